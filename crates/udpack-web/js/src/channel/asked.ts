/** The asker's side of requests (PROTOCOL.md §6): what was asked and has no last word yet. */

import { type Clock, Deferred, handled, type Stop } from '../base/async.js';
import { BacklogError, Fault, TimeoutError, WireError } from '../base/errors.js';
import { Code } from '../wire/codes.js';
import { decodeFault } from '../wire/control.js';
import { isU64, type U64, type WireMessage } from '../wire/message.js';
import { ItemQueue, SendCredit } from './items.js';

/** What a request may say beside its data. */
export interface AskOptions {
  /** Milliseconds until the answer is of no use; 30,000 unless given. It covers the items, too. The peer is told. */
  timeout?: number;
  /** Gives the request up. The peer is told. */
  signal?: AbortSignal;
  /** Items that follow the request, at most 256 KiB ahead of what the peer has taken. */
  items?: Iterable<unknown> | AsyncIterable<unknown>;
}

/** How a channel sends for its requests. */
export interface AskSender {
  readonly clock: Clock;
  /** Makes a frame, and throws `EncodeError` if there is none. */
  frame(event: string, data: unknown, id: U64, deadline?: number): Uint8Array;
  /** Queues a frame when there is room. Rejects when the channel is over. */
  queue(frame: Uint8Array): Promise<void>;
  /** Queues a small frame of the protocol at once. */
  queueNow(frame: Uint8Array): void;
}

export const REQUEST_MS = 30_000;

class Request {
  readonly reply = new Deferred<unknown>();
  readonly items: ItemQueue<unknown>;
  readonly pushes = new SendCredit();
  stop: Stop = () => {};

  constructor(items: ItemQueue<unknown>) {
    this.items = items;
  }
}

export class Asked {
  readonly #sender: AskSender;
  readonly #open = new Map<U64, Request>();
  #nextId = 0;

  constructor(sender: AskSender) {
    this.#sender = sender;
  }

  /** Requests that wait for an answer. */
  get size(): number {
    return this.#open.size;
  }

  /** Sends a request. `reply` and `items` end together; whichever nobody looks at is never an unhandled rejection. */
  ask(event: string, data: unknown, options: AskOptions): { reply: Promise<unknown>; items: ItemQueue<unknown> } {
    const { timeout = REQUEST_MS, signal } = options;
    const id = this.#nextId;
    const deadline = Number.isFinite(timeout) ? Math.max(0, Math.ceil(timeout)) : undefined;
    const frame = this.#sender.frame(event, data, id, deadline);
    this.#nextId += 1;
    const items = new ItemQueue<unknown>(
      this.#sender.clock,
      (bytes) => this.#sender.queueNow(this.#sender.frame('$credit', bytes, id)),
      () => this.#cancel(id, new Fault('cancelled', 'the answer is no longer wanted')),
    );
    const request = new Request(items);
    const stops: Stop[] = [];
    request.stop = () => {
      for (const stop of stops) {
        stop();
      }
    };
    this.#open.set(id, request);
    if (deadline !== undefined) {
      stops.push(this.#sender.clock.after(deadline, () => this.#cancel(id, new TimeoutError(event))));
    }
    if (signal) {
      const abort = (): void => this.#cancel(id, signal.reason);
      if (signal.aborted) {
        this.#over(id, signal.reason);
        return { reply: request.reply.promise, items };
      }
      signal.addEventListener('abort', abort, { once: true });
      stops.push(() => signal.removeEventListener('abort', abort));
    }
    void this.#send(id, request, frame, options.items);
    return { reply: request.reply.promise, items };
  }

  /** A `$reply`, `$fault`, `$item` or `$want` has come, in a frame of `size` bytes. */
  take(message: WireMessage, size: number): void {
    const { event, data } = message;
    const id = needId(message);
    const fault = event === '$fault' ? decodeFault(message) : undefined;
    if (event === '$want' && !isU64(data)) {
      throw new WireError(Code.BAD_MESSAGE, '$want: its data is an integer from 0');
    }
    const request = this.#open.get(id);
    if (request === undefined) {
      return;
    }
    if (event === '$item') {
      request.items.push(data, size);
    } else if (event === '$want') {
      request.pushes.give(data as U64);
    } else if (fault) {
      this.#over(id, new Fault(fault.fault, fault.message, fault.data));
    } else {
      this.#close(id);
      request.items.end();
      request.reply.resolve(data);
    }
  }

  /** Nobody reads what came before the answers, and there is no room for more. */
  backlog(): void {
    for (const id of [...this.#open.keys()]) {
      this.#cancel(id, new BacklogError());
    }
  }

  /** The channel is over. */
  fail(error: unknown): void {
    for (const id of [...this.#open.keys()]) {
      this.#over(id, error);
    }
  }

  async #send(id: U64, request: Request, frame: Uint8Array, pushes: AskOptions['items']): Promise<void> {
    try {
      await this.#sender.queue(frame);
      if (pushes === undefined) {
        return;
      }
      for await (const item of pushes) {
        const push = this.#sender.frame('$push', item, id);
        if (!(await request.pushes.spend(push.length))) {
          return;
        }
        await this.#sender.queue(push);
      }
      if (this.#open.has(id)) {
        await this.#sender.queue(this.#sender.frame('$end', null, id));
      }
    } catch (error) {
      this.#cancel(id, error);
    }
  }

  #cancel(id: U64, error: unknown): void {
    if (this.#open.has(id)) {
      this.#over(id, error);
      handled(this.#sender.queue(this.#sender.frame('$cancel', null, id)));
    }
  }

  #over(id: U64, error: unknown): void {
    const request = this.#close(id);
    request?.items.end(error);
    request?.reply.reject(error);
  }

  #close(id: U64): Request | undefined {
    const request = this.#open.get(id);
    this.#open.delete(id);
    request?.stop();
    request?.pushes.end();
    return request;
  }
}

/** @throws {WireError} `bad_message`. */
export function needId(message: WireMessage): U64 {
  if (message.id === undefined) {
    throw new WireError(Code.BAD_MESSAGE, `${message.event} needs an id`);
  }
  return message.id;
}

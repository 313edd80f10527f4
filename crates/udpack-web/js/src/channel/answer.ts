/** The answerer's side of one request (PROTOCOL.md §6): its deadline, its items both ways, its one last word. */

import { type Stop } from '../base/async.js';
import { EncodeError, Fault } from '../base/errors.js';
import { reportError } from '../base/emitter.js';
import { Code, sendable } from '../wire/codes.js';
import { type U64 } from '../wire/message.js';
import { type AskSender } from './asked.js';
import { ItemQueue, SendCredit } from './items.js';

/** How long a handler may take for a request without a deadline, and for each item that it takes. */
export const HANDLER_MS = 30_000;

export class Answer {
  readonly id: U64;
  readonly event: string;
  /** What the request carries. */
  readonly items: ItemQueue<unknown>;
  /** For the items of the answer. */
  readonly credit = new SendCredit();
  readonly #sender: AskSender;
  readonly #onOver: () => void;
  readonly #controller = new AbortController();
  readonly #stopDeadline: Stop | undefined;
  #stopPatience: Stop | undefined;
  #isOver = false;

  constructor(sender: AskSender, id: U64, event: string, deadline: number | undefined, onOver: () => void) {
    this.#sender = sender;
    this.id = id;
    this.event = event;
    this.#onOver = onOver;
    this.items = new ItemQueue<unknown>(
      sender.clock,
      (bytes) => {
        this.begin();
        sender.queueNow(sender.frame('$want', bytes, id));
      },
      () => {},
    );
    if (deadline !== undefined) {
      this.#stopDeadline = sender.clock.after(deadline, () => this.#timeout());
    }
  }

  /** Aborted when the asker lets go, the time is over, or the channel ends. */
  get signal(): AbortSignal {
    return this.#controller.signal;
  }

  get over(): boolean {
    return this.#isOver;
  }

  /** A handler takes it up, or has taken an item: its own time begins, anew. */
  begin(): void {
    if (!this.#isOver) {
      this.#stopPatience?.();
      this.#stopPatience = this.#sender.clock.after(HANDLER_MS, () => this.#timeout());
    }
  }

  /** The last word. A reply that cannot be sent becomes a fault. */
  async reply(data: unknown): Promise<void> {
    if (!this.#isOver) {
      await this.#last(this.#frame('$reply', data));
    }
  }

  /** One item of the answer. False when nobody wants more. */
  async item(data: unknown): Promise<boolean> {
    const frame = this.#frame('$item', data);
    if (this.#isOver || !(await this.credit.spend(frame.length))) {
      return false;
    }
    await this.#sender.queue(frame);
    return !this.#isOver;
  }

  /** The last word. An error that is no `Fault` becomes `internal`, without details for the peer. */
  async fault(error: unknown): Promise<void> {
    if (this.#isOver) {
      return;
    }
    if (!(error instanceof Fault)) {
      reportError(error);
    }
    const fault = error instanceof Fault ? error : new Fault('internal', 'the handler failed');
    let frame: Uint8Array;
    try {
      frame = this.#sender.frame('$fault', { code: fault.fault, message: sendable(fault.message, 256), data: fault.data }, this.id);
    } catch (unsent) {
      reportError(unsent);
      frame = this.#sender.frame('$fault', { code: 'internal', message: 'the handler failed' }, this.id);
    }
    await this.#last(frame);
  }

  /** The asker has let go. */
  cancel(): void {
    void this.#end(new Fault('cancelled', 'cancelled by the asker'));
  }

  /** The channel is over: nobody can be answered. */
  abandon(error: unknown): void {
    if (!this.#isOver) {
      this.#close(error);
    }
  }

  #timeout(): void {
    void this.#end(new Fault('timeout', 'the handler took longer than it may'));
  }

  async #end(fault: Fault): Promise<void> {
    if (this.#isOver) {
      return;
    }
    const frame = this.#sender.frame('$fault', { code: fault.fault, message: fault.message }, this.id);
    this.#close(fault);
    await this.#sender.queue(frame).catch(() => {});
  }

  async #last(frame: Uint8Array): Promise<void> {
    this.#close(undefined);
    // When the channel is over there is nobody to tell.
    await this.#sender.queue(frame).catch(() => {});
  }

  #close(error: unknown): void {
    this.#isOver = true;
    this.#stopDeadline?.();
    this.#stopPatience?.();
    this.credit.end();
    this.items.abort(error);
    this.#onOver();
    if (error !== undefined) {
      this.#controller.abort(error);
    }
  }

  #frame(event: string, data: unknown): Uint8Array {
    try {
      return this.#sender.frame(event, data, this.id);
    } catch (error) {
      if (error instanceof EncodeError && error.code === Code.FRAME_TOO_LARGE) {
        throw new Fault('reply_too_large', error.message);
      }
      throw error;
    }
  }
}

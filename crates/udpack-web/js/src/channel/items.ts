/** Streams of items with credit (PROTOCOL.md §6): `$item` of an answer, `$push` of a request. */

import { type Clock, Signal, type Stop } from '../base/async.js';
import { WireError } from '../base/errors.js';
import { Code } from '../wire/codes.js';
import { Inbox } from './inbox.js';

/** Bytes of whole frames that may be outstanding. */
export const CREDIT = 262_144;
/** Credit that is less than half is given back after so long without another item. */
const GATHER_MS = 5;

/** The sender's side: waits until the receiver has taken enough. */
export class SendCredit {
  #outstanding = 0;
  #over = false;
  readonly #changed = new Signal();

  /** Waits until a frame of `size` bytes may go. False when the stream is over. */
  async spend(size: number): Promise<boolean> {
    while (!this.#over && this.#outstanding > 0 && this.#outstanding + size > CREDIT) {
      await this.#changed.wait();
    }
    this.#outstanding += size;
    return !this.#over;
  }

  give(bytes: number | bigint): void {
    this.#outstanding = Math.max(0, this.#outstanding - Number(bytes));
    this.#changed.wake();
  }

  end(): void {
    this.#over = true;
    this.#changed.wake();
  }
}

/** The receiver's side: items that wait, and the credit that is given back as they are taken. */
export class ItemQueue<T> implements AsyncIterableIterator<T> {
  readonly #inbox = new Inbox<{ data: T; size: number }>({ bytes: CREDIT, messages: CREDIT });
  readonly #clock: Clock;
  readonly #giveBack: (bytes: number) => void;
  readonly #onLeave: () => void;
  #outstanding = 0;
  #taken = 0;
  #stop: Stop | undefined;
  #failure: unknown;
  #over = false;

  /** `giveBack` tells the sender; `onLeave` is called when the reader leaves before the end. */
  constructor(clock: Clock, giveBack: (bytes: number) => void, onLeave: () => void) {
    this.#clock = clock;
    this.#giveBack = giveBack;
    this.#onLeave = onLeave;
  }

  /**
   * Takes in an item of a frame of `size` bytes.
   *
   * @throws {WireError} `backlog` when the sender has more outstanding than it may.
   */
  push(data: T, size: number): void {
    if (this.#over) {
      return;
    }
    if (this.#outstanding > 0 && this.#outstanding + size > CREDIT) {
      throw new WireError(Code.BACKLOG, 'more items outstanding than their credit');
    }
    this.#outstanding += size;
    this.#inbox.push({ data, size }, size);
  }

  /** Nothing more comes; with an error, that is thrown behind what is there. */
  end(failure?: unknown): void {
    if (!this.#over) {
      this.#over = true;
      this.#failure = failure;
      this.#stop?.();
      this.#inbox.end();
    }
  }

  /** As `end`, and what is there is not handed out either. */
  abort(failure: unknown): void {
    this.#inbox.clear();
    this.end(failure);
  }

  async next(): Promise<IteratorResult<T, undefined>> {
    const entry = await this.#inbox.take();
    if (entry === undefined) {
      if (this.#failure !== undefined) {
        const failure = this.#failure;
        this.#failure = undefined;
        throw failure;
      }
      return { done: true, value: undefined };
    }
    if (!this.#over) {
      this.#taken += entry.size;
      this.#stop?.();
      if (this.#taken >= CREDIT / 2) {
        this.#give();
      } else {
        this.#stop = this.#clock.after(GATHER_MS, () => this.#give());
      }
    }
    return { done: false, value: entry.data };
  }

  async return(): Promise<IteratorResult<T, undefined>> {
    if (!this.#over) {
      this.abort(undefined);
      this.#onLeave();
    }
    return { done: true, value: undefined };
  }

  [Symbol.asyncIterator](): this {
    return this;
  }

  #give(): void {
    const bytes = this.#taken;
    if (bytes > 0 && !this.#over) {
      this.#taken = 0;
      this.#outstanding -= bytes;
      this.#giveBack(bytes);
    }
  }
}

/** What has come and the application has not taken: bounded, so that a slow application slows its peer. */

import { Signal } from '../base/async.js';

export interface InboxLimits {
  readonly bytes: number;
  readonly messages: number;
}

interface Entry<T> {
  readonly value: T;
  readonly size: number;
}

export class Inbox<T> {
  readonly #limits: InboxLimits;
  #entries: Entry<T>[] = [];
  #head = 0;
  #held = 0;
  #ended = false;
  /** Wakes when there is more, more room, or the end. */
  readonly changed = new Signal();

  constructor(limits: InboxLimits) {
    this.#limits = limits;
  }

  get length(): number {
    return this.#entries.length - this.#head;
  }

  get hasRoom(): boolean {
    return this.#held < this.#limits.bytes && this.length < this.#limits.messages;
  }

  /** Adds what has come, whatever there is room for: `hasRoom` is the caller's to ask. */
  push(value: T, size: number): void {
    if (!this.#ended) {
      this.#entries.push({ value, size });
      this.#held += size;
      this.changed.wake();
    }
  }

  /** The oldest, if there is one. */
  shift(): T | undefined {
    const entry = this.#entries[this.#head];
    if (entry === undefined) {
      return undefined;
    }
    this.#head += 1;
    this.#held -= entry.size;
    if (this.#head >= 64 && this.#head * 2 >= this.#entries.length) {
      this.#entries = this.#entries.slice(this.#head);
      this.#head = 0;
    }
    this.changed.wake();
    return entry.value;
  }

  /** The oldest; `undefined` when everything is taken and nothing more comes. */
  async take(): Promise<T | undefined> {
    while (true) {
      const value = this.shift();
      if (value !== undefined || this.#ended) {
        return value;
      }
      await this.changed.wait();
    }
  }

  /** Nothing more comes. What is there can still be taken. */
  end(): void {
    this.#ended = true;
    this.changed.wake();
  }

  /** Forgets what is there. */
  clear(): void {
    this.#entries = [];
    this.#head = 0;
    this.#held = 0;
    this.changed.wake();
  }
}

/** What an application takes from a channel. */

import { UsageError } from '../base/errors.js';
import { type Gap } from '../wire/control.js';
import { type Answer } from './answer.js';

/** A message that came on a channel: an event, a request, or a gap. */
export class Message<Event extends string = string, Data = unknown> {
  readonly event: Event;
  readonly data: Data;
  /** Bytes of its frame. */
  readonly size: number;
  /** On `$gap`: so many messages of a room are missing here. */
  readonly gap: Gap | undefined;
  readonly #answer: Answer | undefined;

  constructor(event: Event, data: Data, size: number, answer?: Answer, gap?: Gap) {
    this.event = event;
    this.data = data;
    this.size = size;
    this.#answer = answer;
    this.gap = gap;
  }

  /** Whether the peer waits for `reply` or `fault`. */
  get isRequest(): boolean {
    return this.#answer !== undefined;
  }

  /** Aborted when the asker lets go, its deadline is over, or the channel ends. Never for a plain event. */
  get signal(): AbortSignal {
    return this.#answer?.signal ?? never;
  }

  /** The items that the request carries, in order. Ends with the request. */
  get items(): AsyncIterableIterator<unknown> {
    return this.#asked().items;
  }

  /** One item of the answer, before the reply. Waits while the asker is 256 KiB behind; false when it wants no more. */
  item(data: unknown): Promise<boolean> {
    return this.#asked().item(data);
  }

  /** The answer. Does nothing when the request is over already. */
  reply(data?: unknown): Promise<void> {
    return this.#asked().reply(data);
  }

  /** Why there is no answer: a `Fault`, or any error, which the peer hears of as `internal`. */
  fault(error: unknown): Promise<void> {
    return this.#asked().fault(error);
  }

  #asked(): Answer {
    if (this.#answer === undefined) {
      throw new UsageError(`${this.event} is no request`);
    }
    return this.#answer;
  }
}

const never = new AbortController().signal;

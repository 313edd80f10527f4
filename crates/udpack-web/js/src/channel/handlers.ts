/** Handlers by event: messages of one channel are begun in order, and so many run at once. */

import { Signal } from '../base/async.js';
import { reportError } from '../base/emitter.js';
import { Fault } from '../base/errors.js';
import { type Message } from './message.js';

/** Gets the data, and the message with its signal and items. What it returns or throws answers a request. */
export type Handler = (data: never, message: Message) => unknown;

export class Handlers {
  readonly #byEvent = new Map<string, Handler>();
  #running = 0;
  readonly #changed = new Signal();
  /** How many run at once. */
  concurrency = 1;
  /** Events that nobody handles and handlers of plain events that failed. */
  dropped = 0;

  on(event: string, handler: Handler): void {
    this.#byEvent.set(event, handler);
  }

  /** Runs until `next` gives nothing more, and what was begun is over. */
  async run(next: () => Promise<Message | undefined>): Promise<void> {
    for (let message = await next(); message; message = await next()) {
      this.#running += 1;
      void this.#handle(message).finally(() => {
        this.#running -= 1;
        this.#changed.wake();
      });
      await this.#until(() => this.#running < Math.max(1, this.concurrency));
    }
    await this.#until(() => this.#running === 0);
  }

  async #until(met: () => boolean): Promise<void> {
    while (!met()) {
      await this.#changed.wait();
    }
  }

  async #handle(message: Message): Promise<void> {
    const handler = this.#byEvent.get(message.event);
    if (!message.isRequest) {
      if (handler === undefined) {
        this.dropped += 1;
        return;
      }
      try {
        await handler((message.gap ?? message.data) as never, message);
      } catch (error) {
        this.dropped += 1;
        reportError(error);
      }
      return;
    }
    if (handler === undefined) {
      return message.fault(new Fault('no_handler', 'no handler for this event'));
    }
    // A handler that does not look at its signal must not hold the channel up: its end is the request's.
    const gone = new Promise<void>((resolve) => {
      if (message.signal.aborted) resolve();
      message.signal.addEventListener('abort', () => resolve(), { once: true });
    });
    await Promise.race([this.#answer(handler, message), gone]);
  }

  async #answer(handler: Handler, message: Message): Promise<void> {
    try {
      const result = await handler(message.data as never, message);
      if (isAsyncIterable(result)) {
        for await (const item of result) {
          if (!(await message.item(item))) {
            return;
          }
        }
        await message.reply(null);
      } else {
        await message.reply(result);
      }
    } catch (error) {
      await message.fault(error);
    }
  }
}

function isAsyncIterable(value: unknown): value is AsyncIterable<unknown> {
  return value !== null && typeof value === 'object' && Symbol.asyncIterator in value;
}

/** So many a second, and twice as many at once. */

import { type Clock } from '../base/async.js';

export class Rate {
  readonly #clock: Clock;
  readonly #perSecond: number;
  #left: number;
  #at: number;

  constructor(clock: Clock, perSecond: number) {
    this.#clock = clock;
    this.#perSecond = perSecond;
    this.#left = 2 * perSecond;
    this.#at = clock.now();
  }

  /** Takes one, and says in how many milliseconds it is due. */
  take(): number {
    const now = this.#clock.now();
    this.#left = Math.min(2 * this.#perSecond, this.#left + ((now - this.#at) / 1000) * this.#perSecond) - 1;
    this.#at = now;
    return this.#left >= 0 ? 0 : (-this.#left / this.#perSecond) * 1000;
  }
}

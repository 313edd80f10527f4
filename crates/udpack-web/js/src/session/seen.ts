/** Numbers of the channels that the peer has opened in a session: one that is over must not be taken for a new one. */

import { type U64 } from '../wire/message.js';

/** Numbers out of order that are kept apart. An opener counts on by one. */
const APART = 1024;

export class Seen {
  /** Everything up to this was seen, or is taken to have been. */
  #upTo = -1n;
  readonly #apart = new Set<bigint>();

  has(id: U64): boolean {
    return BigInt(id) <= this.#upTo || this.#apart.has(BigInt(id));
  }

  add(id: U64): void {
    if (this.has(id)) {
      return;
    }
    this.#apart.add(BigInt(id));
    if (this.#upTo < 0n && BigInt(id) <= 1n) {
      // Openers count up from 0 or 1.
      this.#upTo = BigInt(id);
    }
    if (this.#apart.size > APART) {
      this.#upTo = [...this.#apart].reduce((least, each) => (each < least ? each : least));
    }
    for (const each of this.#apart) {
      if (each <= this.#upTo) {
        this.#apart.delete(each);
      }
    }
    while (this.#apart.delete(this.#upTo + 1n)) {
      this.#upTo += 1n;
    }
  }
}

/** A map of the protocol, read strictly: types are exact, nil is absent, and keys are those of its table. */

import { WireError } from '../base/errors.js';
import { Code } from './codes.js';
import { isU64, type U64 } from './message.js';

export class Fields {
  readonly #event: string;
  readonly #map: Record<string, unknown>;

  /** @throws {WireError} `bad_message` for anything but a map whose keys are text and occur once. */
  constructor(event: string, data: unknown) {
    this.#event = event;
    if (data === null || typeof data !== 'object' || Object.getPrototypeOf(data) !== Object.prototype) {
      throw this.bad('its data is a map with keys that occur once');
    }
    this.#map = data as Record<string, unknown>;
  }

  only(...allowed: string[]): void {
    for (const key of Object.keys(this.#map)) {
      if (!allowed.includes(key)) {
        throw this.bad(`a key that it does not have: ${key}`);
      }
    }
  }

  has(key: string): boolean {
    return this.raw(key) !== undefined;
  }

  /** The field as it is; `undefined` when it is absent or nil. */
  raw(key: string): unknown {
    return Object.hasOwn(this.#map, key) ? (this.#map[key] ?? undefined) : undefined;
  }

  u64(key: string): U64 {
    return this.#required(key, this.optU64(key));
  }

  optU64(key: string): U64 | undefined {
    return this.#typed(key, isU64);
  }

  text(key: string): string {
    return this.#required(key, this.optText(key));
  }

  optText(key: string): string | undefined {
    return this.#typed(key, (value) => typeof value === 'string');
  }

  optBool(key: string): boolean | undefined {
    return this.#typed(key, (value) => typeof value === 'boolean');
  }

  bool(key: string): boolean {
    return this.#required(key, this.optBool(key));
  }

  optBin(key: string): Uint8Array | undefined {
    return this.#typed(key, (value) => value instanceof Uint8Array);
  }

  list(key: string): unknown[] {
    return this.#required(key, this.#typed(key, (value): value is unknown[] => Array.isArray(value)));
  }

  optMap(key: string): Fields | undefined {
    const value = this.raw(key);
    return value === undefined ? undefined : new Fields(this.#event, value);
  }

  subMap(key: string): Fields {
    return this.#required(key, this.optMap(key));
  }

  bad(rule: string): WireError {
    return new WireError(Code.BAD_MESSAGE, `${this.#event}: ${rule}`);
  }

  #typed<T>(key: string, is: (value: unknown) => value is T): T | undefined {
    const value = this.raw(key);
    if (value !== undefined && !is(value)) {
      throw this.bad(`${key} is of another type`);
    }
    return value as T | undefined;
  }

  #required<T>(key: string, value: T | undefined): T {
    if (value === undefined) {
      throw this.bad(`${key} is missing`);
    }
    return value;
  }
}

/**
 * msgpack as PROTOCOL.md §4 wants it.
 *
 * Reading checks and builds in one pass, because the check must see every byte anyway. Writing hands a copy of
 * the value, in which only what the encoder writes exactly is left, to `@msgpack/msgpack`.
 */

import { Encoder, ExtData } from '@msgpack/msgpack';
import { EncodeError, WireError } from '../base/errors.js';
import { Code } from './codes.js';

/** Arrays and maps inside each other, the message's own array included. */
export const MAX_DEPTH = 32;
/** Values of a message: each number, text, key, list, map and binary value counts one. */
export const MAX_ELEMENTS = 65_536;

/** A msgpack timestamp, by its 4, 8 or 12 bytes: a `Date` has no nanoseconds. */
export class Timestamp {
  readonly bytes: Uint8Array;

  constructor(bytes: Uint8Array) {
    this.bytes = bytes;
  }

  /** To the millisecond; an invalid date for a time that a `Date` cannot hold. */
  date(): Date {
    const view = new DataView(this.bytes.buffer, this.bytes.byteOffset, this.bytes.byteLength);
    let seconds: number;
    let nanos = 0;
    if (view.byteLength === 4) {
      seconds = view.getUint32(0);
    } else if (view.byteLength === 8) {
      const both = view.getBigUint64(0);
      nanos = Number(both >> 34n);
      seconds = Number(both & 0x3_ffff_ffffn);
    } else {
      nanos = view.getUint32(0);
      seconds = Number(view.getBigInt64(4));
    }
    return new Date(seconds * 1000 + Math.floor(nanos / 1e6));
  }
}

/** A float where the reader is asked to tell floats from integers, which a JavaScript number does not. */
export class Float {
  readonly value: number;

  constructor(value: number) {
    this.value = value;
  }
}

function broken(rule: string): WireError {
  return new WireError(Code.BAD_MSGPACK, rule);
}

const utf8 = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true });

/**
 * Reads values out of one body. Binary values are copies: they keep neither the body nor a transport's buffer.
 *
 * Integers beyond ±2^53 become `bigint`, all others `number`. A map becomes a plain object when its keys are
 * different strings and none is `__proto__`, otherwise a `Map`, where a repeated key keeps its last value.
 */
export class Reader {
  readonly #bytes: Uint8Array;
  readonly #view: DataView;
  #at = 0;
  #elements = 0;
  /** Whether floats come as {@link Float}. */
  tellFloats = false;

  constructor(bytes: Uint8Array) {
    this.#bytes = bytes;
    this.#view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  }

  /** The number of items if an array comes next, which is then entered; otherwise nothing moves. */
  enterArray(): number | undefined {
    const head = this.#bytes[this.#at];
    if (head === undefined || !((head >= 0x90 && head <= 0x9f) || head === 0xdc || head === 0xdd)) {
      return undefined;
    }
    this.#element();
    this.#at += 1;
    const count = head <= 0x9f ? head & 0x0f : head === 0xdc ? this.#uint(2) : this.#uint(4);
    this.#fits(count);
    return count;
  }

  /** The body must be over. */
  finish(): void {
    if (this.#at !== this.#bytes.length) {
      throw broken('something follows the value');
    }
  }

  /** The next value, `depth` arrays or maps inside others. */
  value(depth = 0): unknown {
    this.#element();
    const head = this.#uint(1);
    if (head <= 0x7f) return head;
    if (head <= 0x8f) return this.#map(head & 0x0f, depth + 1);
    if (head <= 0x9f) return this.#array(head & 0x0f, depth + 1);
    if (head <= 0xbf) return this.#text(head & 0x1f);
    if (head >= 0xe0) return head - 0x100;
    switch (head) {
      case 0xc0:
        return null;
      case 0xc2:
        return false;
      case 0xc3:
        return true;
      case 0xc4:
        return this.#take(this.#uint(1)).slice();
      case 0xc5:
        return this.#take(this.#uint(2)).slice();
      case 0xc6:
        return this.#take(this.#uint(4)).slice();
      case 0xc7:
        return this.#timestamp(this.#uint(1));
      case 0xc8:
        return this.#timestamp(this.#uint(2));
      case 0xc9:
        return this.#timestamp(this.#uint(4));
      case 0xca:
        return this.#float(this.#step(4, (at) => this.#view.getFloat32(at)));
      case 0xcb:
        return this.#float(this.#step(8, (at) => this.#view.getFloat64(at)));
      case 0xcc:
        return this.#uint(1);
      case 0xcd:
        return this.#uint(2);
      case 0xce:
        return this.#uint(4);
      case 0xcf:
        return narrow(this.#step(8, (at) => this.#view.getBigUint64(at)));
      case 0xd0:
        return this.#step(1, (at) => this.#view.getInt8(at));
      case 0xd1:
        return this.#step(2, (at) => this.#view.getInt16(at));
      case 0xd2:
        return this.#step(4, (at) => this.#view.getInt32(at));
      case 0xd3:
        return narrow(this.#step(8, (at) => this.#view.getBigInt64(at)));
      case 0xd6:
        return this.#timestamp(4);
      case 0xd7:
        return this.#timestamp(8);
      case 0xd9:
        return this.#text(this.#uint(1));
      case 0xda:
        return this.#text(this.#uint(2));
      case 0xdb:
        return this.#text(this.#uint(4));
      case 0xdc:
        return this.#array(this.#uint(2), depth + 1);
      case 0xdd:
        return this.#array(this.#uint(4), depth + 1);
      case 0xde:
        return this.#map(this.#uint(2), depth + 1);
      case 0xdf:
        return this.#map(this.#uint(4), depth + 1);
      default:
        throw broken('a byte that begins no accepted value');
    }
  }

  #element(): void {
    this.#elements += 1;
    if (this.#elements > MAX_ELEMENTS) {
      throw broken('too many values');
    }
  }

  /** Every item takes at least one byte. */
  #fits(items: number): void {
    if (items > this.#bytes.length - this.#at) {
      throw broken('a length beyond the end');
    }
  }

  #step<T>(size: number, read: (at: number) => T): T {
    this.#fits(size);
    const value = read(this.#at);
    this.#at += size;
    return value;
  }

  #uint(size: 1 | 2 | 4): number {
    return this.#step(size, (at) =>
      size === 1 ? this.#view.getUint8(at) : size === 2 ? this.#view.getUint16(at) : this.#view.getUint32(at),
    );
  }

  #take(size: number): Uint8Array {
    this.#fits(size);
    this.#at += size;
    return this.#bytes.subarray(this.#at - size, this.#at);
  }

  #float(value: number): number | Float {
    return this.tellFloats ? new Float(value) : value;
  }

  #text(size: number): string {
    try {
      return utf8.decode(this.#take(size));
    } catch (error) {
      throw error instanceof WireError ? error : broken('text that is not UTF-8');
    }
  }

  #timestamp(size: number): Timestamp {
    if (this.#step(1, (at) => this.#view.getInt8(at)) !== -1 || (size !== 4 && size !== 8 && size !== 12)) {
      throw broken('an extension that is no timestamp');
    }
    return new Timestamp(this.#take(size).slice());
  }

  #array(count: number, depth: number): unknown[] {
    this.#nested(depth);
    this.#fits(count);
    const items: unknown[] = [];
    for (let i = 0; i < count; i += 1) {
      items.push(this.value(depth));
    }
    return items;
  }

  #map(count: number, depth: number): Record<string, unknown> | Map<unknown, unknown> {
    this.#nested(depth);
    this.#fits(2 * count);
    const pairs: [unknown, unknown][] = [];
    const keys = new Set<unknown>();
    for (let i = 0; i < count; i += 1) {
      const key = this.value(depth);
      if (typeof key === 'string' && key !== '__proto__') {
        keys.add(key);
      }
      pairs.push([key, this.value(depth)]);
    }
    return keys.size === count ? Object.fromEntries(pairs) : new Map(pairs);
  }

  #nested(depth: number): void {
    if (depth > MAX_DEPTH) {
      throw broken('too deep');
    }
  }
}

function narrow(value: bigint): number | bigint {
  const number = Number(value);
  return Number.isSafeInteger(number) ? number : value;
}

const encoder = new Encoder({ useBigInt64: true, maxDepth: MAX_DEPTH + 1 });

/**
 * One msgpack value as bytes. `undefined` is nil, and a field that is `undefined` is left out.
 *
 * @throws {EncodeError} For what has no exact form: functions, symbols, integers beyond 64 bits, text with half
 * a surrogate pair, a `Map` with other keys than text, more than 32 levels or 65,536 values.
 */
export function encode(value: unknown): Uint8Array {
  const count = { elements: 0 };
  // A view of the encoder's own buffer: the caller copies it before the next call.
  return encoder.encodeSharedRef(exact(value, 0, count));
}

function refuse(rule: string): never {
  throw new EncodeError(rule);
}

/** A copy of `value` that the encoder writes exactly and in the shortest form. */
function exact(value: unknown, depth: number, count: { elements: number }): unknown {
  count.elements += 1;
  if (count.elements > MAX_ELEMENTS) {
    refuse(`a message has at most ${MAX_ELEMENTS} values`);
  }
  switch (typeof value) {
    case 'undefined':
      return null;
    case 'boolean':
      return value;
    case 'number':
      // The encoder writes integers beyond 32 bits as floats when they are not bigints.
      return Number.isSafeInteger(value) && Math.abs(value) >= 2 ** 31 ? exactInteger(BigInt(value)) : value;
    case 'bigint':
      return exactInteger(value);
    case 'string':
      return wellFormed(value);
    case 'object':
      return value === null ? null : exactObject(value, depth + 1, count);
    default:
      return refuse(`a ${typeof value} cannot be sent`);
  }
}

function exactInteger(value: bigint): number | bigint {
  if (value > 0xffff_ffff_ffff_ffffn || value < -0x8000_0000_0000_0000n) {
    refuse('an integer has at most 64 bits');
  }
  return value <= 0xffff_ffffn && value >= -0x8000_0000n ? Number(value) : value;
}

function wellFormed(text: string): string {
  // A lone half of a surrogate pair has no UTF-8.
  return /\p{Surrogate}/u.test(text) ? refuse('text with half a surrogate pair cannot be sent') : text;
}

function exactObject(value: object, depth: number, count: { elements: number }): unknown {
  if (value instanceof Uint8Array) {
    return value;
  }
  if (value instanceof ArrayBuffer) {
    return new Uint8Array(value);
  }
  if (ArrayBuffer.isView(value)) {
    return new Uint8Array(value.buffer, value.byteOffset, value.byteLength);
  }
  if (value instanceof Timestamp) {
    return new ExtData(-1, value.bytes);
  }
  if (value instanceof Date) {
    return Number.isNaN(value.getTime()) ? refuse('an invalid date cannot be sent') : value;
  }
  if (depth > MAX_DEPTH) {
    refuse(`a message has at most ${MAX_DEPTH} levels`);
  }
  if (Array.isArray(value)) {
    return Array.from(value, (item) => exact(item, depth, count));
  }
  const pairs = value instanceof Map ? [...value] : Object.entries(value);
  if (!(value instanceof Map) && !isPlain(value)) {
    refuse(`a ${value.constructor.name} cannot be sent`);
  }
  // Without a prototype, so that a field named `__proto__` is a field.
  const copy: Record<string, unknown> = Object.create(null);
  for (const [key, field] of pairs) {
    if (typeof key !== 'string') {
      refuse('the keys of a map must be text');
    }
    if (field !== undefined) {
      count.elements += 1;
      copy[wellFormed(key)] = exact(field, depth, count);
    }
  }
  return copy;
}

/** An object literal, or an instance of an application's class: not a `Set`, a `Promise`, an iterator and the like. */
function isPlain(value: object): boolean {
  return Object.prototype.toString.call(value) === '[object Object]';
}

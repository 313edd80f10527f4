/** Messages (PROTOCOL.md §4) and volatile messages (§7): an event name, data, and what stands behind them. */

import { EncodeError, WireError } from '../base/errors.js';
import { Code } from './codes.js';
import { frameOf, type Memory } from './frame.js';
import { encode, Float, Reader } from './msgpack.js';

/** A u64: a `number` up to 2^53 - 1, a `bigint` above. */
export type U64 = number | bigint;

/** The largest u64; as `received` of an `$ack`: "nothing more of this channel". */
export const U64_MAX = 0xffff_ffff_ffff_ffffn;

/** A message as it came. */
export interface WireMessage {
  readonly event: string;
  readonly data: unknown;
  readonly id?: U64;
  /** Milliseconds from its arrival. */
  readonly deadline?: number;
}

/** A volatile message as it came. */
export interface WireVolatile {
  readonly event: string;
  readonly data: unknown;
  readonly seq?: U64;
  readonly key?: string;
}

/** Protocol events whose data is a map of the protocol, where a float is no integer. */
const TABLES: ReadonlySet<string> = new Set(
  'hello welcome refresh refreshed channels ack passed goaway open resume gap room at mark close credit want'
    .split(' ')
    .map((word) => `$${word}`),
);

function badMessage(rule: string): WireError {
  return new WireError(Code.BAD_MESSAGE, rule);
}

const utf8 = new TextEncoder();

/** Whether `text` may be an event, a channel's or a room's name, or a key: 1 to 128 bytes without control characters. */
export function isName(text: unknown): text is string {
  return (
    typeof text === 'string' &&
    text.length >= 1 &&
    text.length <= 128 &&
    !/[\u0000-\u001f\u007f-\u009f]/.test(text) &&
    utf8.encode(text).length <= 128
  );
}

/** Whether it is an integer from 0 to 2^64 - 1, and was one on the wire. */
export function isU64(value: unknown): value is U64 {
  return (
    (typeof value === 'number' && Number.isSafeInteger(value) && value >= 0) ||
    (typeof value === 'bigint' && value >= 0n && value <= U64_MAX)
  );
}

/** Reads a body whole before it says what is wrong with its shape: bad msgpack counts first. */
function readItems(body: Uint8Array): unknown[] | undefined {
  const reader = new Reader(body);
  reader.tellFloats = true;
  const count = reader.enterArray();
  const items: unknown[] = [];
  if (count === undefined) {
    reader.value();
  } else {
    for (let i = 0; i < count; i += 1) {
      const [event] = items;
      reader.tellFloats = i !== 1 || (typeof event === 'string' && TABLES.has(event));
      const value = reader.value(1);
      if (i < 4) {
        items.push(value);
      }
    }
  }
  reader.finish();
  return count === undefined || count > 4 ? undefined : items;
}

/**
 * Reads a body.
 *
 * @throws {WireError} `bad_msgpack` or `bad_message`.
 */
export function decodeMessage(body: Uint8Array): WireMessage {
  const items = readItems(body);
  if (items === undefined || items.length < 2) {
    throw badMessage('not an array of an event and data');
  }
  const [event, data, id, deadline] = items;
  if (!isName(event)) {
    throw badMessage('an event is text of 1 to 128 bytes without control characters');
  }
  if (items.length === 2) {
    return { event, data };
  }
  if (!isU64(id) || (items.length === 4 && (!isU64(deadline) || event.startsWith('$')))) {
    throw badMessage('id and deadline are integers from 0');
  }
  return items.length === 3 ? { event, data, id } : { event, data, id, deadline: Number(deadline) };
}

/**
 * Reads a volatile message.
 *
 * @throws {WireError} `bad_msgpack` or `bad_message`.
 */
export function decodeVolatile(body: Uint8Array): WireVolatile {
  const items = readItems(body);
  if (items === undefined || items.length < 2) {
    throw badMessage('not an array of an event and data');
  }
  const [event, data, seq, key] = items;
  if (!isName(event) || event.startsWith('$')) {
    throw badMessage('an event is text of 1 to 128 bytes without control characters, and not the protocol\'s');
  }
  if (items.length === 2) {
    return { event, data };
  }
  if (!isU64(seq) || (items.length === 4 && !isName(key))) {
    throw badMessage('seq is an integer from 0, key is text under the rule of an event');
  }
  return items.length === 3 ? { event, data, seq } : { event, data, seq, key: key as string };
}

/**
 * A whole frame with `[event, data]`, `[event, data, id]` or `[event, data, id, deadline]`.
 *
 * @throws {EncodeError} When the data cannot be sent, or is longer than `limit`.
 */
export function encodeFrame(limit: number, event: string, data: unknown, id?: U64, deadline?: number, memory?: Memory): Uint8Array {
  const items = [event, data];
  if (id !== undefined) {
    items.push(id);
  }
  if (deadline !== undefined) {
    items.push(deadline);
  }
  const body = encode(items);
  if (body.length > limit) {
    throw new EncodeError(`the message has ${body.length} bytes, the peer takes ${limit}`, Code.FRAME_TOO_LARGE);
  }
  return frameOf(body, memory);
}

/**
 * The bytes of a volatile message: they have no length before them.
 *
 * @throws {EncodeError} When the data cannot be sent, or is longer than `limit`.
 */
export function encodeVolatile(limit: number, event: string, data: unknown, seq: number, key?: string): Uint8Array {
  const body = encode(key === undefined ? [event, data, seq] : [event, data, seq, key]);
  if (body.length > limit) {
    throw new EncodeError(`the message has ${body.length} bytes, the peer takes ${limit}`, Code.FRAME_TOO_LARGE);
  }
  return body.slice();
}

/**
 * Checks the name of an application's event.
 *
 * @throws {EncodeError}
 */
export function checkEvent(event: string): void {
  if (!isName(event) || event.startsWith('$')) {
    throw new EncodeError('an event has 1 to 128 bytes, no control characters, and does not start with $');
  }
}

/** Takes the marks off floats in a value that was read with them. */
export function plain(value: unknown): unknown {
  if (value instanceof Float) {
    return value.value;
  }
  if (Array.isArray(value)) {
    return value.map(plain);
  }
  if (value instanceof Map) {
    return new Map([...value].map(([key, field]) => [plain(key), plain(field)]));
  }
  if (value !== null && typeof value === 'object' && Object.getPrototypeOf(value) === Object.prototype) {
    return Object.fromEntries(Object.entries(value).map(([key, field]) => [key, plain(field)]));
  }
  return value;
}

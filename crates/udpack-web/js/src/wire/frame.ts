/** Frames (PROTOCOL.md §3): a length of four bytes, and that many bytes of one message. */

import { WireError } from '../base/errors.js';
import { Code } from './codes.js';

/** Bytes before a body. */
export const PREFIX = 4;
/** The largest body a side takes unless it says otherwise, in bytes. */
export const DEFAULT_FRAME = 1_114_112;
/** No side may announce a smaller limit. */
export const MIN_FRAME = 4096;

/** Gives memory for so many bytes, whatever is in it. */
export type Memory = (length: number) => Uint8Array;

/** A whole frame around a body. The body is copied. */
export function frameOf(body: Uint8Array, memory: Memory = (length) => new Uint8Array(length)): Uint8Array {
  const frame = memory(PREFIX + body.length);
  new DataView(frame.buffer).setUint32(0, body.length);
  frame.set(body, PREFIX);
  return frame;
}

/** Cuts a stream into bodies. Holds no more than what has arrived, and at most one body and one chunk. */
export class FrameDecoder {
  readonly #limit: number;
  #chunks: Uint8Array[] = [];
  #held = 0;
  #length: number | undefined;

  constructor(limit: number) {
    this.#limit = limit;
  }

  /** Whether a frame has begun and is not complete. */
  get unfinished(): boolean {
    return this.#held > 0 || this.#length !== undefined;
  }

  /** Takes the next bytes of the stream. They are not changed, and not kept once `next` has given the frames in them. */
  push(chunk: Uint8Array): void {
    if (chunk.length > 0) {
      this.#chunks.push(chunk);
      this.#held += chunk.length;
    }
  }

  /**
   * The next whole body, in memory of its own; `undefined` when more bytes are needed.
   *
   * @throws {WireError} `bad_frame` or `frame_too_large`, as soon as the four bytes of the length are there.
   */
  next(): Uint8Array | undefined {
    if (this.#length === undefined) {
      if (this.#held < PREFIX) {
        return undefined;
      }
      const prefix = this.#take(PREFIX);
      this.#length = new DataView(prefix.buffer).getUint32(0);
      if (this.#length === 0) {
        throw new WireError(Code.BAD_FRAME, 'a frame of length 0');
      }
      if (this.#length > this.#limit) {
        throw new WireError(Code.FRAME_TOO_LARGE, `a frame of ${this.#length} bytes, at most ${this.#limit}`);
      }
    }
    if (this.#held < this.#length) {
      return undefined;
    }
    const body = this.#take(this.#length);
    this.#length = undefined;
    return body;
  }

  /**
   * The stream is over.
   *
   * @throws {WireError} `truncated` inside a frame.
   */
  finish(): void {
    if (this.unfinished) {
      throw new WireError(Code.TRUNCATED, 'the stream ended inside a frame');
    }
  }

  #take(size: number): Uint8Array {
    const bytes = new Uint8Array(size);
    let filled = 0;
    let used = 0;
    while (filled < size) {
      const chunk = this.#chunks[used] as Uint8Array;
      const part = chunk.subarray(0, size - filled);
      bytes.set(part, filled);
      filled += part.length;
      if (part.length < chunk.length) {
        this.#chunks[used] = chunk.subarray(part.length);
      } else {
        used += 1;
      }
    }
    this.#chunks.splice(0, used);
    this.#held -= size;
    return bytes;
  }
}

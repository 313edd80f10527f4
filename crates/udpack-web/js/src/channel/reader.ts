/** Reads one stream frame by frame, and gives an unfinished frame the time of PROTOCOL.md §3. */

import { type Clock, type Stop } from '../base/async.js';
import { WireError } from '../base/errors.js';
import { type ByteReceiver } from '../transport/transport.js';
import { Code } from '../wire/codes.js';
import { FrameDecoder } from '../wire/frame.js';

const HALF_MS = 15_000;
/** A frame that is alive grows by so much in two halves. */
const GROWTH = 30 * 1024;

/** When anything was last read on the connection: a silent path is left to the idle timeout. */
export interface Heard {
  at: number;
}

export class FrameReader {
  readonly #receiver: ByteReceiver;
  readonly #clock: Clock;
  readonly #heard: Heard;
  readonly #decoder: FrameDecoder;
  #arrived = 0;

  constructor(receiver: ByteReceiver, limit: number, clock: Clock, heard: Heard) {
    this.#receiver = receiver;
    this.#clock = clock;
    this.#heard = heard;
    this.#decoder = new FrameDecoder(limit);
  }

  /**
   * The next body; `null` at the orderly end.
   *
   * @throws {WireError} For what is no frame, `StreamEnd` for a reset, `ConnectionEnd`.
   */
  async next(): Promise<Uint8Array | null> {
    let body = this.#decoder.next();
    if (body !== undefined) {
      return body;
    }
    let stop: Stop | undefined;
    const tooSlow = new Promise<never>((_, reject) => {
      stop = this.#watch(() => reject(new WireError(Code.FRAME_TIMEOUT, 'a frame was begun and not completed in time')));
    });
    try {
      while (body === undefined) {
        const chunk = await Promise.race([this.#receiver.read(), tooSlow]);
        this.#heard.at = this.#clock.now();
        if (chunk === null) {
          this.#decoder.finish();
          return null;
        }
        this.#arrived += chunk.length;
        this.#decoder.push(chunk);
        body = this.#decoder.next();
      }
      return body;
    } finally {
      stop?.();
    }
  }

  /** Looks at each half, from when the frame begins: two in a row that count and no growth are too slow. */
  #watch(late: () => void): Stop {
    let from = this.#arrived;
    let halves = 0;
    let begun = this.#clock.now();
    let stop: Stop = () => {};
    const look = (): void => {
      const heard = this.#heard.at >= begun;
      begun = this.#clock.now();
      if (!this.#decoder.unfinished || !heard) {
        halves = 0;
        from = this.#arrived;
      } else if (++halves === 2) {
        if (this.#arrived - from < GROWTH) {
          late();
          return;
        }
        halves = 0;
        from = this.#arrived;
      }
      stop = this.#clock.after(HALF_MS, look);
    };
    stop = this.#clock.after(HALF_MS, look);
    return () => stop();
  }
}

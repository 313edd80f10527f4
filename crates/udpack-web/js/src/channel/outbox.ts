/**
 * What a channel has to send: a bounded queue of frames, written to whatever stream the channel has now.
 *
 * On a resumable channel a frame stays until the peer has confirmed it, and what a lost connection swallowed is
 * written again on the next (PROTOCOL.md §8, "What is counted"). Frames are numbered from 1; the end of the
 * direction counts as one more.
 */

import { Signal } from '../base/async.js';
import { type ByteSender, StreamEnd } from '../transport/transport.js';
import { type U64, U64_MAX } from '../wire/message.js';

/** Small frames go to the transport together, up to so many bytes. */
const GATHER = 64 << 10;
/** Larger frames leave their memory to the next, so much of it. */
const SPARE = 8;

export interface OutboxLimits {
  readonly bytes: number;
  readonly frames: number;
}

export interface OutboxEvents {
  /** The peer has stopped this direction. */
  stopped(code: number): void;
  /** This direction is over and nothing of it need be kept. */
  done(): void;
}

/** The peer says it has what was never sent, or less than it said before. */
export type Told = 'ok' | 'mismatch';

export class Outbox {
  readonly #limits: OutboxLimits;
  readonly #resumable: boolean;
  readonly #on: OutboxEvents;
  #frames: Uint8Array[] = [];
  /** The number of the first frame that is kept. */
  #first = 1;
  /** The number of the next frame to write. */
  #next = 1;
  #held = 0;
  #sender: ByteSender | undefined;
  #endWritten = false;
  #endConfirmed = false;
  #endWanted = false;
  #refusedByPeer = false;
  readonly #spare: ArrayBufferLike[] = [];
  /** Wakes when something was queued, written or confirmed. */
  readonly changed = new Signal();

  constructor(limits: OutboxLimits, resumable: boolean, on: OutboxEvents) {
    this.#limits = limits;
    this.#resumable = resumable;
    this.#on = on;
  }

  /** Memory for a frame: that of a large one which is written, since a browser takes longer to give new memory than to copy. */
  readonly memory = (length: number): Uint8Array => {
    const buffer = length > GATHER ? this.#spare.pop() : undefined;
    return buffer && buffer.byteLength >= length ? new Uint8Array(buffer, 0, length) : new Uint8Array(length);
  };

  /** Bytes that are queued, or written and not confirmed. */
  get bytes(): number {
    return this.#held;
  }

  get hasRoom(): boolean {
    return this.#held < this.#limits.bytes && this.#frames.length < this.#limits.frames;
  }

  /** Whether the end of this direction was asked for. */
  get ended(): boolean {
    return this.#endWanted;
  }

  /** Whether everything is written. */
  get flushed(): boolean {
    return this.#refusedByPeer || (this.#next > this.#sent && (!this.#endWanted || this.#endWritten));
  }

  /** Resolves when everything is written. Stays open when it never is. */
  async untilFlushed(): Promise<void> {
    while (!this.flushed) {
      await this.changed.wait();
    }
  }

  /** Whether this direction is over and nothing of it need be kept. */
  get done(): boolean {
    return this.#refusedByPeer || (this.#endWanted && (this.#resumable ? this.#endConfirmed : this.#endWritten));
  }

  /** How many frames the peer has confirmed. */
  get confirmed(): number {
    return this.#first - 1;
  }

  get #sent(): number {
    return this.#first - 1 + this.#frames.length;
  }

  /** Queues a whole frame, whatever there is room for: `hasRoom` is the caller's to ask. */
  push(frame: Uint8Array): void {
    if (this.#endWanted || this.#refusedByPeer) {
      return;
    }
    this.#frames.push(frame);
    this.#held += frame.length;
    this.changed.wake();
  }

  /** Ends this direction behind what is queued. */
  finish(): void {
    this.#endWanted = true;
    this.changed.wake();
  }

  /** The peer takes nothing more: nothing is kept, sent or waited for. */
  refuse(): void {
    this.#refusedByPeer = true;
    this.#drop(this.#frames.length);
    this.#settle();
  }

  /** The peer has received `received` frames, by `$ack`, or by `$open` or `$resume` on a new stream. */
  told(received: U64, by: 'ack' | 'stream'): Told {
    if (by === 'ack' && received === U64_MAX) {
      this.refuse();
      return 'ok';
    }
    const last = this.#endWanted ? this.#sent + 1 : this.#sent;
    if (this.#refusedByPeer) {
      return 'ok';
    }
    if (received > last) {
      return 'mismatch';
    }
    const count = Number(received);
    if (count < this.confirmed || (this.#endConfirmed && count < last)) {
      return by === 'ack' ? 'ok' : 'mismatch';
    }
    this.#endConfirmed = this.#endWanted && count === last;
    this.#drop(Math.min(count, this.#sent) - this.confirmed);
    this.#settle();
    return 'ok';
  }

  /** Goes on over a stream: everything that is kept is written to it, in order. */
  attach(sender: ByteSender): void {
    this.#sender = sender;
    this.#next = this.#first;
    this.#endWritten = false;
    void this.#pump(sender);
    void sender.stopped.then((code) => this.#stopped(sender, code));
  }

  detach(): void {
    this.#sender = undefined;
    this.changed.wake();
  }

  async #pump(sender: ByteSender): Promise<void> {
    try {
      while (this.#sender === sender) {
        const chunk = this.#gather();
        if (chunk.count > 0) {
          this.#next += chunk.count;
          await sender.write(chunk.bytes);
          if (!this.#resumable && this.#sender === sender) {
            this.#drop(Math.min(chunk.count, this.#frames.length));
            if (chunk.bytes.length > GATHER && this.#spare.length < SPARE) {
              this.#spare.push(chunk.bytes.buffer);
            }
          }
          this.changed.wake();
        } else if (this.#endWanted || this.#refusedByPeer) {
          await sender.finish();
          if (this.#sender === sender) {
            this.#endWritten = true;
            this.#settle();
          }
          return;
        } else {
          await this.changed.wait();
        }
      }
    } catch (error) {
      // A connection that is over is the session's to see: it detaches this, or ends the channel.
      if (error instanceof StreamEnd) {
        this.#stopped(sender, error.code);
      }
    }
  }

  #stopped(sender: ByteSender, code: number): void {
    if (this.#sender !== sender) {
      return;
    }
    this.#sender = undefined;
    const all = this.done;
    this.refuse();
    if (!all) {
      sender.reset(code);
    }
    this.#on.stopped(code);
  }

  #settle(): void {
    this.changed.wake();
    if (this.done) {
      this.#on.done();
    }
  }

  /** What is written next: a frame, or several small ones. */
  #gather(): { bytes: Uint8Array; count: number } {
    const from = this.#next - this.#first;
    let size = 0;
    let count = 0;
    for (let frame = this.#frames[from]; frame; frame = this.#frames[from + count]) {
      if (count > 0 && size + frame.length > GATHER) {
        break;
      }
      size += frame.length;
      count += 1;
    }
    if (count <= 1) {
      return { bytes: this.#frames[from] ?? new Uint8Array(0), count };
    }
    const bytes = new Uint8Array(size);
    let at = 0;
    for (const frame of this.#frames.slice(from, from + count)) {
      bytes.set(frame, at);
      at += frame.length;
    }
    return { bytes, count };
  }

  #drop(count: number): void {
    for (const frame of this.#frames.splice(0, count)) {
      this.#held -= frame.length;
    }
    this.#first += count;
    this.#next = Math.max(this.#next, this.#first);
  }
}

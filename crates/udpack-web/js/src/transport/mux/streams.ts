/** The two directions of a stream over a WebSocket: what waits in them, and how much credit they have. */

import { Deferred, Signal } from '../../base/async.js';
import { type ByteReceiver, type ByteSender } from '../transport.js';
import { type Classes } from './classes.js';
import { FINAL_SIZE, FLOW_CONTROL, MuxFault, PROTOCOL_VIOLATION, type RecordWriter } from './wire.js';

/** A piece of a stream that is shorter is copied out of its record, which is some times as long. */
const WORTH_KEEPING = 8 << 10;

/** What a stream needs of its connection. */
export interface Link {
  readonly classes: Classes;
  readonly over: boolean;
  /** There is data to send on this stream, or its end. */
  schedule(sending: Sending): void;
  /** One of these is to be told to the peer. */
  tell(about: Sending | Receiving): void;
  /** So many bytes were read, or are read by nobody. */
  read(bytes: number): void;
  /** A direction of a stream is over. */
  tidy(id: number): void;
}

export class Sending implements ByteSender {
  readonly id: number;
  readonly priority: number;
  private readonly link: Link;
  private readonly queue: { bytes: Uint8Array; taken: Deferred<void> }[] = [];
  private readonly stop = new Deferred<number>();
  readonly stopped = this.stop.promise;
  /** Bytes that were sent, and how many the peer takes. */
  sent = 0;
  may: number;
  /** It stands in line. */
  queued = false;
  /** Nothing more is written. Resolves when the end is in a record. */
  private ends: Deferred<void> | undefined;
  private endSent = false;
  private resetCode: number | undefined;
  private resetSent = false;
  /** The peer has all of it, the end included. */
  confirmed = false;

  constructor(link: Link, id: number, may: number, priority: number) {
    this.link = link;
    this.id = id;
    this.may = may;
    this.priority = priority;
  }

  /** Bytes that wait for a record. */
  get waiting(): number {
    return this.queue.reduce((sum, { bytes }) => sum + bytes.length, 0);
  }

  /** Nothing more is to be sent on it. */
  get over(): boolean {
    return this.confirmed || this.resetSent;
  }

  /** Its end is still to be sent. */
  get ending(): boolean {
    return this.ends !== undefined && !this.endSent && this.resetCode === undefined;
  }

  get hasWork(): boolean {
    return this.queue.length > 0 ? this.may > this.sent : this.ending;
  }

  /** Resolves when the bytes are in records, so that their memory may be used again. */
  async write(bytes: Uint8Array): Promise<void> {
    const { ConnectionEnd, StreamEnd } = this.link.classes;
    if (this.link.over) {
      throw new ConnectionEnd();
    }
    if (this.resetCode !== undefined || this.ends) {
      throw new StreamEnd(this.resetCode ?? 0);
    }
    if (bytes.length > 0) {
      const taken = new Deferred<void>();
      this.queue.push({ bytes, taken });
      this.link.schedule(this);
      return taken.promise;
    }
  }

  async finish(): Promise<void> {
    const { ConnectionEnd, StreamEnd } = this.link.classes;
    if (this.link.over) {
      throw new ConnectionEnd();
    }
    if (this.resetCode !== undefined) {
      throw new StreamEnd(this.resetCode);
    }
    this.ends ??= new Deferred();
    this.link.schedule(this);
    return this.ends.promise;
  }

  reset(code: number): void {
    if (!this.over && this.resetCode === undefined && !this.link.over) {
      this.fail(new this.link.classes.StreamEnd(code));
      this.resetCode = code;
      this.link.tell(this);
    }
  }

  /** The peer reads no more. */
  stopBy(code: number): void {
    if (!this.over && this.resetCode === undefined) {
      this.stop.resolve(code);
      this.reset(code);
    }
  }

  /** What is waited for does not come about. */
  fail(error: Error): void {
    for (const { taken } of this.queue.splice(0)) {
      taken.reject(error);
    }
    this.ends?.reject(error);
  }

  /** Moves at most so many bytes into a record. Says how many these were, and whether the end is behind them. */
  put(record: RecordWriter, room: number, credit: number): { bytes: number; end: boolean } {
    const { waiting } = this;
    const length = Math.min(waiting, this.may - this.sent, room, credit);
    const end = this.ends !== undefined && length === waiting;
    if (length === 0 && !end) {
      return { bytes: 0, end: false };
    }
    record.stream(this.id, this.sent, length, end);
    for (let left = length; left > 0; ) {
      const first = this.queue[0] as (typeof this.queue)[0];
      record.append(first.bytes.subarray(0, left));
      if (first.bytes.length > left) {
        first.bytes = first.bytes.subarray(left);
        break;
      }
      left -= first.bytes.length;
      first.taken.resolve();
      this.queue.shift();
    }
    this.sent += length;
    if (end) {
      this.endSent = true;
      this.ends?.resolve();
    }
    return { bytes: length, end };
  }

  /** Writes what the peer is to be told. */
  tell(record: RecordWriter): void {
    if (this.resetCode !== undefined && !this.resetSent) {
      record.reset(this.id, this.resetCode, this.sent);
      this.resetSent = true;
      this.link.tidy(this.id);
    }
  }
}

export class Receiving implements ByteReceiver {
  readonly id: number;
  private readonly link: Link;
  private readonly window: number;
  private readonly chunks: Uint8Array[] = [];
  private readonly changed = new Signal();
  private received = 0;
  private taken = 0;
  private told: number;
  private ended = false;
  private resetCode: number | undefined;
  private stopCode: number | undefined;
  private stopTold = false;
  /** Whoever reads knows of the end. */
  private known = false;

  constructor(link: Link, id: number, window: number) {
    this.link = link;
    this.id = id;
    this.window = window;
    this.told = window;
  }

  get over(): boolean {
    return (this.ended || this.resetCode !== undefined) && (this.known || this.stopCode !== undefined);
  }

  async read(): Promise<Uint8Array | null> {
    const { ConnectionEnd, StreamEnd } = this.link.classes;
    while (this.stopCode === undefined) {
      if (this.resetCode !== undefined) {
        this.settle();
        throw new StreamEnd(this.resetCode);
      }
      const chunk = this.chunks.shift();
      if (chunk) {
        this.take(chunk.length);
        return chunk;
      }
      if (this.ended) {
        this.settle();
        return null;
      }
      if (this.link.over) {
        throw new ConnectionEnd();
      }
      await this.changed.wait();
    }
    return null;
  }

  stop(code: number): void {
    if (this.stopCode !== undefined || this.known) {
      return;
    }
    this.stopCode = code;
    this.drop();
    if (this.over) {
      this.link.tidy(this.id);
    } else {
      this.link.tell(this);
    }
  }

  /** Data of the peer. Says how many bytes are new. */
  push(offset: number, data: Uint8Array, end: boolean): void {
    if (this.ended || this.resetCode !== undefined) {
      throw new MuxFault(FINAL_SIZE, 'data behind the end of a stream');
    }
    if (offset !== this.received) {
      throw new MuxFault(PROTOCOL_VIOLATION, 'a gap in a stream');
    }
    this.received += data.length;
    if (this.received > this.told) {
      throw new MuxFault(FLOW_CONTROL, "a stream's window");
    }
    this.ended = end;
    if (this.stopCode !== undefined) {
      this.drop();
      if (end) {
        this.link.tidy(this.id);
      }
    } else if (data.length > 0) {
      this.chunks.push(data.length < WORTH_KEEPING ? data.slice() : data);
    }
    this.changed.wake();
  }

  resetBy(code: number, size: number): void {
    // Peers of this draft may say less than they have sent, but not more: nothing was lost on the way.
    if (size > this.received || (this.ended && size !== this.received)) {
      throw new MuxFault(FINAL_SIZE, "a stream's end has moved");
    }
    if (this.resetCode === undefined && !this.known) {
      this.resetCode = code;
      this.drop();
      this.changed.wake();
      if (this.over) {
        this.link.tidy(this.id);
      }
    }
  }

  /** The connection is over. */
  fail(): void {
    this.changed.wake();
  }

  /** Writes what the peer is to be told. */
  tell(record: RecordWriter): void {
    if (this.ended || this.resetCode !== undefined) {
      return;
    }
    if (this.stopCode === undefined) {
      this.told = this.taken + this.window;
      record.maxStreamData(this.id, this.told);
    } else if (!this.stopTold) {
      this.stopTold = true;
      record.stop(this.id, this.stopCode);
    }
  }

  /** What has come is read by nobody. */
  private drop(): void {
    this.chunks.length = 0;
    this.link.read(this.received - this.taken);
    this.taken = this.received;
    this.changed.wake();
  }

  private take(bytes: number): void {
    this.taken += bytes;
    this.link.read(bytes);
    if (!this.ended && this.taken + this.window - this.told >= this.window / 8) {
      this.link.tell(this);
    }
  }

  private settle(): void {
    if (!this.known) {
      this.known = true;
      this.link.tidy(this.id);
    }
  }
}

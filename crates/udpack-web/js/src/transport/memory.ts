/**
 * Two connections in memory, for tests: what one side sends the other receives, in order, with back-pressure.
 * A link can be cut after any number of bytes, in the middle of a write. Nothing here uses a timer.
 */

import { Signal } from '../base/async.js';
import { CloseReason, Code } from '../wire/codes.js';
import { type BidiStream, type ByteReceiver, type ByteSender, type Connection, ConnectionEnd, StreamEnd } from './transport.js';

/** Bytes that wait unread in one direction of a stream before a write waits. */
const WINDOW = 64 << 10;
const TEXT_BYTES = 1024;

/** One direction of one stream. */
class Pipe implements ByteSender, ByteReceiver {
  private readonly link: MemoryLink;
  private readonly chunks: Uint8Array[] = [];
  private held = 0;
  private ended = false;
  private resetCode: number | undefined;
  private stopCode: number | undefined;
  private stop_!: (code: number) => void;
  readonly stopped = new Promise<number>((resolve) => {
    this.stop_ = resolve;
  });

  constructor(link: MemoryLink) {
    this.link = link;
  }

  async write(bytes: Uint8Array): Promise<void> {
    this.check();
    const taken = this.link.pass(bytes.length);
    // What is sent is a copy: the writer may use its memory again.
    this.chunks.push(bytes.slice(0, taken));
    this.held += taken;
    this.link.changed.wake();
    this.link.cutIfSpent();
    while (this.held >= WINDOW && !this.link.over && this.stopCode === undefined) {
      await this.link.changed.wait();
    }
    this.check();
  }

  async finish(): Promise<void> {
    this.check();
    this.ended = true;
    this.link.changed.wake();
  }

  reset(code: number): void {
    this.resetCode ??= code;
    this.link.changed.wake();
  }

  async read(): Promise<Uint8Array | null> {
    while (true) {
      if (this.stopCode !== undefined) return null;
      if (this.link.over) throw new ConnectionEnd();
      if (this.resetCode !== undefined) throw new StreamEnd(this.resetCode);
      const chunk = this.chunks.shift();
      if (chunk) {
        this.held -= chunk.length;
        this.link.changed.wake();
        return chunk;
      }
      if (this.ended) return null;
      await this.link.changed.wait();
    }
  }

  stop(code: number): void {
    if (this.ended || this.resetCode !== undefined) return;
    this.stopCode ??= code;
    this.stop_(this.stopCode);
    this.link.changed.wake();
  }

  private check(): void {
    if (this.link.over) throw new ConnectionEnd();
    if (this.stopCode !== undefined) throw new StreamEnd(this.stopCode);
  }
}

/** Both ends of one connection. */
export class MemoryLink {
  readonly client: MemoryConnection;
  readonly server: MemoryConnection;
  readonly changed = new Signal();
  /** Bytes that have passed on streams, in both directions. */
  passed = 0;
  over = false;
  private spent = Number.POSITIVE_INFINITY;

  constructor() {
    this.client = new MemoryConnection(this);
    this.server = new MemoryConnection(this);
    this.client.peer = this.server;
    this.server.peer = this.client;
  }

  /** Cuts the path when so many bytes have passed on streams. */
  cutAfter(bytes: number): void {
    this.spent = bytes;
    this.cutIfSpent();
  }

  /** The path is gone: each side finds out by itself. */
  cut(): void {
    this.end(new CloseReason(Code.CONNECTION_LOST, 'the path is gone', 'transport'));
  }

  pass(bytes: number): number {
    const taken = Math.min(bytes, this.spent - this.passed);
    this.passed += taken;
    return taken;
  }

  cutIfSpent(): void {
    if (this.passed >= this.spent) this.cut();
  }

  end(reason: CloseReason, other = reason, by: MemoryConnection = this.client): void {
    if (this.over) return;
    this.over = true;
    by.end(reason);
    by.peer.end(other);
    this.changed.wake();
  }
}

export class MemoryConnection implements Connection {
  peer!: MemoryConnection;
  maxDatagram = 1200;
  /** Loses every datagram while true. */
  losesDatagrams = false;
  private readonly link: MemoryLink;
  private readonly bidi: BidiStream[] = [];
  private readonly uni: ByteReceiver[] = [];
  private readonly datagrams: Uint8Array[] = [];
  end!: (reason: CloseReason) => void;
  readonly closed = new Promise<CloseReason>((resolve) => {
    this.end = resolve;
  });

  constructor(link: MemoryLink) {
    this.link = link;
  }

  async openBidi(): Promise<BidiStream> {
    if (this.link.over) throw new ConnectionEnd();
    const there = new Pipe(this.link);
    const back = new Pipe(this.link);
    this.peer.bidi.push({ send: back, receive: there });
    this.link.changed.wake();
    return { send: there, receive: back };
  }

  acceptBidi(): Promise<BidiStream | null> {
    return this.next(this.bidi);
  }

  async openUni(): Promise<ByteSender> {
    if (this.link.over) throw new ConnectionEnd();
    const pipe = new Pipe(this.link);
    this.peer.uni.push(pipe);
    this.link.changed.wake();
    return pipe;
  }

  acceptUni(): Promise<ByteReceiver | null> {
    return this.next(this.uni);
  }

  async sendDatagram(bytes: Uint8Array): Promise<void> {
    if (this.link.over) throw new ConnectionEnd();
    if (bytes.length <= this.maxDatagram && !this.losesDatagrams) {
      this.peer.datagrams.push(bytes.slice());
      this.link.changed.wake();
    }
  }

  readDatagram(): Promise<Uint8Array | null> {
    return this.next(this.datagrams);
  }

  async finished(): Promise<void> {}

  close(code: number, text: string): void {
    const cut = text.slice(0, TEXT_BYTES);
    this.link.end(new CloseReason(code, cut, 'local'), new CloseReason(code, cut, 'peer'), this);
  }

  private async next<T>(queue: T[]): Promise<T | null> {
    while (true) {
      if (this.link.over) return null;
      const item = queue.shift();
      if (item !== undefined) return item;
      await this.link.changed.wait();
    }
  }
}

/**
 * A connection over a WebSocket, for networks that let no UDP pass (PROTOCOL.md §17): streams with credit of their own,
 * datagrams, an end with code and text. It always reads, so that what nobody reads on one stream holds up no other, and makes
 * the next record only when little waits in the socket, so that what is urgent overtakes the rest.
 */

import { type Clock, Deferred, Signal, type Stop } from '../../base/async.js';
import { type BidiStream, type ByteReceiver, type ByteSender, type Connection, type Mover } from '../transport.js';
import { type CloseReason } from '../../wire/codes.js';
import { type Classes } from './classes.js';
import { type Link, Receiving, Sending } from './streams.js';
import { FINAL_SIZE, FLOW_CONTROL, type Frame, LEAST_RECORD, MuxFault, type Parameters, PROTOCOL_VIOLATION, RECORD, RecordReader, RecordWriter, STREAM_LIMIT, STREAM_STATE } from './wire.js';

/** The part of a WebSocket that is used. */
export interface Socket {
  binaryType: string;
  readonly bufferedAmount: number;
  send(bytes: Uint8Array<ArrayBuffer>): void;
  close(): void;
  addEventListener(type: 'open' | 'message' | 'close' | 'error', listener: (event: { readonly data?: unknown }) => void): void;
}

export interface MuxSettings {
  readonly clock: Clock;
  readonly classes: Classes;
  /** Channels that the server may have open. */
  readonly channels: number;
}

/** What the client permits: unread bytes of one stream; streams beside the channels; a frame with a datagram. */
const WINDOW = 2 << 20;
const MORE_STREAMS = 16;
const ONE_WAY_STREAMS = 4;
const DATAGRAM = 1472;
/** The largest record that is made here, in bytes. */
const RECORD_OUT = 32 << 10;
/** Room for a ping at the end of a record. */
const PING_ROOM = 16;
/** Bytes that wait in the socket before no other record is made; and how soon it is looked at again, for it does not tell. */
const UNSENT = 256 << 10;
const LOOK_MS = 4;
/** The peer is asked to answer after so many bytes: its answers keep sending alive where a browser slows timers down. */
const PING_BYTES = 64 << 10;
/** Datagrams that wait to be read, in bytes. */
const DATAGRAMS_IN = 64 << 10;
const IDLE_MS = 30_000;
const KEEP_ALIVE_MS = 10_000;
const TICK_MS = 5000;
/** How long a WebSocket that is given up may take to open. */
const UNOPENED_MS = 3000;
/** The priority of a stream that the peer opens. */
const NORMAL = 1;
/** The longest head of a frame. */
const FRAME_ROOM = 32;

/** A stream's number says who opened it, and whether it goes both ways. */
const isLocal = (id: number): boolean => (id & 1) === 0;
const isOneWay = (id: number): boolean => (id & 2) !== 0;
const numberOf = (id: number): number => Math.floor(id / 4);

/** Streams of one kind. */
class Kind<T> {
  /** Opened by this side, and how many may be. */
  opened = 0;
  may = 0;
  /** Opened by the peer, those of them that are over, how many it may have at once, and what it was told. */
  seen = 0;
  gone = 0;
  told: number;
  /** Opened by the peer and not taken yet. */
  readonly waiting: T[] = [];

  constructor(readonly permitted: number) {
    this.told = permitted;
  }
}

interface Halves {
  readonly send?: Sending;
  readonly receive?: Receiving;
}

export class MuxConnection implements Connection, Link {
  readonly via = 'wss';
  seek: ((mover: Mover, signal: AbortSignal) => void) | undefined;
  readonly classes: Classes;
  readonly closed: Promise<CloseReason>;
  /** Resolves when the peer has said what it permits. */
  readonly begun = new Deferred<void>();
  over = false;
  private readonly socket: Socket;
  private readonly clock: Clock;
  private readonly permits: Parameters;
  private readonly end_ = new Deferred<CloseReason>();
  private readonly changed = new Signal();
  private readonly record = new RecordWriter();
  private readonly streams = new Map<number, Halves>();
  private readonly both: Kind<BidiStream>;
  private readonly oneWay: Kind<ByteReceiver>;
  private peer: Parameters | undefined;
  /** Bytes over all streams: sent, and how much the peer takes; read, and what it was told. */
  private readonly flow = { sent: 0, may: 0, received: 0, read: 0, told: 0 };
  /** What waits for the next record. */
  private ready: Sending[] = [];
  private readonly telling = new Set<Sending | Receiving>();
  private readonly datagramsOut: { bytes: Uint8Array; taken: Deferred<void> }[] = [];
  private readonly datagramsIn: Uint8Array[] = [];
  private datagramsInBytes = 0;
  private pong: number | undefined;
  private isOpen = false;
  private working = false;
  private look: Stop | undefined;
  private tick: Stop = () => {};
  /** Signs of life: when something came, and when something was first sent since; pings. */
  private heard: number;
  private since: number | undefined;
  private nextPing = 0;
  private pingDue = false;
  private unasked = 0;
  /** Streams whose end was sent, and the ping whose answer says that the peer has them. */
  private readonly unconfirmed: { sending: Sending; ping: number }[] = [];

  constructor(socket: Socket, { clock, classes, channels }: MuxSettings) {
    this.socket = socket;
    this.clock = clock;
    this.classes = classes;
    this.closed = this.end_.promise;
    this.heard = clock.now();
    this.both = new Kind(channels + MORE_STREAMS);
    this.oneWay = new Kind(ONE_WAY_STREAMS);
    const streams = this.both.permitted;
    // Of each stream there is room for its window, so that no stream holds up another.
    const data = (2 * streams + ONE_WAY_STREAMS) * WINDOW;
    this.flow.told = data;
    this.permits = { idle: IDLE_MS, data, ownStream: WINDOW, peersStream: WINDOW, oneWay: WINDOW, streams, oneWayStreams: ONE_WAY_STREAMS, datagram: DATAGRAM, record: RECORD };
    socket.binaryType = 'arraybuffer';
    socket.addEventListener('open', () => this.open());
    socket.addEventListener('message', ({ data }) => this.message(data));
    socket.addEventListener('error', () => this.lose('the WebSocket was not made, or failed'));
    socket.addEventListener('close', () => this.lose('the WebSocket was ended'));
  }

  // What the client calls.

  async openBidi(priority = NORMAL): Promise<BidiStream> {
    const id = await this.opened(this.both, 0);
    const send = new Sending(this, id, this.peer?.peersStream ?? 0, priority);
    const receive = new Receiving(this, id, this.permits.ownStream);
    this.streams.set(id, { send, receive });
    return { send, receive };
  }

  async openUni(): Promise<ByteSender> {
    const id = await this.opened(this.oneWay, 2);
    const send = new Sending(this, id, this.peer?.oneWay ?? 0, 1);
    this.streams.set(id, { send });
    return send;
  }

  acceptBidi(): Promise<BidiStream | null> {
    return this.next(this.both.waiting);
  }

  acceptUni(): Promise<ByteReceiver | null> {
    return this.next(this.oneWay.waiting);
  }

  get maxDatagram(): number {
    return Math.max(0, Math.min(this.peer?.datagram ?? 0, LEAST_RECORD - PING_ROOM) - 5);
  }

  async sendDatagram(bytes: Uint8Array): Promise<void> {
    if (this.over) {
      throw new this.classes.ConnectionEnd();
    }
    if (bytes.length <= this.maxDatagram) {
      const taken = new Deferred<void>();
      this.datagramsOut.push({ bytes, taken });
      this.work();
      await taken.promise;
    }
  }

  async readDatagram(): Promise<Uint8Array | null> {
    const bytes = await this.next(this.datagramsIn);
    this.datagramsInBytes -= bytes?.length ?? 0;
    return bytes;
  }

  async finished(): Promise<void> {
    while (!this.over && (this.unconfirmed.length > 0 || this.ready.some(({ ending }) => ending))) {
      await this.changed.wait();
    }
  }

  close(code: number, text: string): void {
    this.last(true, Math.min(code, Number.MAX_SAFE_INTEGER), text, new this.classes.CloseReason(code, text, 'local'));
  }

  // What streams call.

  schedule(sending: Sending): void {
    if (!sending.queued && sending.hasWork) {
      sending.queued = true;
      this.ready.push(sending);
      this.work();
    }
  }

  tell(about: Sending | Receiving): void {
    this.telling.add(about);
    this.work();
  }

  read(bytes: number): void {
    const { flow } = this;
    flow.read += bytes;
    if (this.unread >= this.permits.data / 8) {
      this.work();
    }
  }

  tidy(id: number): void {
    const { send, receive } = this.streams.get(id) ?? {};
    if ((send || receive) && (send?.over ?? true) && (receive?.over ?? true)) {
      this.streams.delete(id);
      if (!isLocal(id)) {
        (isOneWay(id) ? this.oneWay : this.both).gone += 1;
        this.work();
      }
    }
  }

  /** Bytes that the peer may send and was not told of. */
  private get unread(): number {
    return this.flow.read + this.permits.data - this.flow.told;
  }

  private async next<T>(queue: T[]): Promise<T | null> {
    while (true) {
      const item = queue.shift();
      if (item !== undefined || this.over) {
        return item ?? null;
      }
      await this.changed.wait();
    }
  }

  /** The number of another stream, when the peer permits one. */
  private async opened(kind: Kind<unknown>, bits: number): Promise<number> {
    while (!this.over && kind.opened >= kind.may) {
      await this.changed.wait();
    }
    if (this.over) {
      throw new this.classes.ConnectionEnd();
    }
    const id = 4 * kind.opened + bits;
    kind.opened += 1;
    return id;
  }

  // What comes.

  private open(): void {
    if (this.over) {
      this.socket.close();
    } else {
      this.isOpen = true;
      this.record.parameters(this.permits);
      this.send();
      this.watch();
    }
  }

  private message(data: unknown): void {
    if (this.over) {
      return;
    }
    this.heard = this.clock.now();
    this.since = undefined;
    try {
      if (!(data instanceof ArrayBuffer)) {
        throw new MuxFault(PROTOCOL_VIOLATION, 'a message of text');
      }
      const reader = new RecordReader(new Uint8Array(data));
      for (let frame = reader.next(); frame && !this.over; frame = reader.next()) {
        this.take(frame);
      }
    } catch (error) {
      if (!(error instanceof MuxFault)) {
        throw error;
      }
      const { CloseReason, Code } = this.classes;
      const text = `QMux: ${error.message} (0x${error.code.toString(16)})`;
      this.last(false, error.code, error.message, new CloseReason(Code.TRANSPORT_ERROR, text, 'transport'));
    }
  }

  private take(frame: Frame): void {
    if (frame.kind === 'close') {
      return this.closedBy(frame.application, frame.code, frame.text);
    }
    if ((frame.kind === 'parameters') !== (this.peer === undefined)) {
      throw new MuxFault(PROTOCOL_VIOLATION, 'parameters come first, and once');
    }
    switch (frame.kind) {
      case 'parameters':
        this.peer = frame.parameters;
        this.both.may = frame.parameters.streams;
        this.oneWay.may = frame.parameters.oneWayStreams;
        this.flow.may = frame.parameters.data;
        this.begun.resolve();
        break;
      case 'stream':
        this.flow.received += frame.data.length;
        if (this.flow.received > this.flow.told) {
          throw new MuxFault(FLOW_CONTROL, "the connection's window");
        }
        this.find(frame.id, 'receive', true)?.push(frame.offset, frame.data, frame.fin);
        break;
      case 'reset':
        this.find(frame.id, 'receive')?.resetBy(frame.code, frame.size);
        break;
      case 'stop':
        this.find(frame.id, 'send')?.stopBy(frame.code);
        break;
      case 'maxData':
        this.flow.may = Math.max(this.flow.may, frame.most);
        this.work();
        break;
      case 'maxStreamData': {
        const sending = this.find(frame.id, 'send');
        if (sending) {
          sending.may = Math.max(sending.may, frame.most);
          this.schedule(sending);
        }
        break;
      }
      case 'maxStreams': {
        const kind = frame.oneWay ? this.oneWay : this.both;
        kind.may = Math.max(kind.may, frame.most);
        break;
      }
      case 'datagram':
        this.datagram(frame.data, frame.size);
        break;
      case 'ping':
        this.pong = frame.sequence;
        this.work();
        break;
      case 'pong':
        this.confirm(frame.sequence);
    }
    this.changed.wake();
  }

  private closedBy(application: boolean, code: number, text: string): void {
    const { CloseReason, Code } = this.classes;
    const fault = `the peer found a fault: ${text} (0x${code.toString(16)})`;
    this.end(application ? new CloseReason(code, text, 'peer') : new CloseReason(Code.TRANSPORT_ERROR, fault, 'transport'));
    this.socket.close();
  }

  private datagram(data: Uint8Array, size: number): void {
    if (size > DATAGRAM) {
      throw new MuxFault(PROTOCOL_VIOLATION, 'a datagram is too large');
    }
    this.datagramsIn.push(data.slice());
    this.datagramsInBytes += data.length;
    while (this.datagramsInBytes > DATAGRAMS_IN || this.datagramsIn.length > DATAGRAMS_IN / 64) {
      // The oldest is worth the least.
      this.datagramsInBytes -= this.datagramsIn.shift()?.length ?? 0;
    }
  }

  /** The peer has answered a ping, and so has all that was sent before it. */
  private confirm(sequence: number): void {
    if (sequence >= this.nextPing) {
      throw new MuxFault(PROTOCOL_VIOLATION, 'an answer to no ping');
    }
    for (let [first] = this.unconfirmed; first && first.ping <= sequence; [first] = this.unconfirmed) {
      this.unconfirmed.shift();
      first.sending.confirmed = true;
      this.tidy(first.sending.id);
    }
    this.work();
  }

  /**
   * The half of a stream that the peer speaks of, if it is not over. Makes the streams that the peer has opened by that: whoever
   * opens one has opened those before it as well.
   */
  private find<H extends keyof Halves>(id: number, half: H, there = false): Halves[H] | undefined {
    const kind: Kind<unknown> = isOneWay(id) ? this.oneWay : this.both;
    if (isOneWay(id) && isLocal(id) === (half === 'receive')) {
      throw new MuxFault(STREAM_STATE, 'the wrong side of a stream');
    }
    if (isLocal(id) && numberOf(id) >= kind.opened) {
      throw new MuxFault(STREAM_STATE, 'a stream that was not opened');
    }
    if (!isLocal(id) && numberOf(id) >= kind.told) {
      throw new MuxFault(STREAM_LIMIT, 'too many streams');
    }
    while (!isLocal(id) && kind.seen <= numberOf(id)) {
      const next = 4 * kind.seen + (id % 4);
      kind.seen += 1;
      const receive = new Receiving(this, next, WINDOW);
      if (isOneWay(id)) {
        this.streams.set(next, { receive });
        this.oneWay.waiting.push(receive);
      } else {
        const send = new Sending(this, next, this.peer?.ownStream ?? 0, NORMAL);
        this.streams.set(next, { send, receive });
        this.both.waiting.push({ send, receive });
      }
    }
    const found = this.streams.get(id)?.[half];
    if (there && found === undefined) {
      throw new MuxFault(FINAL_SIZE, 'data behind the end of a stream');
    }
    return found;
  }

  // What goes out.

  private work(): void {
    if (!this.working && !this.over) {
      this.working = true;
      // What is said in one go leaves together.
      queueMicrotask(() => {
        this.working = false;
        this.pump();
      });
    }
  }

  /** Sends what there is, as long as little waits in the socket. */
  private pump(): void {
    while (!this.over && this.peer) {
      if (this.socket.bufferedAmount >= UNSENT) {
        this.look ??= this.clock.after(LOOK_MS, () => {
          this.look = undefined;
          this.pump();
        });
        return;
      }
      this.fill(Math.min(this.peer.record, RECORD_OUT) - PING_ROOM);
      if (this.record.length === 0) {
        this.changed.wake();
        return;
      }
      this.send();
    }
  }

  private send(): void {
    this.since ??= this.clock.now();
    this.socket.send(this.record.take());
  }

  /** Makes the next record. It is empty when there is nothing to say. */
  private fill(most: number): void {
    const { record, flow } = this;
    if (this.pong !== undefined) {
      record.pong(this.pong);
      this.pong = undefined;
    }
    if (this.unread >= this.permits.data / 8) {
      flow.told += this.unread;
      record.maxData(flow.told);
    }
    for (const kind of [this.both, this.oneWay]) {
      if (kind.permitted + kind.gone > kind.told) {
        kind.told = kind.permitted + kind.gone;
        record.maxStreams(kind === this.oneWay, kind.told);
      }
    }
    for (const about of this.telling) {
      if (record.length + FRAME_ROOM > most) {
        return;
      }
      this.telling.delete(about);
      about.tell(record);
    }
    for (let [first] = this.datagramsOut; first && record.length + first.bytes.length + FRAME_ROOM <= most; [first] = this.datagramsOut) {
      this.datagramsOut.shift();
      record.datagram(first.bytes);
      first.taken.resolve();
    }
    this.fillStreams(most);
    if (this.pingDue || this.unasked >= PING_BYTES) {
      record.ping(this.nextPing);
      this.nextPing += 1;
      this.pingDue = false;
      this.unasked = 0;
    }
  }

  private fillStreams(most: number): void {
    const { record, flow } = this;
    while (this.ready.length > 0 && record.length + FRAME_ROOM < most) {
      const at = this.ready.reduce((best, { priority }, index) => (priority > (this.ready[best] as Sending).priority ? index : best), 0);
      const [sending] = this.ready.splice(at, 1) as [Sending];
      sending.queued = false;
      if (!sending.hasWork) {
        continue;
      }
      const { bytes, end } = sending.put(record, most - record.length - FRAME_ROOM, flow.may - flow.sent);
      flow.sent += bytes;
      this.unasked += bytes;
      if (end) {
        this.unconfirmed.push({ sending, ping: this.nextPing });
        this.pingDue = true;
      }
      // Those of one priority take turns.
      this.schedule(sending);
      if (bytes === 0 && !end) {
        // There is no credit over all streams.
        return;
      }
    }
  }

  // The end.

  /** Looks from time to time whether the peer is alive. */
  private watch(): void {
    this.tick = this.clock.after(TICK_MS, () => {
      const now = this.clock.now();
      const idle = Math.min(IDLE_MS, this.peer?.idle || IDLE_MS);
      if (now - Math.max(this.heard, this.since ?? this.heard) >= idle) {
        this.lose(`nothing was heard for ${idle / 1000} s`);
        return;
      }
      if (now - this.heard >= KEEP_ALIVE_MS) {
        this.pingDue = true;
        this.work();
      }
      this.watch();
    });
  }

  private lose(text: string): void {
    // A socket may tell of its failure again when it is closed.
    if (!this.over) {
      const { CloseReason, Code } = this.classes;
      this.end(new CloseReason(Code.CONNECTION_LOST, text, 'transport'));
      this.socket.close();
    }
  }

  /** Ends the connection with a last word to the peer. */
  private last(application: boolean, code: number, text: string, reason: CloseReason): void {
    if (!this.over) {
      this.end(reason);
      if (this.isOpen) {
        this.record.take();
        this.record.close(application, code, text);
        this.send();
        this.socket.close();
      } else {
        // Browsers write an error into their log where a WebSocket is closed before it has opened.
        this.clock.after(UNOPENED_MS, () => this.socket.close());
      }
    }
  }

  private end(reason: CloseReason): void {
    this.over = true;
    this.look?.();
    this.tick();
    for (const { send, receive } of this.streams.values()) {
      send?.fail(new this.classes.ConnectionEnd());
      receive?.fail();
    }
    for (const { taken } of this.datagramsOut) {
      taken.resolve();
    }
    this.begun.reject(new this.classes.ConnectError(reason));
    this.end_.resolve(reason);
    this.changed.wake();
  }
}

/**
 * The bytes of QMux (draft-ietf-quic-qmux-02): QUIC's frames in records, and the transport parameters (PROTOCOL.md §17). A
 * record is one binary message of a WebSocket, and has one or more whole frames.
 */

/** The peer broke a rule of QMux. `code` is one of RFC 9000, section 20.1. */
export class MuxFault extends Error {
  readonly code: number;

  constructor(code: number, text: string) {
    super(text);
    this.code = code;
  }
}

export const FLOW_CONTROL = 0x03;
export const STREAM_LIMIT = 0x04;
export const STREAM_STATE = 0x05;
export const FINAL_SIZE = 0x06;
const FRAME_ENCODING = 0x07;
const TRANSPORT_PARAMETER = 0x08;
export const PROTOCOL_VIOLATION = 0x0a;

/** A record that a peer takes which says nothing about it, in bytes; nobody may take less. */
export const LEAST_RECORD = 16_382;
/** The largest record that is taken here, in bytes. */
export const RECORD = 65_535;
const CLOSE_TEXT = 1024;

const RESET_STREAM = 0x04;
const STOP_SENDING = 0x05;
const STREAM = 0x08;
const FIN = 0x01;
const LEN = 0x02;
const OFF = 0x04;
const MAX_DATA = 0x10;
const MAX_STREAM_DATA = 0x11;
const MAX_STREAMS = 0x12;
const DATA_BLOCKED = 0x14;
const STREAM_DATA_BLOCKED = 0x15;
const STREAMS_BLOCKED_UNI = 0x17;
const CLOSE = 0x1c;
const CLOSE_APP = 0x1d;
const DATAGRAM = 0x30;
const DATAGRAM_LEN = 0x31;
const PARAMETERS = 0x3f51_5330_0d0a_0d0an;
const PING = 0x348c_6752_9ef8_c7bdn;
const PONG = 0x348c_6752_9ef8_c7ben;

/** What a side permits from its first word on, and says so in it. */
export interface Parameters {
  /** In milliseconds; 0 is none. */
  idle: number;
  /** Bytes on all streams, on each that it opened, on each that the peer did, and on each that is one-way. */
  data: number;
  ownStream: number;
  peersStream: number;
  oneWay: number;
  /** Streams that the peer may open: those both ways, and one-way ones. */
  streams: number;
  oneWayStreams: number;
  /** The largest frame with a datagram, in bytes, its head included; 0 takes none. */
  datagram: number;
  /** The largest record, in bytes. */
  record: number;
}

const PARAMETER: readonly (readonly [number | bigint, keyof Parameters])[] = [
  [0x01, 'idle'],
  [0x04, 'data'],
  [0x05, 'ownStream'],
  [0x06, 'peersStream'],
  [0x07, 'oneWay'],
  [0x08, 'streams'],
  [0x09, 'oneWayStreams'],
  [0x20, 'datagram'],
  [0x0571_c594_29cd_0845n, 'record'],
];
/** Those of QUIC that have no meaning here and must not be sent. */
const FORBIDDEN: readonly unknown[] = [0x00, 0x02, 0x03, 0x0a, 0x0b, 0x0c, 0x0d, 0x0e, 0x0f, 0x10];

export type Frame =
  | { kind: 'parameters'; parameters: Parameters }
  | { kind: 'stream'; id: number; offset: number; data: Uint8Array; fin: boolean }
  | { kind: 'reset'; id: number; code: number; size: number }
  | { kind: 'stop'; id: number; code: number }
  | { kind: 'maxData'; most: number }
  | { kind: 'maxStreamData'; id: number; most: number }
  | { kind: 'maxStreams'; oneWay: boolean; most: number }
  /** Only tells that a sender waits for credit; or is padding. */
  | { kind: 'nothing' }
  /** The end of the connection: by the application, or because of a fault. */
  | { kind: 'close'; application: boolean; code: number; text: string }
  | { kind: 'ping' | 'pong'; sequence: number }
  /** `size` has its head, too. */
  | { kind: 'datagram'; data: Uint8Array; size: number };

/** Takes a record apart. */
export class RecordReader {
  private readonly bytes: Uint8Array;
  private readonly view: DataView;
  private at = 0;

  constructor(bytes: Uint8Array) {
    this.bytes = bytes;
    this.view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  }

  /**
   * The next frame; undefined at the end.
   *
   * @throws {MuxFault}
   */
  next(): Frame | undefined {
    if (this.at === this.bytes.length) {
      return undefined;
    }
    const from = this.at;
    const type = this.value();
    switch (type) {
      case 0:
        return { kind: 'nothing' };
      case RESET_STREAM:
        return { kind: 'reset', id: this.number(), code: this.number(), size: this.number() };
      case STOP_SENDING:
        return { kind: 'stop', id: this.number(), code: this.number() };
      case MAX_DATA:
        return { kind: 'maxData', most: this.number() };
      case MAX_STREAM_DATA:
        return { kind: 'maxStreamData', id: this.number(), most: this.number() };
      case MAX_STREAMS:
      case MAX_STREAMS + 1: {
        const most = this.number();
        if (most > 2 ** 60) {
          throw new MuxFault(FRAME_ENCODING, 'MAX_STREAMS');
        }
        return { kind: 'maxStreams', oneWay: type !== MAX_STREAMS, most };
      }
      case CLOSE:
      case CLOSE_APP: {
        const application = type === CLOSE_APP;
        const code = this.number();
        if (!application) {
          this.value();
        }
        return { kind: 'close', application, code, text: new TextDecoder().decode(this.counted(CLOSE_TEXT)) };
      }
      case DATAGRAM:
        return { kind: 'datagram', data: this.rest(), size: this.at - from };
      case DATAGRAM_LEN:
        return { kind: 'datagram', data: this.counted(RECORD), size: this.at - from };
      case PARAMETERS:
        return { kind: 'parameters', parameters: parametersOf(this.counted(1024)) };
      case PING:
      case PONG:
        return { kind: type === PING ? 'ping' : 'pong', sequence: this.number() };
    }
    if (typeof type === 'bigint' || type < STREAM || type > STREAMS_BLOCKED_UNI) {
      throw new MuxFault(FRAME_ENCODING, 'a frame of unknown type');
    }
    if (type >= DATA_BLOCKED) {
      this.value();
      if (type === STREAM_DATA_BLOCKED) {
        this.value();
      }
      return { kind: 'nothing' };
    }
    const id = this.number();
    const offset = type & OFF ? this.number() : 0;
    const data = type & LEN ? this.counted(RECORD) : this.rest();
    return { kind: 'stream', id, offset, data, fin: (type & FIN) !== 0 };
  }

  /** An integer of variable length; of those above 2^53 the exact one. */
  value(): number | bigint {
    const first = this.bytes[this.at] ?? 0;
    const length = 1 << (first >> 6);
    const { at } = this;
    this.at += length;
    if (this.at > this.bytes.length) {
      throw new MuxFault(FRAME_ENCODING, 'a frame is cut short');
    }
    switch (length) {
      case 1:
        return first;
      case 2:
        return this.view.getUint16(at) & 0x3fff;
      case 4:
        return this.view.getUint32(at) & 0x3fff_ffff;
    }
    const large = this.view.getBigUint64(at) & 0x3fff_ffff_ffff_ffffn;
    return large <= Number.MAX_SAFE_INTEGER ? Number(large) : large;
  }

  /** The same; above 2^53 it is rounded. */
  number(): number {
    return Number(this.value());
  }

  get over(): boolean {
    return this.at === this.bytes.length;
  }

  /** A length of at most `most`, and that many bytes. */
  counted(most: number): Uint8Array {
    const length = this.number();
    if (length > most || length > this.bytes.length - this.at) {
      throw new MuxFault(FRAME_ENCODING, 'a length in a frame');
    }
    this.at += length;
    return this.bytes.subarray(this.at - length, this.at);
  }

  private rest(): Uint8Array {
    const rest = this.bytes.subarray(this.at);
    this.at = this.bytes.length;
    return rest;
  }
}

function parametersOf(list: Uint8Array): Parameters {
  const read: Parameters = { idle: 0, data: 0, ownStream: 0, peersStream: 0, oneWay: 0, streams: 0, oneWayStreams: 0, datagram: 0, record: LEAST_RECORD };
  const seen = new Set<number | bigint>();
  let good = true;
  try {
    for (const reader = new RecordReader(list); !reader.over; ) {
      const id = reader.value();
      const value = new RecordReader(reader.counted(RECORD));
      good &&= !seen.has(id) && !FORBIDDEN.includes(id);
      seen.add(id);
      const name = PARAMETER.find(([known]) => known === id)?.[1];
      if (name) {
        read[name] = value.number();
        good &&= value.over;
      }
    }
  } catch {
    good = false;
  }
  if (!good || read.record < LEAST_RECORD || Math.max(read.streams, read.oneWayStreams) > 2 ** 60) {
    throw new MuxFault(TRANSPORT_PARAMETER, 'transport parameters');
  }
  return read;
}

/** Bytes of an integer of variable length. */
export function sizeOf(value: number | bigint): number {
  return value < 64 ? 1 : value < 16_384 ? 2 : value < 2 ** 30 ? 4 : 8;
}

/** Puts a record together, in memory that is used again for the next. */
export class RecordWriter {
  private readonly bytes = new Uint8Array(RECORD);
  private readonly view = new DataView(this.bytes.buffer);
  private at = 0;

  get length(): number {
    return this.at;
  }

  /** What was written. It is good until the next write. */
  take(): Uint8Array<ArrayBuffer> {
    const record = this.bytes.subarray(0, this.at);
    this.at = 0;
    return record;
  }

  parameters(parameters: Parameters): void {
    const list = new RecordWriter();
    for (const [id, name] of PARAMETER) {
      if (parameters[name] > 0) {
        list.put(id, sizeOf(parameters[name]), parameters[name]);
      }
    }
    this.put(PARAMETERS);
    this.counted(list.take());
  }

  /** The head of a STREAM frame; so many bytes of data follow. */
  stream(id: number, offset: number, length: number, fin: boolean): void {
    this.put(STREAM | OFF | LEN | (fin ? FIN : 0), id, offset, length);
  }

  reset(id: number, code: number, size: number): void {
    this.put(RESET_STREAM, id, code, size);
  }

  stop(id: number, code: number): void {
    this.put(STOP_SENDING, id, code);
  }

  maxData(most: number): void {
    this.put(MAX_DATA, most);
  }

  maxStreamData(id: number, most: number): void {
    this.put(MAX_STREAM_DATA, id, most);
  }

  maxStreams(oneWay: boolean, most: number): void {
    this.put(MAX_STREAMS + Number(oneWay), most);
  }

  ping(sequence: number): void {
    this.put(PING, sequence);
  }

  pong(sequence: number): void {
    this.put(PONG, sequence);
  }

  datagram(data: Uint8Array): void {
    this.put(DATAGRAM_LEN);
    this.counted(data);
  }

  /** The end of the connection, by the application with a code of its own, or because of a fault. */
  close(application: boolean, code: number, text: string): void {
    this.put(application ? CLOSE_APP : CLOSE, code);
    if (!application) {
      // What kind of frame it was is not told.
      this.put(0);
    }
    this.counted(new TextEncoder().encode(text).subarray(0, CLOSE_TEXT));
  }

  append(bytes: Uint8Array): void {
    this.bytes.set(bytes, this.at);
    this.at += bytes.length;
  }

  private counted(bytes: Uint8Array): void {
    this.put(bytes.length);
    this.append(bytes);
  }

  private put(...values: (number | bigint)[]): void {
    for (const value of values) {
      switch (sizeOf(value)) {
        case 1:
          this.view.setUint8(this.at, Number(value));
          break;
        case 2:
          this.view.setUint16(this.at, Number(value) | 0x4000);
          break;
        case 4:
          this.view.setUint32(this.at, (Number(value) | 0x8000_0000) >>> 0);
          break;
        default:
          this.view.setBigUint64(this.at, BigInt(value) | 0xc000_0000_0000_0000n);
      }
      this.at += sizeOf(value);
    }
  }
}

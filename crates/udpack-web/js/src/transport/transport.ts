/**
 * What the client needs of a transport: streams, datagrams, and an end with code and text. WebTransport is behind
 * it in browsers, a pair in memory in tests.
 */

import type { CloseReason } from '../wire/codes.js';

/** Our direction of a stream. */
export interface ByteSender {
  /** Resolves when there is room for more. Rejects with {@link StreamEnd} or when the connection is over. */
  write(bytes: Uint8Array): Promise<void>;
  /** Ends the direction in order. Resolves when the transport has taken the end. */
  finish(): Promise<void>;
  /** Ends it at once. */
  reset(code: number): void;
  /** The code with which the peer stopped this direction. Stays open if it does not. */
  readonly stopped: Promise<number>;
}

/** The peer's direction of a stream. */
export interface ByteReceiver {
  /** The next bytes, `null` at the orderly end. Rejects with {@link StreamEnd} or when the connection is over. */
  read(): Promise<Uint8Array | null>;
  /** Reads nothing more: a read that waits, and any other, gives `null`. */
  stop(code: number): void;
}

export interface BidiStream {
  readonly send: ByteSender;
  readonly receive: ByteReceiver;
}

/** The peer ended a direction of a stream before its time. */
export class StreamEnd extends Error {
  readonly code: number;

  constructor(code: number) {
    super(`the peer ended the stream with code ${code}`);
    this.code = code;
  }
}

/** The connection is over; `Connection.closed` says why. */
export class ConnectionEnd extends Error {
  constructor() {
    super('the connection is over');
  }
}

/** A session that can go on over another connection. */
export interface Mover {
  /** Whether it would lose nothing now. */
  mayMove(): boolean;
  /** Leaves its connection for a better one, which it introduces itself on. */
  moveTo(better: Connection): void;
}

/** One connection to a peer. */
export interface Connection {
  /** What carries it, if it says so. */
  readonly via?: 'webtransport' | 'wss';
  /** Where there is a better transport that does not work now: looks for it, and moves the session there, until the signal. */
  readonly seek?: ((mover: Mover, signal: AbortSignal) => void) | undefined;
  /** Waits for the peer's permission for another stream. A higher priority is sent first, where the transport can. */
  openBidi(priority?: number): Promise<BidiStream>;
  /** The next stream that the peer opened; `null` when the connection is over. */
  acceptBidi(): Promise<BidiStream | null>;
  openUni(): Promise<ByteSender>;
  acceptUni(): Promise<ByteReceiver | null>;
  /** Bytes that a datagram may have. */
  readonly maxDatagram: number;
  /** Resolves when it was taken or dropped. */
  sendDatagram(bytes: Uint8Array): Promise<void>;
  readDatagram(): Promise<Uint8Array | null>;
  /** Resolves when no end of a stream is on its way to the peer. */
  finished(): Promise<void>;
  /** Ends it at once, for both sides. */
  close(code: number, text: string): void;
  /** Why it is over. Never rejects. */
  readonly closed: Promise<CloseReason>;
}

/** Makes a connection. `signal` gives it up. Rejects with `ConnectError`. */
export type Dial = (url: string, signal: AbortSignal) => Promise<Connection>;

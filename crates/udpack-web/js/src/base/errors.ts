/** What can go wrong, as classes. Each has a numeric `code` (PROTOCOL.md §9) and says whether to `retry`. */

import { type CloseReason, Code, codeRetry } from '../wire/codes.js';

/** The base of all errors of this library. */
export class UdpackError extends Error {
  override readonly name: string = 'UdpackError';
  /** The close code that says the same on the wire. */
  readonly code: number;
  /** Whether the same call, later and unchanged, can succeed. */
  readonly retry: boolean;

  constructor(code: number, message: string, retry = codeRetry(code)) {
    super(message);
    this.code = code;
    this.retry = retry;
  }
}

/** No connection was made: nobody answered, or the server said no. */
export class ConnectError extends UdpackError {
  override readonly name: string = 'ConnectError';
  readonly reason: CloseReason;

  constructor(reason: CloseReason) {
    super(reason.code, `not connected: ${reason}`, reason.retry);
    this.reason = reason;
  }
}

/** The channel or the socket is over. What was asked on it may or may not have been carried out. */
export class ClosedError extends UdpackError {
  override readonly name: string = 'ClosedError';
  readonly reason: CloseReason;

  constructor(reason: CloseReason) {
    super(reason.code, `closed: ${reason}`, reason.retry);
    this.reason = reason;
  }
}

/** The data cannot be sent: a type that msgpack has not, too deep, too many values, too large, a bad name. */
export class EncodeError extends UdpackError {
  override readonly name: string = 'EncodeError';
  constructor(message: string, code: number = Code.BAD_MESSAGE) {
    super(code, message);
  }
}

/** The peer's handler refused a request, or this side's handler refuses one by throwing it. */
export class Fault extends UdpackError {
  override readonly name: string = 'Fault';
  /** For programs: `no_handler`, `bad_payload`, `timeout`, `cancelled`, or a word of the application. */
  readonly fault: string;
  /** Whatever the application adds. */
  readonly data: unknown;

  constructor(fault: string, message: string, data?: unknown) {
    super(fault === 'timeout' ? Code.TIMED_OUT : fault === 'cancelled' ? Code.CANCELLED : Code.REFUSED, message);
    this.fault = fault;
    this.data = data;
  }
}

/** The deadline is over. The peer was told, and stops too. */
export class TimeoutError extends UdpackError {
  override readonly name: string = 'TimeoutError';
  constructor(what: string) {
    super(Code.TIMED_OUT, `${what}: no answer in time`);
  }
}

/** More waits than a queue holds: messages that came before an answer and nobody reads, or that nobody waits to send. */
export class BacklogError extends UdpackError {
  override readonly name: string = 'BacklogError';
  constructor(message = 'more messages came before the answer than the queue holds, and nobody reads them') {
    super(Code.BACKLOG, message);
  }
}

/** The server did not take a new token. The one before stays good until its own end. */
export class RefreshError extends UdpackError {
  override readonly name: string = 'RefreshError';
  constructor(code: number, text: string) {
    super(code, `the new token is refused: ${text}`);
  }
}

/** A call that makes no sense in the present state, such as reading a channel in two ways. */
export class UsageError extends UdpackError {
  override readonly name: string = 'UsageError';
  constructor(message: string) {
    super(Code.INTERNAL, message);
  }
}

/** The peer broke a rule of the protocol. `code` is what it is told. */
export class WireError extends UdpackError {
  override readonly name: string = 'WireError';
}

/** The close codes of PROTOCOL.md §9, and the reason why something ended. */

/** Close codes by name. */
export const Code = {
  NORMAL: 0x00,
  SHUTTING_DOWN: 0x01,
  INTERNAL: 0x02,
  BAD_FRAME: 0x10,
  FRAME_TOO_LARGE: 0x11,
  TRUNCATED: 0x12,
  FRAME_TIMEOUT: 0x13,
  BAD_MSGPACK: 0x14,
  BAD_MESSAGE: 0x15,
  PROTOCOL_ORDER: 0x16,
  VERSION: 0x17,
  RESUME_MISMATCH: 0x18,
  AUTH_REQUIRED: 0x20,
  AUTH_FAILED: 0x21,
  AUTH_TIMEOUT: 0x22,
  AUTH_REVOKED: 0x23,
  FORBIDDEN: 0x24,
  AUTH_EXPIRED: 0x25,
  SERVER_BUSY: 0x30,
  RATE_LIMITED: 0x31,
  SLOW_PEER: 0x32,
  IDLE: 0x33,
  BACKLOG: 0x34,
  NOT_RESUMED: 0x35,
  SUPERSEDED: 0x36,
  MOVED: 0x37,
  ELSEWHERE: 0x38,
  NO_SUCH_CHANNEL: 0x40,
  REFUSED: 0x41,
  CANCELLED: 0x42,
  HANDLER_FAILED: 0x43,
  CONNECTION_LOST: 0xf0,
  TIMED_OUT: 0xf1,
  PEER_RESTARTED: 0xf2,
  TRANSPORT_ERROR: 0xf3,
} as const;

/** Codes where connecting or opening again, later and unchanged, makes sense. */
const RETRY: ReadonlySet<number> = new Set([
  Code.SHUTTING_DOWN,
  Code.FRAME_TIMEOUT,
  Code.AUTH_TIMEOUT,
  Code.SERVER_BUSY,
  Code.RATE_LIMITED,
  Code.SLOW_PEER,
  Code.IDLE,
  Code.NOT_RESUMED,
  Code.MOVED,
  Code.ELSEWHERE,
  Code.CONNECTION_LOST,
  Code.TIMED_OUT,
  Code.PEER_RESTARTED,
]);

/** What a side concludes by itself. A peer that sends one of these numbers sends an unassigned code. */
const LOCAL_FROM = 0xf0;
const LOCAL_TO = 0xff;

const NAMES: ReadonlyMap<number, string> = new Map(
  Object.entries(Code).map(([name, code]) => [code, name.toLowerCase()]),
);

/** Every assigned code: value, name, whether to retry; in ascending order. */
export function closeCodes(): [number, string, boolean][] {
  return [...NAMES].map(([code, name]) => [code, name, RETRY.has(code)]);
}

/** The name of a code: a word of the table, or the number in hexadecimal. */
export function codeName(code: number): string {
  return NAMES.get(code) ?? `0x${code.toString(16)}`;
}

/** Whether trying again, later and unchanged, makes sense after this code. */
export function codeRetry(code: number): boolean {
  return RETRY.has(code);
}

/** Who ended something: this side, the peer, or neither (the path, the browser). */
export type Side = 'local' | 'peer' | 'transport';

/** Why a channel or a socket is over. */
export class CloseReason {
  /** The close code. One above 2^53 is rounded. */
  readonly code: number;
  /** One sentence for people; it may be empty. A peer's text is cut to 256 characters and has no control characters. */
  readonly text: string;
  readonly by: Side;
  /** The word of the protocol's table, or the code in hexadecimal. */
  readonly name: string;
  /** Whether connecting or opening again, later and unchanged, makes sense. */
  readonly retry: boolean;

  constructor(code: number, text: string, by: Side) {
    this.code = code;
    this.by = by;
    this.text = by === 'peer' ? printable(text, 256) : text;
    const sentLocalWord = by === 'peer' && code >= LOCAL_FROM && code <= LOCAL_TO;
    this.name = sentLocalWord ? `0x${code.toString(16)}` : codeName(code);
    this.retry = !sentLocalWord && codeRetry(code);
  }

  toString(): string {
    return this.text === '' ? this.name : `${this.name}: ${this.text}`;
  }
}

/** A peer's text without control characters, and not longer than `most` characters. */
export function printable(text: string, most: number): string {
  return [...text].slice(0, most).join('').replace(/[\u0000-\u001f\u007f-\u009f\u2028\u2029\u202a-\u202e\u2066-\u2069]/g, '\ufffd');
}

/** A text for the peer, of at most `most` characters: one has at most 4 bytes, and a close's text at most 256. */
export function sendable(text: string, most = 64): string {
  return [...text.replace(/\p{Surrogate}/gu, '\ufffd')].slice(0, most).join('');
}

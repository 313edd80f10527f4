/** The protocol's own messages: what is in them and what is refused (PROTOCOL.md §5 to §8). Pure. */

import { WireError } from '../base/errors.js';
import { CloseReason, Code, printable } from './codes.js';
import { Fields } from './fields.js';
import { MIN_FRAME } from './frame.js';
import { isName, isU64, plain, type U64, U64_MAX, type WireMessage } from './message.js';

export const VERSION = 1;
/** Bytes that a token may have. */
export const TOKEN_BYTES = 512;
const RESUME_TOKEN_BYTES = 32;
/** Channels a second that a server takes that does not say. */
const CHANNEL_RATE = 100;

/** Bulk, normal, high. */
export type Priority = 0 | 1 | 2;

export interface ResumeTicket {
  readonly session: string;
  readonly token: Uint8Array;
}

export interface Hello {
  readonly token: string;
  readonly agent: string;
  readonly frame?: U64;
  readonly channels?: U64;
  /** The client can resume; with a ticket, it wants to. */
  readonly resume?: { readonly ticket?: ResumeTicket };
  /** The client answers `$mark`. */
  readonly marks: boolean;
  /** The client knows `$room` and `$at`. */
  readonly history: boolean;
  /** The client goes to another address when it is told one. */
  readonly follows?: boolean;
}

export interface Welcome {
  readonly session: string;
  readonly agent: string;
  /** The largest body that the server takes. */
  readonly frame: number;
  /** Channels that the client may have open. */
  readonly channels: number;
  /** Channels that it may open a second, and twice as many at once. */
  readonly channelRate: number;
  readonly resumed: boolean;
  readonly reason?: string;
  readonly resume?: { readonly token: Uint8Array; readonly windowMs: number };
  readonly expiresMs?: number;
  readonly marks: boolean;
  readonly history: boolean;
}

export interface Open {
  readonly id: U64;
  readonly name: string;
  readonly meta?: unknown;
  readonly priority: Priority;
  readonly resumable: boolean;
  readonly received?: U64;
  /** Nothing of the wire: whether the session may leave its connection although the channel ends with it. */
  readonly yields?: boolean | undefined;
  /** How far the client has come in rooms that it will be in again. */
  readonly since?: readonly Position[] | undefined;
}

export interface Resume {
  readonly received: U64;
  readonly done: boolean;
}

export interface Ack {
  readonly channel: U64;
  readonly own: boolean;
  readonly received: U64;
}

export interface Passed {
  readonly channel: U64;
  readonly own: boolean;
  readonly mark: U64;
}

export interface GoAway {
  readonly reason: CloseReason;
  readonly retryAfterMs: number;
  readonly windowMs: number;
  /** The node of the server's cluster to connect to next, as `HOST:PORT`. A socket that reconnects does, where it may. */
  readonly address?: string;
}

export interface Refreshed {
  readonly expiresMs?: number;
  readonly refused?: { readonly code: number; readonly text: string };
}

/** `$gap`: so many messages of a room were dropped here. */
export interface Gap {
  readonly room: string;
  readonly lost: U64;
  /** In a room with a history: which one, the offsets of the first and the last, and why. All of them, or none. */
  readonly epoch?: U64;
  readonly from?: U64;
  readonly to?: U64;
  /** The program was too slow; they are not kept any more; the history is another one, and how many are lost nobody knows. */
  readonly why?: 'slow' | 'gone' | 'epoch';
}

/** How far a client has come in a room with a history. */
export interface Position {
  readonly room: string;
  readonly epoch: U64;
  readonly offset: U64;
}

export interface FaultFields {
  readonly fault: string;
  readonly message: string;
  readonly data?: unknown;
}

export function fieldsOf(message: WireMessage, event: string): Fields {
  if (message.event !== event) {
    const code = event === '$hello' ? Code.AUTH_REQUIRED : Code.PROTOCOL_ORDER;
    throw new WireError(code, `expected ${event}, got another event`);
  }
  if (message.id !== undefined) {
    throw new WireError(Code.BAD_MESSAGE, `${event} takes no id`);
  }
  return new Fields(event, message.data);
}

function version(message: WireMessage): void {
  // First of all: what else the map may hold is not known before. Repeated keys make it a `Map`.
  const { data } = message;
  const v = data instanceof Map ? data.get('v') : (data as { v?: unknown } | null)?.v;
  if ((typeof v === 'number' || typeof v === 'bigint') && v >= 0 && Number(v) !== VERSION) {
    throw new WireError(Code.VERSION, `protocol version ${v} is not spoken here, version ${VERSION} is`);
  }
}

function sessionId(fields: Fields, id: string): string {
  if (!/^[0-9a-fA-F]{32}$/.test(id)) {
    throw fields.bad('session is not 32 hexadecimal digits');
  }
  return id;
}

function resumeToken(fields: Fields): Uint8Array {
  const token = fields.optBin('token');
  if (token?.length !== RESUME_TOKEN_BYTES) {
    throw fields.bad('a resume token is 32 bytes');
  }
  return token;
}

function frameLimit(fields: Fields, frame: U64): void {
  if (frame < MIN_FRAME) {
    throw fields.bad(`a frame limit is at least ${MIN_FRAME} bytes`);
  }
}

/** The extensions that this side knows. */
function extensions(fields: Fields): { marks: boolean; history: boolean } {
  const ext = fields.optMap('ext');
  return { marks: ext?.raw('mark') === true, history: ext?.raw('history') === true };
}

export function encodeHello(hello: Hello): unknown {
  return {
    v: VERSION,
    token: hello.token,
    agent: hello.agent,
    limits: { frame: hello.frame, channels: hello.channels },
    resume: hello.resume && { session: hello.resume.ticket?.session, token: hello.resume.ticket?.token },
    ext: { mark: hello.marks, history: hello.history, address: hello.follows },
  };
}

export function decodeHello(message: WireMessage): Hello {
  if (message.event === '$hello' && message.id === undefined) {
    version(message);
  }
  const fields = fieldsOf(message, '$hello');
  fields.u64('v');
  fields.only('v', 'token', 'agent', 'limits', 'resume', 'ext');
  const token = fields.text('token');
  if (new TextEncoder().encode(token).length > TOKEN_BYTES) {
    throw new WireError(Code.FRAME_TOO_LARGE, 'the token is too long');
  }
  const agent = printable(fields.text('agent'), 128);
  const limits = fields.optMap('limits');
  limits?.only('frame', 'channels');
  const frame = limits?.optU64('frame') || undefined;
  if (frame !== undefined) {
    frameLimit(fields, frame);
  }
  const channels = limits?.optU64('channels');
  const resume = fields.optMap('resume');
  let ticket: ResumeTicket | undefined;
  if (resume !== undefined) {
    resume.only('session', 'token');
    const session = resume.optText('session');
    if ((session === undefined) !== (resume.optBin('token') === undefined)) {
      throw fields.bad('resume has a session and its token, or neither');
    }
    ticket = session === undefined ? undefined : { session: sessionId(fields, session), token: resumeToken(resume) };
  }
  return {
    token,
    agent,
    ...(frame !== undefined && { frame }),
    ...(channels !== undefined && { channels }),
    ...(resume && { resume: ticket ? { ticket } : {} }),
    ...extensions(fields),
    ...(fields.optMap('ext')?.raw('address') === true && { follows: true }),
  };
}

export function decodeWelcome(message: WireMessage): Welcome {
  if (message.event === '$welcome' && message.id === undefined) {
    version(message);
  }
  const fields = fieldsOf(message, '$welcome');
  fields.u64('v');
  fields.only('v', 'session', 'agent', 'limits', 'resumed', 'reason', 'resume', 'expires_ms', 'ext');
  const session = sessionId(fields, fields.text('session'));
  const agent = printable(fields.text('agent'), 128);
  const limits = fields.subMap('limits');
  const frame = limits.u64('frame');
  frameLimit(fields, frame);
  const channels = limits.u64('channels');
  const rate = limits.raw('channel_rate');
  const resumed = fields.optBool('resumed') ?? false;
  const reason = fields.optText('reason');
  if (resumed && reason !== undefined) {
    throw fields.bad('a resumed session has no reason why not');
  }
  const resume = fields.optMap('resume');
  resume?.only('token', 'window_ms');
  const expires = fields.optU64('expires_ms');
  return {
    session,
    agent,
    frame: Number(frame),
    channels: Number(channels),
    channelRate: isU64(rate) && rate > 0 ? Number(rate) : CHANNEL_RATE,
    resumed,
    ...extensions(fields),
    ...(reason !== undefined && { reason: printable(reason, 128) }),
    ...(resume && { resume: { token: resumeToken(resume), windowMs: Number(resume.u64('window_ms')) } }),
    ...(expires !== undefined && { expiresMs: Number(expires) }),
  };
}

export function encodeOpen(open: Open): unknown {
  return {
    id: open.id,
    name: open.name,
    meta: open.meta ?? undefined,
    priority: open.priority === 1 ? undefined : open.priority,
    resumable: open.resumable || undefined,
    received: open.received,
    since: open.since?.length ? open.since : undefined,
  };
}

/** A server's: only clients send `since`. */
export function decodeOpen(message: WireMessage): Open {
  const fields = fieldsOf(message, '$open');
  fields.only('id', 'name', 'meta', 'priority', 'resumable', 'received');
  const id = fields.u64('id');
  const name = fields.text('name');
  if (!isName(name) || name.startsWith('$')) {
    throw fields.bad('a channel name has 1 to 128 bytes, no control characters, and does not start with $');
  }
  const priority = fields.optU64('priority') ?? 1;
  if (priority > 2) {
    throw fields.bad('a priority is 0, 1 or 2');
  }
  const resumable = fields.optBool('resumable') ?? false;
  const received = fields.optU64('received');
  if (received !== undefined && !resumable) {
    throw fields.bad('only a resumable channel can go on');
  }
  const meta = plain(fields.raw('meta'));
  return {
    id,
    name,
    priority: priority as Priority,
    resumable,
    ...(meta !== undefined && { meta }),
    ...(received !== undefined && { received }),
  };
}

/** `code` and `text` as `$close` and `$goaway` have them. */
function said(fields: Fields): { code: number; text: string } {
  return { code: Number(fields.u64('code')), text: fields.text('text') };
}

export function decodeClose(message: WireMessage): CloseReason {
  const fields = fieldsOf(message, '$close');
  fields.only('code', 'text');
  const { code, text } = said(fields);
  return new CloseReason(code, text, 'peer');
}

export function decodeGoAway(message: WireMessage): GoAway {
  const fields = fieldsOf(message, '$goaway');
  fields.only('code', 'text', 'retry_after_ms', 'window_ms', 'address');
  const { code, text } = said(fields);
  const address = fields.optText('address');
  return {
    reason: new CloseReason(code, text, 'peer'),
    retryAfterMs: Number(fields.u64('retry_after_ms')),
    windowMs: Number(fields.u64('window_ms')),
    ...(address !== undefined && { address }),
  };
}

export function decodeChannels(message: WireMessage): U64[] {
  const fields = fieldsOf(message, '$channels');
  fields.only('open');
  const open = fields.list('open');
  for (const id of open) {
    if (!(typeof id === 'bigint' || typeof id === 'number') || id < 0) {
      throw fields.bad('open is a list of integers from 0');
    }
  }
  return open as U64[];
}

export function decodeResume(message: WireMessage): Resume {
  const fields = fieldsOf(message, '$resume');
  fields.only('received', 'done');
  return { received: fields.u64('received'), done: fields.bool('done') };
}

export function decodeAck(message: WireMessage): Ack {
  const fields = fieldsOf(message, '$ack');
  fields.only('channel', 'own', 'received');
  return { channel: fields.u64('channel'), own: fields.bool('own'), received: fields.u64('received') };
}

export function decodePassed(message: WireMessage): Passed {
  const fields = fieldsOf(message, '$passed');
  fields.only('channel', 'own', 'mark');
  return { channel: fields.u64('channel'), own: fields.bool('own'), mark: fields.u64('mark') };
}

export function decodeRefresh(message: WireMessage): string {
  const fields = fieldsOf(message, '$refresh');
  fields.only('token');
  const token = fields.text('token');
  if (new TextEncoder().encode(token).length > TOKEN_BYTES) {
    throw new WireError(Code.FRAME_TOO_LARGE, 'the token is too long');
  }
  return token;
}

export function decodeRefreshed(message: WireMessage): Refreshed {
  const fields = fieldsOf(message, '$refreshed');
  fields.only('expires_ms', 'code', 'text');
  const expires = fields.optU64('expires_ms');
  if (fields.has('code') !== fields.has('text') || (fields.has('code') && expires !== undefined)) {
    throw fields.bad('code and text come together and without expires_ms');
  }
  if (fields.has('code')) {
    const { code, text } = said(fields);
    return { refused: { code, text: printable(text, 256) } };
  }
  return expires === undefined ? {} : { expiresMs: Number(expires) };
}

export function decodeGap(message: WireMessage): Gap {
  const fields = fieldsOf(message, '$gap');
  fields.only('room', 'lost');
  const room = fields.text('room');
  const lost = fields.u64('lost');
  if (!isName(room) || lost === 0) {
    throw fields.bad('room is a name, and lost is not 0');
  }
  return { room, lost };
}

export function decodeMark(message: WireMessage): U64 {
  if (message.event !== '$mark') {
    throw new WireError(Code.PROTOCOL_ORDER, 'expected $mark, got another event');
  }
  const { data } = message;
  const isNumber = typeof data === 'number' || typeof data === 'bigint';
  if (message.id !== undefined || !isNumber || data < 0 || data > U64_MAX) {
    throw new WireError(Code.BAD_MESSAGE, '$mark: its data is an integer from 0');
  }
  return data;
}

export function decodeFault(message: WireMessage): FaultFields {
  if (message.event !== '$fault' || message.id === undefined) {
    throw new WireError(Code.BAD_MESSAGE, '$fault needs an id');
  }
  const fields = new Fields('$fault', message.data);
  const fault = fields.text('code');
  const text = fields.text('message');
  if (!isName(fault) || new TextEncoder().encode(text).length > 1024) {
    throw fields.bad('code is a name, and message has at most 1,024 bytes');
  }
  return { fault, message: printable(text, 1024), data: fields.raw('data') };
}

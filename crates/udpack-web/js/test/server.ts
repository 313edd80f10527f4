/**
 * A small server for tests, written from PROTOCOL.md: admission, channels, resuming. Of the package it uses the
 * pure `wire` and the transport in memory, nothing of what it tests.
 */

import { MemoryLink } from '../src/transport/memory.js';
import type { BidiStream, ByteReceiver, ByteSender, Connection } from '../src/transport/transport.js';
import { decodeAck, decodeChannels, decodeHello, decodePassed, decodeResume, type Hello, type Open, type Passed } from '../src/wire/control.js';
import { FrameDecoder } from '../src/wire/frame.js';
import { decodeOpenOfClient } from './since.js';
import { decodeMessage, encodeFrame, U64_MAX, type U64, type WireMessage } from '../src/wire/message.js';

export const TOKEN = 'example-token';
const LIMIT = 1 << 20;

export function frame(event: string, data: unknown, id?: U64): Uint8Array {
  return encodeFrame(LIMIT, event, data, id);
}

/** Writes one after the other; what a dead stream does not take is lost. */
class Writer {
  private queue: Uint8Array[] = [];
  private ends = false;
  private runs = false;

  constructor(readonly sender: ByteSender) {}

  write(bytes: Uint8Array): void {
    this.queue.push(bytes);
    void this.run();
  }

  finish(): void {
    this.ends = true;
    void this.run();
  }

  private async run(): Promise<void> {
    if (this.runs) return;
    this.runs = true;
    await Promise.resolve();
    try {
      while (this.queue.length > 0) {
        const together = Buffer.concat(this.queue);
        this.queue = [];
        for (let at = 0; at < together.length; at += 16_384) await this.sender.write(together.subarray(at, at + 16_384));
      }
      if (this.ends) await this.sender.finish();
      this.runs = false;
      if (this.queue.length > 0) void this.run();
    } catch {
      // It stays marked as running: nothing more is written.
    }
  }
}

async function* bodies(receiver: ByteReceiver): AsyncGenerator<WireMessage> {
  const decoder = new FrameDecoder(LIMIT);
  while (true) {
    for (let body = decoder.next(); body; body = decoder.next()) yield decodeMessage(body);
    const chunk = await receiver.read();
    if (chunk === null) return;
    decoder.push(chunk);
  }
}

/** A channel at the server. */
export class ServerChannel {
  received = 0;
  confirmed = 0;
  /** Everything that came, in order, but for what belongs to streams of items. */
  readonly got: WireMessage[] = [];
  onMessage: (message: WireMessage) => void = () => {};
  onEnd: () => void = () => {};
  peerOver = false;
  ended = false;
  refused = false;
  /** Frames that are not confirmed, of a resumable channel. */
  kept: Uint8Array[] = [];
  writer: Writer | undefined;
  stream: BidiStream | undefined;

  constructor(
    readonly session: ServerSession,
    readonly open: Open,
    readonly own: boolean,
  ) {}

  send(event: string, data: unknown, id?: U64): void {
    this.sendFrame(frame(event, data, id));
  }

  sendFrame(bytes: Uint8Array): void {
    if (this.ended || this.refused) return;
    if (this.open.resumable) this.kept.push(bytes);
    this.writer?.write(bytes);
  }

  finish(): void {
    this.ended = true;
    this.writer?.finish();
  }

  close(code: number, text: string): void {
    this.send('$close', { code, text });
    this.finish();
    this.stream?.receive.stop(code);
    this.peerOver = true;
  }

  attach(stream: BidiStream, writer: Writer): void {
    this.stream = stream;
    this.writer = writer;
    for (const bytes of this.kept) writer.write(bytes);
    if (this.ended) writer.finish();
  }

  told(n: U64): void {
    if (n === U64_MAX) {
      this.refused = true;
      this.kept = [];
      return;
    }
    const count = Math.min(Number(n) - this.confirmed, this.kept.length);
    if (count > 0) {
      this.kept.splice(0, count);
      this.confirmed += count;
    }
  }

  private ackDue = false;

  /** Confirms what came together. */
  ack(): void {
    if (this.ackDue) return;
    this.ackDue = true;
    setImmediate(() => {
      this.ackDue = false;
      this.ackNow();
    });
  }

  private ackNow(): void {
    if (this.open.resumable) this.session.control?.write(frame('$ack', { channel: this.open.id, own: this.own, received: this.received }));
  }

  async read(stream: BidiStream, messages: AsyncGenerator<WireMessage>): Promise<void> {
    try {
      for await (const message of messages) {
        if (this.stream !== stream) return;
        this.received += 1;
        if (message.event === '$close') {
          this.received += 1;
          this.peerOver = true;
        }
        this.got.push(message);
        this.session.server.onAny(this, message);
        this.onMessage(message);
        this.ack();
      }
      if (this.stream !== stream || this.peerOver) return;
      this.received += 1;
      this.peerOver = true;
      this.ack();
      this.onEnd();
    } catch {
      // Reset, or the connection is gone.
    }
  }
}

export class ServerSession {
  readonly own = new Map<U64, ServerChannel>();
  readonly accepted = new Map<U64, ServerChannel>();
  readonly seen = new Set<U64>();
  /** What the client sent on the control stream. */
  readonly control_: WireMessage[] = [];
  tokens: Uint8Array[] = [];
  connection: Connection | undefined;
  control: Writer | undefined;
  controlStream: BidiStream | undefined;
  hello: Hello | undefined;
  passed: Passed[] = [];
  private nextId = 1;

  constructor(
    readonly server: FakeServer,
    readonly id: string,
  ) {}

  async openChannel(name: string, options: Partial<Open> = {}): Promise<ServerChannel> {
    const open: Open = { id: this.nextId, name, priority: 1, resumable: false, ...options };
    this.nextId += 1;
    const channel = new ServerChannel(this, open, true);
    this.own.set(open.id, channel);
    await this.begin(channel, false);
    return channel;
  }

  /** Opens its stream, the first or another. */
  async begin(channel: ServerChannel, again: boolean): Promise<void> {
    const { open } = channel;
    const stream = await (this.connection as Connection).openBidi();
    const writer = new Writer(stream.send);
    const { id, name, priority, resumable } = open;
    writer.write(frame('$open', { id, name, priority, resumable: resumable || undefined, received: again ? channel.received : undefined }));
    channel.stream = stream;
    const messages = bodies(stream.receive);
    if (again) {
      channel.writer = undefined;
      const first = (await messages.next()).value as WireMessage;
      const { received, done } = decodeResume(first);
      if (channel.stream !== stream) return;
      if (done) return void this.own.delete(open.id);
      channel.told(received);
    }
    channel.attach(stream, writer);
    void channel.read(stream, messages);
  }

  tell(event: string, data: unknown): void {
    this.control?.write(frame(event, data));
  }

  /** `$close` on the control stream. */
  close(code: number, text: string): void {
    this.tell('$close', { code, text });
    this.control?.finish();
  }
}

export class FakeServer {
  readonly sessions = new Map<string, ServerSession>();
  readonly links: MemoryLink[] = [];
  /** Channels by name; a name that is not there is `no_such_channel`. */
  readonly handlers = new Map<string, (channel: ServerChannel) => void>();
  tokens = new Set([TOKEN]);
  resumes = true;
  marks = true;
  history = true;
  expiresMs: number | undefined;
  limits: Record<string, number> = { frame: LIMIT, channels: 64 };
  /** Answers a `$refresh`. */
  onRefresh: (token: string) => unknown = () => ({});
  onAny: (channel: ServerChannel, message: WireMessage) => void = () => {};
  /** Called with each new link, before anything is on it. */
  onLink: (link: MemoryLink) => void = () => {};
  /** Answers a hello itself when it returns true. */
  onHello: (hello: Hello, link: MemoryLink, stream: BidiStream) => boolean | Promise<boolean> = () => false;
  /** Refuses to be dialled while it is set. */
  down = false;

  readonly dial = async (): Promise<Connection> => {
    if (this.down) {
      const { ConnectError } = await import('../src/base/errors.js');
      const { CloseReason, Code } = await import('../src/wire/codes.js');
      throw new ConnectError(new CloseReason(Code.CONNECTION_LOST, 'nobody answers', 'transport'));
    }
    const link = new MemoryLink();
    this.links.push(link);
    this.onLink(link);
    void this.serve(link).catch(() => {});
    return link.client;
  };

  get link(): MemoryLink {
    return this.links.at(-1) as MemoryLink;
  }

  get session(): ServerSession {
    return [...this.sessions.values()].at(-1) as ServerSession;
  }

  private async serve(link: MemoryLink): Promise<void> {
    const connection = link.server;
    const stream = await connection.acceptBidi();
    if (!stream) return;
    const messages = bodies(stream.receive);
    const hello = decodeHello((await messages.next()).value as WireMessage);
    if (await this.onHello(hello, link, stream)) return;
    if (!this.tokens.has(hello.token)) return connection.close(0x21, 'the token is not accepted');
    const ticket = hello.resume?.ticket;
    const known = ticket && this.sessions.get(ticket.session);
    const isGood = known?.tokens.some((token) => Buffer.from(token).equals(Buffer.from(ticket?.token as Uint8Array)));
    const session = known && isGood ? known : new ServerSession(this, Array.from({ length: 4 }, () => Math.random().toString(16).slice(2, 10).padEnd(8, '0')).join(''));
    const resumed = session === known;
    if (resumed) session.connection?.close(0x36, 'superseded');
    this.sessions.delete(session.id);
    this.sessions.set(session.id, session);
    const token = Uint8Array.from({ length: 32 }, () => Math.floor(Math.random() * 256));
    session.tokens = [...session.tokens.slice(-1), token];
    session.connection = connection;
    session.controlStream = stream;
    session.control = new Writer(stream.send);
    session.hello = hello;
    for (const channel of [...session.own.values(), ...session.accepted.values()]) {
      channel.stream = undefined;
      channel.writer = undefined;
    }
    session.tell('$welcome', {
      v: 1,
      session: session.id,
      agent: 'fake',
      limits: this.limits,
      resumed: resumed || undefined,
      reason: ticket && !resumed ? 'unknown' : undefined,
      resume: hello.resume && this.resumes ? { token, window_ms: 60_000 } : undefined,
      expires_ms: this.expiresMs,
      ext: { mark: (hello.marks && this.marks) || undefined, history: (hello.history && this.history) || undefined },
    });
    if (resumed) {
      const open = [...session.own.values()].filter((channel) => channel.open.resumable);
      session.tell('$channels', { open: open.map((channel) => channel.open.id) });
      for (const channel of open) void session.begin(channel, true).catch(() => {});
    }
    void this.accept(session, connection);
    for await (const message of messages) {
      session.control_.push(message);
      switch (message.event) {
        case '$channels': {
          session.tokens = [token];
          const named = new Set(decodeChannels(message));
          for (const [id, channel] of session.accepted) if (!named.has(id) && !channel.stream) session.accepted.delete(id);
          break;
        }
        case '$ack': {
          const { channel, own, received } = decodeAck(message);
          (own ? session.accepted : session.own).get(channel)?.told(received);
          break;
        }
        case '$passed':
          session.passed.push(decodePassed(message));
          break;
        case '$refresh':
          session.tell('$refreshed', this.onRefresh((message.data as { token: string }).token));
          break;
        case '$close': {
          const { code, text } = message.data as { code: number; text: string };
          for (const channel of [...session.own.values(), ...session.accepted.values()]) channel.finish();
          connection.close(code, text);
          this.sessions.delete(session.id);
        }
      }
    }
  }

  private async accept(session: ServerSession, connection: Connection): Promise<void> {
    for (let stream = await connection.acceptBidi(); stream; stream = await connection.acceptBidi()) {
      void this.acceptOne(session, stream).catch(() => {});
    }
  }

  private async acceptOne(session: ServerSession, stream: BidiStream): Promise<void> {
    const messages = bodies(stream.receive);
    const first = await messages.next();
    if (first.done) return;
    const open = decodeOpenOfClient(first.value);
    const writer = new Writer(stream.send);
    let channel = session.accepted.get(open.id);
    if (open.received !== undefined) {
      if (channel === undefined && (open.received !== 0 || session.seen.has(open.id))) {
        writer.write(frame('$resume', { received: open.received, done: true }));
        return writer.finish();
      }
      writer.write(frame('$resume', { received: channel?.received ?? 0, done: false }));
      channel?.told(open.received);
    }
    session.seen.add(open.id);
    const isNew = channel === undefined;
    const handler = this.handlers.get(open.name);
    if (isNew && !handler) {
      writer.write(frame('$close', { code: 0x40, text: 'nobody handles channels of this name' }));
      writer.finish();
      return stream.receive.stop(0x40);
    }
    channel ??= new ServerChannel(session, open, false);
    session.accepted.set(open.id, channel);
    channel.attach(stream, writer);
    if (isNew) handler?.(channel);
    await channel.read(stream, messages);
  }
}

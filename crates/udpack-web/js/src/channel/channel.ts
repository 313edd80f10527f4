/**
 * A channel: an ordered two-way stream of messages. It outlives its stream where it is resumable; the session gives
 * it another one.
 */

import { type Clock, Deferred, handled } from '../base/async.js';
import { BacklogError, ClosedError, UsageError, WireError } from '../base/errors.js';
import { type BidiStream, StreamEnd } from '../transport/transport.js';
import { CloseReason, Code, sendable } from '../wire/codes.js';
import { decodeClose, decodeGap, decodeMark, decodeResume, fieldsOf, type Gap, type Open, type Position, type Priority } from '../wire/control.js';
import { checkEvent, decodeMessage, encodeFrame, isU64, type U64, type WireMessage } from '../wire/message.js';
import { Answer } from './answer.js';
import { Asked, type AskOptions, type AskSender, needId } from './asked.js';
import { type Handler, Handlers } from './handlers.js';
import { type History } from './history.js';
import { Inbox } from './inbox.js';
import { type ItemQueue } from './items.js';
import { Message } from './message.js';
import { Outbox } from './outbox.js';
import { FrameReader, type Heard } from './reader.js';
import { type DataOf, type EventMap, type ItemOf, type Name, type ReplyOf } from './types.js';

/** Queued to a peer that does not read; and the same on a resumable channel, with what is not confirmed. */
const SEND = { bytes: 1 << 20, frames: 1024 };
const SEND_RESUMABLE = { bytes: 4 << 20, frames: 65_536 };
/** What has come and is not taken. */
const RECEIVE = { bytes: 1 << 20, messages: 1024 };
/** Frames that may wait for room in the queue, each for a promise that somebody holds. */
const LINE = 1024;
/** Requests of the peer that are not answered. */
const ANSWERS = 1024;

const ASKER_SIDE: ReadonlySet<string> = new Set(['$reply', '$fault', '$item', '$want']);
const ANSWERER_SIDE: ReadonlySet<string> = new Set(['$cancel', '$push', '$end', '$credit']);
/** Protocol events that have a place, and not this one. */
const ELSEWHERE: ReadonlySet<string> = new Set(
  '$hello $welcome $refresh $refreshed $channels $ack $passed $goaway $open $resume'.split(' '),
);

/** What a channel needs of its session. */
export interface ChannelHost {
  readonly clock: Clock;
  readonly history: History | undefined;
  readonly heard: Heard;
  /** The largest body that this side takes, and the largest that the peer takes. */
  readonly receiveLimit: number;
  readonly sendLimit: number;
  /** Whether a resumable channel may queue more: a session without a connection holds a bound in all. */
  mayQueue(): boolean;
  /** The channel has received frames, or does not want more: there is something to confirm. */
  received(channel: Channel, bytes: number): void;
  /** The application has taken everything before this mark. */
  passed(channel: Channel, mark: U64): void;
  /** Something about the channel's end has changed. */
  mayForget(channel: Channel): void;
}

interface Entry {
  readonly message?: Message;
  readonly answer?: Answer;
  /** Done when the application asks for what is behind it. */
  readonly pass?: () => void;
}

/** What an application is not to see of a channel. */
export const internals = Symbol('internals');

export class Channel<In extends EventMap = EventMap, Out extends EventMap = EventMap> implements AsyncIterable<Message> {
  /** The opener's number for it. */
  readonly id: U64;
  readonly name: string;
  /** What the opener said of it. */
  readonly meta: unknown;
  readonly priority: Priority;
  /** Whether it goes on when the session is resumed. */
  readonly resumable: boolean;
  /** Whether this side opened it. */
  readonly own: boolean;
  /** Where it was to go on in rooms with a history. */
  readonly since: readonly Position[] | undefined;
  /** Why it is over. Never rejects. */
  readonly closed: Promise<CloseReason>;
  /** For the session alone. */
  readonly [internals]: ChannelCore;

  /** Made by `socket.open`, or by the session for a channel that the server opened. */
  constructor(host: ChannelHost, open: Open, own: boolean) {
    const core = new ChannelCore(host, open, this as unknown as Channel);
    this[internals] = core;
    this.id = open.id;
    this.name = open.name;
    this.meta = open.meta;
    this.priority = open.priority;
    this.resumable = open.resumable;
    this.own = own;
    this.since = open.since;
    this.closed = core.closed.promise;
  }

  /**
   * Queues an event whole, or not at all. The promise resolves when it is queued: at once while there is room (1 MiB
   * and 1,024 messages; on a resumable channel 4 MiB and 65,536, with what is not confirmed), otherwise when there is.
   * It rejects with `ClosedError` when the channel ends first; nobody need look.
   *
   * @throws {EncodeError} At once, when the data cannot be sent.
   * @throws {BacklogError} At once, when 1,024 messages wait for room already: nobody looks at the promises.
   */
  send<E extends Name<Out>>(event: E, data?: DataOf<Out[E]>): Promise<void> {
    checkEvent(event);
    this[internals].checkLine();
    return handled(this[internals].queue(this[internals].frame(event, data)));
  }

  /** Whether `send` would queue at once. */
  get hasRoom(): boolean {
    return this[internals].hasRoom;
  }

  /** Resolves when everything queued was handed to the transport. Rejects with `ClosedError` when the channel ends first. */
  flush(): Promise<void> {
    return this[internals].flush();
  }

  /**
   * Asks the peer. Rejects with `Fault` when its handler refuses, `TimeoutError`, `BacklogError`, `ClosedError`, or
   * the signal's reason.
   *
   * @throws {EncodeError} At once, when the data cannot be sent.
   */
  request<E extends Name<Out>>(event: E, data?: DataOf<Out[E]>, options: AskOptions = {}): Promise<ReplyOf<Out[E]>> {
    checkEvent(event);
    const { reply, items } = this[internals].ask(event, data, options);
    // Whoever wants one answer wants no items: what comes of them is dropped, and its credit given back.
    void drain(items);
    return reply as Promise<ReplyOf<Out[E]>>;
  }

  /**
   * Asks for a stream of items. Leaving the loop cancels the request; errors are those of `request`.
   *
   * @throws {EncodeError} At once, when the data cannot be sent.
   */
  stream<E extends Name<Out>>(event: E, data?: DataOf<Out[E]>, options: AskOptions = {}): AsyncIterableIterator<ItemOf<Out[E]>> {
    checkEvent(event);
    const { items } = this[internals].ask(event, data, options);
    return items as AsyncIterableIterator<ItemOf<Out[E]>>;
  }

  /**
   * Handles an event, or a request: what the handler returns is the answer, an async generator gives items, and an
   * error is a fault. `$gap` is told of messages that a room dropped. Messages of one channel are handled one after
   * the other unless `concurrency` says otherwise. Not together with `receive` or `for await`.
   */
  on<E extends Name<In>>(event: E, handler: (data: DataOf<In[E]>, message: Message) => unknown): this;
  on(event: '$gap', handler: (gap: Gap, message: Message) => unknown): this;
  on(event: string, handler: Handler): this {
    if (event !== '$gap') {
      checkEvent(event);
    }
    this[internals].on(event, handler);
    return this;
  }

  /** How many handlers run at once. */
  get concurrency(): number {
    return this[internals].handlers.concurrency;
  }

  set concurrency(handlers: number) {
    this[internals].handlers.concurrency = handlers;
  }

  /** Events that no handler took. */
  get dropped(): number {
    return this[internals].handlers.dropped;
  }

  /**
   * The next message; `null` when the peer has finished. Rejects with `ClosedError` when the channel ended otherwise.
   * Not together with `on`.
   */
  receive(): Promise<Message<Name<In>> | null> {
    return this[internals].receive() as Promise<Message<Name<In>> | null>;
  }

  /** All messages, as `receive` gives them. Leaving the loop changes nothing. */
  async *[Symbol.asyncIterator](): AsyncGenerator<Message<Name<In>>, void, undefined> {
    for (let message = await this.receive(); message; message = await this.receive()) {
      yield message;
    }
  }

  /** Ends this direction behind what is queued. The channel is over when the peer has ended its own, too. */
  finish(): void {
    this[internals].finish();
  }

  /** Ends the channel in both directions, behind what is queued. Resolves when that is with the transport, or never can be. */
  async close(code: number = Code.NORMAL, text = ''): Promise<void> {
    this[internals].close(new CloseReason(code, text, 'local'));
    await this[internals].sent();
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }
}

async function drain(items: ItemQueue<unknown>): Promise<void> {
  try {
    for await (const _ of items);
  } catch {
    // The reply tells the same.
  }
}

/** The works of a channel, which the session drives. */
export class ChannelCore implements AskSender {
  readonly asked: Asked;
  readonly handlers = new Handlers();
  readonly closed = new Deferred<CloseReason>();
  readonly outbox: Outbox;
  readonly open: Open;
  /** How many frames were received, the end included. */
  receivedCount = 0;
  /** How many of them the peer was told of. */
  ackedCount = 0;
  /** Bytes that were received since. */
  ackBytes = 0;
  readonly #host: ChannelHost;
  readonly #channel: Channel;
  readonly #inbox = new Inbox<Entry>(RECEIVE);
  readonly #answers = new Map<U64, Answer>();
  /** Frames that wait for room. */
  readonly #line: { frame: Uint8Array; turn: Deferred<void> }[] = [];
  #stream: BidiStream | undefined;
  #stoppedWith: number | undefined;
  #use: 'none' | 'handlers' | 'receive' = 'none';
  #peerOver = false;
  #notReading = false;
  #reason: CloseReason | undefined;
  /** Why it is over when both directions have ended in order. */
  #orderly: CloseReason | undefined;

  constructor(host: ChannelHost, open: Open, channel: Channel) {
    this.#host = host;
    this.open = open;
    this.#channel = channel;
    this.outbox = new Outbox(open.resumable ? SEND_RESUMABLE : SEND, open.resumable, {
      stopped: (code) => this.#onStopped(code),
      done: () => host.mayForget(channel),
    });
    this.asked = new Asked(this);
  }

  get clock(): Clock {
    return this.#host.clock;
  }

  /** Why it is over, if it is. */
  get end(): CloseReason | undefined {
    return this.#reason;
  }

  /** Whether this side takes nothing more of a channel whose peer has not ended it. */
  get refusing(): boolean {
    return this.#notReading && !this.#peerOver;
  }

  /** Whether both directions are over, and everything of them is confirmed or need not be. */
  get forgettable(): boolean {
    return this.#reason !== undefined && this.outbox.done && (this.#peerOver || this.#notReading);
  }

  /** Whether it does not keep the session on its connection. */
  get yields(): boolean {
    return this.open.resumable || (this.open.yields === true && this.asked.size === 0);
  }

  get hasRoom(): boolean {
    return this.outbox.hasRoom && (!this.open.resumable || this.#host.mayQueue());
  }

  frame(event: string, data: unknown, id?: U64, deadline?: number): Uint8Array {
    return encodeFrame(this.#host.sendLimit, event, data, id, deadline, this.outbox.memory);
  }

  async queue(frame: Uint8Array): Promise<void> {
    this.#checkSending();
    if (this.#line.length === 0 && this.hasRoom) {
      this.outbox.push(frame);
      return;
    }
    const turn = new Deferred<void>();
    this.#line.push({ frame, turn });
    if (this.#line.length === 1) {
      void this.#serveLine();
    }
    await turn.promise;
  }

  /** Takes those that wait for room one after the other: who asked first is sent first. */
  async #serveLine(): Promise<void> {
    for (let first = this.#line[0]; first; first = this.#line[0]) {
      try {
        this.#checkSending();
      } catch (error) {
        for (const { turn } of this.#line.splice(0)) {
          turn.reject(error);
        }
        return;
      }
      if (this.hasRoom) {
        this.outbox.push(first.frame);
        this.#line.shift();
        first.turn.resolve();
      } else {
        await this.outbox.changed.wait();
      }
    }
  }

  /** Refuses to let more wait than a program means to that looks at what `send` returns. */
  checkLine(): void {
    if (this.#line.length >= LINE) {
      throw new BacklogError(`${LINE} messages wait for room in the queue already: await what send returns`);
    }
  }

  queueNow(frame: Uint8Array): void {
    this.outbox.push(frame);
  }

  ask(event: string, data: unknown, options: AskOptions): { reply: Promise<unknown>; items: ItemQueue<unknown> } {
    const asked = this.asked.ask(event, data, options);
    if (this.#peerOver) {
      this.asked.fail(new ClosedError(this.#reason ?? new CloseReason(Code.NORMAL, 'the peer has finished', 'peer')));
    }
    return asked;
  }

  async flush(): Promise<void> {
    while (!this.outbox.flushed) {
      this.#checkOpen();
      await this.outbox.changed.wait();
    }
  }

  /** Resolves when what was queued before the end is with the transport, or never can be. */
  async sent(): Promise<void> {
    while (!this.outbox.flushed && this.#stream !== undefined) {
      await this.outbox.changed.wait();
    }
  }

  on(event: string, handler: Handler): void {
    if (this.#use === 'receive') {
      throw new UsageError('this channel is read with receive or for await');
    }
    this.handlers.on(event, handler);
    if (this.#use === 'none') {
      this.#use = 'handlers';
      // Behind the present code, so that it can name all handlers.
      queueMicrotask(() => void this.handlers.run(() => this.#next()).then(() => this.#onHandled()));
    }
  }

  async receive(): Promise<Message | null> {
    if (this.#use === 'handlers') {
      throw new UsageError('this channel is read by handlers');
    }
    this.#use = 'receive';
    const message = await this.#next();
    if (message === undefined) {
      if (this.#reason && this.#reason.code !== Code.NORMAL) {
        throw new ClosedError(this.#reason);
      }
      return null;
    }
    return message;
  }

  finish(): void {
    this.wind(new CloseReason(Code.NORMAL, '', 'local'));
  }

  /** Ends this direction; once the peer has ended its own, the channel is over for this reason, the first that was given. */
  wind(reason: CloseReason): void {
    this.#orderly ??= reason;
    this.outbox.finish();
    if (this.#peerOver) {
      this.#conclude(reason);
    }
    this.#host.mayForget(this.#channel);
  }

  /** Ends it from this side: `$close`, the end, and no more reading. */
  close(reason: CloseReason): void {
    if (this.#reason !== undefined) {
      return;
    }
    if (!this.outbox.ended) {
      this.outbox.push(encodeFrame(this.#host.sendLimit, '$close', { code: reason.code, text: sendable(reason.text) }));
      this.outbox.finish();
    }
    this.#stopReading(reason.code);
    this.#inbox.clear();
    this.#conclude(reason);
  }

  /** Ends it without a word: the connection is lost, or the session. */
  abandon(reason: CloseReason): void {
    this.detach();
    this.outbox.refuse();
    this.#notReading = true;
    this.#conclude(reason);
  }

  /** Begins on its first stream, or goes on over another, at whose begin `reader` may stand already. */
  attach(stream: BidiStream, reader?: FrameReader): void {
    this.detach();
    this.#stream = stream;
    this.outbox.attach(stream.send);
    this.#readOn(stream, reader ?? this.#reader(stream), false);
  }

  /** Goes on over another stream once the acceptor has said in `$resume` what it has. */
  reattach(stream: BidiStream): void {
    this.detach();
    this.#stream = stream;
    void this.#read(stream, this.#reader(stream), true);
  }

  /** Leaves the stream for a newer one: nothing of it counts any more. */
  leaveStream(): void {
    const old = this.#stream;
    this.detach();
    old?.receive.stop(Code.NORMAL);
    handled(old?.send.finish() ?? Promise.resolve());
  }

  /** Whether it has a stream on the present connection. */
  get attached(): boolean {
    return this.#stream !== undefined;
  }

  /** Whether the peer's direction has ended. */
  get peerFinished(): boolean {
    return this.#peerOver;
  }

  #reader(stream: BidiStream): FrameReader {
    return new FrameReader(stream.receive, this.#host.receiveLimit, this.clock, this.#host.heard);
  }

  #readOn(stream: BidiStream, reader: FrameReader, awaitsResume: boolean): void {
    if (this.#notReading) {
      this.#stopReading(Code.NORMAL);
    } else {
      void this.#read(stream, reader, awaitsResume);
    }
  }

  /** The stream is gone; nothing of it counts any more. */
  detach(): void {
    this.#stream = undefined;
    this.outbox.detach();
  }

  #checkOpen(): void {
    if (this.#reason !== undefined) {
      throw new ClosedError(this.#reason);
    }
  }

  #checkSending(): void {
    this.#checkOpen();
    if (this.#stoppedWith !== undefined) {
      throw new ClosedError(new CloseReason(this.#stoppedWith, 'the peer takes nothing more', 'peer'));
    }
    if (this.outbox.ended) {
      if (this.#orderly && this.#orderly.code !== Code.NORMAL) {
        throw new ClosedError(this.#orderly);
      }
      throw new UsageError('this direction of the channel is finished');
    }
  }

  /** The next message that is still of interest. */
  async #next(): Promise<Message | undefined> {
    while (true) {
      const entry = await this.#inbox.take();
      if (entry?.pass) {
        entry.pass();
      } else if (!entry?.answer?.over) {
        entry?.answer?.begin();
        this.#host.history?.taken(this.#channel, entry?.message);
        return entry?.message;
      }
    }
  }

  async #read(stream: BidiStream, reader: FrameReader, expectResume: boolean): Promise<void> {
    const stale = (): boolean => this.#stream !== stream;
    let awaitsResume = expectResume;
    try {
      while (!stale() && (awaitsResume || !this.#notReading)) {
        const body = await reader.next();
        if (stale() || (this.#notReading && !awaitsResume)) {
          // The end of a stream that this side has stopped is no end of the peer's.
          return;
        }
        if (body === null) {
          if (awaitsResume) {
            throw new WireError(Code.PROTOCOL_ORDER, 'the stream ended where $resume belongs');
          }
          this.#onFinished();
          return;
        }
        const message = decodeMessage(body);
        if (awaitsResume && message.event !== '$close') {
          this.#onResume(message, stream);
          awaitsResume = false;
          if (this.#notReading) {
            this.#stopReading(Code.NORMAL);
          }
        } else if (!(await this.#take(message, body.length + 4, stream, stale))) {
          return;
        }
      }
    } catch (error) {
      if (stale() || (this.#notReading && !awaitsResume)) {
        return;
      }
      if (error instanceof WireError) {
        this.close(new CloseReason(error.code, error.message, 'local'));
      } else if (error instanceof StreamEnd) {
        this.#onClosed(stream, new CloseReason(error.code, '', 'peer'));
      }
      // Otherwise the connection is over, which the session sees.
    }
  }

  /** Takes in one message. False when nothing more is to be read. */
  async #take(message: WireMessage, size: number, stream: BidiStream, stale: () => boolean): Promise<boolean> {
    const { event } = message;
    const { history } = this.#host;
    const pass = this.#passes(message) ?? history?.passes(this.#channel, message, fieldsOf);
    if (ASKER_SIDE.has(event)) {
      this.asked.take(message, size);
    } else if (ANSWERER_SIDE.has(event)) {
      this.#forAnswer(message, size);
    } else if (event === '$close') {
      const reason = decodeClose(message);
      this.#peerOver = true;
      this.#count(2, size);
      this.#onClosed(stream, reason);
      return false;
    } else if (ELSEWHERE.has(event)) {
      throw new WireError(Code.PROTOCOL_ORDER, `${event} has no place here`);
    } else if (event.startsWith('$') && event !== '$gap' && !pass) {
      throw new WireError(Code.BAD_MESSAGE, 'an unknown event of the protocol');
    } else {
      const gap = event === '$gap' ? (history?.gap(message, fieldsOf) ?? decodeGap(message)) : undefined;
      while (!(this.#inbox.hasRoom && this.#answers.size < ANSWERS)) {
        if (this.asked.size > 0) {
          this.asked.backlog();
        }
        await this.#inbox.changed.wait();
        if (stale() || this.#notReading) {
          return false;
        }
      }
      this.#inbox.push(pass ? { pass } : this.#entry(message, size, gap), size);
    }
    this.#count(1, size);
    return true;
  }

  /** What the application passes by when it comes to this message. */
  #passes(message: WireMessage): (() => void) | undefined {
    if (message.event === '$mark') {
      const mark = decodeMark(message);
      return () => this.#host.passed(this.#channel, mark);
    }
    return undefined;
  }

  #entry(message: WireMessage, size: number, gap: Gap | undefined): Entry {
    const { event, id, deadline } = message;
    const data = message.data;
    if (id === undefined) {
      return { message: new Message(event, data, size, undefined, gap) };
    }
    const answer = new Answer(this, id, event, deadline, () => {
      this.#answers.delete(id);
      this.#inbox.changed.wake();
    });
    this.#answers.set(id, answer);
    return { message: new Message(event, data, size, answer), answer };
  }

  #forAnswer(message: WireMessage, size: number): void {
    const { event, data } = message;
    const answer = this.#answers.get(needId(message));
    if (event === '$credit' && !isU64(data)) {
      throw new WireError(Code.BAD_MESSAGE, '$credit: its data is an integer from 0');
    }
    switch (event) {
      case '$cancel':
        return answer?.cancel();
      case '$push':
        return answer?.items.push(data, size);
      case '$end':
        return answer?.items.end();
      default:
        return answer?.credit.give(data as U64);
    }
  }

  #count(frames: number, bytes: number): void {
    if (this.open.resumable) {
      this.receivedCount += frames;
      this.ackBytes += bytes;
      this.#host.received(this.#channel, bytes);
    }
  }

  /** The first frame on a stream that goes on. */
  #onResume(message: WireMessage, stream: BidiStream): void {
    const { received, done } = decodeResume(message);
    if (done) {
      // The acceptor has forgotten it: both directions had ended there, and everything was received.
      this.#peerOver = true;
      this.outbox.refuse();
      this.#inbox.end();
      this.#conclude(new CloseReason(Code.NORMAL, '', 'peer'));
      this.#host.mayForget(this.#channel);
    } else if (this.outbox.told(received, 'stream') === 'mismatch') {
      throw new WireError(Code.RESUME_MISMATCH, 'the peer has received what was not sent');
    }
    this.outbox.attach(stream.send);
  }

  /** The peer has ended its direction in order: it answers nothing more. */
  #onFinished(): void {
    this.#peerOver = true;
    this.#count(1, 0);
    this.#inbox.end();
    this.asked.fail(new ClosedError(new CloseReason(Code.NORMAL, 'the peer has finished', 'peer')));
    if (this.#stoppedWith !== undefined) {
      this.#conclude(new CloseReason(this.#stoppedWith, '', 'peer'));
    } else if (this.outbox.ended) {
      this.#conclude(this.#orderly ?? new CloseReason(Code.NORMAL, '', 'peer'));
    }
    this.#host.mayForget(this.#channel);
  }

  /** The peer has closed it: it reads nothing more of this side. */
  #onClosed(stream: BidiStream, reason: CloseReason): void {
    this.#peerOver = true;
    this.outbox.detach();
    stream.send.reset(reason.code);
    this.outbox.refuse();
    this.#conclude(reason);
  }

  /** The peer has stopped this side's direction. What it still says is read first, and tells why. */
  #onStopped(code: number): void {
    this.#stoppedWith = code;
    this.outbox.changed.wake();
    if (this.#peerOver || this.#notReading) {
      this.#conclude(new CloseReason(code, '', 'peer'));
    }
    this.#host.mayForget(this.#channel);
  }

  /** The handlers have seen everything that came. */
  #onHandled(): void {
    if (this.#reason === undefined) {
      this.finish();
    }
  }

  #stopReading(code: number): void {
    this.#notReading = true;
    this.#inbox.changed.wake();
    if (!this.#peerOver) {
      this.#stream?.receive.stop(code);
      if (this.open.resumable) {
        this.#host.received(this.#channel, 0);
      }
    }
  }

  #conclude(reason: CloseReason): void {
    if (this.#reason === undefined) {
      this.#reason = reason;
      const error = new ClosedError(reason);
      this.asked.fail(error);
      for (const answer of [...this.#answers.values()]) {
        answer.abandon(error);
      }
      this.#inbox.end();
      this.outbox.changed.wake();
      this.closed.resolve(reason);
    }
    this.#host.mayForget(this.#channel);
  }
}

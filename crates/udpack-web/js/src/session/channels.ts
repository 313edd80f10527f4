/**
 * The channels of a session: opening, accepting, going on over another connection, forgetting (PROTOCOL.md §7, §8).
 */

import { type Clock, handled, Signal, sleep, within } from '../base/async.js';
import { WireError } from '../base/errors.js';
import { Channel, type ChannelHost, internals } from '../channel/channel.js';
import { type History } from '../channel/history.js';
import { FrameReader, type Heard } from '../channel/reader.js';
import { type BidiStream, type Connection } from '../transport/transport.js';
import { CloseReason, Code, sendable } from '../wire/codes.js';
import { decodeOpen, encodeOpen, type Open } from '../wire/control.js';
import { decodeMessage, encodeFrame, type U64 } from '../wire/message.js';
import { type Acks } from './acks.js';
import { type Link } from './admission.js';
import { Rate } from './rate.js';
import { Seen } from './seen.js';

const OPEN_MS = 30_000;
const SMALL_FRAME = 4096;
/** What the resumable channels of a session without a connection may hold in all. */
const DETACHED_BYTES = 16 << 20;

/** Takes a channel that the server opened, or says why not. */
export type Accept = (channel: Channel) => CloseReason | undefined;

export class Channels implements ChannelHost {
  readonly clock: Clock;
  history: History | undefined;
  readonly heard: Heard = { at: 0 };
  readonly receiveLimit: number;
  sendLimit = SMALL_FRAME;
  /** Wakes when a channel was forgotten, or a connection came or went. */
  readonly changed = new Signal();
  readonly #acks: Acks;
  readonly #accept: Accept;
  readonly #acceptMost: number;
  readonly #own = new Map<U64, Channel>();
  readonly #accepted = new Map<U64, Channel>();
  #seen = new Seen();
  #nextId = 1;
  #link: Link | undefined;
  #closing = false;
  #rate: Rate;
  #canResume = false;

  constructor(clock: Clock, acks: Acks, receiveLimit: number, acceptMost: number, accept: Accept) {
    this.clock = clock;
    this.#acks = acks;
    this.receiveLimit = receiveLimit;
    this.#acceptMost = acceptMost;
    this.#accept = accept;
    this.#rate = new Rate(clock, 100);
  }

  /** All that are not forgotten. */
  get all(): Channel[] {
    return [...this.#own.values(), ...this.#accepted.values()];
  }

  mayQueue(): boolean {
    return this.#link !== undefined || this.all.reduce((sum, channel) => sum + channel[internals].outbox.bytes, 0) < DETACHED_BYTES;
  }

  received(channel: Channel): void {
    if (channel.resumable) {
      this.#acks.received(channel);
    }
  }

  passed(channel: Channel, mark: U64): void {
    if (this.#link?.welcome.marks) {
      this.#acks.passed(channel, mark);
    }
  }

  mayForget(channel: Channel): void {
    this.changed.wake();
    const map = channel.own ? this.#own : this.#accepted;
    const core = channel[internals];
    if (!core?.forgettable || map.get(channel.id) !== channel) {
      return;
    }
    if (channel.resumable && this.#link) {
      // What ends the peer's direction is confirmed before it is forgotten here.
      this.#acks.received(channel);
      this.#acks.now();
    }
    this.#acks.forget(channel);
    map.delete(channel.id);
  }

  /** Whether channels may be opened now. */
  get canOpen(): boolean {
    return this.#link !== undefined && !this.#closing;
  }

  /** No more channels are opened on this connection. */
  stopOpening(): void {
    this.#closing = true;
  }

  /** Opens a channel on the connection that stands. Undefined when that was lost meanwhile, and another may come. */
  async open(wanted: Omit<Open, 'id'>): Promise<Channel | undefined> {
    const link = this.#link;
    if (link === undefined) {
      return undefined;
    }
    while (this.#own.size >= link.welcome.channels && this.#link === link && !this.#closing) {
      await this.changed.wait();
    }
    const due = this.#rate.take();
    if (due > 0) {
      await Promise.race([sleep(this.clock, due), link.connection.closed]);
    }
    if (this.#link !== link || this.#closing) {
      return undefined;
    }
    const open = {
      ...wanted,
      id: this.#nextId,
      resumable: wanted.resumable && this.#canResume,
      since: link.welcome.history ? wanted.since : undefined,
    };
    const first = encodeFrame(this.sendLimit, '$open', encodeOpen(open));
    this.#nextId += 1;
    const channel = new Channel(this, open, true);
    this.#own.set(open.id, channel);
    let stream: BidiStream | undefined;
    try {
      stream = await link.connection.openBidi(open.priority);
    } catch {
      // The connection is over, which the session sees.
    }
    if (this.#link === link && stream !== undefined && !channel[internals].attached) {
      handled(stream.send.write(first));
      channel[internals].attach(stream);
    } else if (!open.resumable) {
      this.#own.delete(open.id);
      return undefined;
    }
    return channel;
  }

  /** A connection stands. Where it resumes, the channels go on, otherwise those of the session before are over. */
  up(link: Link): void {
    this.#link = link;
    this.#closing = false;
    this.sendLimit = link.welcome.frame;
    this.heard.at = this.clock.now();
    this.#canResume = link.welcome.resume !== undefined;
    this.#rate = new Rate(this.clock, link.welcome.channelRate);
    if (link.welcome.resumed) {
      const resumable = [...this.#own.values()].filter((channel) => channel.resumable);
      const open = resumable.map((channel) => channel.id);
      link.control.push(encodeFrame(link.welcome.frame, '$channels', { open }));
      for (const channel of resumable) {
        void this.#goOn(link, channel);
      }
    } else {
      this.abandon(new CloseReason(Code.NOT_RESUMED, 'the session could not be resumed', 'local'));
      this.#seen = new Seen();
      this.#nextId = 1;
    }
    void this.#acceptAll(link.connection);
    this.changed.wake();
  }

  /** The connection is gone: what cannot go on is over. */
  down(reason: CloseReason, sessionOver: boolean): void {
    this.#link = undefined;
    for (const channel of this.all) {
      channel[internals].detach();
      if (sessionOver || !channel.resumable) {
        channel[internals].abandon(reason);
      }
    }
    this.changed.wake();
  }

  /** Ends all that are left. */
  abandon(reason: CloseReason): void {
    for (const channel of this.all) {
      channel[internals].abandon(reason);
    }
  }

  /** The peer's `$channels`: it has forgotten those of its own that are not among them. */
  peerHas(open: U64[]): void {
    const kept = new Set(open);
    for (const channel of this.#accepted.values()) {
      if (channel.resumable && !kept.has(channel.id) && !channel[internals].attached) {
        channel[internals].abandon(new CloseReason(Code.NORMAL, '', 'peer'));
      }
    }
  }

  /**
   * The peer's `$ack`.
   *
   * @throws {WireError} `resume_mismatch` when it confirms what was not sent.
   */
  peerHasReceived(id: U64, peersOwn: boolean, received: U64): void {
    const channel = (peersOwn ? this.#accepted : this.#own).get(id);
    if (channel?.resumable && channel[internals].outbox.told(received, 'ack') === 'mismatch') {
      throw new WireError(Code.RESUME_MISMATCH, 'the peer confirms what was not sent');
    }
  }

  /** An own channel of an earlier connection, on a stream of this one. */
  async #goOn(link: Link, channel: Channel): Promise<void> {
    const core = channel[internals];
    let stream: BidiStream;
    try {
      stream = await link.connection.openBidi(channel.priority);
    } catch {
      return;
    }
    if (this.#link !== link || this.#own.get(channel.id) !== channel) {
      stream.send.reset(Code.NORMAL);
      stream.receive.stop(Code.NORMAL);
      return;
    }
    const open = { ...core.open, received: core.receivedCount };
    handled(stream.send.write(encodeFrame(this.sendLimit + 16, '$open', encodeOpen(open))));
    core.reattach(stream);
  }

  async #acceptAll(connection: Connection): Promise<void> {
    for (let stream = await connection.acceptBidi(); stream; stream = await connection.acceptBidi()) {
      void this.#acceptOne(connection, stream);
    }
  }

  async #acceptOne(connection: Connection, stream: BidiStream): Promise<void> {
    const reader = new FrameReader(stream.receive, this.receiveLimit, this.clock, this.heard);
    try {
      const late = (): never => {
        throw new WireError(Code.FRAME_TIMEOUT, 'no $open in time');
      };
      const body = await within(this.clock, OPEN_MS, handled(reader.next()), late);
      if (body === null) {
        throw new WireError(Code.TRUNCATED, 'the stream ended before its $open');
      }
      const open = decodeOpen(decodeMessage(body));
      if (this.#link?.connection !== connection) {
        return;
      }
      if (open.received === undefined) {
        this.#acceptNew(stream, reader, open);
      } else {
        this.#acceptOn(stream, reader, open, open.received);
      }
    } catch (error) {
      if (error instanceof WireError) {
        refuse(stream, new CloseReason(error.code, error.message, 'local'));
      }
      // Otherwise the stream or the connection is over, and there is nobody to tell.
    }
  }

  #acceptNew(stream: BidiStream, reader: FrameReader, open: Open, first?: Uint8Array): void {
    if (this.#accepted.has(open.id)) {
      throw new WireError(Code.PROTOCOL_ORDER, 'a channel of this number is there');
    }
    this.#seen.add(open.id);
    if (this.#accepted.size >= this.#acceptMost) {
      throw new WireError(Code.RATE_LIMITED, 'too many channels are open');
    }
    const { received: _, ...rest } = open;
    const channel = new Channel(this, { ...rest, resumable: open.resumable && this.#canResume }, false);
    const refusal = this.#accept(channel);
    if (refusal) {
      return refuse(stream, refusal);
    }
    this.#accepted.set(open.id, channel);
    if (first) {
      handled(stream.send.write(first));
    }
    channel[internals].attach(stream, reader);
  }

  #acceptOn(stream: BidiStream, reader: FrameReader, open: Open, received: U64): void {
    const channel = this.#accepted.get(open.id);
    if (channel === undefined || !channel.resumable) {
      const isNew = received === 0 && !this.#seen.has(open.id) && this.#canResume;
      const first = encodeFrame(SMALL_FRAME, '$resume', { received, done: !isNew });
      if (isNew) {
        return this.#acceptNew(stream, reader, open, first);
      }
      handled(stream.send.write(first));
      handled(stream.send.finish());
      return;
    }
    if (channel.name !== open.name || channel.priority !== open.priority) {
      throw new WireError(Code.PROTOCOL_ORDER, 'a channel of this number was opened with another name or priority');
    }
    const core = channel[internals];
    core.leaveStream();
    const isKnown = core.outbox.told(received, 'stream') === 'ok';
    if (isKnown) {
      handled(stream.send.write(encodeFrame(SMALL_FRAME, '$resume', { received: core.receivedCount, done: false })));
      core.attach(stream, reader);
    } else {
      refuse(stream, new CloseReason(Code.RESUME_MISMATCH, 'received does not fit what was sent', 'local'));
      core.abandon(new CloseReason(Code.RESUME_MISMATCH, 'received does not fit what was sent', 'local'));
    }
  }
}

/** `$close`, the end, and no reading. */
function refuse(stream: BidiStream, reason: CloseReason): void {
  const close = encodeFrame(SMALL_FRAME, '$close', { code: reason.code, text: sendable(reason.text) });
  handled(stream.send.write(close));
  handled(stream.send.finish());
  stream.receive.stop(reason.code);
}


/**
 * A session: its connections one after the other, the control stream of each, and what outlives them
 * (PROTOCOL.md §5, §8).
 */

import { type Clock, Deferred, Signal, sleep, type Stop, within } from '../base/async.js';
import { Emitter } from '../base/emitter.js';
import { ClosedError, ConnectError, WireError } from '../base/errors.js';
import { type Channel, internals } from '../channel/channel.js';
import { type History } from '../channel/history.js';
import { type Connection, ConnectionEnd, type Mover } from '../transport/transport.js';
import { CloseReason, Code, sendable } from '../wire/codes.js';
import {
  decodeAck,
  decodeChannels,
  decodeClose,
  decodeGoAway,
  decodeRefreshed,
  type GoAway,
  type Open,
  type ResumeTicket,
} from '../wire/control.js';
import { decodeMessage, encodeFrame, type WireMessage } from '../wire/message.js';
import { Acks } from './acks.js';
import { admit, GONE_MS, type Link } from './admission.js';
import { type Accept, Channels } from './channels.js';
import { delay, type Reconnect, type SocketState } from './state.js';
import { TokenKeeper, type TokenSource, type TokenWanted } from './token.js';
import { Volatiles } from './volatile.js';

export interface SessionOptions {
  /** Makes a connection: to the address that a server has told, else each time to the next server that there is. */
  readonly dial: (signal: AbortSignal, told: string | undefined) => Promise<Connection>;
  /** How many servers the first connect tries, one after the other. */
  readonly first: number;
  readonly token: TokenSource;
  readonly agent: string;
  /** Whether the server is asked to keep the session when its connection is lost. */
  readonly resume: boolean;
  /** How to come back; not at all without. */
  readonly reconnect: Reconnect | undefined;
  readonly accept: Accept;
  readonly history: History | undefined;
  /** The largest body that this side takes, and the channels that the server may have open. */
  readonly frame: number;
  readonly channels: number;
  /** For the handshake and the admission, and for a graceful close. */
  readonly connectMs: number;
  readonly closeMs: number;
  readonly clock: Clock;
  /** From 0 to 1, without 1. */
  readonly random: () => number;
}

interface SessionEvents {
  state: SocketState;
  goaway: GoAway;
}

/** How a connection ended, and whether the client left it for another server. */
interface Outcome {
  readonly reason: CloseReason;
  readonly moved: boolean;
}

const CONTROL_FRAME = 4096;
/** How long a close waits for the server to end its directions, too. */
const LINGER_MS = 1000;
/** What a server is told of a page that may come back. */
const SLEEPS = 'the page sleeps';
/** Between `$close` and the end of the control stream. */
const FIN_MS = 3000;
/** How often a client goes to an address that it was told before it asks elsewhere, and to how many while it comes back. */
const TOLD_TRIES = 2;
const DETOURS = 3;

export class Session extends Emitter<SessionEvents> {
  readonly channels: Channels;
  readonly volatiles = new Volatiles();
  readonly token: TokenKeeper;
  readonly closed = new Deferred<CloseReason>();
  readonly #options: SessionOptions;
  readonly #acks: Acks;
  readonly #wishes = new Signal();
  #now: SocketState = { state: 'connecting' };
  #link: Link | undefined;
  #ticket: ResumeTicket | undefined;
  #sessionId: string | undefined;
  #wish: CloseReason | undefined;
  /** Where a server has told the session to be. */
  #told: string | undefined;
  #dialling: AbortController | undefined;
  #hurry = false;
  #asleep = false;
  /** A better connection than the one that was left for it. */
  #better: Connection | undefined;
  #turn: { at: number; goAway: GoAway; stop: Stop } | undefined;

  constructor(options: SessionOptions) {
    super();
    this.#options = options;
    this.#acks = new Acks(options.clock);
    this.token = new TokenKeeper(options.token, options.clock);
    this.channels = new Channels(options.clock, this.#acks, options.frame, options.channels, options.accept);
    this.channels.history = options.history;
  }

  get state(): SocketState {
    return this.#now;
  }

  /** What carries the session now. */
  get via(): Connection['via'] {
    return this.#link?.connection.via;
  }

  /** 32 hexadecimal digits; another after a session that could not be resumed. */
  get id(): string | undefined {
    return this.#sessionId;
  }

  /** Makes the first connection. Rejects with `ConnectError`, or the signal's reason; then the session is over. */
  async start(signal: AbortSignal | undefined): Promise<void> {
    for (let left = this.#options.first - 1; ; left -= 1) {
      try {
        const link = await this.#dial('connect', signal);
        void this.#live(link);
        return;
      } catch (error) {
        if (left > 0 && error instanceof ConnectError && error.retry) {
          continue;
        }
        const reason = error instanceof ConnectError ? error.reason : new CloseReason(Code.CANCELLED, `${error}`, 'local');
        this.#finish(reason);
        throw error;
      }
    }
  }

  /** Opens a channel; waits for a connection while there may be one. Rejects with `ClosedError`, `EncodeError`, or the signal's reason. */
  async open(wanted: Omit<Open, 'id'>, signal?: AbortSignal): Promise<Channel> {
    const abort = (): void => this.channels.changed.wake();
    signal?.addEventListener('abort', abort);
    try {
      while (true) {
        signal?.throwIfAborted();
        if (this.#wish || this.#now.state === 'closed') {
          throw new ClosedError(this.#wish ?? (await this.closed.promise));
        }
        if (this.#now.state === 'goingAway' && !this.#options.reconnect) {
          throw new ClosedError(this.#now.goAway.reason);
        }
        const channel = this.channels.canOpen ? await this.channels.open(wanted) : undefined;
        if (channel) {
          return channel;
        }
        await this.channels.changed.wait();
      }
    } finally {
      signal?.removeEventListener('abort', abort);
    }
  }

  /** Ends the session in order. */
  close(reason: CloseReason): Promise<CloseReason> {
    this.#wish ??= reason;
    this.#wishes.wake();
    this.#dialling?.abort();
    this.channels.changed.wake();
    return this.closed.promise;
  }

  /** Tries to reconnect now instead of after the wait: the network is back, say. */
  reconnectNow(): void {
    this.#hurry = true;
    this.#wishes.wake();
  }

  /** Gives the connection up for a while: the server keeps the session, and no other connection is made until `wake`. */
  sleep(): void {
    if (this.#options.reconnect) {
      this.#asleep = true;
      this.#dialling?.abort();
      this.#link?.connection.close(Code.SUPERSEDED, SLEEPS);
    }
  }

  wake(): void {
    this.#asleep = false;
    this.reconnectNow();
  }

  /** Ends the session without waiting for anything: its page is going. */
  quit(): void {
    this.#link?.connection.close(Code.NORMAL, '');
    void this.close(new CloseReason(Code.NORMAL, 'the page is left', 'local'));
  }

  /** One try: connect, and be let in. */
  async #dial(wanted: TokenWanted, signal?: AbortSignal, follows = true): Promise<Link> {
    const { clock, connectMs } = this.#options;
    signal?.throwIfAborted();
    const token = await this.#fetchToken(wanted);
    const controller = new AbortController();
    const abort = (): void => controller.abort();
    signal?.addEventListener('abort', abort);
    try {
      const better = this.#better;
      this.#better = undefined;
      const dialled = better ? Promise.resolve(better) : this.#options.dial(controller.signal, this.#told);
      const connection = await within(clock, connectMs, dialled, () => {
        controller.abort();
        void dialled.then((late) => late.close(Code.NORMAL, '')).catch(() => {});
        throw new ConnectError(new CloseReason(Code.TIMED_OUT, 'no connection in time', 'local'));
      });
      if (signal?.aborted) {
        connection.close(Code.NORMAL, '');
        signal.throwIfAborted();
      }
      controller.signal.addEventListener('abort', () => connection.close(this.#asleep ? Code.SUPERSEDED : Code.NORMAL, ''));
      const hello = {
        token,
        agent: this.#options.agent,
        frame: this.#options.frame,
        channels: this.#options.channels,
        ...(this.#options.resume && { resume: this.#ticket ? { ticket: this.#ticket } : {} }),
        marks: true,
        history: this.#options.history !== undefined,
        follows,
      };
      return await admit(connection, hello, clock, connectMs);
    } catch (error) {
      signal?.throwIfAborted();
      throw error;
    } finally {
      signal?.removeEventListener('abort', abort);
    }
  }

  async #fetchToken(wanted: TokenWanted): Promise<string> {
    try {
      return await this.token.forHello(wanted);
    } catch (error) {
      // Whoever fetches tokens may succeed the next time.
      throw new ConnectError(new CloseReason(Code.CONNECTION_LOST, `no token: ${error}`, 'local'));
    }
  }

  /** One connection after the other, until there is no other. */
  async #live(first: Link): Promise<void> {
    let link = first;
    while (true) {
      this.#up(link);
      const { reason, moved } = await this.#drive(link);
      const { reconnect } = this.#options;
      const slept = reason.by === 'local' && reason.code === Code.SUPERSEDED;
      const comesBack = reconnect !== undefined && this.#wish === undefined && (moved || slept || (reason.retry && reason.by !== 'local'));
      // A session goes on where its connection was lost. One that a side has closed with a code is over.
      const goesOn = comesBack && !moved && (reason.by === 'transport' || reason.code === Code.SUPERSEDED);
      if (!goesOn) {
        this.#ticket = undefined;
      }
      // Whoever opens a channel anew can do so on the next connection, also where this side has left the one before.
      const lost = comesBack && !reason.retry ? new CloseReason(Code.CONNECTION_LOST, reason.text, 'transport') : reason;
      this.#down(lost, !goesOn || !this.#ticket);
      if (!comesBack) {
        return this.#finish(reason);
      }
      const next = await this.#comeBack(reconnect, reason, moved);
      if (next instanceof CloseReason) {
        return this.#finish(next);
      }
      link = next;
    }
  }

  #finish(reason: CloseReason): void {
    this.#better?.close(Code.NORMAL, '');
    this.channels.abandon(reason);
    this.volatiles.end();
    this.#change({ state: 'closed', reason });
    this.closed.resolve(reason);
    this.channels.changed.wake();
  }

  #change(state: SocketState): void {
    this.#now = state;
    this.emit('state', state);
  }

  #up(link: Link): void {
    const { welcome, control, stream } = link;
    this.#link = link;
    this.#sessionId = welcome.session;
    this.#ticket = welcome.resume && { session: welcome.session, token: welcome.resume.token };
    this.#hurry = false;
    if (!welcome.resumed) {
      this.volatiles.forget();
    }
    control.attach(stream.send);
    this.channels.up(link);
    this.#acks.use(control);
    this.token.up(welcome.expiresMs, (token) => control.push(encodeFrame(CONTROL_FRAME, '$refresh', { token })));
    this.volatiles.serve(link.connection, this.#options.frame);
    const { resumed, reason } = welcome;
    this.#change({ state: 'connected', resumed, ...(reason !== undefined && { reason }) });
  }

  #down(reason: CloseReason, sessionOver: boolean): void {
    this.#link?.control.detach();
    this.#link = undefined;
    this.#acks.use(undefined);
    this.token.down();
    this.channels.down(reason, sessionOver);
  }

  /** Serves one connection to its end. */
  async #drive(link: Link): Promise<Outcome> {
    const { connection } = link;
    const over = new Deferred<Outcome>();
    // What this side has begun to do counts before how the connection takes it.
    let parting: Outcome | undefined;
    const ended = (reason: CloseReason): void => over.resolve(parting ?? { reason, moved: false });
    const part = async (outcome: Outcome, work: Promise<void>): Promise<void> => {
      parting = outcome;
      await work;
      over.resolve(outcome);
    };
    const wished = async (): Promise<void> => {
      while (this.#wish === undefined && !over.settled) {
        await this.#wishes.wait();
      }
      if (this.#wish && !over.settled) {
        await part({ reason: this.#wish, moved: false }, this.#leave(link, this.#wish));
      }
    };
    const move = (): void =>
      void part({ reason: new CloseReason(Code.MOVED, 'moved to another server', 'local'), moved: true }, this.#move(link));
    void connection.closed.then(ended);
    if (this.#asleep) {
      connection.close(Code.SUPERSEDED, SLEEPS);
    }
    void wished();
    void this.#readControl(link, (goAway) => this.#onGoAway(goAway, move)).then((reason) => {
      if (reason) {
        connection.close(reason.code, sendable(reason.text, 256));
        ended(reason);
      }
    });
    const left = new AbortController();
    connection.seek?.(this.#moverFrom(connection), left.signal);
    const outcome = await over.promise;
    left.abort();
    this.#wishes.wake();
    connection.close(Code.NORMAL, '');
    this.#turn?.stop();
    return outcome;
  }

  #moverFrom(connection: Connection): Mover {
    return {
      // Not amidst a close or a move to another server, and not while a channel would end with the connection.
      mayMove: () =>
        this.#link?.connection === connection &&
        this.#now.state === 'connected' &&
        this.#ticket !== undefined &&
        this.#options.reconnect !== undefined &&
        this.#wish === undefined &&
        this.channels.all.every((channel) => channel[internals].yields),
      moveTo: (better) => {
        this.#better = better;
        connection.close(Code.SUPERSEDED, 'the session goes on over another transport');
      },
    };
  }

  /** Reads the control stream. Gives the reason to end the connection, or nothing when that has ended. */
  async #readControl(link: Link, onGoAway: (goAway: GoAway) => void): Promise<CloseReason | undefined> {
    let awaitsChannels = link.welcome.resumed;
    try {
      while (true) {
        const body = await link.reader.next();
        if (body === null) {
          throw new ConnectionEnd();
        }
        const message = decodeMessage(body);
        if (message.event === '$close') {
          const reason = decodeClose(message);
          await this.#agree(link, reason);
          return reason;
        }
        if (awaitsChannels) {
          this.channels.peerHas(decodeChannels(message));
          awaitsChannels = false;
        } else {
          this.#onControl(message, onGoAway);
        }
      }
    } catch (error) {
      if (error instanceof WireError) {
        return new CloseReason(error.code, error.message, 'local');
      }
      // An end of the control stream without `$close` breaks the order. That of the connection may be behind it, and counts.
      const ended = new CloseReason(Code.PROTOCOL_ORDER, 'the control stream ended without $close', 'local');
      return within<CloseReason | undefined>(this.#options.clock, GONE_MS, link.connection.closed.then(() => undefined), () => ended);
    }
  }

  #onControl(message: WireMessage, onGoAway: (goAway: GoAway) => void): void {
    switch (message.event) {
      case '$ack': {
        const { channel, own, received } = decodeAck(message);
        return this.channels.peerHasReceived(channel, own, received);
      }
      case '$refreshed':
        if (!this.token.waiting) {
          throw new WireError(Code.PROTOCOL_ORDER, '$refreshed without $refresh');
        }
        return this.token.refreshed(decodeRefreshed(message));
      case '$goaway':
        return onGoAway(decodeGoAway(message));
      default:
        throw new WireError(Code.PROTOCOL_ORDER, `${sendable(message.event)} has no place on the control stream`);
    }
  }

  /** Of several the one counts by which the client's turn comes soonest. */
  #onGoAway(goAway: GoAway, move: () => void): void {
    const { clock, random, reconnect } = this.#options;
    const patience = reconnect?.patience ?? goAway.retryAfterMs;
    const at = clock.now() + Math.min(goAway.retryAfterMs, patience) + goAway.windowMs * random();
    this.emit('goaway', goAway);
    if (this.#turn && this.#turn.at <= at) {
      return;
    }
    this.#turn?.stop();
    const stop = reconnect ? clock.after(at - clock.now(), move) : () => {};
    this.#turn = { at, goAway, stop };
    this.channels.stopOpening();
    this.#change({ state: 'goingAway', goAway });
  }

  /** Finishes all channels, and waits until what is queued is sent and what still comes is read, as long as the time allows. */
  async #wind(reason: CloseReason, ms: number, done: (channel: Channel) => boolean): Promise<void> {
    const { clock } = this.#options;
    this.channels.stopOpening();
    const until = clock.now() + ms;
    let late = false;
    const stop = clock.after(ms, () => {
      late = true;
      this.channels.changed.wake();
    });
    for (const channel of this.channels.all) {
      channel[internals].wind(reason);
    }
    const ended = (): boolean => this.channels.all.every((channel) => done(channel));
    while (!late && !ended()) {
      const changes = this.channels.all.map((channel) => channel[internals].outbox.changed.wait());
      await Promise.race([this.channels.changed.wait(), this.#link?.connection.closed, ...changes]);
      late ||= this.#link === undefined;
    }
    stop();
    if (this.#link) {
      await within(clock, Math.max(0, until - clock.now()), this.#link.connection.finished(), () => {});
    }
  }

  /** Closes the connection from this side, in order. */
  async #leave(link: Link, reason: CloseReason): Promise<void> {
    const { clock, closeMs } = this.#options;
    const until = clock.now() + closeMs;
    // Most servers end and confirm at once: Chromium 156 may lose the page when something still comes as the session ends.
    await this.#wind(reason, Math.min(closeMs, LINGER_MS), (channel) => channel[internals].outbox.done && channel[internals].peerFinished);
    await this.#wind(reason, Math.max(0, until - clock.now()), (channel) => channel[internals].outbox.flushed);
    link.control.push(encodeFrame(CONTROL_FRAME, '$close', { code: reason.code, text: sendable(reason.text) }));
    // The server ends the connection when it has read everything. The end of the stream is for one that waits for it:
    // Chromium 156 loses the page when a session ends while that of a stream is on its way.
    const over = link.connection.closed.then(() => true);
    if (!(await within(clock, FIN_MS, over, () => false))) {
      link.control.finish();
      await within(clock, Math.max(0, until - clock.now()), over, () => false);
    }
    link.connection.close(reason.code, sendable(reason.text, 256));
  }

  /** Leaves this server for another: nothing that was accepted is overtaken by what comes after. */
  async #move(link: Link): Promise<void> {
    const moved = new CloseReason(Code.MOVED, 'moved to another server', 'local');
    await this.#wind(moved, this.#options.closeMs, (channel) => channel[internals].outbox.flushed && channel[internals].peerFinished);
    await this.#leave(link, new CloseReason(Code.NORMAL, '', 'local'));
  }

  /** The server closes the connection: finishes what runs, then the connection can end. */
  async #agree(link: Link, reason: CloseReason): Promise<void> {
    await this.#wind(reason, this.#options.closeMs, (channel) => channel[internals].outbox.flushed && channel[internals].peerFinished);
    link.control.finish();
    const over = link.connection.closed.then(() => {});
    await within(this.#options.clock, this.#options.closeMs, Promise.race([link.control.untilFlushed(), over]), () => {});
  }

  /** The next connection; why there is none, otherwise. */
  async #comeBack(policy: Reconnect, lost: CloseReason, moved: boolean): Promise<Link | CloseReason> {
    const { clock, random } = this.#options;
    let since = clock.now();
    const turn = moved ? since : (this.#turn?.at ?? since);
    let detours = DETOURS;
    if (this.#turn) {
      // The session ends with its server, and another may not have heard of that yet.
      detours = 1;
      this.#told = this.#turn.goAway.address;
    }
    this.#turn = undefined;
    let tries = 0;
    let now = moved || this.#better !== undefined;
    let reason = lost;
    for (let attempt = 1; ; attempt += 1) {
      if (this.#asleep) {
        this.#change({ state: 'reconnecting', attempt: 1, retryInMs: 0, reason });
        while (this.#asleep && this.#wish === undefined) {
          await this.#wishes.wait();
        }
        // The time in which the page slept is not one in which the server did not answer.
        since = clock.now();
        attempt = 1;
      }
      const left = policy.patience - (clock.now() - since);
      if (attempt > policy.attempts || left <= 0) {
        return reason;
      }
      const wait = now ? 0 : Math.min(left, Math.max(delay(policy, attempt, random), turn - clock.now()));
      this.#change({ state: 'reconnecting', attempt, retryInMs: wait, reason });
      await this.#pause(wait);
      if (this.#wish) {
        return this.#wish;
      }
      this.#dialling = new AbortController();
      now = false;
      if (tries >= TOLD_TRIES) {
        this.#told = undefined;
      }
      const told = this.#told;
      tries += told === undefined ? 0 : 1;
      try {
        return await this.#dial('reconnect', this.#dialling.signal, detours > 0);
      } catch (error) {
        if (this.#wish) {
          return this.#wish;
        }
        if (this.#asleep) {
          continue;
        }
        if (!(error instanceof ConnectError)) {
          return new CloseReason(Code.INTERNAL, `${error}`, 'local');
        }
        reason = error.reason;
        const elsewhere = reason.code === Code.ELSEWHERE && reason.by === 'peer';
        if (elsewhere && told === undefined && detours > 0) {
          this.#told = reason.text;
          tries = TOLD_TRIES - 1;
          detours -= 1;
          now = true;
        } else if (elsewhere || !error.retry) {
          if (!elsewhere && told === undefined) {
            return reason;
          }
          // Somebody else is there: the servers that the program knows decide.
          this.#told = undefined;
          detours = 0;
        }
      }
    }
  }

  async #pause(ms: number): Promise<void> {
    const { clock } = this.#options;
    let over = false;
    const waited = sleep(clock, ms).then(() => {
      over = true;
    });
    while (!over && !this.#hurry && this.#wish === undefined) {
      await Promise.race([waited, this.#wishes.wait()]);
    }
    this.#hurry = false;
  }
}

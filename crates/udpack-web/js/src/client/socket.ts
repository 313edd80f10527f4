/** A socket: one client at one server, over one connection after the other. */

import { guarded } from '../base/emitter.js';
import { EncodeError } from '../base/errors.js';
import { type Channel } from '../channel/channel.js';
import { type EventMap } from '../channel/types.js';
import { type Session } from '../session/session.js';
import { type SocketState } from '../session/state.js';
import { type VolatileMessage } from '../session/volatile.js';
import { CloseReason, Code } from '../wire/codes.js';
import { type GoAway, type Position, type Priority } from '../wire/control.js';
import { checkEvent, isName } from '../wire/message.js';

export interface OpenOptions {
  /** For the server's handler: anything that a message may hold. */
  meta?: unknown;
  /** What waits on channels of a higher priority is sent first. Normal unless given. */
  priority?: 'bulk' | 'normal' | 'high';
  /** Whether the channel goes on when a lost connection is made again. It does unless this is false. */
  resumable?: boolean;
  /**
   * A channel that is not resumable keeps a session on its WebSocket once WebTransport is possible again. One that yields does
   * not, as long as no request waits on it: it ends with `connection_lost` then, and the program opens it again.
   */
  yields?: boolean;
  /** Goes on in rooms with a history where another channel was: its `positions`, of `udpack/rooms`. At most 256. */
  since?: readonly Position[] | undefined;
  /** Gives up waiting for a connection or for room for another channel. */
  signal?: AbortSignal;
}

/** What `socket.on` tells. */
export interface SocketEvents {
  /** The state has changed. */
  state: SocketState;
  /** The server is about to stop. A socket that reconnects moves by itself. */
  goaway: GoAway;
  /** A volatile message of any event. While there is a listener, `receiveVolatile` gets none. */
  volatile: VolatileMessage;
}

const PRIORITY: Record<'bulk' | 'normal' | 'high', Priority> = { bulk: 0, normal: 1, high: 2 };

export class Socket {
  /** Why it is over. Never rejects. */
  readonly closed: Promise<CloseReason>;
  readonly #session: Session;
  readonly #frame: number;
  readonly #another: (() => Promise<Socket>) | undefined;
  readonly #volatileListeners = new Set<(message: VolatileMessage) => void>();

  /** Made by `connect`. */
  constructor(session: Session, frame: number, another?: () => Promise<Socket>) {
    this.#session = session;
    this.#frame = frame;
    this.#another = another;
    this.closed = session.closed.promise;
    session.volatiles.deliver = (message) => {
      for (const listener of [...this.#volatileListeners]) {
        guarded(() => listener(message));
      }
      return this.#volatileListeners.size > 0;
    };
  }

  get state(): SocketState {
    return this.#session.state;
  }

  /** What carries the socket now. Not there without a connection, and where `dial` does not say it. */
  get transport(): 'webtransport' | 'wss' | undefined {
    return this.#session.via;
  }

  /**
   * Connects once more as the same client, over a WebSocket: for bulk that WebTransport carries slowly. That socket ends with its
   * connection. Gives nothing where this one's `transport` is not `auto`. Rejects with `ConnectError`.
   */
  overTcp(): Promise<Socket> | undefined {
    return this.#another?.();
  }

  /** The session's id, 32 hexadecimal digits. It stays when the session is resumed. */
  get sessionId(): string {
    return this.#session.id ?? '';
  }

  /** Calls `listener` at each event until the returned function is called. */
  on<E extends keyof SocketEvents>(event: E, listener: (value: SocketEvents[E]) => void): () => void {
    if (event === 'volatile') {
      const volatile = listener as (message: VolatileMessage) => void;
      this.#volatileListeners.add(volatile);
      return () => void this.#volatileListeners.delete(volatile);
    }
    return this.#session.on(event as 'state' | 'goaway', listener as (value: SocketState | GoAway) => void);
  }

  /**
   * Opens a channel. Waits while there is no connection but may be one again, and for room when as many are open as the
   * server allows. Rejects with `ClosedError`, `EncodeError`, or the signal's reason. That the server wants the channel
   * is not waited for: a refusal is its end.
   */
  async open<In extends EventMap = EventMap, Out extends EventMap = EventMap>(name: string, options: OpenOptions = {}): Promise<Channel<In, Out>> {
    checkEvent(name);
    const { meta, priority = 'normal', resumable = true, yields, since, signal } = options;
    const channel = await this.#session.open({ name, meta, priority: PRIORITY[priority], resumable, yields, since }, signal);
    return channel as unknown as Channel<In, Out>;
  }

  /**
   * Sends what is soon out of date: it may be lost, and while it waits a newer value takes its place. Never waits.
   *
   * @throws {EncodeError}
   */
  sendVolatile(event: string, data?: unknown): void {
    this.#volatile(event, data, undefined);
  }

  /** The same, with a place of its own for each key: positions of several, say. */
  sendLatest(event: string, key: string, data?: unknown): void {
    if (!isName(key)) {
      throw new EncodeError('a key has 1 to 128 bytes and no control characters');
    }
    this.#volatile(event, data, key);
  }

  /** The next volatile message, the latest of its event and key; `undefined` when the socket is over. */
  receiveVolatile(): Promise<VolatileMessage | undefined> {
    return this.#session.volatiles.receive();
  }

  /** Volatile messages that gave way here, to newer ones or for want of room, or broke a rule. */
  get droppedVolatile(): number {
    return this.#session.volatiles.dropped;
  }

  /** Presents a new token of the same identity. Rejects with `RefreshError` when it is refused: the one before stays good. */
  refresh(token: string): Promise<void> {
    return this.#session.token.refresh(token);
  }

  /** While it waits to reconnect: tries now. For when the program knows better, as by the browser's `online` event. */
  reconnectNow(): void {
    this.#session.reconnectNow();
  }

  /** Ends the socket in order: what is queued is sent first, for 5 seconds at most. Resolves with why it is over. */
  close(code: number = Code.NORMAL, text = ''): Promise<CloseReason> {
    return this.#session.close(new CloseReason(code, text, 'local'));
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  #volatile(event: string, data: unknown, key: string | undefined): void {
    checkEvent(event);
    this.#session.volatiles.send(this.#frame, event, data, key);
  }
}

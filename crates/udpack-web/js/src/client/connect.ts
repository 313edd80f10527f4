/** From options to a socket. */

import { type Clock, realClock } from '../base/async.js';
import { reportError } from '../base/emitter.js';
import { UsageError } from '../base/errors.js';
import { type History } from '../channel/history.js';
import { type Channel, internals } from '../channel/channel.js';
import { Session } from '../session/session.js';
import { RECONNECT, type Reconnect } from '../session/state.js';
import { type TokenWanted } from '../session/token.js';
import { dialFirst, type Endpoint, type Transport } from '../transport/choose.js';
import { type MakeSocket } from '../transport/mux/index.js';
import { type Connection, type Dial } from '../transport/transport.js';
import { CloseReason, Code, sendable } from '../wire/codes.js';
import { DEFAULT_FRAME, MIN_FRAME } from '../wire/frame.js';
import { discover, hashOf, nodeAt, socketAt } from './discover.js';
import { follow, windowHere } from './page.js';
import { Socket } from './socket.js';

export interface ConnectOptions {
  /** `https://HOST:PORT/udpack`; of several each try takes the next. */
  url?: string | readonly string[];
  /** Instead of `url`: where the page's server tells its address and hashes. `/.well-known/udpack.json` unless given. */
  discover?: string;
  /** With `url`: SHA-256 of the server's certificate, as base64 or hexadecimal, when no CA has signed it. */
  hashes?: readonly string[];
  /** What lets the client in. */
  token?: string;
  /** Or who fetches it: at each connect, and in time before the last one ends. */
  getToken?: (wanted: { reason: TokenWanted }) => string | Promise<string>;
  /** Channels that the server may open, by name. A handler that throws or rejects closes its channel with `handler_failed`. */
  channels?: Readonly<Record<string, (channel: Channel) => unknown>>;
  /** That of `udpack/rooms`, to miss nothing of rooms with a history. */
  history?: History;
  /** How to come back after a lost connection; false never does. */
  reconnect?: Partial<Reconnect> | boolean;
  /** Whether channels go on over the next connection. They do unless this is false. */
  resume?: boolean;
  /** Gives up the first connect. */
  signal?: AbortSignal;
  /** Name and version of the program, for the server's log; cut to 32 characters. */
  agent?: string;
  limits?: {
    /** The largest message that this side takes, in bytes. */
    frame?: number;
    /** Channels that the server may have open. */
    channels?: number;
  };
  timeouts?: {
    /** For the handshake, and again for the admission, in milliseconds. */
    connect?: number;
    /** For a graceful close, in milliseconds. */
    close?: number;
  };
  /**
   * Whose `pagehide` and `pageshow` say that the page goes and comes back: its window unless given, nobody's with null. A
   * page that may come back gives its connection up and has the server keep the session; one that will not ends it.
   */
  page?: EventTarget | null;
  /**
   * `auto` unless given: WebTransport, and a WebSocket where it fails or takes more than 250 ms. Each reconnect chooses again. A socket
   * that runs over a WebSocket looks for UDP after 5 s and, ever more rarely, each 5 minutes, and goes over with nothing lost or doubled:
   * by the states `reconnecting` and `connected`, and only while all its channels are resumable or yield.
   */
  transport?: Transport;
  /** With `url`: where the server takes WebSockets, if that is not `url` itself. They cannot be told `hashes`. */
  socketUrl?: string;
  /** Makes WebSockets where there is no global one: the class of a package, or one with options of its own. */
  WebSocket?: MakeSocket;
  /** Another transport: makes a connection to a URL. */
  dial?: Dial;
  /** Another time, for tests. */
  clock?: Clock;
  /** Other chances, for tests: from 0 to 1, without 1. */
  random?: () => number;
}

const AGENT = 'udpack-js/0.1.0';
const CHANNELS = 64;

/**
 * Connects, and resolves when the server has let the client in. Rejects with `ConnectError`, whose `retry` says whether
 * trying again can help, or with the signal's reason. The first connect is tried once for each URL.
 */
export async function connect(options: ConnectOptions = {}): Promise<Socket> {
  const { token, getToken, clock = realClock, random = Math.random, reconnect = true, limits = {}, timeouts = {} } = options;
  const source = getToken ?? token;
  if (source === undefined || (getToken && token !== undefined)) {
    throw new UsageError('connect needs a token or getToken, one of them');
  }
  const frame = limits.frame ?? DEFAULT_FRAME;
  if (!(frame >= MIN_FRAME)) {
    throw new UsageError(`limits.frame is at least ${MIN_FRAME}`);
  }
  const servers = serversOf(options, clock);
  let next = 0;
  const session = new Session({
    dial: (signal, told) => {
      if (told !== undefined) {
        return servers.at(told, signal);
      }
      const dial = servers.known[next % servers.known.length] as (signal: AbortSignal) => Promise<Connection>;
      next += 1;
      return dial(signal);
    },
    first: servers.known.length,
    token: source,
    agent: sendable(options.agent ?? AGENT, 32),
    resume: options.resume ?? true,
    reconnect: reconnect === false ? undefined : { ...RECONNECT, ...(reconnect === true ? {} : reconnect) },
    accept: (channel) => accept(options.channels ?? {}, channel),
    history: options.history,
    frame,
    channels: limits.channels ?? CHANNELS,
    connectMs: timeouts.connect ?? 10_000,
    closeMs: timeouts.close ?? 5000,
    clock,
    random,
  });
  const { signal, channels: _, ...same } = options;
  const isAuto = (options.transport ?? 'auto') === 'auto' && !options.dial;
  const socket = new Socket(session, frame, isAuto ? () => connect({ ...same, transport: 'wss', reconnect: false }) : undefined);
  await session.start(signal);
  const page = options.page === undefined ? windowHere() : options.page;
  if (page) {
    follow(page, session);
  }
  return socket;
}

interface Servers {
  readonly known: ((signal: AbortSignal) => Promise<Connection>)[];
  /** Connects to an address that one of them has told. */
  at(told: string, signal: AbortSignal): Promise<Connection>;
}

function serversOf(options: ConnectOptions, clock: Clock): Servers {
  const { url, socketUrl, hashes = [], dial, transport = 'auto' } = options;
  const known = hashes.map(hashOf);
  const choice = { transport, clock, channels: options.limits?.channels ?? CHANNELS, make: options.WebSocket, random: options.random ?? Math.random, kept: {} };
  const by = async (find: (signal: AbortSignal) => Endpoint | Promise<Endpoint>, signal: AbortSignal): Promise<Connection> =>
    dial ? dial((await find(signal)).url, signal) : dialFirst(find, choice, signal);
  let last: Endpoint | undefined;
  const to = (find: (signal: AbortSignal) => Endpoint | Promise<Endpoint>, signal: AbortSignal): Promise<Connection> => by(async (until) => (last = await find(until)), signal);
  const named = url === undefined || typeof url === 'string' ? [] : url;
  const at = (told: string, signal: AbortSignal): Promise<Connection> => {
    const from = last as Endpoint;
    return by(() => nodeAt(told, from, [from.url, ...named]), signal);
  };
  if (url !== undefined) {
    const urls = typeof url === 'string' ? [url] : url;
    if (urls.length === 0) {
      throw new UsageError('connect needs a URL');
    }
    return { known: urls.map((each) => (signal) => to(() => ({ url: each, socketUrl: socketUrl ?? socketAt(each), hashes: known }), signal)), at };
  }
  const address = options.discover ?? '/.well-known/udpack.json';
  return { known: [(signal) => to((until) => discover(address, until), signal)], at };
}

function accept(handlers: Readonly<Record<string, (channel: Channel) => unknown>>, channel: Channel): CloseReason | undefined {
  if (!Object.hasOwn(handlers, channel.name)) {
    return new CloseReason(Code.NO_SUCH_CHANNEL, 'nobody handles channels of this name', 'local');
  }
  const handler = handlers[channel.name] as (channel: Channel) => unknown;
  // Behind the present code: the channel has its stream then.
  queueMicrotask(() => {
    void (async () => {
      try {
        await handler(channel);
      } catch (error) {
        if (channel[internals].end === undefined) {
          reportError(error);
        }
        channel[internals].close(new CloseReason(Code.HANDLER_FAILED, 'the handler of the channel failed', 'local'));
      }
    })();
  });
  return undefined;
}

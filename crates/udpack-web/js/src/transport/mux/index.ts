/** The bundle `mux.js`: what a client needs where the network lets no UDP pass. It is loaded when it is needed. */

import { within } from '../../base/async.js';
import { type ConnectError } from '../../base/errors.js';
import { type CloseReason } from '../../wire/codes.js';
import { type Connection } from '../transport.js';
import { lookForUdp, Probes, remember, type WayBack } from './back.js';
import { type MuxSettings, MuxConnection, type Socket } from './connection.js';

/** What makes a WebSocket: that of the browser, or another. */
export type MakeSocket = new (url: string, protocol: string) => Socket;

export interface Way extends WayBack {
  readonly url: string;
  /** The time from when on a WebSocket may be made. */
  readonly from: number;
  readonly make: MakeSocket | undefined;
  /** What a client keeps from one connection to the next. */
  readonly kept: Kept;
}

export interface Kept {
  probes?: Probes;
}

const SUBPROTOCOL = 'qmux-02.udpack-1';

/** Makes a connection over a WebSocket. Rejects with `ConnectError`. */
export async function dialWebSocket(way: MuxSettings & Pick<Way, 'url' | 'make'>, signal: AbortSignal): Promise<MuxConnection> {
  const { CloseReason, Code, ConnectError } = way.classes;
  const Make = way.make ?? (globalThis as { WebSocket?: MakeSocket }).WebSocket;
  if (!Make) {
    throw new ConnectError(new CloseReason(Code.TRANSPORT_ERROR, 'this program has no WebSocket', 'local'));
  }
  let socket: Socket;
  try {
    socket = new Make(way.url, SUBPROTOCOL);
  } catch (error) {
    throw new ConnectError(new CloseReason(Code.TRANSPORT_ERROR, `${error}`, 'local'));
  }
  const connection = new MuxConnection(socket, way);
  const giveUp = (): void => connection.close(Code.CANCELLED, '');
  signal.addEventListener('abort', giveUp);
  if (signal.aborted) {
    giveUp();
  }
  try {
    await connection.begun.promise;
    return connection;
  } finally {
    signal.removeEventListener('abort', giveUp);
  }
}

/**
 * The first connection that stands: `first`, if there is one, or a WebSocket, which is made when its time has come or `first` has
 * failed. Rejects with `ConnectError` when there is neither, and tells of both. `signal` gives the WebSocket up.
 */
export async function race(first: Promise<Connection> | undefined, way: Way, signal: AbortSignal): Promise<Connection> {
  const { CloseReason, Code, ConnectError } = way.classes;
  if (!first) {
    return dialWebSocket(way, signal);
  }
  const probes = (way.kept.probes ??= new Probes());
  let won: Connection | undefined;
  const take = (connection: Connection): void => {
    won ??= connection;
    if (won !== connection) {
      connection.close(Code.NORMAL, '');
    } else if (connection instanceof MuxConnection) {
      remember(way.key, true);
      connection.seek = way.back && ((mover, until) => void lookForUdp(way, probes, mover, until));
    } else {
      remember(way.key, false);
      probes.lasts(connection, way.clock);
    }
  };
  first.then(take, () => {});
  const wait = way.from - way.clock.now();
  await (wait > 0 ? within<unknown>(way.clock, wait, first, () => {}).catch(() => {}) : undefined);
  if (won || signal.aborted) {
    return first;
  }
  const socket = dialWebSocket(way, signal);
  socket.then(take, () => {});
  try {
    return await Promise.any([first, socket]);
  } catch (error) {
    const [one, other] = (error as { errors: ConnectError[] }).errors.map(({ reason }) => reason) as [CloseReason, CloseReason];
    // The trouble that may go away is the one that counts.
    const { code, by } = one.retry ? one : other;
    throw new ConnectError(new CloseReason(code, `${one.text}; ${other.text}`, by));
  }
}

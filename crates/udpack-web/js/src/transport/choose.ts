/** Which transport carries a connection: WebTransport, or a WebSocket where the network lets no UDP pass (PROTOCOL.md §17). */

import { type Clock, within } from '../base/async.js';
import { ConnectError } from '../base/errors.js';
import { CloseReason, Code } from '../wire/codes.js';
import { type MakeSocket } from './mux/index.js';
import { type Connection, ConnectionEnd, StreamEnd } from './transport.js';
import { dialWebTransport } from './webtransport.js';

/** `auto` begins with WebTransport and tries a WebSocket 300 ms later, or as soon as WebTransport has failed; the first that stands is taken. */
export type Transport = 'auto' | 'webtransport' | 'wss';

/** Where a server is. */
export interface Endpoint {
  readonly url: string;
  /** Its WebSockets. */
  readonly socketUrl: string;
  /** SHA-256 of the certificates that the server has or will have next. None: a CA has signed it. */
  readonly hashes: readonly Uint8Array[];
}

export interface Choice {
  readonly transport: Transport;
  readonly clock: Clock;
  /** Channels that the server may have open. */
  readonly channels: number;
  /** Makes WebSockets, where the global one does not. */
  readonly make: MakeSocket | undefined;
}

const HEAD_START_MS = 300;

/** Makes a connection. Rejects with `ConnectError`. */
export async function dialFirst({ url, socketUrl, hashes }: Endpoint, choice: Choice, signal: AbortSignal): Promise<Connection> {
  const { transport, clock } = choice;
  const other = new AbortController();
  const abort = (): void => other.abort();
  signal.addEventListener('abort', abort);
  try {
    let first: Promise<Connection> | undefined;
    if (transport !== 'wss') {
      first = dialWebTransport(url, other.signal, { clock, hashes });
      if (transport === 'webtransport') {
        return await first;
      }
      const stands = await within(clock, HEAD_START_MS, first, () => undefined).catch(() => {});
      if (stands) {
        return stands;
      }
    }
    let mux: typeof import('./mux/index.js');
    try {
      mux = await import('./mux/index.js');
    } catch (error) {
      if (first) {
        return await first;
      }
      throw new ConnectError(new CloseReason(Code.CONNECTION_LOST, `${error}`, 'transport'));
    }
    const classes = { CloseReason, Code, ConnectError, ConnectionEnd, StreamEnd };
    return await mux.race(first, { ...choice, url: socketUrl, classes }, other.signal);
  } finally {
    // What has not stood by now is given up unseen.
    signal.removeEventListener('abort', abort);
    abort();
  }
}

/** Which transport carries a connection: WebTransport, or a WebSocket where the network lets no UDP pass (PROTOCOL.md §17). */

import { type Clock, within } from '../base/async.js';
import { ConnectError } from '../base/errors.js';
import { CloseReason, Code } from '../wire/codes.js';
import { type Kept, type MakeSocket } from './mux/index.js';
import { type Connection, ConnectionEnd, StreamEnd } from './transport.js';
import { dialWebTransport } from './webtransport.js';

/**
 * `auto` begins with WebTransport and tries a WebSocket 250 ms later, or as soon as WebTransport has failed; the first that stands is taken.
 * For a day after a WebSocket was first, both begin at once.
 */
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
  /** From 0 to 1, without 1. */
  readonly random: () => number;
  /** Of one client, over all its connections. */
  readonly kept: Kept;
}

/** After this the WebSocket is made; what makes it is loaded before, which takes a round trip. */
const HEAD_START_MS = 250;
const LOAD_MS = 150;
const DAY_MS = 86_400_000;

/** What a page has, and a Worker has not. */
export interface Keeping {
  readonly localStorage: { getItem(key: string): string | null; setItem(key: string, value: string): void; removeItem(key: string): void };
}

/** Whether a WebSocket was first, of late. */
function wasSocket(key: string): boolean {
  try {
    return Math.abs(Date.now() - Number((globalThis as unknown as Keeping).localStorage.getItem(key))) < DAY_MS;
  } catch {
    return false;
  }
}

/** Makes a connection to where the server is found. Rejects with `ConnectError`. */
export async function dialFirst(find: (signal: AbortSignal) => Endpoint | Promise<Endpoint>, choice: Choice, signal: AbortSignal): Promise<Connection> {
  const { transport, clock, kept } = choice;
  const { url, socketUrl, hashes } = await find(signal);
  const key = `udpack-wss ${url}`;
  const other = new AbortController();
  const abort = (): void => other.abort();
  signal.addEventListener('abort', abort);
  try {
    let first: Promise<Connection> | undefined;
    let from = 0;
    if (transport !== 'wss') {
      first = dialWebTransport(url, other.signal, { clock, hashes });
      if (transport === 'webtransport') {
        return await first;
      }
      if (!wasSocket(key)) {
        from = clock.now() + HEAD_START_MS;
        const stands = await within(clock, LOAD_MS, first, () => undefined).catch(() => {});
        if (stands) {
          kept.probes?.lasts(stands, clock);
          return stands;
        }
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
    const back = async (until: AbortSignal): Promise<Connection> => {
      // A renewal of the certificate changes the hashes.
      const { url, hashes } = await find(until);
      return dialWebTransport(url, until, { clock, hashes });
    };
    return await mux.race(first, { ...choice, url: socketUrl, from, classes, key, back: typeof WebTransport === 'undefined' ? undefined : back }, other.signal);
  } finally {
    // What has not stood by now is given up unseen.
    signal.removeEventListener('abort', abort);
    abort();
  }
}

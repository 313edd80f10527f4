/** The way back from a WebSocket to WebTransport, once UDP passes again (PROTOCOL.md §17). */

import { type Clock, within } from '../../base/async.js';
import { type Keeping } from '../choose.js';
import { type Connection, type Mover } from '../transport.js';
import { type MuxSettings } from './connection.js';

/** The wait before the first look for UDP, and the longest; each is twice the one before. */
const FIRST_MS = 5000;
const MOST_MS = 300_000;
/** A connection over UDP that was lost sooner shows a network that lets a handshake pass and not much more. */
const LASTING_MS = 60_000;
const CONNECT_MS = 10_000;

/** When a client looks for UDP, over all its connections. */
export class Probes {
  private next = FIRST_MS;

  /** UDP carries a connection from now on. */
  lasts(connection: Connection, clock: Clock): void {
    const since = clock.now();
    void connection.closed.then(() => {
      if (clock.now() - since >= LASTING_MS) {
        this.next = FIRST_MS;
      }
    });
  }

  wait(random: () => number): number {
    const wait = this.next;
    this.next = Math.min(2 * wait, MOST_MS);
    return wait * (1 + random() / 4);
  }
}

export interface WayBack extends MuxSettings {
  /** From 0 to 1, without 1. */
  readonly random: () => number;
  /** Makes a connection by WebTransport. None: the browser has none. */
  readonly back: ((signal: AbortSignal) => Promise<Connection>) | undefined;
  /** By what it is remembered of this server that a WebSocket was first. */
  readonly key: string;
}

/** Looks for UDP until the signal, and moves the session as soon as that can go over. */
export async function lookForUdp({ clock, random, back, key, classes }: WayBack, probes: Probes, mover: Mover, until: AbortSignal): Promise<void> {
  let giveUp = (): void => {};
  until.addEventListener('abort', () => giveUp());
  while (!until.aborted) {
    await new Promise<void>((resolve) => {
      const stop = clock.after(probes.wait(random), resolve);
      giveUp = () => (stop(), resolve());
    });
    if (until.aborted || !back || !mover.mayMove()) {
      continue;
    }
    const tried = new AbortController();
    giveUp = () => tried.abort();
    try {
      const better = await within(clock, CONNECT_MS, back(tried.signal), () => {
        throw giveUp();
      });
      if (!until.aborted && mover.mayMove()) {
        remember(key, false);
        probes.lasts(better, clock);
        return mover.moveTo(better);
      }
      better.close(classes.Code.NORMAL, '');
    } catch {
      // UDP does not pass yet.
    }
  }
}

/** Whether a WebSocket is to begin at once the next time. Pages of one origin share it; a Worker has nothing to remember it by. */
export function remember(key: string, wasFirst: boolean): void {
  try {
    const { localStorage } = globalThis as unknown as Keeping;
    if (wasFirst) {
      localStorage.setItem(key, `${Date.now()}`);
    } else {
      localStorage.removeItem(key);
    }
  } catch {
    // There is none, or the page may not use it.
  }
}

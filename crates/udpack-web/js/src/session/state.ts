/** What the connection of a socket is doing. */

import { type CloseReason } from '../wire/codes.js';
import { type GoAway } from '../wire/control.js';

export type SocketState =
  /** The first connection is being made. */
  | { readonly state: 'connecting' }
  /**
   * Connected and let in. With `resumed` the session goes on and resumable channels lost nothing; `reason` says why it
   * does not: `unknown`, `expired`, `identity` or `off`, and resumable channels have ended with `not_resumed`.
   */
  | { readonly state: 'connected'; readonly resumed: boolean; readonly reason?: string }
  /** The server goes down; a socket that reconnects moves when its turn has come. */
  | { readonly state: 'goingAway'; readonly goAway: GoAway }
  /** The connection is lost for this reason; another is made after the delay. Tries count from 1 since the last success. */
  | { readonly state: 'reconnecting'; readonly attempt: number; readonly retryInMs: number; readonly reason: CloseReason }
  /** There will be no other connection. */
  | { readonly state: 'closed'; readonly reason: CloseReason };

/** How to come back after a lost connection. Times are in milliseconds. */
export interface Reconnect {
  /** Tries without success before giving up. No bound unless given. */
  attempts: number;
  /** Time without success before giving up. */
  patience: number;
  /** The wait before the first try is drawn from 0 to this; it doubles each time. */
  first: number;
  /** The longest that the wait becomes. */
  most: number;
}

export const RECONNECT: Reconnect = { attempts: Number.POSITIVE_INFINITY, patience: 300_000, first: 250, most: 30_000 };

/** A random wait before try number `attempt`, from 0 to its bound, so that clients do not come back together. */
export function delay(policy: Reconnect, attempt: number, random: () => number): number {
  return Math.min(policy.most, policy.first * 2 ** (attempt - 1)) * random();
}

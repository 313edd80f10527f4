/** The token of a client: asked for at each connect, and presented anew before it ends (PROTOCOL.md §5). */

import { type Clock, Deferred, type Stop } from '../base/async.js';
import { RefreshError, UsageError } from '../base/errors.js';
import { type Refreshed } from '../wire/control.js';

/** Why a token is asked for. */
export type TokenWanted = 'connect' | 'reconnect' | 'refresh';

/** A token, or who fetches one. */
export type TokenSource = string | ((wanted: { reason: TokenWanted }) => string | Promise<string>);

/** The part of a token's time after which another is fetched. */
const PART = 0.8;
/** Two tokens are this far apart at least, and two after a failure. */
const PAUSE_MS = 1000;
const FAILURE_PAUSE_MS = 10_000;

export class TokenKeeper {
  readonly #source: TokenSource;
  readonly #clock: Clock;
  #pending: { done: Deferred<void>; token: string } | undefined;
  #present: ((token: string) => void) | undefined;
  #stop: Stop | undefined;
  #latest: string | undefined;

  constructor(source: TokenSource, clock: Clock) {
    this.#source = source;
    this.#clock = clock;
  }

  /** The token for a `$hello`: a fixed one, or the last that was presented by hand, or a fetched one. */
  async forHello(reason: TokenWanted): Promise<string> {
    return typeof this.#source === 'string' ? (this.#latest ?? this.#source) : this.#source({ reason });
  }

  /** A connection stands, whose token is good for so long; `present` sends a `$refresh` on it. */
  up(expiresMs: number | undefined, present: (token: string) => void): void {
    this.#present = present;
    this.#plan(expiresMs);
  }

  /** The connection is gone. */
  down(): void {
    this.#present = undefined;
    this.#stop?.();
    this.#pending?.done.reject(new UsageError('the connection was lost before the new token was answered'));
    this.#pending = undefined;
  }

  /** Whether a `$refreshed` is waited for. */
  get waiting(): boolean {
    return this.#pending !== undefined;
  }

  /** Presents a token. Rejects with `RefreshError` when it is refused. */
  async refresh(token: string): Promise<void> {
    while (this.#pending) {
      await this.#pending.done.promise.catch(() => {});
    }
    if (!this.#present) {
      throw new UsageError('there is no connection to present a token on; the next one asks for it');
    }
    const pending = { done: new Deferred<void>(), token };
    this.#pending = pending;
    this.#present(token);
    await pending.done.promise;
  }

  /** The answer to the token that was presented. */
  refreshed({ refused, expiresMs }: Refreshed): void {
    const pending = this.#pending;
    this.#pending = undefined;
    if (refused) {
      pending?.done.reject(new RefreshError(refused.code, refused.text));
    } else {
      this.#latest = pending?.token;
      pending?.done.resolve();
      this.#plan(expiresMs);
    }
  }

  #plan(expiresMs: number | undefined): void {
    this.#stop?.();
    if (expiresMs !== undefined && typeof this.#source === 'function') {
      this.#again(Math.max(PAUSE_MS, expiresMs * PART));
    }
  }

  #again(ms: number): void {
    this.#stop = this.#clock.after(ms, () => void this.#fetch());
  }

  async #fetch(): Promise<void> {
    const present = this.#present;
    try {
      const token = await this.forHello('refresh');
      if (this.#present === present && !this.#pending) {
        await this.refresh(token);
      }
    } catch {
      // The token that is there stays good until its end. The server says so when that has come.
      if (this.#present === present && present) {
        this.#again(FAILURE_PAUSE_MS);
      }
    }
  }
}

/** What the server transfers, live (PROTOCOL.md §11, "Watching transfers"). */

import { type Channel } from '../channel/channel.js';
import { type Socket } from '../client/socket.js';

export interface Job {
  readonly id: number;
  readonly kind: string;
  readonly path: string | Uint8Array;
  readonly peer: string;
  /** Not known, or not yet, when it is not there. */
  readonly size?: number | null;
  readonly bytes: number;
  readonly safe: number;
  readonly state: 'running' | 'done' | 'failed' | 'cancelled' | 'suspended';
  /** While it runs: `waiting`, `receiving`, `checking`, `syncing`, `storing`, `sending`, or a word of a later version. */
  readonly phase?: string;
  /** While it runs: bytes a second. */
  readonly rate?: number;
  /** No byte has moved for a while, though some should. */
  readonly stalled?: boolean;
  readonly code?: string;
  /** The sentence about a failure, or the reason that was given with a cancel. */
  readonly text?: string;
  readonly secs: number;
  /** Seconds since its end, of those that had ended before this watch began. */
  readonly ago?: number;
}

/** A watch over transfers: those of the token, or all with the right watch or admin. */
export class Jobs {
  private readonly channel: Channel;

  private constructor(channel: Channel) {
    this.channel = channel;
  }

  static async open(socket: Socket): Promise<Jobs> {
    return new Jobs((await socket.open('transfers', { resumable: false, yields: true })) as unknown as Channel);
  }

  /**
   * Those that run at first, then those that ended of late, if there are any, and then each that is new, moves or ends.
   * Rejects with `ClosedError` when the watch is lost.
   */
  async *[Symbol.asyncIterator](): AsyncGenerator<Job[], void, undefined> {
    for await (const { event, data } of this.channel) {
      if (event === 'jobs') {
        const { jobs, ended } = data as { jobs: Job[]; ended?: Job[] };
        yield jobs;
        if (ended !== undefined && ended.length > 0) {
          yield ended;
        }
      } else if (event === 'job') {
        yield [data as Job];
      }
    }
  }

  /**
   * Ends one. Its client is told the reason: one line of at most 256 bytes. Rejects with `Fault`: `forbidden`, `not_found` if
   * it does not run, `bad_payload` for the reason.
   */
  async cancel(job: number, reason?: string): Promise<void> {
    await this.channel.request('cancel', { job, ...(reason !== undefined && { reason }) });
  }

  close(): Promise<void> {
    return this.channel.close();
  }
}

/** Watches what the server transfers. */
export function jobs(socket: Socket): Promise<Jobs> {
  return Jobs.open(socket);
}

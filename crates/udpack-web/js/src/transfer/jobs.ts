/** What the server transfers, live (PROTOCOL.md §11, "Watching transfers"). */

import { type Channel } from '../channel/channel.js';
import { type Socket } from '../client/socket.js';

export interface Job {
  readonly id: number;
  readonly kind: string;
  readonly path: string | Uint8Array;
  readonly peer: string;
  /** Not known, or a download, when it is not there. */
  readonly size?: number | null;
  readonly bytes: number;
  readonly safe: number;
  readonly state: 'running' | 'done' | 'failed' | 'cancelled' | 'suspended';
  readonly code?: string;
  readonly secs: number;
}

/** A watch over transfers: those of the token, or all with the admin right. */
export class Jobs {
  private readonly channel: Channel;

  private constructor(channel: Channel) {
    this.channel = channel;
  }

  static async open(socket: Socket): Promise<Jobs> {
    return new Jobs((await socket.open('transfers', { resumable: false })) as unknown as Channel);
  }

  /** Those that run at first, and then each that is new, moves or ends. Rejects with `ClosedError` when the watch is lost. */
  async *[Symbol.asyncIterator](): AsyncGenerator<Job[], void, undefined> {
    for await (const { event, data } of this.channel) {
      if (event === 'jobs') {
        yield (data as { jobs: Job[] }).jobs;
      } else if (event === 'job') {
        yield [data as Job];
      }
    }
  }

  /** Ends one. Rejects with `Fault`: `forbidden`, or `not_found` if it does not run. */
  async cancel(job: number): Promise<void> {
    await this.channel.request('cancel', { job });
  }

  close(): Promise<void> {
    return this.channel.close();
  }
}

/** Watches what the server transfers. */
export function jobs(socket: Socket): Promise<Jobs> {
  return Jobs.open(socket);
}

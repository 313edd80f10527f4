/** A lane: a channel named `transfer`, and who waits for what the server says of each file on it. */

import { type Channel } from '../channel/channel.js';
import { type Socket } from '../client/socket.js';
import { Code } from '../wire/codes.js';
import { isSaid, Said, TransferError } from './messages.js';

/** Hears what the server says of one file. */
export interface Listener {
  said(event: string, said: Said): void | Promise<void>;
  /** The lane is over before the file's outcome. */
  lost(error: TransferError): void;
}

export class Lane {
  readonly socket: Socket;
  private readonly channel: Channel;
  private readonly listeners = new Map<number, Listener>();
  private nextId = 1;
  private failure: TransferError | undefined;

  private constructor(socket: Socket, channel: Channel) {
    this.socket = socket;
    this.channel = channel;
    void this.read();
  }

  /** Opens one; waits for a connection while there may be one again. */
  static async open(socket: Socket, signal: AbortSignal): Promise<Lane> {
    // What a lane loses is asked for again, so that nothing of it need be kept for a lost connection.
    return new Lane(socket, (await socket.open('transfer', { priority: 'bulk', resumable: false, signal })) as unknown as Channel);
  }

  /** Why it is over, if it is. */
  get over(): TransferError | undefined {
    return this.failure;
  }

  /** A number for another file, and who hears of it. */
  begin(listener: Listener): number {
    const id = this.nextId;
    this.nextId += 1;
    this.listeners.set(id, listener);
    if (this.failure) {
      listener.lost(this.failure);
    }
    return id;
  }

  /** Nothing more of this file is waited for. */
  end(id: number): void {
    this.listeners.delete(id);
  }

  /** Queues a message, waits while the queue is full. Rejects when the lane is over. */
  async send(event: string, data: unknown): Promise<void> {
    try {
      await this.channel.send(event, data);
    } catch (error) {
      // It may still hear of files whose bytes are all sent; nothing more goes there.
      throw (this.failure ??= lostBy(error));
    }
  }

  async close(): Promise<void> {
    await this.channel.close();
  }

  private async read(): Promise<void> {
    let failure: TransferError;
    try {
      for await (const message of this.channel) {
        if (message.isRequest || !isSaid(message.event)) {
          continue;
        }
        const said = new Said(message);
        await this.listeners.get(said.id)?.said(message.event, said);
      }
      failure = new TransferError('lane_closed', 'the server has ended the lane', true);
    } catch (error) {
      failure = error instanceof TransferError ? error : lostBy(error);
    }
    this.failure = failure;
    void this.channel.close(failure.reason === 'bad_message' ? Code.BAD_MESSAGE : Code.NORMAL, failure.message);
    for (const listener of [...this.listeners.values()]) {
      listener.lost(failure);
    }
  }
}

function lostBy(error: unknown): TransferError {
  const { message = `${error}`, retry = false } = (error ?? {}) as { message?: string; retry?: boolean };
  return new TransferError('lane_closed', message, retry);
}

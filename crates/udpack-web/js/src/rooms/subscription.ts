/** A channel for listening to rooms that is opened again where it cannot go on. */

import { type ClosedError } from '../base/errors.js';
import { type Channel } from '../channel/channel.js';
import { type Message } from '../channel/message.js';
import { type OpenOptions, type Socket } from '../client/socket.js';
import { type Position } from '../wire/control.js';
import { positions } from './history.js';

export class Subscription implements AsyncIterable<Message> {
  /** The channel of this moment: to send on it, to ask something. Not to be read. */
  channel: Channel;
  private readonly open: (since: Position[]) => Promise<Channel>;

  /** Made by `subscribe`. */
  constructor(channel: Channel, open: (since: Position[]) => Promise<Channel>) {
    this.channel = channel;
    this.open = open;
  }

  /** How far it has come. */
  get positions(): Position[] {
    return positions(this.channel);
  }

  /**
   * The next message, of this channel or of the next one; `null` when the server has finished. Rejects with `ClosedError`
   * when the channel ended in a way that another does not mend. One at a time.
   */
  async receive(): Promise<Message | null> {
    while (true) {
      try {
        return await this.channel.receive();
      } catch (error) {
        if (!isLost(error as ClosedError)) {
          throw error;
        }
        this.channel = await this.open(this.positions);
      }
    }
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<Message, void, undefined> {
    for (let message = await this.receive(); message; message = await this.receive()) {
      yield message;
    }
  }
}

/** Whether the channel is over because its connection or its session is, or the client has moved, and not because the peer says so. */
function isLost({ name, reason }: ClosedError): boolean {
  return name === 'ClosedError' && reason.by !== 'peer' && ['not_resumed', 'connection_lost', 'moved'].includes(reason.name);
}

/**
 * Opens a channel for listening to rooms, and another each time that it is lost for good because its session was: it goes on
 * where the last one was, so that in rooms with a history nothing is missed, or a `$gap` says what is. For a socket with
 * `history`. Rejects as `socket.open` does.
 */
export async function subscribe(socket: Socket, name: string, options: OpenOptions = {}): Promise<Subscription> {
  return new Subscription(await socket.open(name, options), (since) => socket.open(name, { ...options, since }));
}

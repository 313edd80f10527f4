/** How far a program has come in the rooms with a history that its channels are in, by the messages that it has taken. */

import { type Channel } from '../channel/channel.js';
import { type History } from '../channel/history.js';
import { type Gap, type Position } from '../wire/control.js';
import { type U64 } from '../wire/message.js';
import { decodeAt, decodeGap, decodeRoom } from './messages.js';

/** Rooms of one channel whose positions are kept. */
const ROOMS = 64;

class Places {
  readonly rooms: Map<string, Position>;
  /** The rooms by the numbers that the server gave them. */
  readonly names = new Map<U64, string>();
  /** The room's number and the offset of the next message. */
  next: readonly [U64, U64] | undefined;

  constructor(since: readonly Position[] = []) {
    this.rooms = new Map(since.map((position) => [position.room, position]));
  }

  enter(number: U64, position: Position): void {
    const { room } = position;
    if (this.rooms.has(room) || this.rooms.size < ROOMS) {
      this.names.set(number, room);
      this.rooms.set(room, position);
    }
  }

  /** The program takes a message, or this gap. */
  taken(gap: Gap | undefined): void {
    const { next } = this;
    this.next = undefined;
    const place = this.rooms.get(gap?.room ?? this.names.get(next?.[0] ?? -1) ?? '');
    const offset = gap ? gap.to : next?.[1];
    if (place && offset !== undefined) {
      this.rooms.set(place.room, { room: place.room, epoch: gap?.epoch ?? place.epoch, offset });
    }
  }
}

const all = new WeakMap<Channel, Places>();

function placesOf(channel: Channel): Places {
  let places = all.get(channel);
  if (!places) {
    places = new Places(channel.since);
    all.set(channel, places);
  }
  return places;
}

/** For `connect`: its socket hears of positions. */
export const history: History = {
  passes(channel, message, read) {
    if (message.event === '$at') {
      const at = decodeAt(message, read);
      return () => {
        placesOf(channel).next = at;
      };
    }
    if (message.event === '$room') {
      const { number, ...position } = decodeRoom(message, read);
      return () => placesOf(channel).enter(number, position);
    }
    return undefined;
  },
  taken(channel, message) {
    const places = message?.gap ? placesOf(channel) : all.get(channel);
    places?.taken(message?.gap);
  },
  gap: decodeGap,
};

/**
 * How far this side has come in rooms with a history, by the message of the channel that was taken last: for `since` of
 * another channel. Of a socket with `history`; otherwise none.
 */
export function positions(channel: Channel): Position[] {
  return [...placesOf(channel).rooms.values()];
}

/** The protocol's messages of rooms with a history (PROTOCOL.md §7). Pure. */

import { type ReadFields } from '../channel/history.js';
import { type Gap, type Position } from '../wire/control.js';
import { type Fields } from '../wire/fields.js';
import { isName, isU64, type U64, type WireMessage } from '../wire/message.js';

/** A position, and what stands for its room in `$at`. */
export type Place = Position & { readonly number: U64 };

function roomOf(fields: Fields): string {
  const room = fields.text('room');
  if (!isName(room)) {
    throw fields.bad('room is a name');
  }
  return room;
}

export function decodeRoom(message: WireMessage, read: ReadFields): Place {
  const fields = read(message, '$room');
  fields.only('room', 'number', 'epoch', 'offset');
  return { room: roomOf(fields), number: fields.u64('number'), epoch: fields.u64('epoch'), offset: fields.u64('offset') };
}

/** The number of a room, and the offset of the message that follows. */
export function decodeAt(message: WireMessage, read: ReadFields): readonly [U64, U64] {
  const { data } = message;
  // The data is no map: what is wrong with the rest of the message shows without it.
  const fields = read({ ...message, data: {} }, '$at');
  if (!Array.isArray(data) || data.length !== 2 || !data.every(isU64)) {
    throw fields.bad('its data is two integers from 0');
  }
  return data as [U64, U64];
}

export function decodeGap(message: WireMessage, read: ReadFields): Gap {
  const fields = read(message, '$gap');
  fields.only('room', 'lost', 'epoch', 'from', 'to', 'why');
  const room = roomOf(fields);
  const lost = fields.u64('lost');
  const why = fields.optText('why');
  if (lost === 0 && why !== 'epoch') {
    throw fields.bad('nothing is missing');
  }
  if (!['epoch', 'from', 'to', 'why'].some((key) => fields.has(key))) {
    return { room, lost };
  }
  const [epoch, from, to] = [fields.u64('epoch'), fields.u64('from'), fields.u64('to')];
  if (from === 0 || BigInt(to) - BigInt(from) + 1n < lost) {
    throw fields.bad('more is lost than from there to there');
  }
  if (why !== 'slow' && why !== 'gone' && why !== 'epoch') {
    throw fields.bad('why is slow, gone or epoch');
  }
  return { room, lost, epoch, from, to, why };
}

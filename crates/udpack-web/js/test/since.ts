/** `$open` as a server reads it, with `since`. */

import { WireError } from '../src/base/errors.js';
import { Code } from '../src/wire/codes.js';
import { decodeOpen, type Open, type Position } from '../src/wire/control.js';
import { Fields } from '../src/wire/fields.js';
import { isName, type WireMessage } from '../src/wire/message.js';

export function decodeOpenOfClient(message: WireMessage): Open {
  const { data } = message;
  if (typeof data !== 'object' || data === null || !('since' in data)) return decodeOpen(message);
  const { since, ...rest } = data as { since: unknown };
  return { ...decodeOpen({ ...message, data: rest }), since: readSince(since) };
}

function readSince(since: unknown): Position[] {
  const bad = new WireError(Code.BAD_MESSAGE, '$open: since is a list of at most 256 positions');
  if (!Array.isArray(since) || since.length > 256) throw bad;
  return since.map((value) => {
    const fields = new Fields('$open', value);
    fields.only('room', 'epoch', 'offset');
    const room = fields.text('room');
    if (!isName(room)) throw bad;
    return { room, epoch: fields.u64('epoch'), offset: fields.u64('offset') };
  });
}

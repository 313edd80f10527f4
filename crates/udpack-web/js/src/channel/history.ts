/** What `udpack/rooms` does for the channels of a socket. Apart, because most programs are in no rooms with a history. */

import { type Fields } from '../wire/fields.js';
import { type Gap } from '../wire/control.js';
import { type WireMessage } from '../wire/message.js';
import { type Channel } from './channel.js';
import { type Message } from './message.js';

/** The fields of a message of the protocol, whose breaches are told as this library tells them. */
export type ReadFields = (message: WireMessage, event: string) => Fields;

/** `history` of `udpack/rooms`, for `connect`. */
export interface History {
  /** What a message of the protocol does when the application has come to it; nothing for one that is not of rooms. */
  passes(channel: Channel, message: WireMessage, read: ReadFields): (() => void) | undefined;
  /** The application takes a message. */
  taken(channel: Channel, message: Message | undefined): void;
  gap(message: WireMessage, read: ReadFields): Gap;
}

/**
 * What this bundle and the client's must have in common, since errors are known by their class. It is handed in, because whoever
 * bundles the client gives its modules other names.
 */

import { type ConnectError } from '../../base/errors.js';
import { type CloseReason, type Code, type Side } from '../../wire/codes.js';
import { type ConnectionEnd, type StreamEnd } from '../transport.js';

export interface Classes {
  readonly Code: typeof Code;
  readonly CloseReason: new (code: number, text: string, by: Side) => CloseReason;
  readonly ConnectError: new (reason: CloseReason) => ConnectError;
  readonly ConnectionEnd: new () => ConnectionEnd;
  readonly StreamEnd: new (code: number) => StreamEnd;
}

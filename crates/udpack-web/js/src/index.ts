/** The udpack client for browsers and Workers. */

export {
  BacklogError,
  ClosedError,
  ConnectError,
  EncodeError,
  Fault,
  RefreshError,
  TimeoutError,
  UdpackError,
  UsageError,
} from './base/errors.js';
export type { Clock } from './base/async.js';
export type { AskOptions } from './channel/asked.js';
export { Channel } from './channel/channel.js';
export type { History, ReadFields } from './channel/history.js';
export { Message } from './channel/message.js';
export type { DataOf, EventMap, ItemOf, ReplyOf } from './channel/types.js';
export { connect, type ConnectOptions } from './client/connect.js';
export { type OpenOptions, Socket, type SocketEvents } from './client/socket.js';
export type { Reconnect, SocketState } from './session/state.js';
export type { VolatileMessage } from './session/volatile.js';
export type { Transport } from './transport/choose.js';
export type { MakeSocket } from './transport/mux/index.js';
export type { Socket as WebSocketLike } from './transport/mux/connection.js';
export type { BidiStream, ByteReceiver, ByteSender, Connection, Dial } from './transport/transport.js';
export { ConnectionEnd, StreamEnd } from './transport/transport.js';
export { CloseReason, Code } from './wire/codes.js';
export type { Gap, GoAway, Position } from './wire/control.js';
export { Timestamp } from './wire/msgpack.js';

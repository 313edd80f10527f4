/** The first two messages of a connection (PROTOCOL.md §5), and the control stream that they begin. */

import { type Clock, within } from '../base/async.js';
import { ConnectError, WireError } from '../base/errors.js';
import { FrameReader, type Heard } from '../channel/reader.js';
import { Outbox } from '../channel/outbox.js';
import { type BidiStream, type Connection, ConnectionEnd } from '../transport/transport.js';
import { CloseReason, Code } from '../wire/codes.js';
import { decodeClose, decodeWelcome, encodeHello, type Hello, type Welcome } from '../wire/control.js';
import { DEFAULT_FRAME } from '../wire/frame.js';
import { decodeMessage, encodeFrame } from '../wire/message.js';

/** Before the server has said what it takes. */
const HELLO_FRAME = 16 << 10;
/** From the end of the control stream until that of the connection is no longer waited for. */
export const GONE_MS = 1000;
/** From when the server has stopped the control stream until that breaks the order. */
const STOPPED_MS = 1000;
const CONTROL_QUEUE = { bytes: 256 << 10, frames: 1024 };

/** A connection that is let in. */
export interface Link {
  readonly connection: Connection;
  readonly welcome: Welcome;
  readonly stream: BidiStream;
  readonly control: Outbox;
  readonly reader: FrameReader;
  readonly heard: Heard;
}

/**
 * Introduces the client and waits for its admission, at most `ms`.
 *
 * Rejects with `ConnectError`, and the connection is closed.
 */
export async function admit(connection: Connection, hello: Hello, clock: Clock, ms: number): Promise<Link> {
  const heard = { at: clock.now() };
  const over = connection.closed.then((reason): never => {
    throw new ConnectError(reason);
  });
  try {
    const late = (): never => {
      // The session may still be resumed: the server is to take this connection for lost.
      const code = hello.resume?.ticket ? Code.SUPERSEDED : Code.TIMED_OUT;
      connection.close(hello.resume?.ticket ? code : Code.NORMAL, '');
      throw new ConnectError(new CloseReason(Code.TIMED_OUT, 'no $welcome in time', 'local'));
    };
    return await within(clock, ms, Promise.race([introduce(connection, hello, clock, heard), over]), late);
  } catch (error) {
    if (error instanceof ConnectError) {
      throw error;
    }
    if (error instanceof WireError) {
      connection.close(error.code, error.message);
      throw new ConnectError(new CloseReason(error.code, error.message, 'local'));
    }
    // The stream is over; the connection's end may be behind it, and says why.
    const ended = new CloseReason(Code.PROTOCOL_ORDER, 'the control stream ended where $welcome belongs', 'local');
    const reason = await within(clock, GONE_MS, connection.closed, () => ended);
    connection.close(reason.code, reason.text);
    throw new ConnectError(reason);
  } finally {
    over.catch(() => {});
  }
}

async function introduce(connection: Connection, hello: Hello, clock: Clock, heard: Heard): Promise<Link> {
  const stream = await connection.openBidi(3);
  await stream.send.write(encodeFrame(HELLO_FRAME, '$hello', encodeHello(hello)));
  const reader = new FrameReader(stream.receive, DEFAULT_FRAME, clock, heard);
  const body = await reader.next();
  if (body === null) {
    throw new ConnectionEnd();
  }
  const message = decodeMessage(body);
  if (message.event === '$close') {
    const reason = decodeClose(message);
    connection.close(reason.code, '');
    throw new ConnectError(reason);
  }
  const welcome = decodeWelcome(message);
  if (welcome.resumed && hello.resume?.ticket?.session !== welcome.session) {
    throw new WireError(Code.BAD_MESSAGE, '$welcome: resumes another session than was asked for');
  }
  // A `$close` or the end of the connection may be on its way.
  const stopped = (): void =>
    void clock.after(STOPPED_MS, () => connection.close(Code.PROTOCOL_ORDER, 'the control stream was stopped'));
  const control = new Outbox(CONTROL_QUEUE, false, { stopped, done: () => {} });
  return { connection, welcome, stream, control, reader, heard };
}

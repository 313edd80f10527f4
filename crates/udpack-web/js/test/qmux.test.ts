/**
 * QMux (PROTOCOL.md §17) with an independent implementation at the other end, `@moq/qmux`: as the server of this client's
 * WebSocket transport, and as the transport under the whole client against `examples/web.rs`.
 */

import assert from 'node:assert/strict';
import { existsSync } from 'node:fs';
import { after, test } from 'node:test';
import Session from '@moq/qmux';
import { ConnectError } from '../src/base/errors.js';
import { realClock } from '../src/base/async.js';
import { connect } from '../src/client/connect.js';
import { MuxConnection, type Socket } from '../src/transport/mux/connection.js';
import { type ByteReceiver, ConnectionEnd, StreamEnd } from '../src/transport/transport.js';
import { CloseReason, Code } from '../src/wire/codes.js';
import { SERVER, WebServer } from './web.js';

// Node 20 does not have it; the other implementation uses it.
(Promise as { withResolvers?: unknown }).withResolvers ??= () => {
  const given: { resolve?: unknown; reject?: unknown } = {};
  const promise = new Promise((resolve, reject) => Object.assign(given, { resolve, reject }));
  return { promise, ...given };
};

const PROTOCOL = 'qmux-02.udpack-1';
const skip = existsSync(SERVER) || process.env.UDPACK_BROWSER === 'required' ? false : `SKIPPED: not there: ${SERVER}`;

type Handler = ((event: never) => void) | null;

/** One end of two WebSockets that are joined. */
class End {
  binaryType = 'arraybuffer';
  readonly bufferedAmount = 0;
  readonly protocol = PROTOCOL;
  readonly extensions = '';
  readyState = 1;
  onopen: Handler = null;
  onmessage: Handler = null;
  onerror: Handler = null;
  onclose: Handler = null;
  other!: End;

  send(data: unknown): void {
    const bytes = (data as Uint8Array).slice();
    queueMicrotask(() => this.other.onmessage?.({ data: bytes.buffer } as never));
  }

  close(): void {
    for (const end of [this, this.other]) {
      if (end.readyState !== 1) continue;
      end.readyState = 3;
      queueMicrotask(() => end.onclose?.({ code: 1000, reason: '' } as never));
    }
  }

  addEventListener(type: 'open' | 'message' | 'close' | 'error', listener: (event: { data?: unknown }) => void): void {
    this[`on${type}`] = listener as Handler;
    if (type === 'open') queueMicrotask(() => listener({}));
  }
}

/** This client's transport, and the other implementation as its server. */
async function joined(): Promise<{ client: MuxConnection; server: Session }> {
  const [one, other] = [new End(), new End()];
  Object.assign(one, { other });
  Object.assign(other, { other: one });
  const classes = { CloseReason, Code, ConnectError, ConnectionEnd, StreamEnd };
  const server = Session.accept(other as never);
  const client = new MuxConnection(one as Socket, { clock: realClock, classes, channels: 64 });
  await Promise.all([client.begun.promise, server.ready]);
  return { client, server };
}

const pattern = (length: number): Uint8Array<ArrayBuffer> => new Uint8Array(length).map((_, at) => at * 7 + (at >> 8));

async function all(receiver: ByteReceiver): Promise<Buffer> {
  const parts: Uint8Array[] = [];
  for (let part = await receiver.read(); part; part = await receiver.read()) parts.push(part.slice());
  return Buffer.concat(parts);
}

const next = async <T>(streams: ReadableStream<T>): Promise<T> => {
  const reader = streams.getReader();
  const { value } = await reader.read();
  reader.releaseLock();
  return value as T;
};

test('8 MiB each way on a stream that either side opened, which is more than all credit at the beginning', async () => {
  const { client, server } = await joined();
  const bytes = pattern(8 << 20);
  const ours = await client.openBidi();
  const sending = (async () => {
    for (let at = 0; at < bytes.length; at += 100_000) await ours.send.write(bytes.subarray(at, at + 100_000));
    await ours.send.finish();
  })();
  const theirs = await next(server.incomingBidirectionalStreams);
  // It gives back what comes.
  const back = theirs.readable.pipeTo(theirs.writable);
  assert.ok((await all(ours.receive)).equals(bytes));
  await Promise.all([sending, back]);

  const opened = await server.createBidirectionalStream();
  const writer = opened.writable.getWriter();
  const writing = writer.write(bytes).then(() => writer.close());
  const accepted = await client.acceptBidi();
  assert.ok(accepted && (await all(accepted.receive)).equals(bytes));
  await writing;
  await client.finished();
  client.close(Code.NORMAL, '');
});

test('one-way streams and datagrams both ways', async () => {
  const { client, server } = await joined();
  const out = await client.openUni();
  await out.write(pattern(5000));
  await out.finish();
  const came = Buffer.from(await new Response(await next(server.incomingUnidirectionalStreams)).arrayBuffer());
  assert.ok(came.equals(pattern(5000)));
  const writer = (await server.createUnidirectionalStream()).getWriter();
  await writer.write(pattern(3000));
  await writer.close();
  assert.ok((await all((await client.acceptUni()) as ByteReceiver)).equals(pattern(3000)));

  await client.sendDatagram(pattern(900));
  assert.deepEqual(await next(server.datagrams.readable), pattern(900));
  const datagrams = server.datagrams.writable.getWriter();
  await datagrams.write(pattern(1200));
  assert.deepEqual(await client.readDatagram(), pattern(1200));
  client.close(Code.NORMAL, '');
});

test('the codes of resets and stops arrive, and what closes says with which code and text', async () => {
  const { client, server } = await joined();
  const ours = await client.openBidi();
  await ours.send.write(pattern(10));
  const theirs = await next(server.incomingBidirectionalStreams);
  const reader = theirs.readable.getReader();
  assert.deepEqual((await reader.read()).value, pattern(10));
  ours.send.reset(Code.SLOW_PEER);
  const ended = await reader.read().then(() => undefined, (error: { streamErrorCode?: number }) => error.streamErrorCode);
  assert.equal(ended, Code.SLOW_PEER);
  const make = (code: number): unknown => Object.assign(new Error('abort'), { source: 'stream', streamErrorCode: code });
  await theirs.writable.abort(make(Code.CANCELLED));
  const code = await ours.receive.read().then(() => undefined, (error: StreamEnd) => error.code);
  assert.equal(code, Code.CANCELLED);

  const other = await client.openBidi();
  await other.send.write(pattern(10));
  const stopped = await next(server.incomingBidirectionalStreams);
  await stopped.readable.cancel(make(Code.NO_SUCH_CHANNEL));
  assert.equal(await other.send.stopped, Code.NO_SUCH_CHANNEL);

  client.close(Code.AUTH_FAILED, 'not you');
  assert.deepEqual(await server.closed, { closeCode: Code.AUTH_FAILED, reason: 'not you' });
  const second = await joined();
  second.server.close({ closeCode: 0x1234, reason: 'enough' });
  const { code: by, text } = await second.client.closed;
  assert.deepEqual([by, text], [0x1234, 'enough']);
});

let server: WebServer | undefined;

after(() => server?.kill());

test('the whole client over the other implementation: requests, items, a large message, 10,000 in order', { skip }, async (t) => {
  server = await WebServer.start({ tcp: '127.0.0.1:0' });
  const { socketUrl, token } = server.endpoint;
  class Other extends Session {
    constructor(url: string) {
      super(url, { protocols: [PROTOCOL], requireProtocol: true });
    }
  }
  /** As browsers have it. */
  class WebTransportError extends Error {
    readonly source = 'stream';
    readonly streamErrorCode: number;

    constructor({ streamErrorCode }: { streamErrorCode: number }) {
      super('');
      this.streamErrorCode = streamErrorCode;
    }
  }
  Object.assign(globalThis, { WebTransport: Other, WebTransportError });
  t.after(() => ['WebTransport', 'WebTransportError'].forEach((name) => Reflect.deleteProperty(globalThis, name)));
  const url = (socketUrl as string).replace('ws:', 'http:');
  const socket = await connect({ url, token, transport: 'webtransport', channels: { greeter: (channel) => void channel.on('hello', () => 'hello to you') } });
  const math = await socket.open('math');
  assert.equal(await math.request('add', [1, 2]), 3);
  const items: unknown[] = [];
  for await (const item of math.stream('count', 500)) items.push(item);
  assert.equal(items.length, 500);
  assert.equal(await math.request('call back', 'greeter'), 'hello to you');
  const echo = await socket.open('echo');
  const large = pattern(700_000);
  await echo.send('large', large);
  assert.deepEqual((await echo.receive())?.data, large);
  let sent = 0;
  const send = (): void => void (sent < 10_000 && echo.send('n', sent++));
  for (let n = 0; n < 500; n += 1) send();
  for (let n = 0; n < 10_000; n += 1) {
    assert.equal((await echo.receive())?.data, n);
    send();
  }
  // The example sends back numbers alone.
  for (let n = 0; n < 100; n += 1) {
    socket.sendLatest('position', 'me', n);
    assert.deepEqual(await socket.receiveVolatile(), { event: 'position', data: n, key: 'me' });
  }
  socket.sendVolatile('position', -1);
  assert.deepEqual(await socket.receiveVolatile(), { event: 'position', data: -1, key: undefined });
  assert.equal((await (await socket.open('nobody')).closed).code, Code.NO_SUCH_CHANNEL);
  assert.equal((await socket.close()).code, Code.NORMAL);
});

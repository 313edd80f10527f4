/** Sessions over a WebSocket: the bytes of PROTOCOL.md §17, and this client in Node against `examples/web.rs`. */

import assert from 'node:assert/strict';
import { existsSync } from 'node:fs';
import { after, test } from 'node:test';
import { ConnectError } from '../src/base/errors.js';
import { connect } from '../src/client/connect.js';
import { MuxConnection, type Socket } from '../src/transport/mux/connection.js';
import { type Frame, MuxFault, type Parameters, RecordReader, RecordWriter } from '../src/transport/mux/wire.js';
import { ConnectionEnd, StreamEnd } from '../src/transport/transport.js';
import { CloseReason, Code } from '../src/wire/codes.js';
import { FakeClock, settle } from './clock.js';
import { DOCUMENT, readHex } from './document.js';
import { TcpRelay } from './tcp.js';
import { SERVER, WebServer } from './web.js';

const skip = existsSync(SERVER) || process.env.UDPACK_BROWSER === 'required' ? false : `SKIPPED: not there: ${SERVER}`;

/** The rows of the table of records. */
const RECORDS = new Map(
  [...(DOCUMENT.split('\n## 17. TCP\n')[1]?.split('\n## ')[0] ?? '').matchAll(/^\| (.+) \| `([0-9a-f ]+)` \|$/gm)].map(([, what, hex]) => [what as string, readHex(hex as string)]),
);

const PERMITS: Parameters = { idle: 30_000, data: 16 << 10, ownStream: 8 << 20, peersStream: 8 << 20, oneWay: 8 << 20, streams: 4, oneWayStreams: 0, datagram: 1472, record: 65_535 };

/** What each record says, and how it is written. */
const SAID: Record<string, [Frame[], (writer: RecordWriter) => void]> = {
  'parameters: idle 30 s, 16 KiB, 8 MiB a stream, 4 streams, datagrams of 1,472, records of 65,535': [[{ kind: 'parameters', parameters: PERMITS }], (to) => to.parameters(PERMITS)],
  'stream 0: `61 62` from offset 0': [[{ kind: 'stream', id: 0, offset: 0, data: readHex('61 62'), fin: false }], (to) => (to.stream(0, 0, 2, false), to.append(readHex('61 62')))],
  'stream 4: nothing more behind 300 bytes': [[{ kind: 'stream', id: 4, offset: 300, data: new Uint8Array(0), fin: true }], (to) => to.stream(4, 300, 0, true)],
  'reset of stream 4 behind 5 bytes, `slow_peer`': [[{ kind: 'reset', id: 4, code: Code.SLOW_PEER, size: 5 }], (to) => to.reset(4, Code.SLOW_PEER, 5)],
  'stop of stream 4, `cancelled`': [[{ kind: 'stop', id: 4, code: Code.CANCELLED }], (to) => to.stop(4, Code.CANCELLED)],
  '65,536 bytes in all': [[{ kind: 'maxData', most: 65_536 }], (to) => to.maxData(65_536)],
  '1,000 bytes on stream 4': [[{ kind: 'maxStreamData', id: 4, most: 1000 }], (to) => to.maxStreamData(4, 1000)],
  '7 streams both ways, 2 one way': [[{ kind: 'maxStreams', oneWay: false, most: 7 }, { kind: 'maxStreams', oneWay: true, most: 2 }], (to) => (to.maxStreams(false, 7), to.maxStreams(true, 2))],
  'a ping, and an answer': [[{ kind: 'ping', sequence: 5 }, { kind: 'pong', sequence: 5 }], (to) => (to.ping(5), to.pong(5))],
  'datagram `92 a2 61 74 05`': [[{ kind: 'datagram', data: readHex('92 a2 61 74 05'), size: 7 }], (to) => to.datagram(readHex('92 a2 61 74 05'))],
  'close with `auth_failed` and "no"': [[{ kind: 'close', application: true, code: Code.AUTH_FAILED, text: 'no' }], (to) => to.close(true, Code.AUTH_FAILED, 'no')],
  'close because of FLOW_CONTROL_ERROR, "x"': [[{ kind: 'close', application: false, code: 3, text: 'x' }], (to) => to.close(false, 3, 'x')],
};

/** Frames of a record; what they hold is copied, so that it can be compared. */
function framesOf(record: Uint8Array): Frame[] {
  const reader = new RecordReader(record);
  const frames: Frame[] = [];
  for (let frame = reader.next(); frame; frame = reader.next()) frames.push('data' in frame ? { ...frame, data: frame.data.slice() } : frame);
  return frames;
}

test('the records of PROTOCOL.md are read and written as they stand there', () => {
  assert.deepEqual([...RECORDS.keys()].sort(), Object.keys(SAID).sort());
  for (const [what, [frames, write]] of Object.entries(SAID)) {
    const bytes = RECORDS.get(what) as Uint8Array;
    assert.deepEqual(framesOf(bytes), frames, what);
    const writer = new RecordWriter();
    write(writer);
    assert.equal(Buffer.from(writer.take()).toString('hex'), Buffer.from(bytes).toString('hex'), what);
  }
});

test('each record that is cut short, or has an unknown frame, is refused', () => {
  for (const [what, bytes] of RECORDS) {
    for (let length = 1; length < bytes.length; length += 1) {
      const read = (): Frame[] => framesOf(bytes.subarray(0, length));
      // Of two frames the first may be whole.
      if (what.includes('7 streams') && length === 2) continue;
      if (what.includes('a ping') && length === 9) continue;
      assert.throws(read, MuxFault, `${what}, ${length} bytes`);
    }
  }
  for (const hex of ['18', '02', 'c0 00 00 00 00 00 00 20', '3f 51', '10 ff ff']) assert.throws(() => framesOf(readHex(hex)), MuxFault, hex);
});

test('numbers of every length are written shortly and read exactly', () => {
  for (const value of [0, 63, 64, 16_383, 16_384, 2 ** 30 - 1, 2 ** 30, 2 ** 32, Number.MAX_SAFE_INTEGER]) {
    const writer = new RecordWriter();
    writer.maxData(value);
    const record = writer.take();
    assert.equal(record.length, 1 + (value < 64 ? 1 : value < 16_384 ? 2 : value < 2 ** 30 ? 4 : 8));
    assert.deepEqual(framesOf(record), [{ kind: 'maxData', most: value }]);
  }
});

/** A WebSocket whose other end is the test. */
class Peer implements Socket {
  binaryType = '';
  bufferedAmount = 0;
  isClosed = false;
  readonly got: Frame[] = [];
  readonly connection: MuxConnection;
  private readonly listeners = new Map<string, (event: { data?: unknown }) => void>();

  constructor() {
    const classes = { CloseReason, Code, ConnectError, ConnectionEnd, StreamEnd };
    this.connection = new MuxConnection(this, { clock: new FakeClock(), classes, channels: 64 });
    this.listeners.get('open')?.({});
  }

  addEventListener(type: string, listener: (event: { data?: unknown }) => void): void {
    this.listeners.set(type, listener);
  }

  send(record: Uint8Array): void {
    this.got.push(...framesOf(record));
  }

  close(): void {
    this.isClosed = true;
  }

  say(write: (to: RecordWriter) => unknown): void {
    const writer = new RecordWriter();
    write(writer);
    this.listeners.get('message')?.({ data: writer.take().slice().buffer });
  }

  raw(data: unknown): void {
    this.listeners.get('message')?.({ data });
  }
}

const bytes = (length: number): Uint8Array => new Uint8Array(length);
const stream = (id: number, offset: number, length: number, fin = false) => (to: RecordWriter) => (to.stream(id, offset, length, fin), to.append(bytes(length)));

/** What a peer may not say behind its parameters, and the code of the close that answers it. */
const FAULTS: Record<string, [number, (peer: Peer) => void]> = {
  'parameters twice': [0x0a, (peer) => peer.say((to) => to.parameters(PERMITS))],
  'a message of text': [0x0a, (peer) => peer.raw('text')],
  'a gap in a stream': [0x0a, (peer) => peer.say(stream(1, 5, 5))],
  'an answer to no ping': [0x0a, (peer) => peer.say((to) => to.pong(5))],
  'a datagram that is too large': [0x0a, (peer) => peer.say((to) => to.datagram(bytes(1473)))],
  'more than the window of a stream': [0x03, (peer) => Array.from({ length: 33 }, (_, n) => peer.say(stream(1, n * 65_000, 65_000)))],
  'more streams than are permitted': [0x04, (peer) => peer.say(stream(4 * 80 + 1, 0, 1))],
  'more one-way streams': [0x04, (peer) => peer.say(stream(4 * 4 + 3, 0, 1))],
  'data on a stream that was not opened': [0x05, (peer) => peer.say(stream(0, 0, 1))],
  'data on our one-way stream': [0x05, (peer) => peer.say(stream(2, 0, 1))],
  'a stop of its own one-way stream': [0x05, (peer) => peer.say((to) => to.stop(3, 0))],
  'credit for its own one-way stream': [0x05, (peer) => peer.say((to) => to.maxStreamData(3, 9))],
  'data behind the end': [0x06, (peer) => (peer.say(stream(1, 0, 3, true)), peer.say(stream(1, 3, 3)))],
  'a reset that has more than was sent': [0x06, (peer) => (peer.say(stream(1, 0, 3)), peer.say((to) => to.reset(1, 0, 4)))],
  'a reset that moves the end': [0x06, (peer) => (peer.say(stream(1, 0, 3, true)), peer.say((to) => to.reset(1, 0, 2)))],
  'a frame of unknown type': [0x07, (peer) => peer.raw(readHex('18').slice().buffer)],
  'a frame that is cut short': [0x07, (peer) => peer.raw(readHex('04 04').slice().buffer)],
};

for (const [what, [code, say]] of Object.entries(FAULTS)) {
  test(`a peer that sends ${what} is told ${code}, and is a transport error here`, async () => {
    const peer = new Peer();
    peer.say((to) => to.parameters(PERMITS));
    await peer.connection.begun.promise;
    say(peer);
    const reason = await peer.connection.closed;
    assert.deepEqual([reason.code, reason.by], [Code.TRANSPORT_ERROR, 'transport']);
    const last = peer.got.at(-1);
    assert.ok(last?.kind === 'close' && !last.application && last.code === code, JSON.stringify(last));
    assert.ok(peer.isClosed);
    await assert.rejects(peer.connection.openBidi(), ConnectionEnd);
    assert.equal(await peer.connection.readDatagram(), null);
  });
}

test('before its parameters a peer may say nothing, and those of QUIC alone are no parameters', async () => {
  for (const [code, hex] of [[0x0a, '10 05'], [0x08, 'ff 51 53 30 0d 0a 0d 0a 02 00 00'], [0x08, 'ff 51 53 30 0d 0a 0d 0a 06 04 01 05 04 01 06']] as const) {
    const peer = new Peer();
    peer.raw(readHex(hex).slice().buffer);
    await assert.rejects(peer.connection.begun.promise, ConnectError);
    const last = peer.got.at(-1);
    assert.ok(last?.kind === 'close' && last.code === code, hex);
  }
});

test('what is urgent overtakes what waits, and little waits in the socket', async () => {
  const peer = new Peer();
  peer.say((to) => to.parameters({ ...PERMITS, data: 2 ** 40 }));
  await peer.connection.begun.promise;
  const [bulk, urgent] = [await peer.connection.openBidi(0), await peer.connection.openBidi(3)];
  peer.bufferedAmount = 1 << 20;
  void bulk.send.write(bytes(100_000));
  void urgent.send.write(bytes(10));
  await settle();
  const sent = (): number[] => peer.got.flatMap((frame) => (frame.kind === 'stream' ? [frame.id] : []));
  assert.deepEqual(sent(), []);
  // There is room again; what comes has it looked at.
  peer.bufferedAmount = 0;
  peer.say((to) => to.ping(0));
  await settle();
  assert.deepEqual(sent().slice(0, 2), [4, 0]);
});

test('without credit nothing is sent, and with it what it is for', async () => {
  const peer = new Peer();
  peer.say((to) => to.parameters({ ...PERMITS, data: 1000, peersStream: 100 }));
  await peer.connection.begun.promise;
  const { send } = await peer.connection.openBidi();
  const written = send.write(bytes(250));
  await settle();
  const sent = (): number => peer.got.reduce((sum, frame) => sum + (frame.kind === 'stream' ? frame.data.length : 0), 0);
  assert.equal(sent(), 100);
  peer.say((to) => to.maxStreamData(0, 180));
  await settle();
  assert.equal(sent(), 180);
  peer.say((to) => to.maxStreamData(0, 5000));
  await settle();
  assert.equal(sent(), 250);
  await written;
});

let server: WebServer | undefined;

async function started(): Promise<{ url: string; token: string; port: number }> {
  server ??= await WebServer.start({ tcp: '127.0.0.1:0' });
  const { socketUrl, token } = server.endpoint;
  const url = (socketUrl as string).replace('ws:', 'http:');
  return { url, token, port: Number(new URL(url).port) };
}

after(() => server?.kill());

test('a channel, requests, streams of items and a close over a WebSocket', { skip }, async () => {
  const { url, token } = await started();
  const asked: string[] = [];
  const socket = await connect({
    url,
    token,
    transport: 'wss',
    channels: {
      greeter: (channel) => {
        channel.on('hello', (from) => (asked.push(from as string), 'hello to you'));
      },
    },
  });
  const math = await socket.open('math');
  assert.equal(await math.request('add', [1, 2]), 3);
  await assert.rejects(math.request('add', [Number.MAX_SAFE_INTEGER, 2n ** 63n - 1n]), { fault: 'overflow' });
  const items: unknown[] = [];
  for await (const item of math.stream('count', 500)) items.push(item);
  assert.deepEqual(items, Array.from({ length: 500 }, (_, n) => n + 1));
  assert.equal(await math.request('call back', 'greeter'), 'hello to you');
  assert.deepEqual(asked, ['from the server']);
  const large = new Uint8Array(700_000).map((_, at) => at);
  const echo = await socket.open('echo');
  await echo.send('large', large);
  assert.deepEqual((await echo.receive())?.data, large);
  socket.sendVolatile('at', 7);
  assert.deepEqual((await socket.receiveVolatile())?.data, 7);
  const ends = await (await socket.open('nobody')).closed;
  assert.equal(ends.code, Code.NO_SUCH_CHANNEL);
  assert.equal((await socket.close()).code, Code.NORMAL);
});

test('a wrong token, a wrong path and a port where nobody is have errors of their own', { skip }, async () => {
  const { url } = await started();
  const failed = async (options: { url: string; token: string }): Promise<ConnectError> => {
    const error = await connect({ ...options, transport: 'wss' }).then(() => undefined, (error: unknown) => error);
    assert.ok(error instanceof ConnectError, `${error}`);
    return error;
  };
  assert.equal((await failed({ url, token: 'wrong' })).code, Code.AUTH_FAILED);
  assert.equal((await failed({ url: `${url}/elsewhere`, token: 'x' })).code, Code.CONNECTION_LOST);
  assert.equal((await failed({ url: 'http://127.0.0.1:1/udpack', token: 'x' })).code, Code.CONNECTION_LOST);
  assert.equal((await failed({ url: 'nonsense', token: 'x' })).code, Code.TRANSPORT_ERROR);
});

test('without WebTransport, `auto` takes a WebSocket at once', { skip }, async () => {
  const { url, token } = await started();
  assert.equal(typeof WebTransport, 'undefined');
  const socket = await connect({ url, token });
  assert.equal(await (await socket.open('math')).request('add', [1, 2]), 3);
  await socket.close();
});

test('who reads nothing on one channel does not hold up another', { skip }, async () => {
  const { url, token } = await started();
  const socket = await connect({ url, token, transport: 'wss', timeouts: { close: 200 } });
  const [stuck, free] = [await socket.open('echo', { resumable: false }), await socket.open('echo')];
  // More than all queues of it take; what comes back is not read.
  let filled = 0;
  const filling = (async () => {
    for (; filled < 400; filled += 1) await stuck.send('n', new Uint8Array(100_000));
  })().catch(() => {});
  for (let n = 0; n < 300; n += 1) {
    await free.send('n', n);
    assert.equal((await free.receive())?.data, n);
  }
  await socket.close();
  await filling;
  assert.ok(filled > 10 && filled < 400, `${filled}`);
});

test('5,000 messages each way while the TCP connection is cut again and again: none lost, doubled or reordered', { skip }, async (t) => {
  const COUNT = 5000;
  const { token, port } = await started();
  const relay = await TcpRelay.start(port);
  t.after(() => relay.stop());
  const socket = await connect({ url: `http://127.0.0.1:${relay.port}/udpack`, token, transport: 'wss', reconnect: { first: 1, most: 20 } });
  const echo = await socket.open('echo');
  // At most so many are on their way, so that each cut comes amidst of them.
  let sent = 0;
  const send = (): void => void (sent < COUNT && echo.send('n', sent++));
  for (let n = 0; n < 200; n += 1) send();
  for (let n = 0; n < COUNT; n += 1) {
    assert.equal((await echo.receive())?.data, n);
    if (n % 700 === 350) relay.cut();
    send();
  }
  await echo.close();
  assert.equal(await echo.receive(), null);
  t.diagnostic(`${relay.connections} connections`);
  assert.ok(relay.connections > 5, `${relay.connections}`);
  await socket.close();
});

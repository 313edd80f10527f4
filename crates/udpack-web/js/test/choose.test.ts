/** Which transport is taken when, with a browser's WebTransport and WebSocket that do as they are told. */

import assert from 'node:assert/strict';
import { afterEach, test } from 'node:test';
import { ConnectError } from '../src/base/errors.js';
import { dialFirst, type Transport } from '../src/transport/choose.js';
import { type Connection } from '../src/transport/transport.js';
import { RecordWriter } from '../src/transport/mux/wire.js';
import { Code } from '../src/wire/codes.js';
import { FakeClock, settle } from './clock.js';

let quic: FakeWebTransport[] = [];
let tcp: FakeWebSocket[] = [];

class FakeWebTransport {
  closedBy: number | undefined;
  stand!: () => void;
  fail!: (error: Error) => void;
  private broken!: (error: Error) => void;
  readonly ready: Promise<void>;
  readonly closed: Promise<unknown>;
  readonly incomingBidirectionalStreams = new ReadableStream();
  readonly incomingUnidirectionalStreams = new ReadableStream();
  readonly datagrams = { readable: new ReadableStream(), maxDatagramSize: 1200 };

  constructor() {
    this.ready = new Promise((resolve, reject) => {
      this.stand = resolve;
      this.fail = (error) => (this.broken(error), reject(error));
    });
    this.closed = new Promise((_, reject) => {
      this.broken = reject;
    });
    quic.push(this);
  }

  close({ closeCode }: { closeCode: number }): void {
    this.closedBy = closeCode;
    this.fail(new Error('closed'));
  }
}

class FakeWebSocket {
  binaryType = '';
  bufferedAmount = 0;
  isClosed = false;
  private readonly listeners = new Map<string, (event: { data?: unknown }) => void>();

  constructor(
    readonly url: string,
    readonly protocol: string,
  ) {
    tcp.push(this);
  }

  addEventListener(type: string, listener: (event: { data?: unknown }) => void): void {
    this.listeners.set(type, listener);
  }

  emit(type: string, data?: unknown): void {
    this.listeners.get(type)?.({ data });
  }

  /** The peer says what it permits. */
  stand(): void {
    this.emit('open');
    const writer = new RecordWriter();
    writer.parameters({ idle: 0, data: 1, ownStream: 1, peersStream: 1, oneWay: 1, streams: 1, oneWayStreams: 0, datagram: 0, record: 16_382 });
    this.emit('message', writer.take().slice().buffer);
  }

  send(): void {}

  close(): void {
    this.isClosed = true;
  }
}

const clock = new FakeClock();

function dial(transport: Transport = 'auto', hasWebTransport = true): { done: Promise<Connection>; controller: AbortController; how: () => string } {
  const controller = new AbortController();
  if (hasWebTransport) Object.assign(globalThis, { WebTransport: FakeWebTransport });
  quic = [];
  tcp = [];
  const endpoint = { url: 'https://example.com:1/udpack', socketUrl: 'wss://example.com:2/udpack', hashes: [] };
  const done = dialFirst(() => endpoint, { transport, clock, channels: 64, make: FakeWebSocket, random: () => 0, kept: {} }, controller.signal);
  let how = 'waits';
  done.then(({ via }) => (how = `${via}`), (error: Error) => (how = error.message));
  return { done, controller, how: () => how };
}

const kept = new Map<string, string>();
const localStorage = {
  getItem: (key: string) => kept.get(key) ?? null,
  setItem: (key: string, value: string) => void kept.set(key, value),
  removeItem: (key: string) => void kept.delete(key),
};

afterEach(() => {
  for (const name of ['WebTransport', 'localStorage']) Reflect.deleteProperty(globalThis, name);
  kept.clear();
});

test('WebTransport that stands within 250 ms is taken, and no WebSocket is made', async () => {
  for (const after of [0, 149, 151, 249]) {
    const { how } = dial();
    await clock.advance(after);
    quic[0]?.stand();
    await settle();
    assert.equal(how(), 'webtransport', `${after} ms`);
    await clock.advance(10_000);
    assert.equal(tcp.length, 0, `${after} ms`);
    assert.equal(quic[0]?.closedBy, undefined);
  }
});

test('after 250 ms a WebSocket is tried, too, and the first that stands is taken: the other is closed', async () => {
  const first = dial();
  await clock.advance(249);
  assert.equal(tcp.length, 0);
  await clock.advance(1);
  assert.deepEqual(tcp.map(({ url, protocol }) => [url, protocol]), [['wss://example.com:2/udpack', 'qmux-02.udpack-1']]);
  tcp[0]?.stand();
  await settle();
  assert.equal(first.how(), 'wss');
  assert.equal(quic[0]?.closedBy, Code.CANCELLED);
  assert.equal(tcp[0]?.isClosed, false);

  const second = dial();
  await clock.advance(250);
  quic[0]?.stand();
  await settle();
  assert.equal(second.how(), 'webtransport');
  // A WebSocket is closed as soon as it has opened: before, browsers log that as an error.
  assert.equal(tcp[0]?.isClosed, false);
  tcp[0]?.emit('open');
  assert.equal(tcp[0]?.isClosed, true);
  assert.equal(quic[0]?.closedBy, undefined);
});

test('a WebTransport that fails is not waited for; when both fail, both are told of', async () => {
  for (const after of [0, 99, 200]) {
    const { how, done } = dial();
    await clock.advance(after);
    quic[0]?.fail(new Error('no way'));
    await settle();
    assert.equal(tcp.length, 1, `${after} ms`);
    tcp[0]?.emit('error');
    await settle();
    assert.equal(how(), 'not connected: connection_lost: no way; the WebSocket was not made, or failed');
    const error = await done.catch((error: unknown) => error);
    assert.ok(error instanceof ConnectError && error.retry);
  }
});

test('a browser without WebTransport goes to the WebSocket at once', async () => {
  const { how } = dial('auto', false);
  await settle();
  tcp[0]?.stand();
  await settle();
  assert.equal(how(), 'wss');
  assert.equal(quic.length, 0);
});

test('one transport alone is taken alone', async () => {
  const one = dial('wss');
  await settle();
  assert.deepEqual([quic.length, tcp.length], [0, 1]);
  tcp[0]?.stand();
  await settle();
  assert.equal(one.how(), 'wss');
  const other = dial('webtransport');
  await clock.advance(5000);
  assert.deepEqual([quic.length, tcp.length], [1, 0]);
  quic[0]?.fail(new Error('no way'));
  await settle();
  assert.equal(other.how(), 'not connected: connection_lost: no way');
});

test('for a day after a WebSocket was first both begin at once; WebTransport that is first ends that', async () => {
  Object.assign(globalThis, { localStorage });
  const first = dial();
  await clock.advance(250);
  tcp[0]?.stand();
  await settle();
  assert.equal(first.how(), 'wss');
  assert.deepEqual([...kept.keys()], ['udpack-wss https://example.com:1/udpack']);

  const second = dial();
  await settle();
  assert.deepEqual([quic.length, tcp.length], [1, 1]);
  quic[0]?.stand();
  await settle();
  assert.equal(second.how(), 'webtransport');
  assert.equal(kept.size, 0);

  for (const [value, sockets] of [[Date.now() - 86_400_001, 0], [Date.now() - 86_000_000, 1], [Date.now() + 86_500_000, 0], ['nonsense', 0]] as const) {
    kept.set('udpack-wss https://example.com:1/udpack', `${value}`);
    const { controller } = dial();
    await settle();
    assert.equal(tcp.length, sockets, `${value}`);
    controller.abort();
    await clock.advance(3000);
  }
});

test('a page that may not keep anything connects as before', async () => {
  Object.defineProperty(globalThis, 'localStorage', { configurable: true, get: () => { throw new Error('denied'); } });
  const { how } = dial();
  await clock.advance(250);
  tcp[0]?.stand();
  await settle();
  assert.equal(how(), 'wss');
});

test('who gives up before the WebSocket makes none', async () => {
  for (const after of [50, 200]) {
    const { controller, how } = dial();
    await clock.advance(after);
    controller.abort();
    await settle();
    assert.notEqual(how(), 'waits');
    assert.deepEqual([quic[0]?.closedBy, tcp.length], [Code.CANCELLED, 0]);
  }
});

test('who gives up leaves nothing behind', async () => {
  const { controller, how } = dial();
  await clock.advance(250);
  controller.abort();
  await settle();
  assert.notEqual(how(), 'waits');
  await clock.advance(3000);
  assert.deepEqual([quic[0]?.closedBy, tcp[0]?.isClosed], [Code.CANCELLED, true]);
});

/** The way back from a WebSocket to WebTransport: when it is looked for, and that a session which takes it loses nothing. */

import assert from 'node:assert/strict';
import { test } from 'node:test';
import { ConnectError } from '../src/base/errors.js';
import { type Channel, Code, connect, type ConnectOptions, type Socket } from '../src/index.js';
import { lookForUdp, Probes } from '../src/transport/mux/back.js';
import { MemoryLink } from '../src/transport/memory.js';
import { type Connection, ConnectionEnd, type Mover, StreamEnd } from '../src/transport/transport.js';
import { CloseReason } from '../src/wire/codes.js';
import { FakeClock, settle } from './clock.js';
import { FakeServer, TOKEN } from './server.js';

const classes = { CloseReason, Code, ConnectError, ConnectionEnd, StreamEnd };

/** What looks, on a clock that stands still; `tries` are the times at which it dialled. */
function looking(dial: (signal: AbortSignal) => Promise<Connection>, mayMove = (): boolean => true) {
  const clock = new FakeClock();
  const controller = new AbortController();
  const tries: number[] = [];
  const moved: Connection[] = [];
  const back = (signal: AbortSignal): Promise<Connection> => {
    tries.push(clock.now());
    return dial(signal);
  };
  const probes = new Probes();
  const way = { clock, random: () => 0.5, back, key: 'key', classes, channels: 1 };
  const look = (): Promise<void> => lookForUdp(way, probes, { mayMove, moveTo: (better) => void moved.push(better) }, controller.signal);
  return { clock, controller, tries, moved, probes, look };
}

const failing = async (): Promise<Connection> => Promise.reject(new Error('no UDP'));

test('UDP is looked for after 5 s, then after twice as long each time, at most 5 minutes, and each wait is up to a quarter longer', async () => {
  const { clock, controller, tries, look } = looking(failing);
  const done = look();
  await clock.advance(1_500_000);
  const waits = tries.map((at, n) => at - (tries[n - 1] ?? 0));
  assert.deepEqual(waits.map((wait) => wait / 1.125), [5000, 10_000, 20_000, 40_000, 80_000, 160_000, 300_000, 300_000, 300_000]);
  controller.abort();
  await done;
  await clock.advance(1_000_000);
  assert.equal(tries.length, 9);
});

test('the waits begin anew only when a connection over UDP has lasted for a minute', async () => {
  for (const [lasted, wait] of [[59_999, 20_000], [60_000, 5000]] as const) {
    const link = new MemoryLink();
    let fails = 1;
    const { clock, tries, moved, look } = looking(async () => (fails-- > 0 ? failing() : link.client));
    const done = look();
    await clock.advance(20_000);
    await done;
    assert.deepEqual([moved.length, tries.length], [1, 2]);
    await clock.advance(lasted - (clock.now() - (tries[1] as number)));
    link.cut();
    await settle();
    const begun = clock.now();
    fails = 1;
    void look();
    await clock.advance(25_000);
    assert.equal(((tries[2] as number) - begun) / 1.125, wait);
  }
});

test('a handshake that does not end is given up after 10 s, and when the WebSocket is left', async () => {
  const signals: AbortSignal[] = [];
  const { clock, controller, tries, look } = looking((signal) => (signals.push(signal), new Promise(() => {})));
  const done = look();
  await clock.advance(5625 + 9999);
  assert.equal(signals[0]?.aborted, false);
  await clock.advance(1);
  assert.equal(signals[0]?.aborted, true);
  await clock.advance(12_000);
  assert.equal(tries.length, 2);
  controller.abort();
  await settle();
  assert.equal(signals[1]?.aborted, true);
  await clock.result(done);
});

test('nothing is dialled while the session may not move, and what stands too late is closed', async () => {
  let may = false;
  const link = new MemoryLink();
  const { clock, tries, moved, look } = looking(async () => ((may = false), link.client), () => may);
  void look();
  await clock.advance(20_000);
  assert.deepEqual(tries, []);
  may = true;
  await clock.advance(30_000);
  assert.deepEqual([tries.length, moved.length], [1, 0]);
  assert.equal((await link.server.closed).code, Code.NORMAL);
});

/** A client whose connections are over a WebSocket, as it believes, and what moves its session. */
async function overTcp(server: FakeServer, clock: FakeClock, options: ConnectOptions = {}): Promise<{ socket: Socket; mover: () => Mover; better: () => Promise<Connection> }> {
  let mover: Mover | undefined;
  const dial = async (): Promise<Connection> => Object.assign(await server.dial(), { seek: (given: Mover) => (mover = given) });
  const socket = await clock.result(connect({ url: 'x', token: TOKEN, dial, clock, random: () => 0.5, ...options }));
  return { socket, mover: () => mover as Mover, better: dial };
}

const upTo = (count: number): number[] => Array.from({ length: count }, (_, n) => n);

test('a session moves again and again amidst 10,000 messages each way: none lost, doubled or reordered', async (t) => {
  const COUNT = 10_000;
  const server = new FakeServer();
  const clock = new FakeClock();
  const atServer: unknown[] = [];
  server.handlers.set('numbers', (channel) => {
    channel.onMessage = ({ data }) => atServer.push(data);
    for (const n of upTo(COUNT)) channel.send('n', n);
    channel.finish();
  });
  const { socket, mover, better } = await overTcp(server, clock);
  const { sessionId } = socket;
  let moves = 0;
  const resumed: unknown[] = [];
  socket.on('state', (state) => {
    if (state.state === 'connected') resumed.push(state.resumed);
    if (state.state === 'reconnecting') assert.deepEqual([state.attempt, state.retryInMs, state.reason.code], [1, 0, Code.SUPERSEDED]);
  });
  const channel = await clock.result(socket.open('numbers'));
  const receiving = (async () => {
    const got: unknown[] = [];
    for await (const message of channel) {
      got.push(message.data);
      if (got.length % 250 === 0 && mover().mayMove()) {
        const next = await better();
        if (mover().mayMove()) {
          moves += 1;
          mover().moveTo(next);
        }
      }
    }
    return got;
  })();
  const sending = (async () => {
    for (const n of upTo(COUNT)) await channel.send('n', n);
    channel.finish();
  })();
  await clock.result(Promise.all([receiving, sending]));
  await clock.until(() => atServer.length >= COUNT, 'the last message at the server');
  assert.deepEqual(await receiving, upTo(COUNT));
  assert.deepEqual(atServer, upTo(COUNT));
  await clock.until(() => resumed.length === moves, 'the last move');
  t.diagnostic(`${moves} moves`);
  assert.ok(moves >= 20, `${moves} moves`);
  assert.deepEqual([resumed.length, resumed.every(Boolean), socket.sessionId], [moves, true, sessionId]);
});

test('a channel that would end with the connection holds the session, and so does one that only the server opened', async () => {
  const server = new FakeServer();
  const clock = new FakeClock();
  server.handlers.set('tied', () => {});
  const { socket, mover } = await overTcp(server, clock, { channels: { theirs: () => {} } });
  assert.equal(mover().mayMove(), true);
  const own = await clock.result(socket.open('tied', { resumable: false }));
  assert.equal(mover().mayMove(), false);
  own.close();
  await clock.until(() => mover().mayMove());
  const theirs = await server.session.openChannel('theirs');
  await clock.until(() => !mover().mayMove());
  theirs.finish();
  await settle();
  assert.equal(mover().mayMove(), false);
});

test('a channel that yields does not hold the session unless a request waits on it, and is opened again after it', async () => {
  const server = new FakeServer();
  const clock = new FakeClock();
  server.handlers.set('stats', () => {});
  const { socket, mover, better } = await overTcp(server, clock);
  const open = (): Promise<Channel> => clock.result(socket.open('stats', { resumable: false, yields: true }));
  const stats = await open();
  assert.equal(mover().mayMove(), true);
  const controller = new AbortController();
  const asked = stats.request('kick', {}, { signal: controller.signal }).catch(() => {});
  assert.equal(mover().mayMove(), false);
  controller.abort();
  await clock.result(asked);
  assert.equal(mover().mayMove(), true);
  const { sessionId } = socket;
  mover().moveTo(await better());
  const { code, retry } = await clock.result(stats.closed);
  assert.deepEqual([code, retry], [Code.CONNECTION_LOST, true]);
  await open();
  assert.deepEqual([socket.sessionId, socket.state.state], [sessionId, 'connected']);
});

test('a session that is not resumed, or is closing, does not move', async () => {
  const server = new FakeServer();
  const clock = new FakeClock();
  for (const options of [{ resume: false }, { reconnect: false }]) assert.equal((await overTcp(server, clock, options)).mover().mayMove(), false);
  const { socket, mover } = await overTcp(server, clock);
  const closing = socket.close();
  assert.equal(mover().mayMove(), false);
  await clock.result(closing);
});

test('a connection that is moved to and broken comes back as after a loss; one that a close overtakes is closed', async () => {
  const server = new FakeServer();
  const clock = new FakeClock();
  const { socket, mover, better } = await overTcp(server, clock);
  const { sessionId } = socket;
  const broken = await better();
  server.link.cut();
  mover().moveTo(broken);
  await clock.until(() => server.links.length === 3 && socket.state.state === 'connected');
  assert.equal(socket.sessionId, sessionId);

  const unused = await better();
  mover().moveTo(unused);
  await clock.result(socket.close());
  assert.equal((await clock.result(unused.closed)).by, 'local');
});

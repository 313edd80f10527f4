/** Sessions that outlive their connection: nothing lost, doubled or reordered, wherever the path breaks. */

import assert from 'node:assert/strict';
import { test } from 'node:test';
import { type Channel, ClosedError, Code, connect, type ConnectOptions, type Socket, type SocketState } from '../src/index.js';
import { FakeClock, settle } from './clock.js';
import { FakeServer, type ServerChannel, TOKEN } from './server.js';

function start(server: FakeServer, clock: FakeClock, options: ConnectOptions = {}): Promise<Socket> {
  return connect({ url: 'x', token: TOKEN, dial: server.dial, clock, random: () => 0.5, ...options });
}

/** Numbers that look random and are the same in each run. */
function numbers(seed: number): () => number {
  let state = seed;
  return () => {
    state = (Math.imul(state, 1_103_515_245) + 12_345) >>> 0;
    return state / 2 ** 32;
  };
}

async function collect(channel: Channel): Promise<unknown[]> {
  const got: unknown[] = [];
  for await (const message of channel) got.push(message.data);
  return got;
}

const upTo = (count: number): number[] => Array.from({ length: count }, (_, n) => n);

for (const opener of ['client', 'server'] as const) {
  test(`10,000 messages each way on a channel that the ${opener} opened, through cuts`, async (t) => {
    const COUNT = 10_000;
    const random = numbers(7);
    const server = new FakeServer();
    const clock = new FakeClock();
    let cuts = 0;
    let mends = true;
    server.onLink = (link) => {
      if (mends && cuts < 80) {
        link.cutAfter(600 + Math.floor(random() * 12_000));
        cuts += 1;
      }
    };
    const atServer: unknown[] = [];
    let there: ServerChannel | undefined;
    const begin = (channel: ServerChannel): void => {
      there = channel;
      channel.onMessage = ({ data }) => atServer.push(data);
      for (const n of upTo(COUNT)) channel.send('n', n);
      channel.finish();
    };
    server.handlers.set('numbers', begin);
    let here: Channel | undefined;
    const accepted = (channel: Channel): void => {
      here = channel;
    };
    const socket = await clock.result(start(server, clock, { channels: { numbers: accepted } }));
    if (opener === 'client') {
      here = await clock.result(socket.open('numbers'));
    } else {
      await server.session.openChannel('numbers', { resumable: true }).then(begin, () => {});
      await clock.until(() => here !== undefined, 'the channel of the server');
    }
    const channel = here as Channel;
    const receiving = collect(channel);
    const sending = (async () => {
      for (const n of upTo(COUNT)) await channel.send('n', n);
      channel.finish();
    })();
    await clock.result(Promise.all([receiving, sending]));
    await clock.until(() => atServer.length >= COUNT, 'the last message at the server');
    assert.deepEqual(await receiving, upTo(COUNT));
    assert.deepEqual(atServer, upTo(COUNT));
    assert.equal((await clock.result(channel.closed)).code, Code.NORMAL);
    mends = false;
    await clock.until(() => there?.kept.length === 0, 'the last confirmation');
    t.diagnostic(`${server.links.length} connections`);
    assert.ok(server.links.length > 20, `${server.links.length} connections`);
  });
}

/** One small exchange, whose first connection ends after so many bytes and the second after so many more. */
async function exchange(first: number, second: number): Promise<'over' | 'refused' | 'uncut'> {
  const server = new FakeServer();
  const clock = new FakeClock();
  const ends = [first, second];
  server.onLink = (link) => link.cutAfter(ends.shift() ?? Number.POSITIVE_INFINITY);
  const atServer: unknown[] = [];
  server.handlers.set('numbers', (channel) => {
    channel.onMessage = ({ event, data, id }) => {
      atServer.push(data);
      if (id !== undefined) channel.send('$reply', `reply to ${data as number}`, id);
      else if (!event.startsWith('$')) channel.send('n', data);
    };
    channel.onEnd = () => channel.finish();
  });
  let socket: Socket;
  try {
    socket = await clock.result(start(server, clock));
  } catch {
    return 'refused';
  }
  const channel = await clock.result(socket.open('numbers'));
  void channel.send('n', 0);
  void channel.send('n', 1);
  const reply = channel.request('ask', 2, { timeout: Number.POSITIVE_INFINITY });
  void channel.send('n', 3);
  assert.equal(await clock.result(reply), 'reply to 2');
  channel.finish();
  assert.deepEqual(await clock.result(collect(channel)), [0, 1, 3]);
  assert.deepEqual(atServer, [0, 1, 2, 3]);
  await clock.until(() => (server.session.accepted.get(1)?.kept.length ?? 0) === 0, 'the confirmation');
  // Both sides forget it: the client's list is empty when it comes back once more.
  if (server.links.length === 1) return 'uncut';
  await clock.until(() => socket.state.state === 'connected');
  server.link.cut();
  await clock.until(() => server.links.at(-1)?.over === false && socket.state.state === 'connected');
  await settle();
  const lists = server.session.control_.filter(({ event }) => event === '$channels');
  assert.deepEqual(lists.at(-1)?.data, { open: [] });
  return 'over';
}

test('a connection may break at every byte', async (t) => {
  const random = numbers(3);
  const seen = { over: 0, refused: 0, uncut: 0 };
  for (let bytes = 0; seen.uncut === 0; bytes += 1) {
    seen[await exchange(bytes, 400 + Math.floor(random() * 500))] += 1;
  }
  t.diagnostic(JSON.stringify(seen));
  assert.ok(seen.over > 200, JSON.stringify(seen));
});

test('a session that is not kept ends resumable channels with not_resumed, and the socket lives on', async () => {
  const server = new FakeServer();
  server.handlers.set('quiet', () => {});
  const clock = new FakeClock();
  const socket = await start(server, clock);
  const states: SocketState[] = [];
  socket.on('state', (state) => states.push(state));
  const channel = await socket.open('quiet');
  const old = socket.sessionId;
  server.sessions.clear();
  server.link.cut();
  await clock.until(() => socket.state.state === 'connected' && socket.sessionId !== old);
  assert.equal((await channel.closed).code, Code.NOT_RESUMED);
  await assert.rejects(channel.receive(), ClosedError);
  assert.deepEqual(states.map(({ state }) => state), ['reconnecting', 'connected']);
  assert.deepEqual(states[1], { state: 'connected', resumed: false, reason: 'unknown' });
  assert.equal((await socket.open('quiet')).id, 1);
});

test('a channel that is not resumable ends with its connection', async () => {
  const server = new FakeServer();
  server.handlers.set('quiet', () => {});
  const clock = new FakeClock();
  const socket = await start(server, clock);
  const brief = await socket.open('quiet', { resumable: false });
  const kept = await socket.open('quiet');
  server.link.cut();
  await clock.until(() => server.links.length === 2 && socket.state.state === 'connected');
  assert.equal((await brief.closed).code, Code.CONNECTION_LOST);
  await kept.send('still', 1);
  await settle();
  assert.deepEqual([...server.session.accepted.values()].at(-1)?.got.map(({ data }) => data), [1]);
});

test('tries wait longer and longer, and patience ends', async () => {
  const server = new FakeServer();
  const clock = new FakeClock();
  const socket = await start(server, clock, { reconnect: { patience: 60_000 } });
  const waits: number[] = [];
  socket.on('state', (state) => state.state === 'reconnecting' && waits.push(state.retryInMs));
  server.down = true;
  server.link.cut();
  const reason = await clock.result(socket.closed);
  assert.equal(reason.code, Code.CONNECTION_LOST);
  assert.deepEqual(waits.slice(0, 8), [125, 250, 500, 1000, 2000, 4000, 8000, 15_000]);
  assert.equal(clock.now(), 60_000);
});

test('a try is made at once when the program knows better', async () => {
  const server = new FakeServer();
  const clock = new FakeClock();
  const socket = await start(server, clock, { random: () => 0.999 });
  server.link.cut();
  await settle();
  assert.equal(socket.state.state, 'reconnecting');
  socket.reconnectNow();
  await settle();
  assert.deepEqual(socket.state, { state: 'connected', resumed: true });
  assert.equal(clock.now(), 0);
});

test('closing while there is no connection ends at once, and what waits to open hears of it', async () => {
  const server = new FakeServer();
  const clock = new FakeClock();
  const socket = await start(server, clock);
  server.down = true;
  server.link.cut();
  await settle();
  const opening = assert.rejects(socket.open('quiet'), ClosedError);
  assert.equal((await socket.close()).code, Code.NORMAL);
  await opening;
});

test('a close during an outage reaches the server afterwards', async () => {
  const server = new FakeServer();
  server.handlers.set('quiet', () => {});
  const clock = new FakeClock();
  const socket = await start(server, clock);
  const channel = await socket.open('quiet');
  await channel.send('a', 1);
  await settle();
  server.link.cut();
  await settle();
  void channel.send('b', 2);
  await channel.close(0x1001, 'enough');
  await clock.until(() => server.links.length === 2 && socket.state.state === 'connected');
  await clock.advance(20);
  const [there] = [...server.session.accepted.values()];
  assert.deepEqual(there?.got.map(({ event, data }) => [event, data]), [['a', 1], ['b', 2], ['$close', { code: 0x1001, text: 'enough' }]]);
});

test('what a session without a connection keeps is bounded, and send waits', async () => {
  const server = new FakeServer();
  server.handlers.set('quiet', () => {});
  const clock = new FakeClock();
  const socket = await start(server, clock);
  const channels = await Promise.all(upTo(5).map(() => socket.open('quiet')));
  server.down = true;
  server.link.cut();
  await settle();
  let queued = 0;
  const data = new Uint8Array(500_000);
  for (const channel of channels) for (const _ of upTo(9)) void channel.send('n', data).then(() => { queued += 1; }, () => {});
  await settle();
  // 4 MiB each, 16 MiB in all, and one message more wherever there was room for a part of it.
  assert.ok(queued >= 33 && queued <= 40, `${queued}`);
  server.down = false;
  await clock.until(() => queued === 45, 'the rest');
  await clock.advance(100);
  assert.equal([...server.session.accepted.values()].reduce((sum, { got }) => sum + got.length, 0), 45);
});

test('a connection that is given up on the way back is closed as superseded', async () => {
  const server = new FakeServer();
  const clock = new FakeClock();
  const socket = await start(server, clock);
  let silent = 1;
  const ends: Promise<number>[] = [];
  server.onHello = (_, link) => {
    if (silent === 0) return false;
    silent -= 1;
    ends.push(link.server.closed.then(({ code }) => code));
    return true;
  };
  server.link.cut();
  await clock.until(() => server.links.length === 3 && socket.state.state === 'connected');
  assert.deepEqual(await Promise.all(ends), [Code.SUPERSEDED]);
  assert.deepEqual(socket.state, { state: 'connected', resumed: true });
});

/** A page that is left and comes back. */
function turn(page: EventTarget, type: 'pagehide' | 'pageshow', persisted: boolean): void {
  page.dispatchEvent(Object.assign(new Event(type), { persisted }));
}

test('a page that may come back keeps its session, however long it sleeps, and goes on with it', async () => {
  const server = new FakeServer();
  const clock = new FakeClock();
  const page = new EventTarget();
  const states: string[] = [];
  const atServer: unknown[] = [];
  server.handlers.set('numbers', (channel) => {
    channel.onMessage = ({ data }) => atServer.push(data);
  });
  const socket = await clock.result(start(server, clock, { page }));
  socket.on('state', ({ state }) => states.push(state));
  const { sessionId } = socket;
  const channel = await clock.result(socket.open('numbers'));
  await channel.send('n', 1);
  const tied = await clock.result(socket.open('numbers', { resumable: false }));
  await settle();
  const { link } = server;
  turn(page, 'pagehide', true);
  // Whoever opens such a channel anew when it is lost does so after a sleep as well.
  const { code, retry } = await clock.result(tied.closed);
  assert.deepEqual([code, retry], [Code.CONNECTION_LOST, true]);
  const left = await link.server.closed;
  assert.deepEqual([left.code, left.by], [Code.SUPERSEDED, 'peer']);
  await channel.send('n', 2);
  // Longer than it would try to come back.
  await clock.advance(3_600_000);
  assert.deepEqual(states, ['reconnecting']);
  assert.equal(server.link, link);
  turn(page, 'pageshow', true);
  await clock.until(() => atServer.length === 2, 'the second message');
  assert.deepEqual(states, ['reconnecting', 'reconnecting', 'connected']);
  assert.equal(socket.sessionId, sessionId);
  assert.deepEqual(atServer, [1, 2]);
  await clock.result(socket.close());
});

test('a page that falls asleep while it reconnects does not end its session', async () => {
  const server = new FakeServer();
  const clock = new FakeClock();
  const page = new EventTarget();
  const socket = await clock.result(start(server, clock, { page }));
  const channel = await clock.result(socket.open('numbers', {}));
  void channel;
  server.link.cut();
  let asleep = false;
  server.onLink = () => {
    if (asleep) return;
    asleep = true;
    turn(page, 'pagehide', true);
  };
  await clock.until(() => asleep, 'the next connection');
  await clock.advance(60_000);
  assert.equal(socket.state.state, 'reconnecting');
  turn(page, 'pageshow', true);
  await clock.until(() => socket.state.state === 'connected', 'the connection');
  assert.deepEqual(socket.state, { state: 'connected', resumed: true });
  await clock.result(socket.close());
});

test('a page that is left for good ends its session', async () => {
  const server = new FakeServer();
  const clock = new FakeClock();
  const page = new EventTarget();
  const socket = await clock.result(start(server, clock, { page }));
  const { link } = server;
  turn(page, 'pagehide', false);
  const left = await link.server.closed;
  assert.deepEqual([left.code, left.by], [Code.NORMAL, 'peer']);
  const reason = await clock.result(socket.closed);
  assert.deepEqual([reason.code, reason.by], [Code.NORMAL, 'local']);
});

/** The client against the small server: admission, channels, requests, volatile messages, the end. */

import assert from 'node:assert/strict';
import { test } from 'node:test';
import { connect, type ConnectOptions, ConnectError, ClosedError, Code, EncodeError, Fault, RefreshError, type Socket, TimeoutError, UsageError, Timestamp } from '../src/index.js';
import type { Channel, Message, SocketState } from '../src/index.js';
import { FakeClock, settle } from './clock.js';
import { FakeServer, frame, type ServerChannel, TOKEN } from './server.js';

interface Setup {
  server: FakeServer;
  clock: FakeClock;
  socket: Socket;
}

async function setup(options: ConnectOptions = {}, prepare: (server: FakeServer) => void = () => {}): Promise<Setup> {
  const server = new FakeServer();
  const clock = new FakeClock();
  server.handlers.set('echo', echo);
  server.handlers.set('quiet', () => {});
  prepare(server);
  const socket = await clock.result(connect({ url: 'https://server/udpack', token: TOKEN, dial: server.dial, clock, random: () => 0.5, ...options }));
  return { server, clock, socket };
}

function echo(channel: ServerChannel): void {
  channel.onMessage = ({ event, data, id }) => {
    if (event.startsWith('$')) return;
    if (id === undefined) channel.send(event, data);
    else channel.send('$reply', data, id);
  };
  channel.onEnd = () => channel.finish();
}

async function fails<T extends Error>(promise: Promise<unknown>, kind: new (...args: never[]) => T): Promise<T> {
  try {
    await promise;
  } catch (error) {
    assert.ok(error instanceof kind, `another error: ${error}`);
    return error;
  }
  throw new Error('it did not fail');
}

test('a client is let in, opens a channel, and hears what it says', async () => {
  const { socket, server } = await setup();
  assert.deepEqual(socket.state, { state: 'connected', resumed: false });
  assert.match(socket.sessionId, /^[0-9a-f]{32}$/);
  assert.equal(server.session.hello?.agent, 'udpack-js/0.1.0');
  const channel = await socket.open('echo');
  const said = { text: 'hi', big: 2n ** 63n, small: -(2 ** 40), bytes: new Uint8Array([1, 2]), nothing: undefined, list: [1.5, null] };
  await channel.send('say', said);
  const message = await channel.receive();
  assert.equal(message?.event, 'say');
  const { nothing: _, ...rest } = said;
  assert.deepEqual(message?.data, rest);
});

test('a wrong token is refused, and nothing tries again', async () => {
  const server = new FakeServer();
  const error = await fails(connect({ url: 'x', token: 'wrong', dial: server.dial, clock: new FakeClock() }), ConnectError);
  assert.equal(error.code, Code.AUTH_FAILED);
  assert.equal(error.retry, false);
  assert.equal(error.reason.by, 'peer');
});

test('of several servers the first connect tries each once', async () => {
  const server = new FakeServer();
  const dialled: string[] = [];
  const dial = async (url: string) => {
    dialled.push(url);
    if (url === 'a') throw new ConnectError((await closedBy(Code.SERVER_BUSY)).reason);
    return server.dial();
  };
  const socket = await connect({ url: ['a', 'b'], token: TOKEN, dial, clock: new FakeClock() });
  assert.equal(socket.state.state, 'connected');
  assert.deepEqual(dialled, ['a', 'b']);
});

async function closedBy(code: number): Promise<ClosedError> {
  const { CloseReason } = await import('../src/index.js');
  return new ClosedError(new CloseReason(code, '', 'peer'));
}

test('a server that says nothing is given up in time', async () => {
  const server = new FakeServer();
  server.onHello = () => true;
  const clock = new FakeClock();
  const pending = connect({ url: 'x', token: TOKEN, dial: server.dial, clock });
  const error = await fails(clock.result(pending), ConnectError);
  assert.equal(error.code, Code.TIMED_OUT);
  assert.equal(clock.now(), 10_000);
});

test('the first connect can be given up', async () => {
  const server = new FakeServer();
  server.onHello = () => true;
  const controller = new AbortController();
  const pending = connect({ url: 'x', token: TOKEN, dial: server.dial, clock: new FakeClock(), signal: controller.signal });
  await settle();
  controller.abort(new Error('no longer wanted'));
  await assert.rejects(pending, { message: 'no longer wanted' });
});

test('a channel that nobody handles ends with the server\'s code', async () => {
  const { socket } = await setup();
  const channel = await socket.open('nonsense');
  const reason = await channel.closed;
  assert.equal(reason.code, Code.NO_SUCH_CHANNEL);
  assert.equal(reason.text, 'nobody handles channels of this name');
  const error = await fails(channel.send('x'), ClosedError);
  assert.equal(error.code, Code.NO_SUCH_CHANNEL);
  await fails(channel.receive(), ClosedError);
});

test('requests: a reply, a fault, no handler, a deadline, a signal', async () => {
  const { socket, clock, server } = await setup({}, (server) => {
    server.handlers.set('calc', (channel) => {
      channel.onMessage = ({ event, data, id }) => {
        if (id === undefined) return;
        if (event === 'add') channel.send('$reply', (data as number[]).reduce((sum, n) => sum + n), id);
        if (event === 'refuse') channel.send('$fault', { code: 'sold_out', message: 'no apples', data: { left: 0 } }, id);
        if (event === 'what') channel.send('$fault', { code: 'no_handler', message: 'no handler for this event' }, id);
      };
    });
  });
  const calc = await socket.open<Record<string, never>, { add: (pair: [number, number]) => number; refuse: () => number; what: null; never: null }>('calc');
  assert.equal(await calc.request('add', [1, 2]), 3);
  const fault = await fails(calc.request('refuse'), Fault);
  assert.deepEqual([fault.fault, fault.message, fault.data], ['sold_out', 'no apples', { left: 0 }]);
  assert.equal((await fails(calc.request('what'), Fault)).fault, 'no_handler');

  const late = fails(calc.request('never', null, { timeout: 2000 }), TimeoutError);
  await clock.advance(2000);
  assert.equal((await late).code, Code.TIMED_OUT);
  const controller = new AbortController();
  const given = calc.request('never', null, { signal: controller.signal });
  await settle();
  controller.abort(new Error('enough'));
  await assert.rejects(given, { message: 'enough' });
  await settle();
  const [channel] = [...server.session.accepted.values()];
  assert.deepEqual(channel?.got.filter(({ event }) => event === '$cancel').map(({ id }) => id), [3, 4]);
  assert.deepEqual(channel?.got.filter(({ event }) => event === 'never').map(({ deadline }) => deadline), [2000, 30_000]);
});

test('many answers in any order reach those who asked', async () => {
  const { socket } = await setup({}, (server) => {
    server.handlers.set('later', (channel) => {
      const ids: [unknown, number][] = [];
      channel.onMessage = ({ data, id }) => {
        ids.push([data, id as number]);
        if (ids.length === 100) for (const [data, id] of ids.reverse()) channel.send('$reply', data, id);
      };
    });
  });
  const channel = await socket.open('later');
  const asked = Array.from({ length: 100 }, (_, n) => channel.request('n', n));
  assert.deepEqual(await Promise.all(asked), Array.from({ length: 100 }, (_, n) => n));
});

test('an answer of items is read with credit, and leaving it cancels', async () => {
  const { socket, clock, server } = await setup({}, (server) => {
    server.handlers.set('tail', (channel) => {
      channel.onMessage = ({ event, id }) => {
        if (event === 'few') {
          for (const n of [1, 2, 3]) channel.send('$item', n, id);
          channel.send('$reply', null, id);
        }
        if (event === 'endless') for (let n = 0; n < 3; n += 1) channel.send('$item', new Uint8Array(60_000), id);
      };
    });
  });
  const channel = await socket.open('tail');
  const got: unknown[] = [];
  for await (const item of channel.stream('few')) got.push(item);
  assert.deepEqual(got, [1, 2, 3]);
  let taken = 0;
  for await (const _ of channel.stream('endless')) if (++taken === 3) break;
  await clock.advance(10);
  const [there] = [...server.session.accepted.values()];
  const after = there?.got.slice(2).map(({ event }) => event);
  assert.ok(after?.includes('$credit') && after.at(-1) === '$cancel', `${after}`);
  const credited = there?.got.filter(({ event }) => event === '$credit').reduce((sum, { data }) => sum + (data as number), 0) ?? 0;
  assert.ok(credited > 131_072 && credited <= 3 * 60_100, `${credited}`);
});

test('items that exceed their credit cost the channel', async () => {
  const { socket } = await setup({}, (server) => {
    server.handlers.set('flood', (channel) => {
      channel.onMessage = ({ id }) => {
        for (let n = 0; n < 6 && id !== undefined; n += 1) channel.send('$item', new Uint8Array(50_000), id);
      };
    });
  });
  const channel = await socket.open('flood');
  const items = channel.stream('x');
  assert.equal((await channel.closed).code, Code.BACKLOG);
  await fails((async () => { for await (const _ of items); })(), ClosedError);
});

test('a request carries items as fast as the peer takes them', async () => {
  const { socket, server } = await setup({}, (server) => {
    server.handlers.set('sum', (channel) => {
      let sum = 0;
      channel.onMessage = ({ event, data, id }) => {
        if (event === '$push') sum += (data as Uint8Array).length;
        if (event === '$end') channel.send('$reply', sum, id);
      };
    });
  });
  const channel = await socket.open('sum');
  async function* items() {
    for (let n = 0; n < 10; n += 1) yield new Uint8Array(50_000);
  }
  const reply = channel.request('sum', null, { items: items() });
  await settle();
  const [there] = [...server.session.accepted.values()] as [ServerChannel];
  assert.equal(there.got.filter(({ event }) => event === '$push').length, 5);
  there.send('$want', 5 * 50_100, 0);
  await settle();
  assert.equal(there.got.filter(({ event }) => event === '$push').length, 10);
  assert.equal(await reply, 500_000);
});

test('handlers answer the server, one after the other and in order', async () => {
  const running: string[] = [];
  const { socket, server } = await setup({
    channels: {
      work: (channel: Channel) => {
        channel.on('add', (pair: number[]) => (pair[0] as number) + (pair[1] as number));
        channel.on('fail', () => { throw new Fault('too_much', 'at most 3', 3); });
        channel.on('count', async function* (to: number) { for (let n = 0; n < to; n += 1) yield n; });
        channel.on('slow', async (name: string) => { running.push(`${name} begins`); await settle(); running.push(`${name} ends`); });
        channel.on('total', async (_: null, message: Message) => {
          let sum = 0;
          for await (const item of message.items) sum += item as number;
          return sum;
        });
      },
    },
  });
  assert.equal(socket.state.state, 'connected');
  const channel = await server.session.openChannel('work');
  channel.send('add', [2, 3], 0);
  channel.send('fail', null, 1);
  channel.send('count', 3, 2);
  channel.send('unknown', null, 3);
  channel.send('slow', 'a');
  channel.send('slow', 'b', 4);
  channel.send('total', null, 5);
  for (const n of [1, 2, 3]) channel.send('$push', n, 5);
  channel.send('$end', null, 5);
  for (let turn = 0; turn < 10; turn += 1) await settle();
  assert.deepEqual(
    channel.got.map(({ event, data, id }) => [event, data, id]),
    [
      ['$reply', 5, 0],
      ['$fault', { code: 'too_much', message: 'at most 3', data: 3 }, 1],
      ['$item', 0, 2],
      ['$item', 1, 2],
      ['$item', 2, 2],
      ['$reply', null, 2],
      ['$fault', { code: 'no_handler', message: 'no handler for this event' }, 3],
      ['$reply', null, 4],
      ['$reply', 6, 5],
    ],
  );
  assert.deepEqual(running, ['a begins', 'a ends', 'b begins', 'b ends']);
});

test('a handler hears that its asker has let go, and its channel goes on', async () => {
  const aborted: unknown[] = [];
  const { server, clock } = await setup({
    channels: {
      work: (channel: Channel) => {
        channel.on('hang', (_: null, { signal }: Message) => new Promise(() => signal.addEventListener('abort', () => aborted.push((signal.reason as Fault).fault))));
        channel.on('ping', () => 'pong');
      },
    },
  });
  const channel = await server.session.openChannel('work');
  channel.send('hang', null, 0);
  await settle();
  channel.send('$cancel', null, 0);
  channel.sendFrame((await import('../src/wire/message.js')).encodeFrame(1000, 'hang', null, 1, 500));
  channel.send('hang', null, 2);
  channel.send('ping', null, 3);
  await clock.advance(500);
  await clock.advance(30_000);
  assert.deepEqual(aborted, ['cancelled', 'timeout', 'timeout']);
  assert.deepEqual(channel.got.map(({ event, data, id }) => [event, id, event === '$fault' ? (data as { code: string }).code : data]), [
    ['$fault', 0, 'cancelled'],
    ['$fault', 1, 'timeout'],
    ['$fault', 2, 'timeout'],
    ['$reply', 3, 'pong'],
  ]);
});

test('a channel of the server that nobody wants is refused, and a handler that fails closes its own', async () => {
  const { server } = await setup({ channels: { bad: async () => { throw new Error('shown by the next line, on purpose'); } } });
  const unknown = await server.session.openChannel('unknown');
  const bad = await server.session.openChannel('bad');
  await settle();
  assert.deepEqual(unknown.got.map(({ data }) => (data as { code: number }).code), [Code.NO_SUCH_CHANNEL]);
  assert.deepEqual(bad.got.map(({ data }) => (data as { code: number }).code), [Code.HANDLER_FAILED]);
});

test('a full queue makes send wait, and nothing is lost', async () => {
  const { socket, server } = await setup({}, (server) => server.handlers.set('slow', (channel) => { channel.onMessage = () => {}; }));
  const channel = await socket.open('slow', { resumable: false });
  const [there] = await until(() => [...server.session.accepted.values()]);
  const gate = there as ServerChannel;
  let sent = 0;
  const data = new Uint8Array(100_000);
  const sending = (async () => { for (let n = 0; n < 40; n += 1) { await channel.send('n', data); sent += 1; } })();
  await sending;
  await channel.flush();
  await settle();
  assert.equal(sent, 40);
  assert.equal(gate.got.length, 40);
});

async function until<T>(get: () => T[]): Promise<T[]> {
  while (get().length === 0) await settle();
  return get();
}

test('a peer that reads nothing fills the queue, and send waits', async () => {
  const { socket } = await setup({}, (server) => server.handlers.set('stuck', (channel) => { channel.read = async () => {}; }));
  const channel = await socket.open('stuck', { resumable: false });
  let queued = 0;
  for (let n = 0; n < 2000; n += 1) void channel.send('n', new Uint8Array(1000)).then(() => { queued += 1; }, () => {});
  await settle();
  assert.equal(channel.hasRoom, false);
  assert.ok(queued >= 1024 && queued < 1400, `${queued}`);
  await channel.closed.then.call(Promise.resolve(), () => {});
  void channel.close();
  await settle();
  assert.ok(queued < 1400, 'what waited was not queued');
});

test('messages that wait for room keep their order, and no number of them waits unseen', async () => {
  let there: ServerChannel | undefined;
  const { socket, server, clock } = await setup({}, (server) => server.handlers.set('stuck', (channel) => { there = channel; }));
  const channel = await socket.open('stuck');
  await settle();
  const data = new Uint8Array(100_000);
  server.down = true;
  server.link.cut();
  await settle();
  let next = 0;
  while (channel.hasRoom) void channel.send('n', [next++, data]);
  for (let n = 0; n < 20; n += 1) void channel.send('n', [next++, data]);
  // Whenever there is room again: another one tries to be first.
  const sending = (async () => {
    for (let n = 0; n < 200; n += 1) {
      void channel.send('n', [next++]);
      await Promise.resolve();
    }
  })();
  server.down = false;
  await sending;
  for (let n = 0; n < 40; n += 1) {
    void channel.send('n', [next++]);
    await clock.advance(20);
  }
  await clock.until(() => there?.got.length === next, 'the last message');
  assert.deepEqual(there?.got.map(({ data }) => (data as number[])[0]), Array.from({ length: next }, (_, n) => n));

  server.link.cut();
  server.down = true;
  await settle();
  assert.throws(() => { for (let n = 0; n < 100_000; n += 1) void channel.send('n', data.subarray(0, 10_000)); }, { name: 'BacklogError' });
});

test('channels are opened no faster than the server takes them', async () => {
  const { socket, server, clock } = await setup({}, (server) => { server.limits = { frame: 1 << 20, channels: 1000, channel_rate: 10 }; });
  const opening = Promise.all(Array.from({ length: 40 }, () => socket.open('quiet')));
  await settle();
  assert.equal(server.session.accepted.size, 20);
  await clock.advance(1000);
  assert.equal(server.session.accepted.size, 30);
  await clock.result(opening);
  assert.equal(clock.now(), 2000);
});

test('an application that does not read slows its peer, and unread messages before an answer are a backlog', async () => {
  const { socket, server } = await setup({}, (server) => {
    server.handlers.set('talker', (channel) => {
      channel.onMessage = () => { for (let n = 0; n < 1500; n += 1) channel.send('n', n); };
    });
  });
  const channel = await socket.open('talker');
  await assert.rejects(channel.request('go'), { name: 'BacklogError', code: Code.BACKLOG });
  const got: unknown[] = [];
  for (let n = 0; n < 1500; n += 1) got.push((await channel.receive())?.data);
  assert.deepEqual(got, Array.from({ length: 1500 }, (_, n) => n));
  assert.equal(server.session.accepted.size, 1);
});

test('gaps stand where messages are missing, and marks are told when they are passed', async () => {
  const { socket, server, clock } = await setup({}, (server) => {
    server.handlers.set('room', (channel) => {
      channel.send('$mark', 1);
      channel.send('said', 'a');
      channel.send('$gap', { room: 'lobby', lost: 3 });
      channel.send('$mark', 4);
      channel.send('said', 'b');
    });
  });
  const channel = await socket.open('room');
  assert.equal((await channel.receive())?.data, 'a');
  await clock.advance(10);
  assert.deepEqual(server.session.passed.map(({ mark }) => mark), [1]);
  const gap = await channel.receive();
  assert.deepEqual(gap?.gap, { room: 'lobby', lost: 3 });
  assert.equal((await channel.receive())?.data, 'b');
  await clock.advance(10);
  assert.deepEqual(server.session.passed.map(({ channel, own, mark }) => [channel, own, mark]), [[1, true, 1], [1, true, 4]]);
});

test('on reads everything, and cannot be mixed with receive', async () => {
  const { socket } = await setup({}, (server) => {
    server.handlers.set('room', (channel) => {
      channel.send('said', 'a');
      channel.send('$gap', { room: 'lobby', lost: 3 });
      channel.send('other', 1);
    });
  });
  const got: unknown[] = [];
  const channel = await socket.open('room');
  channel.on('said', (text) => got.push(text)).on('$gap', (gap) => got.push(gap));
  await settle();
  assert.deepEqual(got, ['a', { room: 'lobby', lost: 3 }]);
  assert.equal(channel.dropped, 1);
  await fails(channel.receive(), UsageError);
  const other = await socket.open('echo');
  void other.receive();
  assert.throws(() => other.on('x', () => {}), UsageError);
});

test('finish ends one direction, and the channel when both have', async () => {
  const { socket } = await setup();
  const channel = await socket.open('echo');
  await channel.send('last', 1);
  channel.finish();
  assert.equal((await channel.receive())?.data, 1);
  assert.equal(await channel.receive(), null);
  assert.equal((await channel.closed).code, Code.NORMAL);
  await fails(channel.send('x'), ClosedError);
});

test('close sends what is queued, then code and text, and await using does', async () => {
  const { socket, server } = await setup();
  {
    await using channel = await socket.open('quiet');
    void channel.send('a', 1);
  }
  const channel = await socket.open('quiet');
  await channel.send('b', 2);
  await channel.close(0x1234, 'done with it');
  await settle();
  const all = [...server.session.accepted.values()].map(({ got }) => got.map(({ event, data }) => [event, data]));
  assert.deepEqual(all, [
    [['a', 1], ['$close', { code: 0, text: '' }]],
    [['b', 2], ['$close', { code: 0x1234, text: 'done with it' }]],
  ]);
  const reason = await channel.closed;
  assert.deepEqual([reason.code, reason.text, reason.by], [0x1234, 'done with it', 'local']);
});

test('a close while the server still speaks confirms nothing that was not sent', async () => {
  const { socket, server, clock } = await setup();
  const channel = await socket.open('quiet');
  await settle();
  await channel.close();
  await clock.advance(100);
  const acks = server.session.control_.filter(({ event }) => event === '$ack').map(({ data }) => (data as { received: unknown }).received);
  assert.deepEqual(acks, [2n ** 64n - 1n]);
});

test('a close of the server arrives behind its last message, with code and text', async () => {
  const { socket } = await setup({}, (server) => server.handlers.set('brief', (channel) => { channel.send('bye', 1); channel.close(0x41, 'not today'); }));
  const channel = await socket.open('brief');
  const request = fails(channel.request('never'), ClosedError);
  assert.equal((await channel.receive())?.event, 'bye');
  const error = await fails(channel.receive(), ClosedError);
  assert.deepEqual([error.code, error.reason.text, error.reason.by], [0x41, 'not today', 'peer']);
  assert.equal((await request).code, 0x41);
});

test('volatile messages: by datagram, by stream, the latest by key, older ones dropped', async () => {
  const { socket, server } = await setup();
  const { encodeVolatile } = await import('../src/wire/message.js');
  const there = server.link.server;
  socket.sendVolatile('load', 0.7);
  socket.sendLatest('cursor', 'alice', [1, 2]);
  socket.sendVolatile('picture', new Uint8Array(5000));
  await settle();
  const { decodeVolatile } = await import('../src/wire/message.js');
  const first = decodeVolatile((await there.readDatagram()) as Uint8Array);
  assert.deepEqual(first, { event: 'load', data: 0.7, seq: 0 });
  assert.deepEqual(decodeVolatile((await there.readDatagram()) as Uint8Array), { event: 'cursor', data: [1, 2], seq: 1, key: 'alice' });
  const stream = await there.acceptUni();
  assert.equal((await stream?.read())?.length, 5000 + 13);

  await there.sendDatagram(encodeVolatile(1000, 'pos', 1, 5, 'bob'));
  await there.sendDatagram(encodeVolatile(1000, 'pos', 2, 4, 'bob'));
  await there.sendDatagram(new Uint8Array([0xc1]));
  await there.sendDatagram(encodeVolatile(1000, 'pos', 3, 6, 'bob'));
  const uni = await there.openUni();
  await uni.write(encodeVolatile(10_000, 'big', 'x'.repeat(5000), 7));
  await uni.finish();
  await settle();
  assert.deepEqual(await socket.receiveVolatile(), { event: 'pos', data: 3, key: 'bob' });
  assert.equal(((await socket.receiveVolatile())?.data as string).length, 5000);
  assert.equal(socket.droppedVolatile, 1);
  const got: unknown[] = [];
  const off = socket.on('volatile', ({ data }) => got.push(data));
  await there.sendDatagram(encodeVolatile(1000, 'pos', 9, 8, 'bob'));
  await settle();
  off();
  assert.deepEqual(got, [9]);
});

test('what waits of volatile messages is bounded', async () => {
  const { socket, server } = await setup();
  const { encodeVolatile } = await import('../src/wire/message.js');
  for (let n = 0; n < 3000; n += 1) await server.link.server.sendDatagram(encodeVolatile(1000, 'pos', n, n, `key ${n}`));
  await settle();
  assert.equal(socket.droppedVolatile, 3000 - 1024);
  assert.equal((await socket.receiveVolatile())?.data, 3000 - 1024);
});

test('a token is refreshed in time, by hand, and a refusal says so', async () => {
  const wanted: string[] = [];
  const presented: string[] = [];
  const { socket, clock } = await setup(
    { token: undefined as never, getToken: ({ reason }) => { wanted.push(reason); return TOKEN; } },
    (server) => {
      server.expiresMs = 100_000;
      server.onRefresh = (token) => { presented.push(token); return token === 'bad' ? { code: Code.FORBIDDEN, text: 'another identity' } : { expires_ms: 50_000 }; };
    },
  );
  await clock.advance(79_999);
  assert.deepEqual(wanted, ['connect']);
  await clock.advance(1);
  await clock.advance(40_000);
  assert.deepEqual(wanted, ['connect', 'refresh', 'refresh']);
  assert.deepEqual(presented, [TOKEN, TOKEN]);
  const error = await fails(socket.refresh('bad'), RefreshError);
  assert.equal(error.code, Code.FORBIDDEN);
  assert.equal(socket.state.state, 'connected');
});

test('close of the socket sends what is queued and tells the server code and text', async () => {
  const { socket, server, clock } = await setup();
  const channel = await socket.open('quiet');
  void channel.send('last', 1);
  const reason = await clock.result(socket.close(0x2000, 'good night'));
  assert.deepEqual([reason.code, reason.by], [0x2000, 'local']);
  assert.equal(socket.state.state, 'closed');
  const end = await server.link.server.closed;
  assert.deepEqual([end.code, end.text], [0x2000, 'good night']);
  assert.equal((await channel.closed).code, 0x2000);
  await fails(socket.open('x'), ClosedError);
  assert.equal(await socket.receiveVolatile(), undefined);
});

test('a server that closes with a code that says no retry is not come back to', async () => {
  const { socket, server, clock } = await setup();
  const states: SocketState[] = [];
  socket.on('state', (state) => states.push(state));
  const channel = await socket.open('quiet');
  server.session.close(Code.AUTH_REVOKED, 'the token was revoked');
  const reason = await clock.result(socket.closed);
  assert.deepEqual([reason.code, reason.text, reason.by], [Code.AUTH_REVOKED, 'the token was revoked', 'peer']);
  assert.equal((await channel.closed).code, Code.AUTH_REVOKED);
  assert.deepEqual(states.map(({ state }) => state), ['closed']);
  assert.equal(server.links.length, 1);
});

test('a server that goes away is left in order for another connection', async () => {
  const { socket, server, clock } = await setup();
  const states: string[] = [];
  socket.on('state', ({ state }) => states.push(state));
  const channel = await socket.open('echo');
  await channel.send('before', 1);
  server.session.tell('$goaway', { code: Code.SHUTTING_DOWN, text: 'back soon', retry_after_ms: 1000, window_ms: 2000 });
  await clock.until(() => socket.state.state === 'goingAway');
  assert.equal(clock.now(), 0);
  await clock.until(() => socket.state.state === 'connected');
  assert.equal(clock.now(), 2000);
  assert.equal((await channel.closed).code, Code.MOVED);
  assert.equal((await channel.receive())?.data, 1);
  assert.equal((await fails(channel.receive(), ClosedError)).retry, true);
  assert.deepEqual(states, ['goingAway', 'reconnecting', 'connected']);
  assert.equal(server.links.length, 2);
  assert.equal((await (await socket.open('echo')).request('x', 5)), 5);
});

test('what cannot be sent is refused at once', async () => {
  const { socket } = await setup();
  const channel = await socket.open('quiet');
  let deep: unknown = null;
  for (let n = 0; n < 40; n += 1) deep = [deep];
  const loop: unknown[] = [];
  loop.push(loop);
  for (const bad of [deep, loop, () => 1, Symbol('x'), 2n ** 64n, -(2n ** 63n) - 1n, '\ud800', new Set([1]), new Map([[1, 2]]), Array(70_000).fill(0), new Uint8Array(2 << 20)]) {
    assert.throws(() => channel.send('x', bad), EncodeError);
  }
  assert.throws(() => channel.send('$open', 1), EncodeError);
  assert.throws(() => channel.send('', 1), EncodeError);
  assert.throws(() => channel.request('x'.repeat(129)), EncodeError);
  await channel.send('x', new Map([['__proto__', 1]]));
  await channel.send('x', new Timestamp(new Uint8Array(4)));
  assert.equal(frame('x', 1).length, 8);
});

test('without reconnect a lost connection ends the socket', async () => {
  const { socket, server, clock } = await setup({ reconnect: false });
  const channel = await socket.open('quiet');
  server.link.cut();
  assert.equal((await clock.result(socket.closed)).code, Code.CONNECTION_LOST);
  assert.equal((await channel.closed).code, Code.CONNECTION_LOST);
});

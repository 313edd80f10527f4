/** Servers that break the rules: each ends with the code of PROTOCOL.md, and nothing is left unhandled. */

import assert from 'node:assert/strict';
import { after, test } from 'node:test';
import { type Channel, Code, connect, type ConnectError, type ConnectOptions, type Socket } from '../src/index.js';
import type { MemoryLink } from '../src/transport/memory.js';
import type { BidiStream } from '../src/transport/transport.js';
import { FakeClock, settle } from './clock.js';
import { FakeServer, frame, type ServerChannel, TOKEN } from './server.js';

const unhandled: unknown[] = [];
process.on('unhandledRejection', (error) => unhandled.push(error));
after(() => assert.deepEqual(unhandled, []));

function hex(text: string): Uint8Array {
  return Uint8Array.from(Buffer.from(text.replaceAll(' ', ''), 'hex'));
}

function join(...parts: Uint8Array[]): Uint8Array {
  return Uint8Array.from(Buffer.concat(parts));
}

const SESSION = '5f0c9a3e7d1b48269e0f4a6b2c8d7e13';
const LIMITS = { frame: 1 << 20, channels: 64 };
const WELCOME = { v: 1, session: SESSION, agent: 'x', limits: LIMITS };

async function start(server: FakeServer, clock: FakeClock, options: ConnectOptions = {}): Promise<Socket> {
  return clock.result(connect({ url: 'x', token: TOKEN, dial: server.dial, clock, random: () => 0.5, ...options }));
}

/** What comes first on the control stream, and the code that the client ends with. */
const welcomes: [string, Uint8Array | 'fin' | 'reset', number][] = [
  ['a frame of length 0', hex('00000000'), Code.BAD_FRAME],
  ['a frame that is too long', hex('7fffffff'), Code.FRAME_TOO_LARGE],
  ['an HTTP answer', new TextEncoder().encode('HTTP/1.1 400 Bad Request\r\n\r\n'), Code.FRAME_TOO_LARGE],
  ['no msgpack', hex('00000001 c1'), Code.BAD_MSGPACK],
  ['no message', hex('00000001 c0'), Code.BAD_MESSAGE],
  ['an endless depth', join(hex('000003e8'), new Uint8Array(1000).fill(0x91)), Code.BAD_MSGPACK],
  ['a length that lies', hex('00000005 dd ffffffff'), Code.BAD_MSGPACK],
  ['another message', frame('$goaway', { code: 1, text: '', retry_after_ms: 0, window_ms: 0 }), Code.PROTOCOL_ORDER],
  ['an event of an application', frame('hello', null), Code.PROTOCOL_ORDER],
  ['another version', frame('$welcome', { ...WELCOME, v: 2, unknown: 1 }), Code.VERSION],
  ['an unknown key', frame('$welcome', { ...WELCOME, more: 1 }), Code.BAD_MESSAGE],
  ['no limits', frame('$welcome', { ...WELCOME, limits: undefined }), Code.BAD_MESSAGE],
  ['a frame limit that is too small', frame('$welcome', { ...WELCOME, limits: { frame: 10, channels: 1 } }), Code.BAD_MESSAGE],
  ['an id on $welcome', frame('$welcome', WELCOME, 1), Code.BAD_MESSAGE],
  ['a session that was not asked for', frame('$welcome', { ...WELCOME, resumed: true }), Code.BAD_MESSAGE],
  ['a resume token of 5 bytes', frame('$welcome', { ...WELCOME, resume: { token: new Uint8Array(5), window_ms: 1 } }), Code.BAD_MESSAGE],
  ['a $close', frame('$close', { code: 0x30, text: 'full' }), Code.SERVER_BUSY],
  ['nothing but the end', 'fin', Code.PROTOCOL_ORDER],
];

for (const [what, bytes, code] of welcomes) {
  test(`instead of $welcome: ${what}`, async () => {
    const server = new FakeServer();
    const clock = new FakeClock();
    server.onHello = async (_, __, stream) => {
      if (bytes === 'fin') await stream.send.finish();
      else if (bytes !== 'reset') await stream.send.write(bytes);
      return true;
    };
    await assert.rejects(start(server, clock), (error: ConnectError) => {
      assert.equal(error.code, code, `${error}`);
      return true;
    });
    await settle();
    assert.ok(server.link.over, 'the connection is closed');
  });
}

test('a $welcome that ends in the middle is given up in time', async () => {
  const server = new FakeServer();
  const clock = new FakeClock();
  server.onHello = async (_, __, stream) => {
    await stream.send.write(frame('$welcome', WELCOME).subarray(0, 20));
    return true;
  };
  await assert.rejects(start(server, clock), { code: Code.TIMED_OUT });
});

test('a reset of the control stream before $welcome ends the connect', async () => {
  const server = new FakeServer();
  const clock = new FakeClock();
  server.onHello = (_, __, stream) => {
    stream.send.reset(7);
    return true;
  };
  await assert.rejects(start(server, clock), { name: 'ConnectError', code: Code.PROTOCOL_ORDER });
});

/** What comes on the control stream after `$welcome`, and the code that ends the connection. */
const controls: [string, Uint8Array, number][] = [
  ['a second $welcome', frame('$welcome', WELCOME), Code.PROTOCOL_ORDER],
  ['a $hello', frame('$hello', { v: 1, token: '', agent: '' }), Code.PROTOCOL_ORDER],
  ['an event of an application', frame('said', 1), Code.PROTOCOL_ORDER],
  ['an unknown event of the protocol', frame('$new', 1), Code.PROTOCOL_ORDER],
  ['a $refreshed that nobody waits for', frame('$refreshed', {}), Code.PROTOCOL_ORDER],
  ['a $passed', frame('$passed', { channel: 1, own: true, mark: 1 }), Code.PROTOCOL_ORDER],
  ['a $channels without resuming', frame('$channels', { open: [] }), Code.PROTOCOL_ORDER],
  ['a $goaway without fields', frame('$goaway', {}), Code.BAD_MESSAGE],
  ['an $ack with a float', join(hex('0000002f'), hex('92a424 61636b 83a7 6368616e6e656c cb3ff0000000000000 a36f776e c3 a8 7265636569766564'), hex('cb3ff0000000000000')), Code.BAD_MESSAGE],
  ['an $ack of what was not sent', frame('$ack', { channel: 1, own: false, received: 99 }), Code.RESUME_MISMATCH],
  ['an $ack of more than a u53', frame('$ack', { channel: 1, own: false, received: 2n ** 63n }), Code.RESUME_MISMATCH],
  ['a $close without text', frame('$close', { code: 1 }), Code.BAD_MESSAGE],
  ['a frame of length 0', hex('00000000'), Code.BAD_FRAME],
  ['a frame that is too long', hex('ffffffff'), Code.FRAME_TOO_LARGE],
  ['no msgpack', hex('00000002 92 c1'), Code.BAD_MSGPACK],
];

for (const [what, bytes, code] of controls) {
  test(`on the control stream: ${what}`, async () => {
    const server = new FakeServer();
    server.handlers.set('quiet', () => {});
    const clock = new FakeClock();
    const socket = await start(server, clock);
    const channel = await socket.open('quiet');
    await settle();
    const end = server.link.server.closed;
    server.session.control?.write(bytes);
    const reason = await clock.result(socket.closed);
    assert.equal(reason.code, code, `${reason}`);
    assert.equal(reason.by, 'local');
    assert.equal((await end).code, code);
    assert.equal((await channel.closed).code, code);
  });
}

test('the control stream ends, or is reset, without $close', async () => {
  for (const work of [(stream: BidiStream) => void stream.send.finish(), (stream: BidiStream) => stream.send.reset(3)]) {
    const server = new FakeServer();
    const clock = new FakeClock();
    const socket = await start(server, clock);
    work(server.session.controlStream as BidiStream);
    assert.equal((await clock.result(socket.closed)).code, Code.PROTOCOL_ORDER);
  }
});

test('an $ack about an unknown channel, or an old one, is ignored', async () => {
  const server = new FakeServer();
  server.handlers.set('quiet', () => {});
  const clock = new FakeClock();
  const socket = await start(server, clock);
  const channel = await socket.open('quiet');
  await channel.send('a', 1);
  await settle();
  for (const received of [1, 0, 1]) server.session.tell('$ack', { channel: 1, own: false, received });
  server.session.tell('$ack', { channel: 77, own: false, received: 5 });
  server.session.tell('$ack', { channel: 1, own: true, received: 5 });
  await clock.advance(100);
  assert.equal(socket.state.state, 'connected');
});

/** What comes on a channel, and the code that closes it. The socket lives on. */
const channels: [string, Uint8Array, number][] = [
  ['a frame of length 0', hex('00000000'), Code.BAD_FRAME],
  ['a frame that is too long', hex('00200000'), Code.FRAME_TOO_LARGE],
  ['no msgpack', hex('00000001 c1'), Code.BAD_MSGPACK],
  ['text that is not UTF-8', hex('00000005 92 a1 61 a1 ff'), Code.BAD_MSGPACK],
  ['bytes behind the message', hex('00000005 92 a1 61 c0 c0'), Code.BAD_MSGPACK],
  ['an empty event', hex('00000003 92 a0 c0'), Code.BAD_MESSAGE],
  ['an event with a control character', frame('x', 1).map((byte, at) => (at === 6 ? 7 : byte)), Code.BAD_MESSAGE],
  ['a negative id', hex('00000005 93 a1 61 c0 ff'), Code.BAD_MESSAGE],
  ['an unknown event of the protocol', frame('$new', 1), Code.BAD_MESSAGE],
  ['an $open', frame('$open', { id: 9, name: 'x' }), Code.PROTOCOL_ORDER],
  ['a $resume', frame('$resume', { received: 0, done: false }), Code.PROTOCOL_ORDER],
  ['a $welcome', frame('$welcome', WELCOME), Code.PROTOCOL_ORDER],
  ['an $ack', frame('$ack', { channel: 1, own: true, received: 1 }), Code.PROTOCOL_ORDER],
  ['a $reply without id', frame('$reply', 1), Code.BAD_MESSAGE],
  ['a $fault without its fields', frame('$fault', {}, 0), Code.BAD_MESSAGE],
  ['a $want that is no number', frame('$want', 'x', 0), Code.BAD_MESSAGE],
  ['a $credit that is no number', frame('$credit', null, 0), Code.BAD_MESSAGE],
  ['a $cancel without id', frame('$cancel', null), Code.BAD_MESSAGE],
  ['a $gap of nothing', frame('$gap', { room: 'x', lost: 0 }), Code.BAD_MESSAGE],
  ['a $gap with an id', frame('$gap', { room: 'x', lost: 1 }, 1), Code.BAD_MESSAGE],
  ['a $mark that is no number', frame('$mark', 'x'), Code.BAD_MESSAGE],
  ['a $close without code', frame('$close', { text: '' }), Code.BAD_MESSAGE],
];

for (const [what, bytes, code] of channels) {
  test(`on a channel: ${what}`, async () => {
    const server = new FakeServer();
    let there: ServerChannel | undefined;
    server.handlers.set('room', (channel) => {
      there = channel;
      channel.send('first', 1);
    });
    server.handlers.set('other', (channel) => channel.send('well', 1));
    const clock = new FakeClock();
    const socket = await start(server, clock);
    const channel = await socket.open('room', { resumable: false });
    await settle();
    there?.sendFrame(bytes);
    const reason = await clock.result(channel.closed);
    assert.equal(reason.code, code, `${reason}`);
    await settle();
    assert.deepEqual(there?.got.map(({ event, data }) => [event, (data as { code: number }).code]), [['$close', code]]);
    assert.equal((await (await socket.open('other')).receive())?.event, 'well');
  });
}

test('what names an unknown request is dropped', async () => {
  const server = new FakeServer();
  server.handlers.set('room', (channel) => {
    for (const event of ['$reply', '$item', '$want', '$cancel', '$push', '$end', '$credit']) channel.send(event, 1, 2n ** 64n - 1n);
    channel.send('$fault', { code: 'x', message: '', more: 1 }, 5);
    channel.send('after', 1);
  });
  const socket = await start(server, new FakeClock());
  const channel = await socket.open('room');
  assert.equal((await channel.receive())?.event, 'after');
});

test('a stream that ends inside a frame, or is reset, ends its channel', async () => {
  const server = new FakeServer();
  const streams: BidiStream[] = [];
  server.handlers.set('room', (channel) => streams.push(channel.stream as BidiStream));
  const socket = await start(server, new FakeClock());
  const [cut, reset, stopped] = await Promise.all([0, 1, 2].map(() => socket.open('room', { resumable: false }))) as [Channel, Channel, Channel];
  await settle();
  await streams[0]?.send.write(hex('00000007 92a4'));
  await streams[0]?.send.finish();
  streams[1]?.send.reset(0x1077);
  streams[2]?.receive.stop(0x41);
  assert.equal((await cut.closed).code, Code.TRUNCATED);
  assert.equal((await reset.closed).code, 0x1077);
  await settle();
  await assert.rejects(stopped.send('x'), { code: 0x41 });
  await streams[2]?.send.finish();
  assert.equal((await stopped.closed).code, 0x41);
});

test('a frame that grows too slowly ends its channel, and one on a silent path does not', async () => {
  const server = new FakeServer();
  let stream: BidiStream | undefined;
  server.handlers.set('drip', (channel) => {
    stream = channel.stream;
  });
  const clock = new FakeClock();
  const socket = await start(server, clock);
  const channel = await socket.open('drip', { resumable: false });
  await settle();
  await stream?.send.write(hex('00010000 92'));
  await clock.advance(120_000);
  assert.equal(socket.state.state, 'connected');
  let over = false;
  void channel.closed.then(() => { over = true; });
  for (let second = 0; second < 60 && !over; second += 1) {
    await stream?.send.write(hex('00')).catch(() => {});
    await clock.advance(1000);
  }
  assert.equal((await channel.closed).code, Code.FRAME_TIMEOUT);
});

/** What a server begins a stream of its own with, and the code that refuses it. */
const opens: [string, Uint8Array | 'fin' | 'nothing', number][] = [
  ['no $open', frame('said', 1), Code.PROTOCOL_ORDER],
  ['an $open of a name with $', frame('$open', { id: 1, name: '$x' }), Code.BAD_MESSAGE],
  ['an $open with an unknown key', frame('$open', { id: 1, name: 'x', more: 1 }), Code.BAD_MESSAGE],
  ['received without resumable', frame('$open', { id: 1, name: 'x', received: 1 }), Code.BAD_MESSAGE],
  ['a priority of 3', frame('$open', { id: 1, name: 'x', priority: 3 }), Code.BAD_MESSAGE],
  ['the number of a channel that is there', frame('$open', { id: 500, name: 'room' }), Code.PROTOCOL_ORDER],
  ['another name for a channel that goes on', frame('$open', { id: 500, name: 'other', resumable: true, received: 0 }), Code.PROTOCOL_ORDER],
  ['more received than was sent', frame('$open', { id: 500, name: 'room', resumable: true, received: 9 }), Code.RESUME_MISMATCH],
  ['nothing but the end', 'fin', Code.TRUNCATED],
  ['nothing', 'nothing', Code.FRAME_TIMEOUT],
];

for (const [what, bytes, code] of opens) {
  test(`a stream of the server that begins with ${what}`, async () => {
    const server = new FakeServer();
    const clock = new FakeClock();
    const socket = await start(server, clock, { channels: { room: () => {}, x: () => {} } });
    await server.session.openChannel('room', { id: 500, resumable: true });
    await settle();
    const stream = await (server.link as MemoryLink).server.openBidi();
    if (bytes === 'fin') await stream.send.finish();
    else if (bytes !== 'nothing') await stream.send.write(bytes);
    const said: Uint8Array[] = [];
    const reading = (async () => {
      for (let chunk = await stream.receive.read(); chunk; chunk = await stream.receive.read()) said.push(chunk);
    })();
    await clock.result(reading);
    assert.deepEqual(join(...said), frame('$close', { code, text: closeText(said) }));
    assert.equal(socket.state.state, 'connected');
  });
}

function closeText(said: Uint8Array[]): string {
  const bytes = Buffer.from(join(...said));
  const at = bytes.lastIndexOf('text') + 4;
  return bytes.subarray((bytes[at] as number) <= 0xbf ? at + 1 : at + 2).toString();
}

test('a server that opens more channels than this side takes is refused them', async () => {
  const server = new FakeServer();
  const socket = await start(server, new FakeClock(), { channels: { room: () => {} }, limits: { channels: 3 } });
  const all = await Promise.all([1, 2, 3, 4].map(() => server.session.openChannel('room')));
  await settle();
  assert.deepEqual(all.map(({ got }) => got.map(({ data }) => (data as { code: number }).code)), [[], [], [], [Code.RATE_LIMITED]]);
  assert.equal(socket.state.state, 'connected');
});

test('a $resume that does not fit closes the channel', async () => {
  for (const [first, code] of [
    [frame('$resume', { received: 5, done: false }), Code.RESUME_MISMATCH],
    [frame('said', 1), Code.PROTOCOL_ORDER],
    [frame('$resume', { received: 0 }), Code.BAD_MESSAGE],
  ] as const) {
    const server = new FakeServer();
    const clock = new FakeClock();
    server.handlers.set('room', () => {});
    const socket = await start(server, clock);
    const channel = await socket.open('room');
    await channel.send('a', 1);
    await settle();
    // The next connection is the test's own.
    const { session } = server;
    server.onHello = async (hello, link, stream) => {
      await stream.send.write(frame('$welcome', { ...WELCOME, session: session.id, resumed: true, resume: { token: new Uint8Array(32), window_ms: 60_000 } }));
      await stream.send.write(frame('$channels', { open: [] }));
      assert.equal(hello.resume?.ticket?.session, session.id);
      const again = await link.server.acceptBidi();
      await again?.send.write(first);
      return true;
    };
    server.link.cut();
    const reason = await clock.result(channel.closed);
    assert.equal(reason.code, code, `${reason}`);
    assert.equal(socket.state.state, 'connected');
  }
});

test('random bytes on the control stream and on channels end in order', async () => {
  let state = 99;
  const random = (below: number): number => {
    state = (Math.imul(state, 1_103_515_245) + 12_345) >>> 0;
    return Math.floor((state / 2 ** 32) * below);
  };
  for (let round = 0; round < 300; round += 1) {
    const server = new FakeServer();
    const clock = new FakeClock();
    const body = Uint8Array.from({ length: 1 + random(40) }, () => random(256));
    const valid = frame(['said', '$close', '$ack', '$reply', '$gap'][random(5)] as string, { code: random(300), text: 'x', own: true }, random(2) === 0 ? undefined : random(9));
    // A good frame with a byte changed, or noise in a frame.
    const bytes = random(2) === 0 ? join(hex('000000'), Uint8Array.from([body.length]), body) : valid.map((byte, at) => (at === 4 + random(valid.length - 4) ? random(256) : byte));
    server.handlers.set('room', (channel) => {
      channel.sendFrame(bytes);
      channel.finish();
    });
    const socket = await start(server, clock, { reconnect: false });
    const channel = await socket.open('room', { resumable: false });
    void channel.request('x');
    channel.on('said', () => {});
    channel.finish();
    await clock.result(channel.closed);
    server.session.control?.write(bytes);
    server.session.control?.finish();
    await clock.result(socket.closed);
  }
});

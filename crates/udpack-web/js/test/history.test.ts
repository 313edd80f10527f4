/** Rooms with a history: positions that are told and presented, and subscriptions that miss nothing. */

import assert from 'node:assert/strict';
import { test } from 'node:test';
import { type Channel, ClosedError, Code, connect, type Gap, type Message, type Socket } from '../src/index.js';
import { history as withHistory, positions, subscribe } from '../src/rooms/index.js';
import { FakeClock, settle } from './clock.js';
import { FakeServer, frame, type ServerChannel, TOKEN } from './server.js';

const ROOM = 'hall';

/** A room of the small server, which keeps the last messages. */
class Room {
  epoch = 5;
  readonly sent: unknown[] = [];
  readonly members = new Set<ServerChannel>();

  constructor(readonly keeps = Number.POSITIVE_INFINITY) {}

  join(channel: ServerChannel): void {
    const since = channel.open.since?.find(({ room }) => room === ROOM);
    const first = Math.max(this.sent.length - this.keeps, 0);
    let at = this.sent.length;
    const gap = (from: number, why: string): void =>
      channel.send('$gap', { room: ROOM, lost: first - from + 1, epoch: this.epoch, from, to: first, why });
    if (since?.epoch === this.epoch) at = Number(since.offset);
    else if (since) {
      gap(1, 'epoch');
      at = first;
    }
    channel.send('$room', { room: ROOM, number: 9, epoch: this.epoch, offset: at });
    if (at < first) {
      gap(at + 1, 'gone');
      at = first;
    }
    while (at < this.sent.length) {
      at += 1;
      this.give(channel, at);
    }
    this.members.add(channel);
  }

  say(data: unknown): void {
    this.sent.push(data);
    for (const member of this.members) this.give(member, this.sent.length);
  }

  private give(channel: ServerChannel, offset: number): void {
    channel.send('$at', [9, offset]);
    channel.send('n', this.sent[offset - 1]);
  }
}

interface Setup {
  server: FakeServer;
  clock: FakeClock;
  socket: Socket;
  room: Room;
}

async function setup(room = new Room(), history = true): Promise<Setup> {
  const server = new FakeServer();
  const clock = new FakeClock();
  server.history = history;
  server.handlers.set('chat', (channel) => room.join(channel));
  const socket = await clock.result(connect({ url: 'x', token: TOKEN, dial: server.dial, clock, random: () => 0.5, history: withHistory }));
  return { server, clock, socket, room };
}

/** The server forgets its sessions, and the connection is lost. */
function forget({ server, room }: Setup): void {
  server.sessions.clear();
  room.members.clear();
  server.link.cut();
}

const place = (offset: number, epoch = 5): object => ({ room: ROOM, epoch, offset });

async function next(channel: { receive(): Promise<Message | null> }): Promise<unknown> {
  const message = await channel.receive();
  return message?.gap ?? message?.data;
}

test('a position counts when its message is taken, and another channel goes on behind it', async () => {
  const { socket, room } = await setup();
  const channel = await socket.open('chat');
  await settle();
  for (const n of [1, 2, 3]) room.say(n);
  assert.deepEqual(positions(channel), []);
  assert.equal(await next(channel), 1);
  await settle();
  assert.deepEqual(positions(channel), [place(1)]);
  assert.equal(await next(channel), 2);
  assert.deepEqual(positions(channel), [place(2)]);
  const second = await socket.open('chat', { since: positions(channel) });
  assert.deepEqual(positions(second), [place(2)], 'until the server says otherwise');
  await settle();
  room.say(4);
  assert.equal(await next(second), 3);
  assert.equal(await next(second), 4);
  assert.deepEqual(positions(second), [place(4)]);
});

test('a subscription goes on through lost sessions: each message once, in order', async () => {
  const COUNT = 2000;
  const setting = await setup();
  const { socket, room, clock } = setting;
  let connections = 0;
  socket.on('state', ({ state }) => {
    if (state === 'connected') connections += 1;
  });
  const subscription = await clock.result(subscribe(socket, 'chat'));
  const got: unknown[] = [];
  const receiving = (async () => {
    for await (const message of subscription) {
      got.push(message.data);
      if (got.length === COUNT) return;
    }
  })();
  await settle();
  for (let n = 0; n < COUNT; n += 1) {
    room.say(n);
    if (n % 97 === 0) await clock.advance(1);
    if (n % 300 === 299) {
      forget(setting);
      // Long enough to come back.
      await clock.advance(3000);
    }
  }
  await clock.result(receiving);
  assert.deepEqual(got, Array.from({ length: COUNT }, (_, n) => n));
  assert.ok(connections >= 6, `${connections} connections`);
});

test('what is not kept, and another epoch, are gaps with their bounds', async () => {
  const setting = await setup(new Room(3));
  const { socket, room, clock } = setting;
  const subscription = await clock.result(subscribe(socket, 'chat'));
  await settle();
  room.say(1);
  assert.equal(await next(subscription), 1);
  forget(setting);
  for (const n of [2, 3, 4, 5, 6]) room.say(n);
  const gap: Gap = { room: ROOM, lost: 2, epoch: 5, from: 2, to: 3, why: 'gone' };
  assert.deepEqual(await clock.result(next(subscription)), gap);
  assert.deepEqual(subscription.positions, [place(3)]);
  for (const n of [4, 5, 6]) assert.equal(await next(subscription), n);
  forget(setting);
  room.epoch = 6;
  assert.deepEqual(await clock.result(next(subscription)), { ...gap, lost: 3, epoch: 6, from: 1, why: 'epoch' });
  assert.deepEqual(subscription.positions, [place(3, 6)]);
});

test('a server that keeps no histories is told of no positions', async () => {
  const { socket, server } = await setup(new Room(), false);
  const opened: unknown[] = [];
  server.handlers.set('plain', (channel) => opened.push(channel.open.since));
  await socket.open('plain', { since: [{ room: ROOM, epoch: 5, offset: 1 }] });
  await settle();
  assert.deepEqual(opened, [undefined]);
});

test('a socket without it offers nothing, and gets plain gaps', async () => {
  const server = new FakeServer();
  const clock = new FakeClock();
  server.handlers.set('chat', (channel) => {
    channel.send('$gap', { room: ROOM, lost: 2 });
    channel.send('$at', [9, 1]);
  });
  const socket = await clock.result(connect({ url: 'x', token: TOKEN, dial: server.dial, clock }));
  assert.equal(server.session.hello?.history, false);
  const channel = await socket.open('chat');
  assert.deepEqual(await next(channel), { room: ROOM, lost: 2 });
  assert.equal((await channel.closed).code, Code.BAD_MESSAGE);
  assert.deepEqual(positions(channel), []);
});

test('a subscription ends when the server ends its channel', async () => {
  const { socket, server, clock } = await setup();
  server.handlers.set('short', (channel) => channel.close(Code.NOT_RESUMED, 'as the peer says'));
  const subscription = await clock.result(subscribe(socket, 'short'));
  await assert.rejects(subscription.receive(), ClosedError);
  server.handlers.set('short', (channel) => channel.finish());
  assert.equal(await (await subscribe(socket, 'short')).receive(), null);
});

test('hostile positions break the rules of their tables, or are ignored', async () => {
  const { socket, server } = await setup();
  const open = async (bytes: Uint8Array[]): Promise<Channel> => {
    server.handlers.set('hostile', (channel) => {
      for (const one of bytes) channel.sendFrame(one);
    });
    return socket.open('hostile');
  };
  for (const bad of [frame('$at', [9]), frame('$at', ['hall', 1]), frame('$room', { room: '', number: 1, epoch: 1, offset: 1 }), frame('$at', [9, 1], 3)]) {
    const reason = await (await open([bad])).closed;
    assert.equal(reason.code, Code.BAD_MESSAGE);
  }
  const many = Array.from({ length: 100 }, (_, n) => frame('$room', { room: `room ${n}`, number: n, epoch: 1, offset: 2 }));
  const channel = await open([...many, frame('$at', [2n ** 64n - 1n, 7]), frame('n', 1), frame('$at', [99, 7]), frame('n', 2), frame('$at', [1, 7]), frame('n', 3)]);
  for (const n of [1, 2, 3]) assert.equal(await next(channel), n);
  assert.equal(positions(channel).length, 64);
  assert.deepEqual(positions(channel)[1], { room: 'room 1', epoch: 1, offset: 7 });
});

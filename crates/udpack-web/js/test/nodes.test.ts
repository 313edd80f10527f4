/** Nodes of a cluster: a client that comes back to the wrong one goes where it is told, and nowhere that its program has not named. */

import assert from 'node:assert/strict';
import { test } from 'node:test';
import { Code, connect, type ConnectOptions, type Socket, type SocketState } from '../src/index.js';
import { PresenceMap } from '../src/rooms/index.js';
import { FakeClock, settle } from './clock.js';
import { FakeServer, TOKEN } from './server.js';

const URLS = { all: 'https://all.example:45456/udpack', home: 'https://node-1.all.example:45456/udpack', other: 'https://node-2.all.example:45456/udpack' };

class Cluster {
  readonly clock = new FakeClock();
  readonly home = new FakeServer();
  readonly other = new FakeServer();
  /** Which addresses were dialled. */
  readonly dialled: string[] = [];
  readonly states: SocketState[] = [];
  /** Where `all` leads to. */
  leads = this.home;
  /** What `other` says of sessions that it has not. */
  tells = 'node-1.all.example:45456';
  /** Whether the last client that came to `other` follows. */
  follows: boolean[] = [];

  constructor() {
    this.home.handlers.set('quiet', () => {});
    this.other.handlers.set('quiet', () => {});
    this.other.onHello = (hello, link) => {
      this.follows.push(hello.follows === true);
      const ticket = hello.resume?.ticket;
      if (!ticket || this.other.sessions.has(ticket.session) || !hello.follows) return false;
      link.server.close(Code.ELSEWHERE, this.tells);
      return true;
    };
  }

  async client(options: ConnectOptions = {}): Promise<Socket> {
    const dial = (url: string): ReturnType<FakeServer['dial']> => {
      this.dialled.push(url);
      const server = { [URLS.all]: this.leads, [URLS.home]: this.home, [URLS.other]: this.other }[url];
      return (server ?? this.other).dial();
    };
    const { clock } = this;
    const socket = await connect({ url: URLS.all, token: TOKEN, dial, clock, random: () => 0.5, ...options });
    socket.on('state', (state) => this.states.push(state));
    return socket;
  }

  /** The connection is lost, and the name leads to the other node from then on. */
  async lose(socket: Socket): Promise<SocketState> {
    this.leads = this.other;
    this.home.link.cut();
    this.states.length = 0;
    await this.clock.until(() => this.states.some(({ state }) => state === 'connected') || socket.state.state === 'closed');
    return socket.state;
  }
}

test('a client that comes back to another node goes on where its session is', async () => {
  const cluster = new Cluster();
  const socket = await cluster.client();
  const channel = await socket.open('quiet');
  const id = socket.sessionId;
  assert.deepEqual(await cluster.lose(socket), { state: 'connected', resumed: true });
  assert.deepEqual(cluster.dialled, [URLS.all, URLS.all, URLS.home]);
  // It knows the place from then on.
  assert.deepEqual(await cluster.lose(socket), { state: 'connected', resumed: true });
  assert.deepEqual(cluster.dialled.slice(3), [URLS.home]);
  await channel.send('still', 1);
  await settle();
  assert.deepEqual([...cluster.home.session.accepted.values()].at(-1)?.got.map(({ data }) => data), [1]);
  assert.equal(socket.sessionId, id);
});

for (const [name, tells, dialled] of [
  ['that leads in a circle', 'node-2.all.example:45456', [URLS.other]],
  ['of a stranger', 'all.example.stranger.example:45456', []],
  ['of a name that only looks alike', 'small.example:45456', []],
  ['that is none', 'https://all.example/', []],
] as const) {
  test(`an address ${name} is no end: the client gets a new session`, async () => {
    const cluster = new Cluster();
    cluster.tells = tells;
    const socket = await cluster.client();
    const channel = await socket.open('quiet');
    assert.deepEqual(await cluster.lose(socket), { state: 'connected', resumed: false, reason: 'unknown' });
    assert.deepEqual(cluster.dialled, [URLS.all, URLS.all, ...dialled, URLS.all]);
    assert.deepEqual(cluster.follows, [...dialled.map(() => true), true, false]);
    assert.equal((await channel.closed).code, Code.NOT_RESUMED);
  });
}

test('with the hash of its certificate a node may be anywhere', async () => {
  const cluster = new Cluster();
  cluster.tells = '[fd00::7]:9';
  const socket = await cluster.client({ hashes: ['ab'.repeat(32)] });
  await cluster.lose(socket);
  assert.equal(cluster.dialled[2], 'https://[fd00::7]:9/udpack');
});

test('a client of a node that goes moves to the address that it is told', async () => {
  const cluster = new Cluster();
  const socket = await cluster.client();
  const channel = await socket.open('quiet');
  const away = { code: Code.SHUTTING_DOWN, text: '', retry_after_ms: 0, window_ms: 0, address: 'node-2.all.example:45456' };
  const told = new Promise((resolve) => socket.on('goaway', ({ address }) => resolve(address)));
  cluster.home.session.tell('$goaway', away);
  assert.equal(await told, away.address);
  await cluster.clock.until(() => socket.state.state === 'connected' && cluster.other.links.length > 0);
  assert.equal((await channel.closed).code, Code.MOVED);
  assert.deepEqual(cluster.dialled, [URLS.all, URLS.other, URLS.all].slice(0, cluster.dialled.length));
  assert.equal(socket.state.state, 'connected');
});

test('presence is kept by room', () => {
  const map = new PresenceMap<string>('lobby');
  const entry = (peer: string, session: string, meta: string) => ({ peer, session, meta });
  assert.equal(map.apply({ event: 'said', data: null }), undefined);
  assert.equal(map.apply({ event: 'presence_state', data: { room: 'other', entries: [] } }), undefined);
  const state = map.apply({ event: 'presence_state', data: { room: 'lobby', entries: [entry('bob', '2', 'here'), entry('alice', '1', 'away')] } });
  assert.equal(state?.joins.length, 2);
  assert.deepEqual(map.peers, ['alice', 'bob']);
  const diff = map.apply({ event: 'presence_diff', data: { room: 'lobby', joins: [entry('bob', '3', 'phone')], leaves: [entry('alice', '1', 'away')] } });
  assert.deepEqual([diff?.joins.length, diff?.leaves.length, diff?.why], [1, 1, undefined]);
  assert.deepEqual(map.metas('bob'), ['here', 'phone']);
  const again = map.apply({ event: 'presence_state', data: { room: 'lobby', entries: [entry('bob', '3', 'phone')] } });
  assert.deepEqual([again?.joins.length, again?.leaves.length], [0, 1]);
  const lost = map.apply({ event: 'presence_diff', data: { room: 'lobby', joins: [], leaves: [entry('bob', '3', 'phone')], why: 'node_lost' } });
  assert.deepEqual([lost?.leaves.length, lost?.why], [1, 'node_lost']);
});

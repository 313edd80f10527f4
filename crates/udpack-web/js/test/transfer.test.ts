/** Uploads, downloads and jobs against lanes that the test serves. */

import assert from 'node:assert/strict';
import { File } from 'node:buffer';
import { test } from 'node:test';
import { connect, type Socket } from '../src/index.js';
import { hashOf } from '../src/transfer/blake3.js';
import { download, dropped, type DroppedEntry, jobs, TransferError, upload } from '../src/transfer/index.js';
import type { WireMessage } from '../src/wire/message.js';
import { settle } from './clock.js';
import { FakeServer, type ServerChannel, TOKEN } from './server.js';

globalThis.File ??= File as unknown as typeof globalThis.File;

interface Fields {
  id: number;
  path: string;
  off: number;
  size: number;
  chunk: Uint8Array;
  data: Uint8Array;
  hash: Uint8Array;
  run: Uint8Array;
  resume: boolean;
  keep?: boolean;
  if_exists: string;
  have: [number, number, Uint8Array][];
}

/** Stores what comes, and checks that it comes as it must. */
class Lanes {
  readonly stored = new Map<string, Uint8Array>();
  /** What an interrupted upload has left. */
  readonly partial = new Map<string, Uint8Array>();
  readonly got: WireMessage[] = [];
  readonly directories: string[] = [];
  /** Called with each message first; true takes it. */
  before: (channel: ServerChannel, event: string, fields: Fields) => boolean = () => false;

  readonly serve = (channel: ServerChannel): void => {
    let open: { fields: Fields; bytes: Uint8Array; end: number } | undefined;
    channel.onMessage = (message) => {
      if (message.event.startsWith('$')) return;
      this.got.push(message);
      const fields = message.data as Fields;
      if (this.before(channel, message.event, fields)) return;
      if (message.event === 'put') void this.finish(channel, fields, fields.data, fields.hash);
      if (message.event === 'file') {
        const there = this.partial.get(fields.path) ?? new Uint8Array(0);
        const bytes = new Uint8Array(fields.size);
        bytes.set(there);
        open = { fields, bytes, end: 0 };
        void hashOf(there).then((hash) => channel.send('ready', { id: fields.id, have: there.length > 0 ? [[0, there.length, hash]] : [], chunk: 100_000 }));
      }
      if (message.event === 'chunk' && open) {
        assert.equal(Object.keys(fields).at(-1), 'chunk');
        open.bytes.set(fields.chunk, fields.off);
        open.end = fields.off + fields.chunk.length;
        channel.send('ack', { id: fields.id, recv: open.end, safe: 0 });
      }
      if (message.event === 'finish' && open) void this.finish(channel, { ...open.fields }, open.bytes, fields.hash);
      if (message.event === 'dir') {
        assert.equal(open, undefined, 'a directory while a file is open');
        this.directories.push(fields.path);
        channel.send('done', { id: fields.id, path: fields.path, size: 0, hash: new Uint8Array(32) });
      }
      if (message.event === 'cancel' && open?.fields.id === fields.id) {
        if (fields.keep) this.partial.set(open.fields.path, open.bytes.slice(0, open.end));
        else this.partial.delete(open.fields.path);
      }
      if (message.event === 'finish' || message.event === 'cancel') open = undefined;
      if (message.event === 'cancel') channel.send('error', { id: fields.id, code: 'cancelled', message: 'by the client', retry: false });
    };
  };

  private async finish(channel: ServerChannel, { id, path }: Fields, bytes: Uint8Array, hash: Uint8Array): Promise<void> {
    const here = await hashOf(bytes);
    if (!Buffer.from(here).equals(Buffer.from(hash))) return channel.send('error', { id, code: 'hash_mismatch', message: 'differs', retry: true });
    this.stored.set(path, bytes);
    channel.send('done', { id, path, size: bytes.length, hash: here, sync: 'file' });
  }
}

async function setup(): Promise<{ server: FakeServer; lanes: Lanes; socket: Socket }> {
  const server = new FakeServer();
  const lanes = new Lanes();
  server.handlers.set('transfer', lanes.serve);
  const socket = await connect({ url: 'x', token: TOKEN, dial: server.dial, reconnect: { first: 1 } });
  return { server, lanes, socket };
}

function bytes(length: number, seed = 1): Uint8Array {
  return Uint8Array.from({ length }, (_, at) => (at * 31 + seed * 17 + (at >> 8)) & 0xff);
}

function file(name: string, content: Uint8Array): globalThis.File {
  return new File([content], name, { lastModified: 1_700_000_000_500 }) as unknown as globalThis.File;
}

test('the hash is BLAKE3, as the sample session has it', async () => {
  const hex = Buffer.from(await hashOf(new TextEncoder().encode('hello'))).toString('hex');
  assert.equal(hex, 'ea8f163db38682925e4491c5e58d4bb3506ef8c14eb78a86e908c5624a67200f');
});

test('files small and large are stored over several lanes', async () => {
  const { lanes, socket, server } = await setup();
  const contents = Array.from({ length: 30 }, (_, n) => bytes(n % 3 === 0 ? 150_000 + n : 10 * n, n));
  const seen: number[] = [];
  const up = upload(socket, contents.map((content, n) => file(`${n}.bin`, content)), { path: (own) => `dir/${own}` });
  const watching = (async () => {
    for await (const files of up) seen.push(files.filter(({ state }) => state === 'done').length);
  })();
  const all = await up.done;
  await watching;
  assert.deepEqual(all.map(({ state }) => state), Array(30).fill('done'));
  for (const [n, content] of contents.entries()) assert.ok(Buffer.from(content).equals(lanes.stored.get(`dir/${n}.bin`) as Uint8Array));
  assert.equal(server.session.seen.size, 4);
  assert.equal(seen.at(-1), 30);
  const size = contents.reduce((sum, { length }) => sum + length, 0);
  assert.deepEqual(up.total, { files: 30, done: 30, failed: 0, bytes: size, received: size, safe: size, complete: true });
  await socket.close();
});

test('what the server has and is equal is passed over, what differs is sent', async () => {
  const { lanes, socket } = await setup();
  const content = bytes(500_000);
  lanes.partial.set('same.bin', content.slice(0, 300_000));
  lanes.partial.set('other.bin', bytes(300_000, 9));
  const all = await upload(socket, [file('same.bin', content), file('other.bin', content)], { lanes: 1 }).done;
  assert.deepEqual(all.map(({ state }) => state), ['done', 'done']);
  const sent = (id: number): number => lanes.got.filter(({ event, data }) => event === 'chunk' && (data as Fields).id === id).reduce((sum, { data }) => sum + (data as Fields).chunk.length, 0);
  assert.deepEqual([sent(1), sent(2)], [200_000, 500_000]);
  assert.ok(Buffer.from(content).equals(lanes.stored.get('other.bin') as Uint8Array));
  await socket.close();
});

test('a lost connection costs a new offer of the same run, and nothing else', async () => {
  const { lanes, socket, server } = await setup();
  const content = bytes(900_000);
  let cuts = 0;
  lanes.before = (_, event, fields) => {
    if (event === 'chunk' && fields.off >= 300_000 && cuts < 2) {
      cuts += 1;
      lanes.partial.set('a.bin', content.slice(0, 200_000 * cuts));
      server.link.cut();
      return true;
    }
    return false;
  };
  const [only] = await upload(socket, file('a.bin', content)).done;
  assert.equal(only?.state, 'done');
  assert.equal(cuts, 2);
  const offers = lanes.got.filter(({ event }) => event === 'file').map(({ data }) => Buffer.from((data as Fields).run).toString('hex'));
  assert.equal(offers.length, 3);
  assert.equal(new Set(offers).size, 1);
  assert.ok(Buffer.from(content).equals(lanes.stored.get('a.bin') as Uint8Array));
  await socket.close();
});

test('a conflict, a refusal and a lie fail the one file', async () => {
  const { lanes, socket } = await setup();
  lanes.before = (channel, event, { id, path }) => {
    if (event !== 'put') return false;
    if (path === 'taken') channel.send('error', { id, code: 'exists', message: 'the name is taken', retry: false });
    else if (path === 'lie') channel.send('done', { id, path, size: 3, hash: new Uint8Array(32) });
    else if (path === 'skipped') channel.send('done', { id, path, size: 3, hash: new Uint8Array(32), same: true });
    else return false;
    return true;
  };
  const files = ['taken', 'lie', 'skipped', 'fine'].map((name) => file(name, bytes(10)));
  const all = await upload(socket, files, { ifExists: (path) => (path === 'skipped' ? 'skip' : 'error') }).done;
  assert.deepEqual(all.map(({ state, error }) => [state, error?.reason]), [['failed', 'exists'], ['failed', 'hash_mismatch'], ['done', undefined], ['done', undefined]]);
  await socket.close();
});

test('a file can be given up, and all of them', async () => {
  const { lanes, socket } = await setup();
  const files = [file('a.bin', bytes(400_000)), file('b.bin', bytes(10))];
  const up = upload(socket, files, { lanes: 1 });
  lanes.before = (_, event) => {
    if (event === 'chunk') up.cancel(files[0]);
    return false;
  };
  const all = await up.done;
  assert.deepEqual(all.map(({ state, error }) => [state, error?.reason]), [['failed', 'cancelled'], ['done', undefined]]);
  await settle();
  assert.ok(lanes.got.some(({ event }) => event === 'cancel'));
  const controller = new AbortController();
  controller.abort();
  assert.deepEqual((await upload(socket, files, { signal: controller.signal }).done).map(({ state }) => state), ['failed', 'failed']);
  await socket.close();
});

test('a paused file sends nothing and stays at the server; then it goes on with what is missing', async () => {
  const { lanes, socket } = await setup();
  const content = bytes(700_000);
  const up = upload(socket, file('a.bin', content), { lanes: 1 });
  lanes.before = (_, event, { off }) => {
    if (event === 'chunk' && (off as number) >= 300_000) up.pause();
    return false;
  };
  while (!lanes.got.some(({ event }) => event === 'cancel')) await settle();
  await settle();
  assert.equal(up.files[0]?.state, 'paused');
  assert.ok(lanes.partial.has('a.bin'));
  assert.equal((lanes.got.at(-1)?.data as Fields).keep, true);
  const before = lanes.got.length;
  await settle();
  assert.equal(lanes.got.length, before);
  lanes.before = () => false;
  const kept = lanes.partial.get('a.bin')?.length as number;
  up.resume();
  assert.deepEqual((await up.done).map(({ state }) => state), ['done']);
  const again = lanes.got.slice(before).filter(({ event }) => event === 'chunk').reduce((sum, { data }) => sum + (data as Fields).chunk.length, 0);
  assert.equal(again, content.length - kept);
  assert.ok(Buffer.from(content).equals(lanes.stored.get('a.bin') as Uint8Array));
  await socket.close();
});

test('one file is paused while the others go on, and files that are added later are paused with all', async () => {
  const { lanes, socket } = await setup();
  const files = [file('a.bin', bytes(10)), file('b.bin', bytes(20))];
  const up = upload(socket, files, { lanes: 1 });
  up.pause('a.bin');
  while (up.total.done === 0) await settle();
  await settle();
  assert.deepEqual(up.files.map(({ state }) => state), ['paused', 'done']);
  up.resume(files[0]);
  await up.done;
  async function* late(): AsyncGenerator<globalThis.File> {
    await settle();
    yield file('c.bin', bytes(30));
  }
  const next = upload(socket, late());
  next.pause();
  while (!next.total.complete) await settle();
  await settle();
  assert.deepEqual(next.files.map(({ path, state }) => [path, state]), [['c.bin', 'paused']]);
  next.resume();
  await next.done;
  assert.deepEqual([...lanes.stored.keys()], ['b.bin', 'a.bin', 'c.bin']);
  await socket.close();
});

test('a file that is given up is gone at the server: on its lane, paused, and after a lost connection', async () => {
  const { lanes, socket, server } = await setup();
  const files = ['sent', 'paused', 'lost'].map((name) => file(name, bytes(400_000)));
  const up = upload(socket, files, { lanes: 1 });
  let cut = false;
  const stages: string[] = [];
  const removals: Promise<void>[] = [];
  lanes.before = (_, event, { id, path }) => {
    if (event === 'file') stages.push(path);
    if (event !== 'chunk') return false;
    const at = stages.at(-1);
    if (at === 'sent') removals.push(up.cancel('sent'));
    if (at === 'paused') up.pause('paused');
    if (at === 'lost' && !cut) {
      cut = true;
      lanes.partial.set('lost', new Uint8Array(id));
      server.link.cut();
      removals.push(up.cancel('lost'));
    }
    return false;
  };
  while (!cut || up.files[1]?.state !== 'paused') await settle();
  assert.ok(lanes.partial.has('paused'));
  await Promise.all([...removals, up.cancel()]);
  assert.deepEqual(lanes.partial, new Map());
  assert.deepEqual((await up.done).map(({ state, error }) => [state, error?.reason]), Array(3).fill(['failed', 'cancelled']));
  assert.equal(lanes.stored.size, 0);
  await socket.close();
});

test('who is asked about a taken name decides, one file after the other', async () => {
  const { lanes, socket } = await setup();
  const taken = new Set(['a', 'b', 'c', 'd']);
  lanes.before = (channel, event, { id, path, if_exists }) => {
    if (event !== 'put' || !taken.has(path) || if_exists === 'overwrite') return false;
    if (if_exists === 'skip') channel.send('done', { id, path, size: 3, hash: new Uint8Array(32), same: true });
    else channel.send('error', { id, code: 'exists', message: 'the name is taken', retry: false, ...(path === 'd' && { why: 'blocked' }) });
    return true;
  };
  const asked: string[] = [];
  let open = 0;
  const onConflict = async ({ path, state }: { path: string; state: string }) => {
    open += 1;
    assert.deepEqual([open, state], [1, 'asking']);
    await settle();
    open -= 1;
    asked.push(path);
    return path === 'a' ? 'overwrite' : path === 'b' ? 'skip' : 'error';
  };
  const up = upload(socket, ['a', 'b', 'c', 'd', 'e'].map((name) => file(name, bytes(10))), { onConflict });
  const all = await up.done;
  assert.deepEqual(asked.sort(), ['a', 'b', 'c']);
  assert.deepEqual(all.map(({ state, error }) => error?.reason ?? state), ['done', 'done', 'exists', 'exists', 'done']);
  assert.deepEqual([...lanes.stored.keys()].sort(), ['a', 'e']);
  await socket.close();
});

test('what is offered again says so', async () => {
  const { lanes, socket } = await setup();
  let refused = false;
  lanes.before = (channel, event, { id }) => {
    if (event !== 'put' || refused) return false;
    refused = true;
    channel.send('error', { id, code: 'quota', message: 'above what may be stored', retry: true });
    return true;
  };
  const up = upload(socket, file('a', bytes(10)));
  const told: unknown[] = [];
  up.on('retry', ({ file, error, inMs }) => told.push([file.path, file.state, file.retries, error.reason, inMs]));
  const [only] = await up.done;
  assert.deepEqual(told, [['a', 'waiting', 1, 'quota', 1000]]);
  assert.deepEqual([only?.state, only?.retries, only?.trouble?.reason], ['done', 1, 'quota']);
  await socket.close();
});

/** A directory as a browser hands it out: a handle, or what was dropped. */
type Tree = { [name: string]: Tree | Uint8Array };

function handleOf(name: string, tree: Tree | Uint8Array): FileSystemDirectoryHandle {
  if (tree instanceof Uint8Array) return { kind: 'file', name, getFile: async () => file(name, tree) } as unknown as FileSystemDirectoryHandle;
  async function* values(): AsyncGenerator<unknown> {
    for (const [child, inner] of Object.entries(tree as Tree)) yield handleOf(child, inner);
  }
  const entries = (): never => assert.fail('a directory is not a list of sources');
  return { kind: 'directory', name, values, [Symbol.asyncIterator]: entries } as unknown as FileSystemDirectoryHandle;
}

function droppedOf(name: string, tree: Tree | Uint8Array): DroppedEntry {
  if (tree instanceof Uint8Array) {
    const get = (done: (file: globalThis.File) => void, failed: (error: unknown) => void): void =>
      name === 'locked' ? failed(new Error('not allowed')) : done(file(name, tree));
    return { name, isFile: true, isDirectory: false, file: get } as DroppedEntry;
  }
  const children = Object.entries(tree).map(([child, inner]) => droppedOf(child, inner));
  const createReader = () => ({ readEntries: (done: (entries: DroppedEntry[]) => void) => done(children.splice(0, 2)) });
  return { name, isFile: false, isDirectory: true, createReader } as DroppedEntry;
}

test('a directory goes with all that is in it, an empty one too, from a handle and from a drop', async () => {
  const { lanes, socket } = await setup();
  const tree = { 'a.txt': bytes(5), sub: { 'b.bin': bytes(150_000), deep: { 'c.txt': bytes(7) } }, empty: {}, d: bytes(1), e: bytes(2) };
  const from = upload(socket, handleOf('tree', tree), { lanes: 2 });
  assert.deepEqual((await from.done).map(({ state }) => state), Array(6).fill('done'));
  const paths = ['tree/a.txt', 'tree/d', 'tree/e', 'tree/sub/b.bin', 'tree/sub/deep/c.txt'];
  assert.deepEqual([...lanes.stored.keys()].sort(), paths);
  assert.deepEqual(lanes.directories, ['tree/empty']);
  lanes.stored.clear();
  const item = (entry: DroppedEntry) => ({ kind: 'file', webkitGetAsEntry: () => entry, getAsFile: () => null });
  const sources = dropped({ items: [item(droppedOf('tree', { ...tree, locked: bytes(1) })), { kind: 'string', getAsFile: () => null }, { kind: 'file', getAsFile: () => file('f', bytes(3)) }] });
  const all = await upload(socket, sources, { path: (own) => `in/${own}` }).done;
  assert.deepEqual(all.filter(({ state }) => state !== 'done').map(({ path, error }) => [path, error?.reason, error?.message]), [['in/tree/locked', 'unreadable', 'it cannot be read: not allowed']]);
  assert.deepEqual([...lanes.stored.keys()].sort(), ['in/f', ...paths.map((path) => `in/${path}`)]);
  assert.deepEqual(lanes.directories, ['tree/empty', 'in/tree/empty']);
  await socket.close();
});

/** Serves downloads of one content, which may break off after so many bytes. */
function serveDownloads(lanes: Lanes, content: Uint8Array, breaks: (channel: ServerChannel, off: number) => boolean = () => false): void {
  lanes.before = (channel, event, { id, path, have }) => {
    if (event !== 'get') return false;
    void (async () => {
      const [, begun = 0, proof] = have?.[0] ?? [];
      if (proof) assert.ok(Buffer.from(await hashOf(content.subarray(0, begun))).equals(Buffer.from(proof)));
      channel.send('file', { id, path, size: content.length });
      for (let off = begun; off < content.length; off += 50_000) {
        if (breaks(channel, off)) return;
        channel.send('chunk', { id, off, chunk: content.subarray(off, off + 50_000) });
      }
      channel.send('finish', { id, size: content.length, hash: await hashOf(content) });
    })();
    return true;
  };
}

test('a download is checked, and goes on over a lost connection with what is there', async () => {
  const { lanes, socket, server } = await setup();
  const content = bytes(1_000_000);
  let cut = false;
  serveDownloads(lanes, content, (_, off) => {
    if (cut || off < 400_000) return false;
    cut = true;
    setImmediate(() => server.link.cut());
    return true;
  });
  const parts: Uint8Array[] = [];
  for await (const part of download(socket, 'a.bin')) parts.push(part);
  assert.ok(Buffer.concat(parts).equals(content));
  await settle();
  const gets = lanes.got.filter(({ event }) => event === 'get').map(({ data }) => (data as Fields).have?.[0]?.[1] ?? 0);
  assert.equal(gets.length, 2);
  assert.equal(lanes.got.filter(({ event }) => event === 'done').length, 1);
  await socket.close();
});

test('a download that is not the file, or is refused, throws', async () => {
  const { lanes, socket } = await setup();
  const all = async (path: string): Promise<void> => {
    for await (const _ of download(socket, path));
  };
  lanes.before = (channel, event, { id, path }) => {
    if (event !== 'get') return false;
    if (path === 'none') channel.send('error', { id, code: 'not_found', message: 'nothing has the name', retry: false });
    channel.send('file', { id, path, size: 3 });
    channel.send('chunk', { id, off: path === 'gap' ? 1 : 0, chunk: bytes(3) });
    channel.send('finish', { id, size: 3, hash: new Uint8Array(32) });
    return true;
  };
  await assert.rejects(all('none'), (error: TransferError) => error instanceof TransferError && error.reason === 'not_found');
  await assert.rejects(all('wrong'), { reason: 'hash_mismatch' });
  await assert.rejects(all('gap'), { reason: 'source_changed' });
  await socket.close();
});

test('jobs are told as they come, and can be ended', async () => {
  const { server, socket } = await setup();
  const job = (id: number, state: string) => ({ id, kind: 'put', path: 'a', peer: 'me', size: 5, bytes: 1, safe: 0, state, secs: 0.5 });
  server.handlers.set('transfers', (channel) => {
    channel.send('jobs', { jobs: [job(1, 'running')], ended: [job(0, 'failed')] });
    channel.onMessage = ({ event, data, id }) => {
      if (event !== 'cancel') return;
      assert.equal((data as { reason?: string }).reason, 'too large');
      channel.send('$reply', null, id);
      channel.send('job', job((data as { job: number }).job, 'cancelled'));
    };
  });
  const watch = await jobs(socket);
  const states: string[] = [];
  for await (const told of watch) {
    states.push(...told.map(({ id, state }) => `${id} ${state}`));
    if (states.length === 2) await watch.cancel(1, 'too large');
    else if (states.length > 2) break;
  }
  assert.deepEqual(states, ['1 running', '0 failed', '1 cancelled']);
  await watch.close();
  await socket.close();
});

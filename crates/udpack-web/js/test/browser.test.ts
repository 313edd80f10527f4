/**
 * The committed bundle in a real Chromium, against the real server (`examples/web.rs`). Skipped aloud where either is
 * missing; with `UDPACK_BROWSER=required` that is a failure.
 */

import assert from 'node:assert/strict';
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { after, before, test } from 'node:test';
import type { Browser, Page } from 'playwright-core';
import { launch } from './chromium.js';
import { Relay } from './relay.js';
import { content, type Endpoint, Pages, skip, WebServer } from './web.js';

let browser: Browser;
let pages: Pages;
let server: WebServer;
let page: Page;

before(async () => {
  if (skip) return;
  server = await WebServer.start();
  browser = await launch();
  pages = await Pages.start(browser);
  page = await fresh();
});

after(async () => {
  if (skip) return;
  await browser.close();
  pages.stop();
  await server.kill();
});

const fresh = (): Promise<Page> => pages.open();

test('a page connects by the hash of the certificate, and speaks on channels', { skip }, async () => {
  const got = await page.evaluate(async ({ url, hashes, token }) => {
    const { connect } = await import('/udpack.js' as string);
    const socket = await connect({ url, hashes, token });
    const echo = await socket.open('echo');
    const all = [1, 'größe', [1.5, null, true], { a: { b: [] } }, 2 ** 40, -(2 ** 40)];
    for (const data of all) await echo.send('say', data);
    const back = [];
    for (const _ of all) back.push((await echo.receive()).data);
    const bytes = new Uint8Array(300_000).map((_, at) => at % 251);
    await echo.send('bytes', bytes);
    const answer = (await echo.receive()).data;
    const same = answer instanceof Uint8Array && answer.length === bytes.length && answer.every((byte, at) => byte === bytes[at]);
    const state = socket.state;
    const reason = await socket.close(0, 'bye');
    return { back, same, state, reason: [reason.code, reason.by] };
  }, server.endpoint);
  assert.deepEqual(got.back, [1, 'größe', [1.5, null, true], { a: { b: [] } }, 2 ** 40, -(2 ** 40)]);
  assert.equal(got.same, true);
  assert.deepEqual(got.state, { state: 'connected', resumed: false });
  assert.deepEqual(got.reason, [0, 'local']);
});

test('a page goes on in a room with a history where it was', { skip }, async () => {
  const got = await (await fresh()).evaluate(async ({ url, hashes, token }) => {
    const { connect } = await import('/udpack.js' as string);
    const { history, positions, subscribe } = await import('/rooms.js' as string);
    const socket = await connect({ url, hashes, token, history });
    const here = await subscribe(socket, 'news');
    for (let n = 0; n < 900; n += 1) await here.channel.send('n', n);
    const heard: unknown[] = [];
    while (heard.length < 450) heard.push((await here.receive()).data);
    const there = await socket.open('news', { since: here.positions });
    while (heard.length < 900) heard.push((await there.receive()).data);
    const [{ room, epoch, offset }] = positions(there);
    const other = await socket.open('news', { since: [{ room, epoch: epoch + 1, offset: 3 }] });
    const { gap } = await other.receive();
    await socket.close();
    return { heard, room, offset, gap: { ...gap, epoch: gap.epoch === epoch } };
  }, server.endpoint);
  assert.deepEqual(got.heard, Array.from({ length: 900 }, (_, n) => n));
  assert.deepEqual([got.room, got.offset], ['news', 900]);
  assert.deepEqual(got.gap, { room: 'news', lost: 0, epoch: true, from: 1, to: 0, why: 'epoch' });
});

test('it runs in a Worker', { skip }, async () => {
  const got = await page.evaluate(async (endpoint) => {
    const program = `
      onmessage = async ({ data: { url, hashes, token, bundle } }) => {
        const { connect } = await import(bundle);
        await using socket = await connect({ url, hashes, token });
        const math = await socket.open('math');
        postMessage(await math.request('add', [20, 22]));
      };`;
    const worker = new Worker(URL.createObjectURL(new Blob([program], { type: 'text/javascript' })), { type: 'module' });
    const answer = new Promise((resolve, reject) => {
      worker.onmessage = ({ data }) => resolve(data);
      worker.onerror = ({ message }) => reject(new Error(message));
    });
    worker.postMessage({ ...endpoint, bundle: `${location.origin}/udpack.js` });
    return answer;
  }, server.endpoint);
  assert.equal(got, 42);
});

test('requests, items both ways, a channel that the server opens, refusals', { skip }, async () => {
  const got = await page.evaluate(async ({ url, hashes, token }) => {
    const { connect } = await import('/udpack.js' as string);
    const asked: unknown[] = [];
    const mine = (channel: { on(event: string, handler: (data: unknown) => unknown): void }): void =>
      channel.on('hello', (data) => {
        asked.push(data);
        return 'from the page';
      });
    const socket = await connect({ url, hashes, token, channels: { mine } });
    const math = await socket.open('math');
    const sums = await Promise.all(Array.from({ length: 200 }, (_, n) => math.request('add', [n, n])));
    const fault = await math.request('add', [2 ** 53, Number.MAX_SAFE_INTEGER]).then(String, (error: { fault: string }) => error.fault);
    const big = await math.request('add', [2n ** 62n, 2n ** 61n]).then(String);
    const overflow = await math.request('add', [2n ** 62n, 2n ** 62n]).catch((error: { fault: string; message: string }) => [error.fault, error.message]);
    const unknown = await math.request('nonsense').catch((error: { fault: string }) => error.fault);
    const items: unknown[] = [];
    for await (const item of math.stream('count', 20_000)) items.push(item);
    const total = await math.request('sum', null, { items: Array.from({ length: 20_000 }, (_, n) => n) });
    const callBack = await math.request('call back', 'mine');
    const refused = await (await socket.open('nobody')).closed;
    await socket.close();
    return { sums, fault, big, overflow, unknown, count: items.length, last: items.at(-1), total, callBack, asked, refused: [refused.code, refused.name, refused.by] };
  }, server.endpoint);
  assert.deepEqual(got.sums, Array.from({ length: 200 }, (_, n) => 2 * n));
  assert.equal(got.big, `${2n ** 62n + 2n ** 61n}`);
  assert.deepEqual(got.overflow, ['overflow', 'the sum is too large']);
  assert.equal(got.unknown, 'no_handler');
  assert.deepEqual([got.count, got.last, got.total], [20_000, 20_000, 199_990_000]);
  assert.deepEqual([got.callBack, got.asked], ['from the page', ['from the server']]);
  assert.deepEqual(got.refused, [0x40, 'no_such_channel', 'peer']);
});

test('volatile messages by datagram and by stream come back with event and key', { skip }, async () => {
  const got = await page.evaluate(async ({ url, hashes, token }) => {
    const { connect } = await import('/udpack.js' as string);
    const socket = await connect({ url, hashes, token });
    socket.sendLatest('cursor', 'alice', 7);
    const first = await socket.receiveVolatile();
    socket.sendVolatile('load', 8);
    const second = await socket.receiveVolatile();
    // Too long for a datagram; the server answers numbers only, and must still be there.
    socket.sendVolatile('picture', new Uint8Array(100_000));
    socket.sendVolatile('load', 9);
    const third = await socket.receiveVolatile();
    await socket.close();
    return [first, second, third];
  }, server.endpoint);
  assert.deepEqual(got.map((message) => [message.event, message.data, message.key ?? null]), [['cursor', 7, 'alice'], ['load', 8, null], ['load', 9, null]]);
});

test('64 channels at once, each with its own order', { skip }, async () => {
  const got = await page.evaluate(async ({ url, hashes, token }) => {
    const { connect } = await import('/udpack.js' as string);
    const socket = await connect({ url, hashes, token });
    const each = async (channel: number): Promise<boolean> => {
      const echo = await socket.open('echo', { resumable: channel % 2 === 0 });
      for (let n = 0; n < 50; n += 1) void echo.send('n', [channel, n]);
      for (let n = 0; n < 50; n += 1) if (String((await echo.receive()).data) !== `${channel},${n}`) return false;
      // Its place is free again for those that wait.
      await echo.close();
      return true;
    };
    const all = await Promise.all(Array.from({ length: 90 }, (_, channel) => each(channel)));
    await socket.close();
    return all.every(Boolean);
  }, server.endpoint);
  assert.equal(got, true);
});

test('files of a page are on the server\'s disk when they are done, and come back', { skip }, async () => {
  const sizes = [0, 1, 65_536, 65_537, 1_000_000, 9_000_000];
  await page.addScriptTag({ content: `globalThis.content = ${content}` });
  const got = await page.evaluate(
    async ({ url, hashes, token, sizes }) => {
      const { connect } = await import('/udpack.js' as string);
      const { download, upload } = await import('/transfer.js' as string);
      const { content } = globalThis as unknown as { content(size: number, seed: number): Uint8Array };
      const socket = await connect({ url, hashes, token });
      const files = sizes.map((size, seed) => new File([content(size, seed) as BlobPart], `${size}.bin`));
      const path = (name: string): string => `from a page/größe/${name}`;
      const running = upload(socket, files, { path });
      const all = await running.done;
      const back = [];
      for (const [seed, size] of sizes.entries()) {
        let at = 0;
        let same = true;
        const wanted = content(size, seed);
        for await (const bytes of download(socket, `from a page/größe/${size}.bin`)) {
          same &&= (bytes as Uint8Array).every((byte, n) => byte === wanted[at + n]);
          at += bytes.length;
        }
        back.push(same && at === size);
      }
      const again = await upload(socket, files, { path }).done;
      const other = await upload(socket, [new File(['other'], '1.bin')], { path }).done;
      const kept = await upload(socket, [new File(['other'], '1.bin')], { path, ifExists: 'rename' }).done;
      await socket.close();
      const ends = (files: { state: string; received: number; safe: number; error?: { reason: string } }[]): unknown[] =>
        files.map(({ state, received, safe, error }) => [state, received, safe, error?.reason ?? '']);
      return { all: ends(all), back, again: ends(again), other: ends(other), kept: ends(kept), total: running.total };
    },
    { ...server.endpoint, sizes },
  );
  const done = sizes.map((size) => ['done', size, size, '']);
  const sum = sizes.reduce((sum, size) => sum + size, 0);
  assert.deepEqual(got.all, done);
  assert.deepEqual(got.back, sizes.map(() => true));
  assert.deepEqual(got.again, done);
  assert.deepEqual(got.other.map((file) => (file as string[])[0]), ['failed']);
  assert.equal((got.other[0] as string[])[3], 'exists');
  // A server renames only where its operator said so.
  assert.deepEqual(got.kept.map((file) => (file as string[])[3]), ['forbidden']);
  assert.deepEqual(got.total, { files: 6, done: 6, failed: 0, bytes: sum, received: sum, safe: sum, complete: true });
  const stored = `${server.endpoint.files}/from a page/größe`;
  for (const [seed, size] of sizes.entries()) {
    assert.ok(readFileSync(`${stored}/${size}.bin`).equals(content(size, seed)), `${size} bytes`);
  }
  assert.equal(readdirSync(stored).length, sizes.length);
});

test('300 small files of a page arrive whole', { skip }, async () => {
  await page.addScriptTag({ content: `globalThis.content = ${content}` });
  const got = await page.evaluate(async ({ url, hashes, token }) => {
    const { connect } = await import('/udpack.js' as string);
    const { upload } = await import('/transfer.js' as string);
    const { content } = globalThis as unknown as { content(size: number, seed: number): Uint8Array };
    const socket = await connect({ url, hashes, token });
    const files = Array.from({ length: 300 }, (_, n) => new File([content(100 + 37 * n, n) as BlobPart], `${n}.bin`));
    const all = await upload(socket, files, { path: (name: string) => `many/${name}` }).done;
    await socket.close();
    return all.filter((file: { state: string }) => file.state !== 'done').map((file: { path: string; error: unknown }) => `${file.path}: ${file.error}`);
  }, server.endpoint);
  assert.deepEqual(got, []);
  const stored = `${server.endpoint.files}/many`;
  for (let n = 0; n < 300; n += 1) {
    assert.ok(readFileSync(`${stored}/${n}.bin`).equals(content(100 + 37 * n, n)), `file ${n}`);
  }
  assert.equal(readdirSync(stored).length, 300);
});

test('an upload goes on over a cut, and one that is cancelled leaves nothing', { skip }, async (t) => {
  const relay = await Relay.start(server.port);
  const page = await fresh();
  await page.exposeFunction('cut', () => relay.cut());
  await page.exposeFunction('mend', () => relay.mend());
  await page.addScriptTag({ content: `globalThis.content = ${content}` });
  const size = 24_000_000;
  const got = await page.evaluate(
    async ({ url, hashes, token, size }) => {
      const { connect } = await import('/udpack.js' as string);
      const { upload } = await import('/transfer.js' as string);
      const { content, cut, mend } = globalThis as unknown as { content(size: number, seed: number): Uint8Array; cut(): Promise<void>; mend(): Promise<void> };
      const socket = await connect({ url, hashes, token, reconnect: { first: 20 } });
      const states: string[] = [];
      socket.on('state', ({ state }: { state: string }) => {
        states.push(state);
        if (state === 'reconnecting') void mend().catch(() => {});
      });
      const running = upload(socket, [new File([content(size, 9) as BlobPart], 'cut.bin')]);
      let cutAt = 0;
      for await (const _ of running) {
        const { received } = running.total;
        if (cutAt === 0 && received > size / 4) {
          cutAt = received;
          await cut();
        }
      }
      const [file] = await running.done;
      const second = upload(socket, [new File([content(size, 10) as BlobPart], 'given up.bin')]);
      for await (const _ of second) {
        if (second.total.received > 0) await second.cancel();
      }
      const [cancelled] = await second.done;
      await socket.close();
      return { state: file.state, error: `${file.error}`, cutAt, states, cancelled: [cancelled.state, cancelled.error?.reason] };
    },
    { ...server.endpoint, url: `https://127.0.0.1:${relay.port}/udpack`, size },
  );
  t.diagnostic(`cut at ${got.cutAt} of ${size} bytes: ${got.states}`);
  assert.equal(got.state, 'done', got.error);
  assert.ok(got.cutAt > 0 && got.states.includes('reconnecting'), `${got.states}`);
  assert.deepEqual(got.cancelled, ['failed', 'cancelled']);
  assert.ok(readFileSync(`${server.endpoint.files}/cut.bin`).equals(content(size, 9)));
  assert.ok(!existsSync(`${server.endpoint.files}/given up.bin`));
  await page.close();
  await relay.cut();
});

test('a directory of a page arrives as it is, hashed in a Worker, and a paused upload goes on', { skip }, async () => {
  const page = await fresh();
  const workers: string[] = [];
  page.on('worker', (worker) => workers.push(new URL(worker.url()).pathname));
  await page.addScriptTag({ content: `globalThis.content = ${content}` });
  const got = await page.evaluate(async ({ url, hashes, token }) => {
    const { connect } = await import('/udpack.js' as string);
    const { upload } = await import('/transfer.js' as string);
    const { content } = globalThis as unknown as { content(size: number, seed: number): Uint8Array };
    const socket = await connect({ url, hashes, token });
    const root = await navigator.storage.getDirectory();
    const top = await root.getDirectoryHandle('folder', { create: true });
    const sub = await top.getDirectoryHandle('größe', { create: true });
    await top.getDirectoryHandle('empty', { create: true });
    const fill = async (directory: FileSystemDirectoryHandle, name: string, size: number): Promise<void> => {
      const stream = await (await directory.getFileHandle(name, { create: true })).createWritable();
      await stream.write(content(size, size) as BufferSource as never);
      await stream.close();
    };
    await fill(top, 'a.bin', 10);
    await fill(sub, 'b.bin', 8_000_000);
    const running = upload(socket, top);
    const states = new Set<string>();
    let held = false;
    for await (const files of running) {
      for (const { state } of files) states.add(state);
      if (!held && files.some(({ received, size }: { received: number; size: number }) => received > 0 && received < size)) {
        held = true;
        running.pause();
        await new Promise((resolve) => setTimeout(resolve, 50));
        states.add(running.files.map(({ state }: { state: string }) => state).sort().at(-1) as string);
        running.resume();
      }
    }
    await socket.close();
    return { ends: (await running.done).map(({ path, state, error }: { path: string; state: string; error: unknown }) => `${path} ${state} ${error ?? ''}`).sort(), states: [...states], total: running.total };
  }, server.endpoint);
  assert.deepEqual(got.ends, ['folder/a.bin done ', 'folder/empty done ', 'folder/größe/b.bin done ']);
  const stored = `${server.endpoint.files}/folder`;
  assert.ok(readFileSync(`${stored}/a.bin`).equals(content(10, 10)));
  assert.ok(readFileSync(`${stored}/größe/b.bin`).equals(content(8_000_000, 8_000_000)));
  assert.deepEqual(readdirSync(`${stored}/empty`), []);
  assert.deepEqual(workers, ['/hash-worker.js']);
  await page.close();
});

test('a page that is left and comes back as it was goes on with its session', { skip }, async () => {
  const page = await fresh();
  const got = await page.evaluate(async ({ url, hashes, token }) => {
    const { connect } = await import('/udpack.js' as string);
    const socket = await connect({ url, hashes, token });
    const { sessionId } = socket;
    const echo = await socket.open('echo');
    await echo.send('before', 1);
    const states: unknown[] = [];
    const again = new Promise<void>((resolve) =>
      socket.on('state', ({ state, resumed }: { state: string; resumed?: boolean }) => {
        states.push(resumed ?? state);
        if (state === 'connected') resolve();
      }),
    );
    // Playwright cannot follow a page into the cache and back: the events are made by hand.
    dispatchEvent(Object.assign(new Event('pagehide'), { persisted: true }));
    await echo.send('meanwhile', 2);
    while (states.length === 0) await new Promise((resolve) => setTimeout(resolve, 10));
    const asleep = socket.state.state;
    dispatchEvent(Object.assign(new Event('pageshow'), { persisted: true }));
    await again;
    const back = [(await echo.receive()).data, (await echo.receive()).data];
    const same = sessionId === socket.sessionId;
    await socket.close();
    return { asleep, back, same, last: states.filter((state) => state !== 'reconnecting')[0] };
  }, server.endpoint);
  assert.deepEqual(got, { asleep: 'reconnecting', back: [1, 2], same: true, last: true });
  await page.close();
});

test('a wrong token, a wrong path, a wrong hash', { skip }, async () => {
  const got = await page.evaluate(async ({ url, hashes, token }) => {
    const { connect } = await import('/udpack.js' as string);
    const failure = (options: object): Promise<unknown> =>
      connect(options).catch((error: { name: string; code: number; retry: boolean }) => [error.name, error.code, error.retry]);
    return [
      await failure({ url, hashes, token: 'wrong' }),
      await failure({ url: `${url}/elsewhere`, hashes, token }),
      await failure({ url, hashes: ['00'.repeat(32)], token }),
    ];
  }, server.endpoint);
  assert.deepEqual(got, [
    ['ConnectError', 0x21, false],
    ['ConnectError', 0xf0, true],
    ['ConnectError', 0xf0, true],
  ]);
});

test('10,000 messages each way through cuts: none lost, doubled or reordered', { skip }, async (t) => {
  const relay = await Relay.start(server.port);
  const page = await fresh();
  await page.exposeFunction('cut', () => relay.cut());
  await page.exposeFunction('mend', () => relay.mend());
  const got = await page.evaluate(
    async ({ url, hashes, token }) => {
      const { connect } = await import('/udpack.js' as string);
      const { cut, mend } = globalThis as unknown as { cut(): Promise<void>; mend(): Promise<void> };
      const COUNT = 10_000;
      const CUTS = 6;
      const socket = await connect({ url, hashes, token, reconnect: { first: 20 } });
      const resumed: boolean[] = [];
      let lost = Promise.resolve();
      socket.on('state', (state: { state: string; resumed: boolean }) => {
        if (state.state === 'connected') resumed.push(state.resumed);
        // The path stays away until the page has seen that it is.
        if (state.state === 'reconnecting') lost = lost.then(mend).catch(() => {});
      });
      const echo = await socket.open('echo');
      const sending = (async () => {
        for (let n = 0; n < COUNT; n += 1) await echo.send('n', n);
      })();
      const wrong: unknown[] = [];
      for (let n = 0; n < COUNT; n += 1) {
        const { data } = await echo.receive();
        if (data !== n) wrong.push([n, data]);
        if (n % Math.floor(COUNT / (CUTS + 1)) === 500) {
          await cut();
          // Something to send, so that the browser sees at once that nobody is there.
          void echo.send('again', n);
          await echo.receive().then(({ event, data }: { event: string; data: unknown }) => {
            if (event === 'again') return;
            if (data !== n + 1) wrong.push([n + 1, data]);
            n += 1;
          });
        }
      }
      await sending;
      await socket.close();
      return { wrong, resumed };
    },
    { ...server.endpoint, url: `https://127.0.0.1:${relay.port}/udpack` },
  );
  t.diagnostic(`${relay.cuts} cuts`);
  assert.deepEqual(got.wrong, []);
  assert.ok(got.resumed.length >= 3 && got.resumed.every(Boolean), `${got.resumed}`);
  await page.close();
  await relay.cut();
});

test('64 channels of each of two browsers keep their order while an upload fills one of them', { skip }, async (t) => {
  // More by hand, in whole megabytes: UDPACK_UPLOAD_BYTES=1000000000.
  const size = Number(process.env.UDPACK_UPLOAD_BYTES ?? 48_000_000);
  const ask = async ({ url, hashes, token, size }: Endpoint & { size: number }) => {
    const { connect } = await import('/udpack.js' as string);
    const { upload } = await import('/transfer.js' as string);
    const socket = await connect({ url, hashes, token });
    // 64 with those of the upload.
    const channels = await Promise.all(Array.from({ length: size > 0 ? 60 : 64 }, () => socket.open('echo')));
    const part = new Uint8Array(1_000_000).map((_, at) => (at * 31 + (at >> 8)) & 0xff);
    const file = new File(Array.from({ length: size / part.length }, () => part), 'beside.bin');
    const running = size > 0 ? upload(socket, file, { ifExists: 'same' }) : undefined;
    let over = false;
    const begun = performance.now();
    void (running?.done ?? new Promise((resolve) => setTimeout(resolve, 2000))).then(() => (over = true));
    const times: number[] = [];
    // On each channel the next message leaves when the one before is back, a little later than that.
    const wrong = await Promise.all(
      channels.map(async (channel, at) => {
        let wrong = 0;
        for (let n = 0; !over; n += 1) {
          const sent = performance.now();
          await channel.send('n', [at, n]);
          const { data } = await channel.receive();
          times.push(performance.now() - sent);
          wrong += String(data) === `${at},${n}` ? 0 : 1;
          await new Promise((resolve) => setTimeout(resolve, 100));
        }
        // And many at once, beside nothing.
        for (let n = 0; n < 100; n += 1) void channel.send('m', n);
        for (let n = 0; n < 100; n += 1) wrong += (await channel.receive()).data === n ? 0 : 1;
        return wrong;
      }),
    );
    const secs = (performance.now() - begun) / 1000;
    const [only] = (await running?.done) ?? [];
    await socket.close();
    times.sort((a, b) => a - b);
    return { wrong: wrong.reduce((sum, each) => sum + each), times: times.length, p99: times[Math.floor(times.length * 0.99)] as number, secs, state: only?.state ?? 'done' };
  };
  const [one, other] = [await fresh(), await fresh()];
  const got = await Promise.all([one.evaluate(ask, { ...server.endpoint, size }), other.evaluate(ask, { ...server.endpoint, size: 0 })]);
  const [full, quiet] = got;
  t.diagnostic(`p99 of ${full.times} messages beside the upload ${full.p99.toFixed(1)} ms, of ${quiet.times} in the other browser ${quiet.p99.toFixed(1)} ms; ${(size / full.secs / 2 ** 20).toFixed(1)} MiB/s`);
  assert.deepEqual(got.map(({ wrong, state }) => [wrong, state]), [[0, 'done'], [0, 'done']]);
  assert.ok(full.times > 0 && quiet.times > 0);
  await one.close();
  await other.close();
});

test('a server that drains is left, and the next on its address is found', { skip }, async () => {
  const first = await WebServer.start();
  const page = await fresh();
  await page.exposeFunction('drain', () => void first.drain());
  const second = await WebServer.start();
  const got = await page.evaluate(
    async ({ urls, hashes, token }) => {
      const { connect } = await import('/udpack.js' as string);
      const { drain } = globalThis as unknown as { drain(): Promise<void> };
      const socket = await connect({ url: urls, hashes, token, reconnect: { first: 20 } });
      const echo = await socket.open('echo');
      await echo.send('first', 0);
      await echo.receive();
      await echo.send('before', 1);
      const goAway = new Promise<{ reason: { code: number } }>((resolve) => socket.on('goaway', resolve));
      const again = new Promise<void>((resolve) => socket.on('state', ({ state }: { state: string }) => state === 'connected' && resolve()));
      await drain();
      const { reason } = await goAway;
      await again;
      const answer = (await echo.receive())?.data;
      const moved = await echo.closed;
      const next = await socket.open('echo');
      await next.send('after', 2);
      const after = (await next.receive()).data;
      await socket.close();
      return [reason.code, answer, moved.name, after];
    },
    { urls: [first.endpoint.url, second.endpoint.url], hashes: [...first.endpoint.hashes, ...second.endpoint.hashes], token: first.endpoint.token },
  );
  assert.deepEqual(got, [0x01, 1, 'moved', 2]);
  await page.close();
  await second.kill();
  await first.kill();
});

test('a server that is killed is missed at once by who has something to send', { skip }, async () => {
  const doomed = await WebServer.start();
  const page = await fresh();
  await page.exposeFunction('kill', () => doomed.kill());
  const got = await page.evaluate(async ({ url, hashes, token }) => {
    const { connect } = await import('/udpack.js' as string);
    const { kill } = globalThis as unknown as { kill(): Promise<void> };
    const socket = await connect({ url, hashes, token, reconnect: false });
    const echo = await socket.open('echo');
    await kill();
    void echo.send('x', 1);
    const reason = await socket.closed;
    return [reason.name, reason.by, (await echo.closed).name];
  }, doomed.endpoint);
  assert.deepEqual(got, ['connection_lost', 'transport', 'connection_lost']);
  await page.close();
});

test('nothing in any page went uncaught', { skip }, () => {
  assert.deepEqual(pages.uncaught, []);
});

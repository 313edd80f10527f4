/**
 * What a page loses and what it keeps when its server is ended and started again, and when nothing passes for a long time; and an
 * upload that takes long. In a real Chromium, against `examples/web.rs`; skipped aloud where either is missing.
 */

import assert from 'node:assert/strict';
import { randomFillSync } from 'node:crypto';
import { closeSync, createReadStream, mkdtempSync, openSync, rmSync, writeSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { after, before, test } from 'node:test';
import { createBLAKE3 } from 'hash-wasm';
import type { Browser, Page } from 'playwright-core';
import { launch } from './chromium.js';
import { Relay } from './relay.js';
import { Pages, skip, WebServer } from './web.js';

let browser: Browser;
let pages: Pages;
let here: string;

before(async () => {
  if (skip) return;
  here = mkdtempSync(`${tmpdir()}/udpack-outage-`);
  browser = await launch();
  pages = await Pages.start(browser);
});

after(async () => {
  if (skip) return;
  await browser.close();
  pages.stop();
  rmSync(here, { recursive: true, force: true });
});

/** A file of this size that nobody can guess. */
function write(name: string, size: number): string {
  const path = `${here}/${name}`;
  const file = openSync(path, 'w');
  const part = Buffer.alloc(1 << 20);
  for (let left = size; left > 0; left -= part.length) writeSync(file, randomFillSync(part), 0, Math.min(left, part.length));
  closeSync(file);
  return path;
}

async function blake3(path: string): Promise<string> {
  const hash = (await createBLAKE3()).init();
  for await (const bytes of createReadStream(path, { highWaterMark: 1 << 20 })) hash.update(bytes as Uint8Array);
  return hash.digest();
}

/** Gives the page a file of the disk, by its `input`. */
async function choose(page: Page, path: string): Promise<void> {
  await page.setContent('<!doctype html><title>test</title><input type="file">');
  await page.locator('input').setInputFiles(path);
}

/** How a server goes, and what the page is told of it: its states, and the ends of a resumable channel and of another. */
const ENDS = {
  killed: { states: ['reconnecting connection_lost', 'connected unknown'], resumable: ['not_resumed', 0x35], plain: ['connection_lost', 0xf0] },
  drained: { states: ['goingAway shutting_down', 'reconnecting moved', 'connected undefined'], resumable: ['moved', 0x37], plain: ['moved', 0x37] },
} as const;

for (const [how, told] of Object.entries(ENDS)) {
  test(`a server that is ${how} and started again: channels end as is said, an upload goes on`, { skip }, async (t) => {
    const dir = `${here}/${how}`;
    let server = await WebServer.start({ dir });
    const { endpoint, port } = server;
    const relay = await Relay.start(port);
    t.after(async () => {
      await relay.cut();
      await server.kill();
      rmSync(dir, { recursive: true });
    });
    let before = 0;
    const page = await pages.open();
    await page.exposeFunction('restart', async () => {
      // A server that drains gives clients seconds to leave, in which a fast machine could end the upload.
      relay.longest = 600;
      await (how === 'killed' ? server.kill() : server.drain());
      relay.longest = Infinity;
      before = relay.passed;
      server = await WebServer.start({ dir, address: `127.0.0.1:${port}` });
      assert.deepEqual([server.endpoint.url, server.endpoint.hashes], [endpoint.url, endpoint.hashes]);
    });
    const size = 96 << 20;
    const path = write(`${how}.bin`, size);
    await choose(page, path);
    const got = await page.evaluate(
      async ({ url, hashes, token }) => {
        const { connect } = await import('/udpack.js' as string);
        const { upload } = await import('/transfer.js' as string);
        const { restart } = globalThis as unknown as { restart(): Promise<void> };
        const socket = await connect({ url, hashes, token, reconnect: { first: 20, most: 200 } });
        const states: string[] = [];
        socket.on('state', (now: { state: string; reason?: string | { name: string }; goAway?: { reason: { name: string } } }) => {
          const reason = now.goAway?.reason ?? now.reason;
          const line = `${now.state} ${typeof reason === 'object' ? reason.name : reason}`;
          // Tries that find nobody are told, too, as many as there are.
          if (states.at(-1)?.split(' ')[0] !== now.state) states.push(line);
        });
        const { sessionId } = socket;
        const [echo, plain] = [await socket.open('echo'), await socket.open('echo', { resumable: false })];
        // Some messages are always on their way.
        const back: unknown[] = [];
        let sent = 0;
        const send = (): void => void echo.send('n', sent++).catch(() => {});
        for (let n = 0; n < 50; n += 1) send();
        const over = (async () => {
          for await (const { data } of echo) {
            back.push(data);
            send();
          }
        })().catch((error: { name: string; code: number }) => error.code);
        const running = upload(socket, document.querySelector('input')?.files);
        let safe = 0;
        for await (const _ of running) {
          if (safe === 0 && running.total.safe > 0) {
            ({ safe } = running.total);
            await restart();
          }
        }
        const [file] = await running.done;
        const ends = [];
        for (const { name, code, retry } of [await echo.closed, await plain.closed]) ends.push([name, code, retry]);
        const late = await echo.send('n', 0).then(() => 'sent', ({ name, code }: { name: string; code: number }) => `${name} ${code}`);
        const last = await over;
        const again = await socket.open('echo');
        await again.send('again', 1);
        const { data } = await again.receive();
        const isOther = socket.sessionId !== sessionId;
        await socket.close();
        const hash = [...(file.done?.hash ?? [])].map((byte: number) => byte.toString(16).padStart(2, '0')).join('');
        return { states, ends, late, last, data, isOther, back, sent, safe, hash, file: [file.state, `${file.error ?? ''}`, file.received, file.safe], trouble: file.trouble?.reason };
      },
      { ...endpoint, url: `https://127.0.0.1:${relay.port}/udpack` },
    );
    const after = relay.passed - before;
    t.diagnostic(`${got.safe >> 20} MiB were safe, ${after >> 20} MiB went to the next server; ${got.back.length} of ${got.sent} messages came back`);
    assert.deepEqual(got.states.slice(0, told.states.length), told.states);
    assert.deepEqual(got.states.slice(told.states.length), ['closed normal']);
    assert.deepEqual(got.ends, [[...told.resumable, true], [...told.plain, true]]);
    assert.equal(got.late, `ClosedError ${told.resumable[1]}`);
    // What came back is the first of what was sent, each once and in order.
    assert.ok(got.back.length > 0);
    assert.deepEqual(got.back, got.back.map((_, n) => n));
    assert.deepEqual([got.data, got.isOther], [1, true]);
    assert.deepEqual(got.file, ['done', '', size, size]);
    assert.equal(got.trouble, 'lane_closed');
    // What was safe is not sent again.
    assert.ok(after < size, `${after} bytes for the ${size - got.safe} that were not safe`);
    const wanted = await blake3(path);
    assert.deepEqual([got.hash, await blake3(`${endpoint.files}/${how}.bin`)], [wanted, wanted]);
    await page.close();
  });
}

test('10,000 messages each way, and nothing passes for 40 s: none lost, doubled or reordered', { skip }, async (t) => {
  const CUT_MS = 40_000;
  const server = await WebServer.start({ dir: `${here}/cut` });
  const relay = await Relay.start(server.port);
  t.after(async () => {
    await relay.cut();
    await server.kill();
  });
  const page = await pages.open();
  await page.exposeFunction('cut', () => {
    relay.silent = true;
    setTimeout(() => (relay.silent = false), CUT_MS).unref();
  });
  const got = await page.evaluate(
    async ({ url, hashes, token }) => {
      const { connect } = await import('/udpack.js' as string);
      const { cut } = globalThis as unknown as { cut(): Promise<void> };
      const COUNT = 10_000;
      const socket = await connect({ url, hashes, token, reconnect: { most: 2000 } });
      const begun = performance.now();
      const states: unknown[] = [];
      const at: string[] = [];
      socket.on('state', ({ state, resumed, reason }: { state: string; resumed?: boolean; reason?: { name: string } }) => {
        states.push(resumed ?? reason?.name ?? state);
        at.push(`${state} ${((performance.now() - begun) / 1000).toFixed(1)} s`);
      });
      const echo = await socket.open('echo');
      // At most so many are on their way, so that the cut comes amidst of them.
      let sent = 0;
      const send = async (): Promise<void> => void (sent < COUNT && (await echo.send('n', sent++)));
      for (let n = 0; n < 500; n += 1) void send();
      const wrong: unknown[] = [];
      for (let n = 0; n < COUNT; n += 1) {
        const { data } = await echo.receive();
        if (data !== n) wrong.push([n, data]);
        if (n === COUNT / 4) await cut();
        void send();
      }
      await echo.close();
      const more = await echo.receive();
      await socket.close();
      return { wrong, states, at, more: more?.data };
    },
    { ...server.endpoint, url: `https://127.0.0.1:${relay.port}/udpack` },
  );
  t.diagnostic(got.at.join(', '));
  assert.deepEqual(got.wrong, []);
  assert.equal(got.more, undefined);
  // Told that it is lost, perhaps that tries fail, and that the session goes on.
  const [lost, ...later] = got.states;
  assert.equal(lost, 'connection_lost');
  assert.deepEqual(later.filter((state) => state !== 'connection_lost' && state !== 'timed_out'), [true, 'normal']);
  await page.close();
});

test('a large file of a page is on the disk with its hash', { skip }, async (t) => {
  // 1 GiB by hand and before a release: UDPACK_UPLOAD_BYTES=1073741824.
  const size = Number(process.env.UDPACK_UPLOAD_BYTES ?? 128 << 20);
  const server = await WebServer.start({ dir: `${here}/large` });
  t.after(async () => {
    await server.kill();
    rmSync(`${here}/large`, { recursive: true });
  });
  const path = write('large.bin', size);
  const page = await pages.open();
  await choose(page, path);
  const got = await page.evaluate(async ({ url, hashes, token }) => {
    const { connect } = await import('/udpack.js' as string);
    const { upload } = await import('/transfer.js' as string);
    const socket = await connect({ url, hashes, token });
    const begun = performance.now();
    const [file] = await upload(socket, document.querySelector('input')?.files).done;
    const secs = (performance.now() - begun) / 1000;
    await socket.close();
    const hash = [...(file.done?.hash ?? [])].map((byte: number) => byte.toString(16).padStart(2, '0')).join('');
    return { secs, state: file.state, error: `${file.error ?? ''}`, size: file.done?.size, hash };
  }, server.endpoint);
  t.diagnostic(`${size >> 20} MiB in ${got.secs.toFixed(1)} s, ${(size / 2 ** 20 / got.secs).toFixed(1)} MiB/s`);
  const wanted = await blake3(path);
  assert.deepEqual([got.state, got.error, got.size, got.hash], ['done', '', size, wanted]);
  assert.equal(await blake3(`${server.endpoint.files}/large.bin`), wanted);
  await page.close();
});

test('nothing in any page went uncaught', { skip }, () => {
  assert.deepEqual(pages.uncaught, []);
});

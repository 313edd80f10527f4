/**
 * Where UDP does not pass: pages come over a WebSocket, and their sessions go from one transport to the other. In a real Chromium,
 * against `examples/web.rs`; skipped aloud where either is missing.
 */

import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { after, before, test } from 'node:test';
import type { Browser } from 'playwright-core';
import { launch } from './chromium.js';
import { Relay } from './relay.js';
import { TcpRelay } from './tcp.js';
import { type Endpoint, Pages, skip, WebServer } from './web.js';

let browser: Browser;
let pages: Pages;
let server: WebServer;
let udp: Relay;
let tcp: TcpRelay;

before(async () => {
  if (skip) return;
  browser = await launch();
  pages = await Pages.start(browser);
  server = await WebServer.start({ tcp: '127.0.0.1:0' });
  udp = await Relay.start(server.port);
  tcp = await TcpRelay.start(Number(new URL(server.endpoint.socketUrl as string).port));
});

after(async () => {
  if (skip) return;
  await browser.close();
  pages.stop();
  await udp.cut();
  tcp.stop();
  await server.kill();
});

/** The server behind the two paths. */
function endpoint(): Endpoint {
  return { ...server.endpoint, url: `https://127.0.0.1:${udp.port}/udpack`, socketUrl: `ws://127.0.0.1:${tcp.port}/udpack` };
}

test('where UDP is lost, `auto` connects by a WebSocket; where nothing else passes, by WebTransport', { skip }, async (t) => {
  t.after(() => (udp.silent = tcp.closed = false));
  const page = await pages.open();
  const scripts: string[] = [];
  page.on('request', (request) => scripts.push(new URL(request.url()).pathname));
  const vias = async (transport?: string): Promise<unknown> =>
    page.evaluate(
      async ([endpoint, transport]) => {
        const { connect } = await import('/udpack.js' as string);
        const socket = await connect({ ...(endpoint as object), ...((transport ? { transport } : {}) as object) });
        const sum = await (await socket.open('math')).request('add', [1, 2]);
        const { transport: via } = socket;
        await socket.close();
        return [via, sum, socket.transport ?? 'none'];
      },
      [endpoint(), transport] as const,
    );
  assert.deepEqual(await vias('webtransport'), ['webtransport', 3, 'none']);
  assert.ok(!scripts.includes('/mux.js'), `${scripts}`);
  tcp.closed = true;
  assert.deepEqual(await vias(), ['webtransport', 3, 'none']);
  tcp.closed = false;
  udp.silent = true;
  assert.deepEqual(await vias(), ['wss', 3, 'none']);
  udp.silent = false;
  assert.deepEqual(await vias('wss'), ['wss', 3, 'none']);
  assert.ok(scripts.includes('/mux.js'), `${scripts}`);
  await page.close();
});

test('10,000 messages each way from WebTransport to a WebSocket and back: none lost, doubled or reordered', { skip }, async (t) => {
  const page = await pages.open();
  await page.exposeFunction('lose', async (what: 'udp' | 'tcp') => {
    if (what === 'udp') {
      tcp.closed = false;
      await udp.cut();
    } else {
      await udp.mend();
      tcp.closed = true;
      tcp.cut();
    }
  });
  tcp.closed = true;
  t.after(() => (tcp.closed = false));
  const got = await page.evaluate(async (endpoint) => {
    const { connect } = await import('/udpack.js' as string);
    const { lose } = globalThis as unknown as { lose(what: string): Promise<void> };
    const COUNT = 10_000;
    const socket = await connect({ ...endpoint, reconnect: { first: 20, most: 200 } });
    const { sessionId } = socket;
    const states: unknown[] = [];
    socket.on('state', ({ state, resumed }: { state: string; resumed?: boolean }) => {
      if (state === 'connected') states.push([socket.transport, resumed]);
    });
    const echo = await socket.open('echo');
    // At most so many are on their way, so that each cut comes amidst of them.
    let sent = 0;
    const send = async (): Promise<void> => void (sent < COUNT && (await echo.send('n', sent++)));
    for (let n = 0; n < 500; n += 1) void send();
    const wrong: unknown[] = [];
    for (let n = 0; n < COUNT; n += 1) {
      const { data } = await echo.receive();
      if (data !== n) wrong.push([n, data]);
      if (n === COUNT / 4) await lose('udp');
      if (n === COUNT / 2) await lose('tcp');
      void send();
    }
    await echo.close();
    const more = await echo.receive();
    const isSame = sessionId === socket.sessionId;
    await socket.close();
    return { wrong, states, more: more?.data, isSame };
  }, endpoint());
  assert.deepEqual(got, { wrong: [], states: [['wss', true], ['webtransport', true]], more: undefined, isSame: true });
  await page.close();
});

test('a socket over a WebSocket goes back to WebTransport by itself once UDP passes, amidst messages that go on', { skip }, async (t) => {
  t.after(() => (udp.silent = false));
  udp.silent = true;
  const page = await pages.open();
  await page.exposeFunction('mend', () => void (udp.silent = false));
  const got = await page.evaluate(async (endpoint) => {
    const { connect } = await import('/udpack.js' as string);
    const { mend } = globalThis as unknown as { mend(): Promise<void> };
    const socket = await connect(endpoint);
    const first = [socket.transport, Object.keys(localStorage).length];
    const { sessionId } = socket;
    const echo = await socket.open('echo');
    let back = false;
    socket.on('state', ({ state, resumed }: { state: string; resumed?: boolean }) => {
      back ||= state === 'connected' && resumed === true && socket.transport === 'webtransport';
    });
    await mend();
    let wrong = 0;
    let count = 0;
    for (let left = 100; left > 0; left -= back ? 1 : 0, count += 1) {
      await echo.send('n', count);
      if ((await echo.receive()).data !== count) wrong += 1;
      await new Promise((resolve) => setTimeout(resolve, 1));
    }
    const last = [socket.transport, Object.keys(localStorage).length];
    const isSame = sessionId === socket.sessionId;
    await socket.close();
    return { first, last, wrong, isSame };
  }, endpoint());
  assert.deepEqual(got, { first: ['wss', 1], last: ['webtransport', 0], wrong: 0, isSame: true });
  await page.close();
});

test('a browser without WebTransport uploads by a WebSocket, and its other channels are not held up', { skip }, async () => {
  const page = await pages.open();
  const size = 24 << 20;
  const got = await page.evaluate(
    async ([endpoint, size]) => {
      Reflect.deleteProperty(globalThis, 'WebTransport');
      const { connect } = await import('/udpack.js' as string);
      const { upload } = await import('/transfer.js' as string);
      const socket = await connect(endpoint);
      const bytes = new Uint8Array(size as number).map((_, at) => (at * 7 + (at >> 9)) & 0xff);
      const up = upload(socket, new File([bytes], 'fallback.bin'));
      const echo = await socket.open('echo', { priority: 'high' });
      let answers = 0;
      let over = false;
      void up.done.then(() => (over = true));
      while (!over) {
        await echo.send('n', answers);
        if ((await echo.receive()).data === answers) answers += 1;
      }
      const [file] = await up.done;
      await socket.close();
      return { via: typeof WebTransport, state: file.state, error: `${file.error ?? ''}`, answers };
    },
    [endpoint(), size] as const,
  );
  const { answers, ...rest } = got;
  assert.deepEqual(rest, { via: 'undefined', state: 'done', error: '' });
  assert.ok(answers > 5, `${answers}`);
  const stored = readFileSync(`${server.endpoint.files}/fallback.bin`);
  assert.ok(stored.equals(new Uint8Array(size).map((_, at) => (at * 7 + (at >> 9)) & 0xff)));
  await page.close();
});

test('an upload that WebTransport carries slowly goes over TCP, and the rest of the socket does not', { skip }, async (t) => {
  // A path as between continents: 100 ms, and losses that are no congestion.
  Object.assign(udp, { delayMs: 50, losesEach: 20 });
  tcp.closed = true;
  t.after(() => {
    Object.assign(udp, { delayMs: 0, losesEach: 0 });
    tcp.closed = false;
  });
  const [before, made] = [udp.passed, tcp.connections];
  const page = await pages.open();
  await page.exposeFunction('passTcp', () => void (tcp.closed = false));
  const size = 32 << 20;
  const got = await page.evaluate(
    async ([endpoint, size]) => {
      const { connect } = await import('/udpack.js' as string);
      const { upload } = await import('/transfer.js' as string);
      const { passTcp } = globalThis as unknown as { passTcp(): Promise<void> };
      const socket = await connect(endpoint);
      await passTcp();
      const bytes = new Uint8Array(size as number).map((_, at) => (at * 7 + (at >> 9)) & 0xff);
      const up = upload(socket, new File([bytes], 'moved.bin'));
      const [file] = await up.done;
      const via = socket.transport;
      await socket.close();
      return { via, state: file.state, error: `${file.error ?? ''}`, retries: file.retries };
    },
    [endpoint(), size] as const,
  );
  const passed = udp.passed - before;
  t.diagnostic(`${passed >> 10} KiB went over UDP`);
  assert.deepEqual(got, { via: 'webtransport', state: 'done', error: '', retries: 0 });
  assert.ok(passed < size / 2, `${passed} bytes`);
  assert.ok(tcp.connections > made);
  const stored = readFileSync(`${server.endpoint.files}/moved.bin`);
  assert.ok(stored.equals(new Uint8Array(size).map((_, at) => (at * 7 + (at >> 9)) & 0xff)));
  await page.close();
});

test('nothing in any page went uncaught', { skip }, () => {
  assert.deepEqual(pages.uncaught, []);
});

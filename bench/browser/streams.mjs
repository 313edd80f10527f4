#!/usr/bin/env node
/**
 * One large file out of headless Chromium: what the client of this project takes for it, with the hash made meanwhile, beside
 * what the browser can do at all.
 *
 *   node bench/browser/streams.mjs [OPTION…]
 *
 *   --bin DIR       udpack-server and udpack-bench; default: target/release
 *   --size 1G       of the file
 *   --rounds 5      in each, every way has one turn, in another order
 *   --ways A,B      only these
 *   --listen HOST   where servers listen; default: 127.0.0.1
 *   --server-via "ip netns exec NAME"   by what servers are started
 *   --results DIR   default: target/bench-results
 *   --name NAME     of the results there; default: browser
 *
 * udpack       `upload` of the client over WebTransport alone, to udpack-server, which compares the hash and syncs
 * page         the same by the upload page of udpack-server, from the drop of the file to its check mark
 * tcp          the same over a WebSocket alone
 * auto         the same as a page does it: WebTransport, and over TCP what that carries slowly
 * bare         the bytes of the same File on one stream of WebTransport, no hash, no protocol, to nowhere
 * byob         the same, read into one buffer again and again, which is faster and leaves no garbage
 * hashed       the same as byob, each buffer hashed by the client's Worker before it is read into again: what a stream and the
 *              hash leave of the rate without any protocol
 * wss          the bytes as messages of a WebSocket over TLS, held up while more than 4 MiB wait in it, to nowhere
 * fetch        the File as the body of a PUT over TLS, to nowhere
 *
 * Files are in memory (tmpfs). A rate is the file's bytes by the time until the other side has said that it has all.
 * CPU is that of the page's process, its Workers included, and of the browser's others, of which the network's is the most.
 */

import { existsSync, realpathSync, rmSync } from 'node:fs';
import { parseArgs } from 'node:util';
import { blake3, emptyPages, launch, median, open, Ours, repository, results, show, Sink, size, table, watch, workspace, write } from './common.mjs';

const target = process.env.CARGO_TARGET_DIR ?? `${repository}target`;
const { values: options } = parseArgs({
  options: {
    bin: { type: 'string', default: `${target}/release` },
    size: { type: 'string', default: '1G' },
    rounds: { type: 'string', default: '5' },
    ways: { type: 'string' },
    listen: { type: 'string', default: '127.0.0.1' },
    'server-via': { type: 'string', default: '' },
    results: { type: 'string', default: `${target}/bench-results` },
    name: { type: 'string', default: 'browser' },
  },
});
for (const program of ['udpack-server', 'udpack-bench']) {
  if (!existsSync(`${options.bin}/${program}`)) {
    console.error(`no ${program} in ${options.bin}: cargo build --release --locked -p udpack-cli -p udpack-bench`);
    process.exit(2);
  }
}
options.bin = realpathSync(options.bin);
const bytes = size(options.size);
const rounds = Number(options.rounds);
const { listen: host, 'server-via': via, bin } = options;
const work = workspace();
const file = write(`${work}/file.bin`, bytes);
const hash = await blake3(file);
const origin = await emptyPages();

/** What runs in the page: each gives the seconds that it took, and what the other side said. */
const ways = {
  async udpack({ endpoint, transport }) {
    const { connect } = await import('/udpack.js');
    const { upload } = await import('/transfer.js');
    const socket = await connect({ ...endpoint, transport });
    const begun = performance.now();
    const [stored] = await upload(socket, document.querySelector('input').files).done;
    const seconds = (performance.now() - begun) / 1000;
    await socket.close();
    if (stored.error) throw stored.error;
    return { seconds, told: Array.from(stored.done.hash, (byte) => byte.toString(16).padStart(2, '0')).join('') };
  },
  async bare({ sink }) {
    const value = Uint8Array.from(sink.hash.match(/../g), (digits) => Number.parseInt(digits, 16));
    const transport = new WebTransport(sink.webTransport, { serverCertificateHashes: [{ algorithm: 'sha-256', value }] });
    await transport.ready;
    const begun = performance.now();
    const stream = await transport.createBidirectionalStream();
    const writer = stream.writable.getWriter();
    const reader = document.querySelector('input').files[0].stream().getReader();
    for (let part = await reader.read(); !part.done; part = await reader.read()) await writer.write(part.value);
    void writer.close();
    const told = await new Response(stream.readable).text();
    const seconds = (performance.now() - begun) / 1000;
    transport.close();
    return { seconds, told };
  },
  async byob({ sink }) {
    const value = Uint8Array.from(sink.hash.match(/../g), (digits) => Number.parseInt(digits, 16));
    const transport = new WebTransport(sink.webTransport, { serverCertificateHashes: [{ algorithm: 'sha-256', value }] });
    await transport.ready;
    const begun = performance.now();
    const stream = await transport.createBidirectionalStream();
    const writer = stream.writable.getWriter();
    const reader = document.querySelector('input').files[0].stream().getReader({ mode: 'byob' });
    let part = await reader.read(new Uint8Array(256 << 10));
    while (!part.done) {
      await writer.write(part.value);
      part = await reader.read(new Uint8Array(part.value.buffer));
    }
    void writer.close();
    const told = await new Response(stream.readable).text();
    const seconds = (performance.now() - begun) / 1000;
    transport.close();
    return { seconds, told };
  },
  async hashed({ sink }) {
    const value = Uint8Array.from(sink.hash.match(/../g), (digits) => Number.parseInt(digits, 16));
    const transport = new WebTransport(sink.webTransport, { serverCertificateHashes: [{ algorithm: 'sha-256', value }] });
    await transport.ready;
    const worker = new Worker('/hash-worker.js', { type: 'module' });
    const free = Array.from({ length: 16 }, () => new ArrayBuffer(256 << 10));
    let wake = () => {};
    let hashed;
    const hash = new Promise((resolve) => (hashed = resolve));
    await new Promise((ready) => {
      worker.onmessage = ({ data }) => {
        if (data.buffer) free.push(data.buffer);
        if (data.ready) ready();
        if (data.hash) hashed(data.hash);
        wake();
      };
    });
    const begun = performance.now();
    const stream = await transport.createBidirectionalStream();
    const writer = stream.writable.getWriter();
    const reader = document.querySelector('input').files[0].stream().getReader({ mode: 'byob' });
    const read = async () => {
      while (free.length === 0) await new Promise((resolve) => (wake = resolve));
      return reader.read(new Uint8Array(free.pop()));
    };
    for (let part = await read(); !part.done; part = await read()) {
      await writer.write(part.value);
      worker.postMessage({ add: [1], bytes: part.value }, [part.value.buffer]);
    }
    void writer.close();
    worker.postMessage({ peek: 1 });
    const [told] = await Promise.all([new Response(stream.readable).text(), hash]);
    const seconds = (performance.now() - begun) / 1000;
    worker.terminate();
    transport.close();
    return { seconds, told };
  },
  async wss({ sink }) {
    const socket = new WebSocket(sink.webSocket);
    socket.binaryType = 'arraybuffer';
    await new Promise((resolve, reject) => Object.assign(socket, { onopen: resolve, onerror: reject }));
    const begun = performance.now();
    const reader = document.querySelector('input').files[0].stream().getReader();
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      while (socket.bufferedAmount > 4 << 20) await new Promise((resolve) => setTimeout(resolve, 1));
      socket.send(part.value);
    }
    const answer = new Promise((resolve) => (socket.onmessage = ({ data }) => resolve(data)));
    socket.send('how many');
    const told = await answer;
    const seconds = (performance.now() - begun) / 1000;
    socket.close();
    return { seconds, told };
  },
  async fetch({ sink }) {
    const begun = performance.now();
    const response = await window.fetch(sink.put, { method: 'PUT', body: document.querySelector('input').files[0] });
    const told = await response.text();
    return { seconds: (performance.now() - begun) / 1000, told };
  },
};

/** The same client over other transports. */
const transports = { udpack: 'webtransport', tcp: 'wss', auto: 'auto' };
ways.tcp = ways.auto = ways.udpack;

/** Drops the file onto the upload page and waits for its check mark. */
async function page({ page }) {
  await page.locator('.state[data-look=good]').waitFor();
  const session = await page.context().newCDPSession(page);
  const done = page.evaluate(
    () =>
      new Promise((resolve) => {
        let begun;
        addEventListener('drop', () => (begun = performance.now()), true);
        const look = () => (document.querySelector('.row.file[data-state=done]') ? resolve((performance.now() - begun) / 1000) : setTimeout(look, 10));
        look();
      }),
  );
  for (const type of ['dragEnter', 'dragOver', 'drop']) {
    await session.send('Input.dispatchDragEvent', { type, x: 300, y: 300, data: { items: [], files: [file], dragOperationsMask: 1 } });
  }
  return { seconds: await done };
}

const names = ['udpack', 'page', ...Object.keys(ways).filter((name) => name !== 'udpack')].filter((name) => !options.ways || options.ways.split(',').includes(name));
const browser = await launch();
console.log(`one file of ${bytes} bytes out of Chromium ${browser.version()}, ${rounds} rounds`);
const runs = [];
let failed = false;
for (let round = 1; round <= rounds; round += 1) {
  for (let turn = 0; turn < names.length; turn += 1) {
    const way = names[(turn + round - 1) % names.length];
    const dir = `${work}/server`;
    const isOurs = way === 'page' || way in transports;
    const server = isOurs ? await Ours.start({ bin, dir, host, via, origin }) : await Sink.start({ bin, host, via });
    const { page: tab, close } = await open(browser, way === 'page' ? server.link : origin);
    const run = { way, round, rate: null, memory: null, cpu: null, server: null };
    let stop = async () => null;
    try {
      if (way !== 'page') await tab.locator('input').setInputFiles(file);
      stop = await watch(browser);
      const { seconds, told } = await (way === 'page' ? page({ page: tab }) : tab.evaluate(ways[way], { endpoint: server.endpoint, transport: transports[way], sink: server.addresses }));
      Object.assign(run, await stop());
      run.server = server.program.peak;
      const right = way === 'page' ? (await blake3(`${server.files}/file.bin`)) === hash : told === (isOurs ? hash : `${bytes}`);
      if (!right) throw new Error(`the other side has something else: ${told}`);
      Object.assign(run, { seconds, rate: bytes / 2 ** 20 / seconds });
    } catch (error) {
      failed = true;
      run.why = `${error}`;
      await stop();
    }
    runs.push(run);
    console.log(`round ${round}: ${way.padEnd(6)} ${run.why ? `FAILED: ${run.why}` : `${show(run.seconds, 2).padStart(8)} s ${show(run.rate).padStart(8)} MiB/s, page +${show(run.memory / 2 ** 20, 0)} MiB, ${show(run.cpu.renderer, 1)} + ${show(run.cpu.rest, 1)} CPU s`}`);
    await close();
    await server.program.stop();
    rmSync(dir, { recursive: true, force: true });
  }
}
await browser.close();

/** Of each round the rate of `way` to that of `other`; the median. */
const ratio = (way, other) =>
  median(Array.from({ length: rounds }, (_, at) => {
    const of = (name) => runs.find((run) => run.way === name && run.round === at + 1)?.rate;
    return of(way) / of(other);
  }));
const line = (way) => {
  const of = (key) => runs.filter((run) => run.way === way && run.rate !== null).map((run) => run[key]);
  const rates = of('rate');
  return {
    way,
    runs: rates.length,
    min: Math.min(...rates),
    median: median(rates),
    max: Math.max(...rates),
    memory: Math.max(...of('memory')) / 2 ** 20,
    server: Math.max(...of('server')) / 2 ** 20,
    cpu: { renderer: median(of('cpu').map(({ renderer }) => renderer)), rest: median(of('cpu').map(({ rest }) => rest)) },
    ours: ratio('udpack', way),
  };
};
const lines = names.map(line);
console.log(`\n${table([
  ['way', 'runs', 'min', 'median', 'max MiB/s', 'udpack/it', 'page + MiB', 'page CPU s', 'browser CPU s', 'server MiB'],
  ...lines.map(({ way, runs, min, median, max, ours, memory, cpu, server }) => [way, runs, show(min), show(median), show(max), show(ours, 2), show(memory, 0), show(cpu.renderer), show(cpu.rest), show(server, 0)]),
])}`);
const [ours] = lines.filter(({ way }) => way === 'udpack');
const isHere = host.startsWith('127.');
const goals = [
  ['udpack / bare', isHere ? ratio('udpack', 'bare') : null, 0.95, true],
  ['udpack / wss', isHere ? ratio('udpack', 'wss') : null, 1.8, true],
  // Over a link, where a kernel's congestion control is what one competes with.
  ['auto / fetch', isHere ? null : ratio('auto', 'fetch'), 0.9, true],
  ['page above idle, MiB', ours?.memory, 100 * 1e6 / 2 ** 20, false],
].filter(([, value]) => value !== null && Number.isFinite(value));
for (const [what, value, goal, most] of goals) console.log(`${what}: ${show(value, 2)} (goal: ${most ? 'at least' : 'at most'} ${show(goal, 2)}) ${(most ? value >= goal : value <= goal) ? 'met' : 'MISSED'}`);
results(options.results, options.name, { bytes, browser: browser.version(), runs, lines });
process.exit(failed ? 1 : 0);

#!/usr/bin/env node
/**
 * Uploads out of headless Chromium to servers that people use for it, each by the means of its own page: one large file, 300
 * small ones, and the server killed in the middle of the large one and started again.
 *
 *   node bench/browser/peers.mjs [OPTION…]        as root: in a network namespace of its own, whose bytes are counted
 *
 *   --bin DIR       udpack-server; default: target/release
 *   --peers DIR     where the others are; default: target/peers. What is not there is left out, and it is said how to get it
 *   --size 1G       of the large file
 *   --rounds 3      in each, every server has one turn at each of the three
 *   --ways A,B      only these
 *   --results DIR   default: target/bench-results
 *
 * udpack      the client: several files at once, hashed, compared and synced by the server, over QUIC
 * dufs        a PUT for each file, one after the other; after a failure a HEAD and a PATCH with the rest
 * miniserve   a POST of multipart/form-data for each file, one after the other; after a failure all of it again
 * tus         @tus/server with its file store, tus-js-client, six files at once, in PATCHes without a bound
 * copyparty   its page with up2k, which hashes first: files are dropped onto it; after a failure once more, if it has not gone on within 15 s
 *
 * The others speak plain HTTP, which costs less than TLS, and sync nothing. Files are in memory (tmpfs). What was sent again is
 * counted on the loopback device, with the headers of packets. Memory of a server is its peak, with its children.
 */

import { spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, readFileSync, readdirSync, realpathSync, rmSync, statSync } from 'node:fs';
import { createServer } from 'node:net';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { emptyPages, launch, median, open, Ours, Program, repository, results, same, show, size, skipped, table, workspace, write } from './common.mjs';

const target = process.env.CARGO_TARGET_DIR ?? `${repository}target`;
const { values: options } = parseArgs({
  options: {
    bin: { type: 'string', default: `${target}/release` },
    peers: { type: 'string', default: 'target/peers' },
    size: { type: 'string', default: '1G' },
    rounds: { type: 'string', default: '3' },
    ways: { type: 'string' },
    results: { type: 'string', default: `${target}/bench-results` },
  },
});

// A namespace of its own, so that nobody else's bytes are counted.
const alone = process.env.UDPACK_BENCH_ALONE === '1';
if (!alone && process.getuid() === 0 && spawnSync('unshare', ['--net', 'true']).status === 0) {
  const { status } = spawnSync('unshare', ['--net', 'sh', '-c', 'ip link set lo up && exec "$@"', 'sh', process.execPath, fileURLToPath(import.meta.url), ...process.argv.slice(2)], {
    stdio: 'inherit',
    env: { ...process.env, UDPACK_BENCH_ALONE: '1' },
  });
  process.exit(status ?? 1);
}
if (!alone) skipped('what is sent after a kill', 'needs root and unshare, for a network namespace');

if (!existsSync(`${options.bin}/udpack-server`)) {
  console.error(`no udpack-server in ${options.bin}: cargo build --release --locked -p udpack-cli`);
  process.exit(2);
}
const bin = realpathSync(options.bin);
const { peers } = options;
const bytes = size(options.size);
const rounds = Number(options.rounds);
const SMALL = { count: 300, bytes: 100_000 };

const work = workspace();
const large = write(`${work}/large.bin`, bytes);
mkdirSync(`${work}/small`);
const small = Array.from({ length: SMALL.count }, (_, n) => write(`${work}/small/${n}.bin`, SMALL.bytes));
const origin = await emptyPages();

function freePort() {
  return new Promise((resolve) => {
    const server = createServer().listen(0, '127.0.0.1', () => {
      const { port } = server.address();
      server.close(() => resolve(port));
    });
  });
}

async function answers(port) {
  for (let tries = 0; tries < 300; tries += 1) {
    try {
      await fetch(`http://127.0.0.1:${port}/`);
      return;
    } catch {
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
  }
  throw new Error(`nobody answers on port ${port}`);
}

/** A server of HTTP: its page, and where its files are. */
function http(line, files = '', more = {}) {
  return async ({ dir, port }) => {
    mkdirSync(`${dir}/files`, { recursive: true });
    const program = new Program(line(`${dir}/files`, port), { cwd: dir, ...more });
    await answers(port);
    return { program, address: `http://127.0.0.1:${port}/`, files: `${dir}/files${files}` };
  };
}

const TUS_SERVER = `
  import { Server } from '@tus/server';
  import { FileStore } from '@tus/file-store';
  const [directory, port] = process.argv.slice(1);
  new Server({ path: '/files', datastore: new FileStore({ directory }) }).listen({ host: '127.0.0.1', port: Number(port) });
`;

/** Each: whether it is there and how to get it; its start; what runs in the page, for files and after a failure. */
const ways = {
  udpack: {
    async start({ dir, port }) {
      const ours = await Ours.start({ bin, dir, port, web: port, origin });
      return { program: ours.program, address: origin, files: ours.files, endpoint: ours.endpoint };
    },
    async send(endpoint) {
      const { connect } = await import('/udpack.js');
      const { upload } = await import('/transfer.js');
      const socket = await connect(endpoint);
      const all = await upload(socket, globalThis.chosen()).done;
      await socket.close();
      for (const { error } of all) if (error) throw error;
    },
  },
  dufs: {
    program: 'bin/dufs',
    how: 'cargo install --locked --root DIR dufs',
    start: http((dir, port) => [`${peers}/bin/dufs`, '-A', '-b', '127.0.0.1', '-p', `${port}`, dir]),
    async send() {
      for (const file of globalThis.chosen()) {
        await new Promise((resolve, reject) => {
          const request = new XMLHttpRequest();
          request.open('PUT', `/${encodeURIComponent(file.name)}`);
          request.onload = () => (request.status < 300 ? resolve() : reject(new Error(`${request.status}`)));
          request.onerror = () => reject(new Error('the connection is lost'));
          request.send(file);
        });
      }
    },
    async again() {
      const [file] = globalThis.chosen();
      const head = await fetch(`/${encodeURIComponent(file.name)}`, { method: 'HEAD' });
      const there = head.ok ? Number(head.headers.get('content-length')) : 0;
      const { ok, status } = await fetch(`/${encodeURIComponent(file.name)}`, { method: 'PATCH', headers: { 'X-Update-Range': 'append' }, body: file.slice(there) });
      if (!ok) throw new Error(`${status}`);
    },
  },
  miniserve: {
    program: 'bin/miniserve',
    how: 'cargo install --locked --root DIR miniserve',
    start: http((dir, port) => [`${peers}/bin/miniserve`, '-u', '-o', 'overwrite', '-i', '127.0.0.1', '-p', `${port}`, dir]),
    async send() {
      for (const file of globalThis.chosen()) {
        const form = new FormData();
        form.append('file_to_upload', file);
        const { ok, status } = await fetch('/upload?path=/', { method: 'POST', body: form });
        if (!ok) throw new Error(`${status}`);
      }
    },
    again: 'send',
  },
  tus: {
    program: 'node_modules/@tus/server',
    how: 'cd DIR && npm install @tus/server @tus/file-store tus-js-client',
    start: http((dir, port) => [process.execPath, '--input-type=module', '--eval', TUS_SERVER, dir, `${port}`], '', { cwd: peers }),
    script: `${peers}/node_modules/tus-js-client/dist/tus.min.js`,
    async send() {
      const waiting = globalThis.chosen();
      const one = (file) =>
        new Promise((resolve, reject) => {
          // The browser thinks that it is offline in a namespace without routes.
          const retryDelays = [100, 500, 1000, 2000, 3000, 5000];
          new globalThis.tus.Upload(file, { endpoint: '/files', retryDelays, metadata: { filename: file.name }, onShouldRetry: () => true, onSuccess: resolve, onError: reject, storeFingerprintForResuming: false }).start();
        });
      const lane = async () => {
        for (let file = waiting.shift(); file; file = waiting.shift()) await one(file);
      };
      await Promise.all(Array.from({ length: 6 }, lane));
    },
    // Names of its own.
    unnamed: true,
  },
  copyparty: {
    program: 'venv/bin/copyparty',
    how: 'python3 -m venv DIR/venv && DIR/venv/bin/pip install copyparty',
    start: http((dir, port) => [`${peers}/venv/bin/copyparty`, '-i', '127.0.0.1', '-p', `${port}`, '-v', `${dir}::rwmd`, '--wram', '-q'], '', { env: { XDG_CONFIG_HOME: `${work}/config` } }),
    drops: true,
  },
};

/** What went through the namespace's loopback device. */
function carried() {
  const line = readFileSync('/proc/net/dev', 'utf8').split('\n').find((line) => line.trim().startsWith('lo:'));
  return Number(line.split(':')[1].trim().split(/\s+/)[8]);
}

async function until(condition, seconds = 300) {
  for (const begun = Date.now(); !condition(); ) {
    if (Date.now() - begun > seconds * 1000) throw new Error(`not within ${seconds} s`);
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}

function stored(server, way, path, at) {
  if (way.drops) {
    // After a kill it takes the name for taken, and finds another.
    const [name, wanted] = [path.slice(path.lastIndexOf('/') + 1), statSync(path).size];
    const names = readdirSync(server.files).filter((other) => other.startsWith(name) && !other.endsWith('.PARTIAL') && statSync(`${server.files}/${other}`).size === wanted);
    return `${server.files}/${names[0]}`;
  }
  if (!way.unnamed) return `${server.files}/${path.slice(path.lastIndexOf('/') + 1)}`;
  const wanted = statSync(path).size;
  const names = readdirSync(server.files).filter((name) => !name.endsWith('.json') && statSync(`${server.files}/${name}`).size === wanted);
  // Which of several is which, it says in files of its own; of one there is no doubt.
  return `${server.files}/${names[at]}`;
}

/** Whether all files are there: the large one byte for byte, of many their sizes. */
function arrived(server, way, paths) {
  if (paths.length === 1) return same(paths[0], stored(server, way, paths[0], 0));
  return paths.every((path, at) => existsSync(stored(server, way, path, at)) && statSync(stored(server, way, path, at)).size === statSync(path).size);
}

/** A page of the server's, ready to send. */
async function ready(browser, server, way, paths) {
  const { page, close } = await open(browser, server.address);
  if (way.drops) {
    await page.waitForLoadState('networkidle');
    const session = await page.context().newCDPSession(page);
    const drag = (type) => session.send('Input.dispatchDragEvent', { type, x: 300, y: 300, data: { items: [], files: paths, dragOperationsMask: 1 } });
    for (const type of ['dragEnter', 'dragOver']) {
      await drag(type);
      await page.waitForTimeout(500);
    }
    page.on('dialog', (dialog) => void dialog.accept());
    const there = () => paths.every((path) => existsSync(stored(server, way, path)));
    const send = async () => {
      await drag('drop');
      // It asks whether these files are meant.
      await page.locator('#modal-ok').click({ timeout: 10_000 }).catch(() => {});
      await until(there);
    };
    const again = async (sending) => {
      sending.catch(() => {});
      await until(there, 15).catch(async () => {
        // It has given up: the same files are dropped once more.
        await page.reload({ waitUntil: 'networkidle' });
        for (const type of ['dragEnter', 'dragOver']) {
          await drag(type);
          await page.waitForTimeout(500);
        }
        await send();
      });
    };
    return { close, send, again };
  }
  await page.evaluate(() => {
    const input = Object.assign(document.createElement('input'), { type: 'file', multiple: true, id: 'bench-files' });
    document.body.append(input);
    globalThis.chosen = () => [...input.files];
  });
  await page.locator('#bench-files').setInputFiles(paths);
  if (way.script) await page.addScriptTag({ path: way.script });
  const again = way.again === 'send' ? way.send : way.again;
  return {
    close,
    send: () => page.evaluate(way.send, server.endpoint),
    again: async (sending) => {
      if (!again) return sending;
      await sending.catch(() => {});
      await page.evaluate(again, server.endpoint);
    },
  };
}

const names = Object.keys(ways).filter((name) => {
  if (options.ways && !options.ways.split(',').includes(name)) return false;
  const { program, how } = ways[name];
  if (program && !existsSync(`${peers}/${program}`)) {
    skipped(`no ${name} in ${peers}`, how.replaceAll('DIR', peers));
    return false;
  }
  return true;
});

const browser = await launch();
console.log(`out of Chromium ${browser.version()}: a file of ${bytes} bytes, ${SMALL.count} files of ${SMALL.bytes}, ${rounds} rounds`);
const runs = [];
async function turn(name, round, what, body) {
  const way = ways[name];
  const dir = `${work}/server`;
  const run = { way: name, round, what };
  let server;
  try {
    const port = await freePort();
    server = await way.start({ dir, port });
    Object.assign(run, await body(way, server, () => way.start({ dir, port })));
    run.memory = (run.server ?? server).program.peak;
  } catch (error) {
    run.why = `${error}`.split('\n')[0];
  }
  await (run.server ?? server)?.program.stop();
  delete run.server;
  rmSync(dir, { recursive: true, force: true });
  runs.push(run);
  const figures = Object.entries(run).filter(([key]) => ['rate', 'files', 'sent', 'memory'].includes(key)).map(([key, value]) => `${key} ${show(key === 'memory' ? value / 2 ** 20 : value, 2)}`);
  console.log(`round ${round}: ${name.padEnd(9)} ${what.padEnd(6)} ${run.why ? `FAILED: ${run.why}` : figures.join(', ')}`);
}

const upload = (paths) => async (way, server) => {
  const { send, close } = await ready(browser, server, way, paths);
  const begun = performance.now();
  await send();
  const seconds = (performance.now() - begun) / 1000;
  await close();
  if (!arrived(server, way, paths)) throw new Error('the server has something else');
  return paths.length === 1 ? { rate: bytes / 2 ** 20 / seconds } : { files: paths.length / seconds };
};

/** Killed when half has gone through; what is sent after that, in parts of the whole. */
const kill = async (way, server, restart) => {
  const { send, again, close } = await ready(browser, server, way, [large]);
  const before = carried();
  const sending = send();
  sending.catch(() => {});
  await until(() => carried() - before > bytes / 2);
  await server.program.stop();
  const at = carried();
  const next = await restart();
  await again(sending);
  const sent = (carried() - at) / bytes;
  await close();
  if (!arrived(next, way, [large])) throw Object.assign(new Error('the server has something else'), { next });
  return { sent, server: next };
};

for (let round = 1; round <= rounds; round += 1) {
  for (const name of names) await turn(name, round, 'large', upload([large]));
  for (const name of names) await turn(name, round, 'small', upload(small));
  if (alone) for (const name of names) await turn(name, round, 'killed', kill);
}
await browser.close();

const lines = names.map((way) => {
  const of = (what, key) => median(runs.filter((run) => run.way === way && run.what === what && run.why === undefined).map((run) => run[key]));
  const memory = Math.max(...runs.filter((run) => run.way === way && run.memory).map(({ memory }) => memory));
  return { way, rate: of('large', 'rate'), files: of('small', 'files'), sent: of('killed', 'sent'), memory, failed: runs.filter((run) => run.way === way && run.why !== undefined).length };
});
console.log(`\n${table([
  ['server', 'MiB/s', 'files/s', 'sent after a kill at half', 'memory MiB', 'failed'],
  ...lines.map(({ way, rate, files, sent, memory, failed }) => [way, show(rate), show(files, 0), show(sent, 2), show(memory / 2 ** 20, 0), failed]),
])}`);
results(options.results, 'browser-peers', { bytes, small: SMALL, browser: browser.version(), runs, lines });
process.exit(runs.some(({ way, why }) => way === 'udpack' && why !== undefined) ? 1 : 0);

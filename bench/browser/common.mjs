/** What the measurements in a browser share: programs that they start, pages, memory, tables. */

import { spawn, spawnSync } from 'node:child_process';
import { createHash, randomFillSync } from 'node:crypto';
import { closeSync, existsSync, mkdirSync, mkdtempSync, openSync, readFileSync, readdirSync, rmSync, writeFileSync, writeSync } from 'node:fs';
import { createServer } from 'node:http';
import { get } from 'node:https';
import { createRequire } from 'node:module';
import { cpus, release } from 'node:os';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';

export const repository = fileURLToPath(new URL('../..', import.meta.url));
const package_ = `${repository}crates/udpack-web/js`;
if (!existsSync(`${package_}/node_modules/playwright-core`)) {
  console.error('no playwright-core: cd crates/udpack-web/js && npm ci');
  process.exit(2);
}
const require = createRequire(`${package_}/package.json`);
export const { chromium } = require('playwright-core');
const { createBLAKE3 } = require('hash-wasm');

const MIB = 2 ** 20;

/** Says what is left out, and how to get it. */
export function skipped(what, how) {
  console.log(`SKIPPED: ${what}: ${how}`);
}

/** `1G`, `128M`, `300k`: bytes, in powers of 1,024. */
export function size(text) {
  const [, number, unit] = /^(\d+)([kMG]?)$/.exec(text) ?? [];
  if (number === undefined) throw new Error(`not a size: ${text}`);
  return Number(number) * { '': 1, k: 2 ** 10, M: MIB, G: 2 ** 30 }[unit];
}

/** A directory that goes at the end: in memory where there is some. */
export function workspace(parent = existsSync('/dev/shm') ? '/dev/shm' : '/tmp') {
  const path = mkdtempSync(`${parent}/udpack-browser-`);
  process.on('exit', () => rmSync(path, { recursive: true, force: true }));
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP']) process.on(signal, () => process.exit(130));
  return path;
}

/** Writes a file that does not compress. */
export function write(path, bytes) {
  const file = openSync(path, 'w');
  const part = Buffer.alloc(MIB);
  for (let left = bytes; left > 0; left -= part.length) writeSync(file, randomFillSync(part), 0, Math.min(left, part.length));
  closeSync(file);
  return path;
}

export async function blake3(path) {
  const { createReadStream } = await import('node:fs');
  const hash = (await createBLAKE3()).init();
  for await (const bytes of createReadStream(path, { highWaterMark: MIB })) hash.update(bytes);
  return hash.digest();
}

/** Whether two files are the same, byte for byte. */
export function same(a, b) {
  return spawnSync('cmp', ['-s', a, b]).status === 0;
}

const running = new Set();
process.on('exit', () => {
  for (const child of running) child.kill('SIGKILL');
});

/** A program that runs until it is stopped; `via` are the words it is started by, as in `ip netns exec NAME`. */
export class Program {
  constructor(line, { via = '', cwd, env } = {}) {
    const [command, ...rest] = [...via.split(' ').filter(Boolean), ...line];
    this.child = spawn(command, rest, { cwd, env: { ...process.env, ...env }, stdio: ['pipe', 'pipe', 'pipe'] });
    running.add(this.child);
    this.log = '';
    this.lines = [];
    this.waiting = [];
    this.ended = new Promise((resolve) =>
      this.child.once('exit', (code) => {
        running.delete(this.child);
        this.code = code ?? -1;
        this.tell();
        resolve();
      }),
    );
    this.child.once('error', (error) => {
      this.log += `${error}`;
      this.code = -1;
      this.tell();
    });
    for (const stream of [this.child.stdout, this.child.stderr]) {
      createInterface({ input: stream }).on('line', (line) => {
        this.log = `${this.log}${line}\n`.slice(-4000);
        this.lines.push(line);
        if (this.lines.length > 1000) this.lines.shift();
        this.tell();
      });
    }
  }

  tell() {
    for (const wake of this.waiting.splice(0)) wake();
  }

  /** The first line, as what `wanted` makes of it. */
  async line(wanted) {
    while (true) {
      for (const line of this.lines) {
        const found = wanted(line);
        if (found) return found;
      }
      if (this.code !== undefined) throw new Error(`${this.child.spawnfile} ended with ${this.code}: ${this.log}`);
      await new Promise((resolve) => this.waiting.push(resolve));
    }
  }

  /** The most memory that it and its children have taken so far, in bytes: the sum of what each has at its peak. */
  get peak() {
    return family(this.child.pid).reduce((sum, pid) => sum + status(pid, 'VmHWM'), 0);
  }

  async stop(signal = 'SIGKILL') {
    for (const pid of family(this.child.pid)) {
      try {
        process.kill(pid, signal);
      } catch {
        // It has ended.
      }
    }
    if (this.code === undefined) await this.ended;
  }
}

function status(pid, name) {
  try {
    const [, kb] = new RegExp(`^${name}:\\s+(\\d+) kB`, 'm').exec(readFileSync(`/proc/${pid}/status`, 'utf8')) ?? [];
    return Number(kb ?? 0) * 1024;
  } catch {
    return 0;
  }
}

/** A process and all below it, children first. */
function family(pid) {
  let children = [];
  try {
    children = readdirSync(`/proc/${pid}/task`).flatMap((task) => readFileSync(`/proc/${pid}/task/${task}/children`, 'utf8').split(' ').filter(Boolean).map(Number));
  } catch {
    // It has ended.
  }
  return [...children.flatMap(family), pid];
}

function secure(url) {
  return new Promise((resolve, reject) => {
    get(url, { rejectUnauthorized: false }, (response) => {
      let text = '';
      response.on('data', (part) => (text += part)).on('end', () => resolve(text));
    }).on('error', reject);
  });
}

/** `udpack-server --web`, with one more page that may connect. */
export class Ours {
  static async start({ bin, dir, host = '127.0.0.1', port = 0, web = 0, via, origin, options = [] }) {
    mkdirSync(dir, { recursive: true });
    const server = `${bin}/udpack-server`;
    const line = [server, '--quiet', '--json', '--listen', `${host}:${port}`, '--web', `${host}:${web}`, '--web-origin', origin, '--min-free', '0', ...options];
    const ours = new Ours();
    ours.program = new Program(line, { via, cwd: dir });
    ours.page = await ours.program.line((line) => JSON.parse(line).web);
    const { origin: site, hash } = new URL(ours.page);
    const asked = `${site}/.well-known/udpack.json`;
    const told = JSON.parse(site.startsWith('https:') ? await secure(asked) : await (await fetch(asked)).text());
    const link = spawnSync(server, ['url', '--web'], { cwd: dir, encoding: 'utf8' }).stdout.trim();
    ours.link = `${site}/${new URL(link).hash || hash}`;
    ours.endpoint = { url: `https://${told.host ?? host}:${told.port}${told.path}`, hashes: told.hashes, token: decodeURIComponent(new URL(ours.link).hash.slice(3)) };
    ours.endpoint.socketUrl = `${site}${told.path}`.replace(/^http/, 'ws');
    ours.port = told.port;
    ours.web = Number(new URL(site).port);
    ours.files = `${dir}/uploads`;
    return ours;
  }
}

/** `udpack-bench page-sink`: where bytes of pages go to be counted. */
export class Sink {
  static async start({ bin, host = '127.0.0.1', via }) {
    const sink = new Sink();
    sink.program = new Program([`${bin}/udpack-bench`, 'page-sink', '--listen', host], { via });
    const told = await sink.program.line((line) => line.startsWith('{') && JSON.parse(line));
    const hash = createHash('sha256').update(Buffer.from(told.certificate, 'hex')).digest('hex');
    sink.addresses = { webTransport: told.web_transport, hash, webSocket: told.web_socket, put: told.put };
    return sink;
  }
}

/** Empty pages with an `input` for files, which can import the bundles and the scripts of `more`, by path. */
export async function emptyPages(more = {}) {
  const server = createServer((request, response) => {
    const { pathname } = new URL(request.url, 'http://page');
    const bundle = ['/udpack.js', '/mux.js', '/transfer.js', '/hash-worker.js'].includes(pathname) ? `${package_}/dist${pathname}` : more[pathname];
    response.setHeader('content-type', bundle ? 'text/javascript' : 'text/html');
    response.end(bundle ? readFileSync(bundle) : '<!doctype html><title>page</title><input type="file" multiple>');
  });
  await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve));
  server.unref();
  return `http://127.0.0.1:${server.address().port}`;
}

export async function launch() {
  const executablePath = process.env.CHROMIUM ?? '/usr/bin/chromium';
  const browser = await chromium.launch({
    executablePath,
    headless: true,
    args: ['--no-sandbox', '--disable-dev-shm-usage', '--ignore-certificate-errors'],
    env: { ...process.env, LC_ALL: 'C.UTF-8' },
  });
  return browser;
}

/** A page of its own. `memory` watches what its renderer holds beyond what it held when it was called. */
export async function open(browser, address) {
  const context = await browser.newContext({ ignoreHTTPSErrors: true });
  const page = await context.newPage();
  await page.goto(address);
  return { page, close: () => context.close() };
}

/** What the pages hold, in bytes, and what they and the rest of the browser have computed, in seconds. */
async function look(session) {
  const { processInfo } = await session.send('SystemInfo.getProcessInfo');
  const pages = processInfo.filter(({ type }) => type === 'renderer');
  const time = (processes) => processes.reduce((sum, { cpuTime }) => sum + cpuTime, 0);
  const renderer = time(pages);
  return { memory: pages.reduce((sum, { id }) => sum + status(id, 'VmRSS'), 0), renderer, rest: time(processInfo) - renderer };
}

/** Watches pages ten times a second. Gives back what tells the most memory beyond what there was first, and the processor time since. */
export async function watch(browser) {
  const session = await browser.newBrowserCDPSession();
  const idle = await look(session);
  let last = idle;
  let most = idle.memory;
  let over = false;
  const watching = (async () => {
    while (!over) {
      // Nothing more is seen of a browser that has ended.
      last = await look(session).catch(() => last);
      most = Math.max(most, last.memory);
      await new Promise((resolve) => setTimeout(resolve, 100));
    }
  })();
  return async () => {
    over = true;
    await watching;
    last = await look(session).catch(() => last);
    await session.detach().catch(() => {});
    return { memory: most - idle.memory, cpu: { renderer: last.renderer - idle.renderer, rest: last.rest - idle.rest } };
  };
}

export function median(values) {
  const sorted = values.filter((value) => value !== null && Number.isFinite(value)).sort((a, b) => a - b);
  const half = sorted.length >> 1;
  return sorted.length === 0 ? null : sorted.length % 2 === 1 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}

/** Lines of cells, in columns. */
export function table(lines) {
  const widths = lines[0].map((_, column) => Math.max(...lines.map((line) => `${line[column] ?? ''}`.length)));
  return lines.map((line) => line.map((cell, column) => (column === 0 ? `${cell}`.padEnd(widths[column]) : `${cell ?? ''}`.padStart(widths[column]))).join('  ')).join('\n');
}

export const show = (value, digits = 1) => (value === null || value === undefined || !Number.isFinite(value) ? '-' : value.toFixed(digits));

/** Leaves the results as JSON, with what they were measured on. */
export function results(path, name, more) {
  mkdirSync(path, { recursive: true });
  const machine = { cores: cpus().length, cpu: cpus()[0]?.model, kernel: release(), node: process.version };
  writeFileSync(`${path}/${name}.json`, `${JSON.stringify({ name, machine, ...more }, null, 1)}\n`);
  console.log(`\n${path}/${name}.json`);
}

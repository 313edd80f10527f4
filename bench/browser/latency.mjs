#!/usr/bin/env node
/**
 * How long a request on another channel takes while an upload takes all that there is: in the page that uploads, and in another
 * browser at the same server.
 *
 *   node bench/browser/latency.mjs [OPTION…]
 *
 *   --bin DIR       udpack-server; default: target/release
 *   --size 1G       of the file
 *   --channels 60   open in each page, 64 with the lanes of an upload; one after the other is asked, some 80 times a second in all
 *   --rounds 3      in each: 5 s without the upload, then as long as the upload takes
 *   --results DIR   default: target/bench-results
 *
 * A page asks the channels `ping` of the server, which answers at once. Times are from the call of `request` to its answer in
 * the page, so they include the page's own queue of tasks.
 */

import { existsSync, realpathSync, rmSync } from 'node:fs';
import { parseArgs } from 'node:util';
import { emptyPages, launch, median, open, Ours, repository, results, show, size, table, workspace, write } from './common.mjs';

const target = process.env.CARGO_TARGET_DIR ?? `${repository}target`;
const { values: options } = parseArgs({
  options: {
    bin: { type: 'string', default: `${target}/release` },
    size: { type: 'string', default: '1G' },
    channels: { type: 'string', default: '60' },
    rounds: { type: 'string', default: '3' },
    results: { type: 'string', default: `${target}/bench-results` },
  },
});
if (!existsSync(`${options.bin}/udpack-server`)) {
  console.error(`no udpack-server in ${options.bin}: cargo build --release --locked -p udpack-cli`);
  process.exit(2);
}
const bin = realpathSync(options.bin);
const bytes = size(options.size);
const channels = Number(options.channels);
const rounds = Number(options.rounds);
const IDLE_MS = 5000;

const work = workspace();
const file = write(`${work}/file.bin`, bytes);
const origin = await emptyPages();

/** Connects the page and opens its channels. */
async function begin({ endpoint, channels }) {
  const { connect } = await import('/udpack.js');
  const socket = await connect({ ...endpoint, transport: 'webtransport' });
  const open = await Promise.all(Array.from({ length: channels }, () => socket.open('ping', { priority: 'high' })));
  await Promise.all(open.map((channel) => channel.request('ping', 0)));
  /** Asks until told to stop; gives the times, in milliseconds. */
  const ask = () => {
    let over = false;
    const done = (async () => {
      const times = [];
      for (let n = 0; !over; n += 1) {
        const begun = performance.now();
        await open[n % open.length].request('ping', n);
        times.push(performance.now() - begun);
        await new Promise((resolve) => setTimeout(resolve, 10));
      }
      return times;
    })();
    return () => ((over = true), done);
  };
  Object.assign(globalThis, { socket, ask });
}

/** Asks for so long. */
async function idle(ms) {
  const stop = globalThis.ask();
  await new Promise((resolve) => setTimeout(resolve, ms));
  return stop();
}

/** Uploads, and asks meanwhile. */
async function busy() {
  const { upload } = await import('/transfer.js');
  const stop = globalThis.ask();
  const begun = performance.now();
  const [stored] = await upload(globalThis.socket, document.querySelector('input').files).done;
  const seconds = (performance.now() - begun) / 1000;
  const times = await stop();
  if (stored.error) throw stored.error;
  return { seconds, times };
}

function summary(times) {
  const sorted = [...times].sort((a, b) => a - b);
  const at = (share) => sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * share))];
  return { count: sorted.length, p50: at(0.5), p99: at(0.99), most: sorted.at(-1) };
}

const [one, other] = [await launch(), await launch()];
console.log(`Chromium ${one.version()} twice, ${channels} channels each, one file of ${bytes} bytes, ${rounds} rounds`);
const runs = [];
let failed = false;
for (let round = 1; round <= rounds; round += 1) {
  const dir = `${work}/server`;
  const server = await Ours.start({ bin, dir, origin });
  const [first, second] = [await open(one, origin), await open(other, origin)];
  try {
    for (const { page } of [first, second]) await page.evaluate(begin, { endpoint: server.endpoint, channels });
    await first.page.locator('input').setInputFiles(file);
    const [quietFirst, quietSecond] = await Promise.all([first.page.evaluate(idle, IDLE_MS), second.page.evaluate(idle, IDLE_MS)]);
    await second.page.evaluate(() => void (globalThis.stop = globalThis.ask()));
    const { seconds, times } = await first.page.evaluate(busy);
    const beside = await second.page.evaluate(() => globalThis.stop());
    const run = { round, rate: bytes / 2 ** 20 / seconds, idle: summary(quietFirst), idleElsewhere: summary(quietSecond), uploading: summary(times), elsewhere: summary(beside) };
    runs.push(run);
    console.log(`round ${round}: ${show(run.rate)} MiB/s; p99 ${show(run.uploading.p99, 2)} ms in the page that uploads (idle ${show(run.idle.p99, 2)}), ${show(run.elsewhere.p99, 2)} ms elsewhere (idle ${show(run.idleElsewhere.p99, 2)})`);
  } catch (error) {
    failed = true;
    console.log(`round ${round}: FAILED: ${error}`);
  }
  await Promise.all([first.close(), second.close()]);
  await server.program.stop();
  rmSync(dir, { recursive: true, force: true });
}
await Promise.all([one.close(), other.close()]);

const line = (what, key) => [what, ...['p50', 'p99', 'most'].map((which) => show(median(runs.map((run) => run[key][which])), 2))];
console.log(`\n${table([
  ['medians, ms', 'p50', 'p99', 'most'],
  line('idle', 'idle'),
  line('the same page uploads', 'uploading'),
  line('another browser, idle', 'idleElsewhere'),
  line('another browser, meanwhile', 'elsewhere'),
])}`);
results(options.results, 'browser-latency', { bytes, channels, browser: one.version(), runs });
process.exit(failed ? 1 : 0);

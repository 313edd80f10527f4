/**
 * The first minutes of a new user with a browser: `udpack-server --web` started as the README says, its link opened, a folder of 300 files
 * dropped, and every file on the disk compared with what was dropped. Prints the steps and how long each took.
 *
 *   node bench/browser/walk.mjs      BIN: where udpack-server is, default target/release; FILES=300
 */

import { spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { mkdirSync, readdirSync, readFileSync } from 'node:fs';
import { launch, open, Program, repository, workspace, write } from './common.mjs';

const bin = process.env.BIN ?? `${repository}target/release`;
const count = Number(process.env.FILES ?? 300);
// Browsers take no files below /dev.
const work = workspace('/tmp');
const hashes = (directory) =>
  new Map(readdirSync(directory, { recursive: true, withFileTypes: true }).filter((entry) => entry.isFile()).map(({ name }) => [name, createHash('sha256').update(readFileSync(`${directory}/${name}`)).digest('hex')]));

mkdirSync(`${work}/photos`);
mkdirSync(`${work}/home`);
// From empty to 600 kB, as pictures and their notes are.
for (let n = 0; n < count; n += 1) write(`${work}/photos/picture ${n}.jpg`, Math.floor(((n * 7919) % 600) * 1000));

const steps = [];
let last = performance.now();
const step = (what) => {
  const now = performance.now();
  steps.push([what, now - last]);
  console.log(`${((now - last) / 1000).toFixed(2).padStart(7)} s  ${what}`);
  last = now;
};

const server = new Program([`${bin}/udpack-server`, '--web'], { cwd: `${work}/home` });
await server.line((line) => line.startsWith('web '));
// The line has the token in it on a terminal only.
const link = spawnSync(`${bin}/udpack-server`, ['url', '--web'], { cwd: `${work}/home`, encoding: 'utf8' }).stdout.trim();
step('udpack-server --web prints its link');
const browser = await launch();
last = performance.now();
const { page } = await open(browser, link);
await page.getByText('Drop files or folders here').waitFor();
step('the link is open, and the page connected');
const session = await page.context().newCDPSession(page);
for (const type of ['dragEnter', 'dragOver', 'drop']) {
  await session.send('Input.dispatchDragEvent', { type, x: 300, y: 300, data: { items: [], files: [`${work}/photos`], dragOperationsMask: 1 } });
}
await page.getByText(`${count} of ${count} files`).waitFor({ timeout: 300_000 });
step(`a folder of ${count} files is dropped, and each has its check mark`);
const [dropped, stored] = [hashes(`${work}/photos`), hashes(`${work}/home/uploads/photos`)];
const wrong = [...dropped].filter(([name, hash]) => stored.get(name) !== hash);
console.log(wrong.length === 0 && stored.size === count ? `${count} hashes on the disk are right` : `FAILED: ${wrong.length} of ${stored.size} differ`);
await browser.close();
await server.stop();
process.exit(wrong.length === 0 && stored.size === count ? 0 : 1);

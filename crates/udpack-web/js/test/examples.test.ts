/**
 * The examples with pages in a real Chromium: two pages and a Rust client each. Skipped aloud where Chromium or an example is
 * missing; with `UDPACK_BROWSER=required` that is a failure. Screenshots are left in `shots`.
 */

import assert from 'node:assert/strict';
import { type ChildProcess, spawn } from 'node:child_process';
import { createInterface, type Interface } from 'node:readline';
import { after, before, test } from 'node:test';
import { fileURLToPath } from 'node:url';
import type { Browser, Page } from 'playwright-core';
import { launch, without } from './chromium.js';

const root = fileURLToPath(new URL('../..', import.meta.url));
const repository = fileURLToPath(new URL('../../../../..', import.meta.url));
const EXAMPLES = `${process.env.CARGO_TARGET_DIR ?? `${repository}target`}/debug/examples`;
const NAMES = ['chat', 'call', 'progress'] as const;
type Name = (typeof NAMES)[number];
const skip = without(`${EXAMPLES}/browser-peer`, ...NAMES.map((name) => `${EXAMPLES}/browser-${name}`));

let browser: Browser;
const running: ChildProcess[] = [];
const uncaught: string[] = [];

before(async () => {
  if (skip) return;
  browser = await launch();
});

after(async () => {
  for (const process of running) process.kill();
  await browser?.close();
});

function run(program: string, ...args: string[]): Interface {
  const process = spawn(`${EXAMPLES}/${program}`, args, { stdio: ['ignore', 'pipe', 'inherit'] });
  running.push(process);
  return createInterface({ input: process.stdout });
}

/** An example, its first page, a second one, and what the Rust client beside them prints. */
async function start(name: Name, hashes: readonly [string, string], query = ''): Promise<{ pages: [Page, Page]; peer: () => AsyncIterableIterator<string> }> {
  const lines = run(`browser-${name}`)[Symbol.asyncIterator]();
  const { page, address, pin } = JSON.parse((await lines.next()).value as string) as { page: string; address: string; pin: string };
  const open = async (hash: string): Promise<Page> => {
    const tab = await (await browser.newContext({ viewport: { width: 900, height: 640 } })).newPage();
    tab.setDefaultTimeout(10_000);
    tab.on('pageerror', (error) => uncaught.push(`${name}: ${error}`));
    tab.on('console', (message) => message.type() === 'error' && uncaught.push(`${name}: ${message.text()}`));
    await tab.goto(`${page}${query}#${hash}`);
    await tab.getByRole('status').filter({ hasText: /^connected/ }).waitFor();
    return tab;
  };
  const pages: [Page, Page] = [await open(hashes[0]), await open(hashes[1])];
  return { pages, peer: () => run('browser-peer', name, address, pin)[Symbol.asyncIterator]() };
}

/** Light, dark, and as on a phone: for somebody to look at. */
async function shots(page: Page, name: Name): Promise<void> {
  for (const scheme of ['light', 'dark'] as const) {
    await page.emulateMedia({ colorScheme: scheme });
    await page.screenshot({ path: `${root}shots/examples-${name}-${scheme}.png` });
  }
  await page.setViewportSize({ width: 390, height: 844 });
  const wide = await page.evaluate(() => document.documentElement.scrollWidth);
  assert.ok(wide <= 390, `${name}: ${wide} pixels wide on a phone of 390`);
  await page.screenshot({ path: `${root}shots/examples-${name}-phone.png` });
}

test('chat: what one says the others hear, pages and Rust alike', { skip }, async () => {
  const { pages: [ann, bob], peer } = await start('chat', ['ann', 'bob']);
  const heard = peer();
  assert.equal((await heard.next()).value, 'rust: hello from Rust');
  await ann.getByLabel('What to say').fill('good morning, wide world');
  await ann.getByRole('button', { name: 'Say' }).click();
  await bob.getByText('ann: good morning, wide world').waitFor();
  assert.equal((await heard.next()).value, 'ann: good morning, wide world');
  await bob.getByLabel('What to say').fill('<b>größe</b>');
  await bob.getByLabel('What to say').press('Enter');
  await ann.getByText('bob: <b>größe</b>').waitFor();
  assert.equal((await heard.next()).value, 'bob: <b>größe</b>');
  assert.deepEqual(await ann.locator('#log p').allTextContents(), ['rust: hello from Rust', 'ann: good morning, wide world', 'bob: <b>größe</b>']);
  await shots(ann, 'chat');
});

test('chat: a browser without WebTransport is in the same room', { skip }, async () => {
  const { pages: [ann, bob] } = await start('chat', ['ann', 'bob']);
  await bob.addInitScript(() => void Reflect.deleteProperty(globalThis, 'WebTransport'));
  await bob.reload();
  await bob.getByRole('status').filter({ hasText: /^connected/ }).waitFor();
  await ann.getByLabel('What to say').fill('over UDP');
  await ann.getByRole('button', { name: 'Say' }).click();
  await bob.getByText('ann: over UDP').waitFor();
  await bob.getByLabel('What to say').fill('over TCP');
  await bob.getByLabel('What to say').press('Enter');
  await ann.getByText('bob: over TCP').waitFor();
});

test('call: each sees the other move, and knows what it has not seen', { skip }, async () => {
  const { pages: [ann, bob], peer } = await start('call', ['ann', 'bob'], '?synthetic');
  const seen = new Set<string>();
  for await (const line of peer()) {
    seen.add(line.split(':')[0] as string);
    if (seen.size === 2) break;
  }
  const caption = (page: Page, who: string): Promise<string> => page.locator('figcaption', { hasText: `${who}:` }).textContent() as Promise<string>;
  for (const [page, who] of [[ann, 'bob'], [bob, 'ann']] as const) {
    await page.locator('figcaption', { hasText: new RegExp(`^${who}: [1-9]\\d+ pictures, \\d+ dropped$`) }).waitFor();
    const colours = await page.locator('figure', { hasText: `${who}:` }).locator('canvas').evaluate((canvas) => {
      const { data } = ((canvas as HTMLCanvasElement).getContext('2d') as CanvasRenderingContext2D).getImageData(0, 0, 320, 240);
      return new Set(new Uint32Array(data.buffer)).size;
    });
    assert.ok(colours > 1, `${who} is one colour`);
  }
  assert.match(await caption(ann, 'ann (you)'), /^ann \(you\): \d+ pictures$/);
  await shots(ann, 'call');
});

test('progress: a job tells who asked how far it is; it can be stopped and done again', { skip }, async () => {
  const { pages: [page, other], peer } = await start('progress', ['', '']);
  const add = async (name: string): Promise<void> => {
    await page.getByLabel('Name of a job').fill(name);
    await page.getByRole('button', { name: 'Start' }).click();
  };
  await add('thumbnails of all pictures');
  await add('index');
  const [first, second] = [0, 1].map((n) => page.locator('#jobs li').nth(n)) as [ReturnType<Page['locator']>, ReturnType<Page['locator']>];
  await first.getByText(/^\d+ %, \d+ s left$/).waitFor();
  await second.getByRole('button', { name: 'Stop' }).click();
  await second.getByText('stopped').waitFor();
  await shots(page, 'progress');
  await first.getByText('done', { exact: true }).waitFor();
  assert.equal(await first.locator('progress').evaluate((bar) => (bar as HTMLProgressElement).value), 1);
  await second.getByRole('button', { name: 'Do again' }).click();
  await second.getByText(/^\d+ %, \d+ s left$/).waitFor();
  assert.equal(await other.locator('#jobs li').count(), 0);
  const lines: string[] = [];
  for await (const line of peer()) lines.push(line);
  assert.equal(lines.at(-1), '50 of 50');
  assert.ok(lines.length < 50, `${lines.length} of 50 steps are told`);
  await second.getByText('done', { exact: true }).waitFor();
});

test('nothing in any page went uncaught', { skip }, () => {
  assert.deepEqual(uncaught, []);
});

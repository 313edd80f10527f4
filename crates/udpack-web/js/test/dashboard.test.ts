/** The activity page, in a real Chromium, while programs transfer. */

import assert from 'node:assert/strict';
import { type ChildProcess, spawn } from 'node:child_process';
import { createHash } from 'node:crypto';
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { after, before, test } from 'node:test';
import type { Browser, Page } from 'playwright-core';
import { launch, without } from './chromium.js';
import { connected, LOOKS, open, shot, Site, skip as skipPages, SERVER, violations } from './pages.js';

const CLIENT = SERVER.replace(/udpack-server$/, 'udpack-client');
const skip = skipPages || without(CLIENT);
/** Generous: what must happen happens on a slow machine, too. */
const PATIENCE = { timeout: 60_000 };
const MB = 1_000_000;

let browser: Browser;
let site: Site;
let directory: string;
const running = new Set<ChildProcess>();

before(async () => {
  if (skip) return;
  directory = mkdtempSync(`${tmpdir()}/udpack-dashboard-`);
  [browser, site] = await Promise.all([launch(), Site.start({ options: ['--allow-read'] })]);
});

after(async () => {
  if (skip) return;
  for (const one of running) one.kill('SIGKILL');
  await browser.close();
  await site.stop();
  rmSync(directory, { recursive: true, force: true });
});

/** A program that transfers, and what it said when it ended. */
class Client {
  private said = '';
  private readonly process: ChildProcess;
  readonly over: Promise<{ code: number | null; said: string }>;

  constructor(server: Site, ...args: string[]) {
    this.process = spawn(CLIENT, args, { env: { ...process.env, UDPACK_URL: server.url }, stdio: ['ignore', 'pipe', 'pipe'] });
    running.add(this.process);
    for (const stream of [this.process.stdout, this.process.stderr]) stream?.on('data', (data: Buffer) => (this.said += data));
    this.over = new Promise((resolve) =>
      this.process.once('close', (code) => {
        running.delete(this.process);
        resolve({ code, said: this.said });
      }),
    );
  }

  kill(): void {
    this.process.kill('SIGKILL');
  }
}

function sample(name: string, size: number): string {
  const path = `${directory}/${name}`;
  writeFileSync(path, Buffer.alloc(size, createHash('sha256').update(name).digest()));
  return path;
}

async function activity(page: Page): Promise<void> {
  await connected(page);
  await page.getByRole('tab', { name: 'Activity' }).click();
}

/** Shows one of the lists. */
async function view(page: Page, name: string): Promise<void> {
  await page.getByRole('group', { name: 'What to show' }).getByRole('button', { name }).click();
}

/** Waits until the button of a list has this number. */
async function counted(page: Page, name: string, count: number): Promise<void> {
  await page.getByRole('button', { name: `${name} ${count}`, exact: true }).waitFor(PATIENCE);
}

/** Waits until so many programs are listed as connected; pages that were closed may be there for a while. */
async function programs(page: Page, count: number): Promise<void> {
  await page.waitForFunction((count) => [...document.querySelectorAll('.peer .detail')].filter(({ textContent }) => textContent?.includes('udpack-client')).length === count, count, PATIENCE);
}

test('twenty uploads are shown as they move, and the figures are those of what was sent', { skip }, async () => {
  const CLIENTS = 20;
  const SIZE = 8 * MB;
  // All are open before anything moves: that takes a slow machine long.
  const looks = Object.keys(LOOKS) as (keyof typeof LOOKS)[];
  const opened = await Promise.all(looks.map(async (look) => ({ look, ...(await open(browser, site.linkFor('read,write,admin'), LOOKS[look])) })));
  for (const { page, look } of opened) {
    await activity(page);
    await page.getByText('Nothing is being transferred.').waitFor(PATIENCE);
    assert.deepEqual(await violations(page), [], look);
  }
  const { page } = opened[0] as (typeof opened)[0];
  await shot(page, 'activity-empty-light');
  // Slow enough to be looked at while they run.
  const clients = Array.from({ length: CLIENTS }, (_, n) => new Client(site, 'put', '--bwlimit', '300k', sample(`camera ${n + 1}.mp4`, SIZE), '--as', `cameras/${n + 1}/recording.mp4`));
  await counted(page, 'Transfers', CLIENTS);
  await page.locator('.tile', { hasText: 'Connections' }).locator('.value', { hasText: `${CLIENTS + opened.length}` }).waitFor(PATIENCE);
  await page.locator('.job .detail', { hasText: /^receiving · [1-9]\d? %/ }).first().waitFor(PATIENCE);
  await page.locator('.job .sums', { hasText: /kB\/s.*left/ }).first().waitFor(PATIENCE);
  await page.locator('.key.first .figure', { hasText: /[1-9].* MB\/s/ }).waitFor(PATIENCE);
  for (const { page, look } of opened) {
    await shot(page, `activity-uploads-${look}`);
    assert.deepEqual(await violations(page), [], look);
    assert.ok(await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth), 'nothing is cut off at the right');
  }
  for (const { page, look } of opened) {
    await view(page, 'Connections');
    await page.locator('.peer', { hasText: 'this page' }).waitFor(PATIENCE);
    await shot(page, `activity-sockets-${look}`);
    assert.deepEqual(await violations(page), [], look);
  }
  for (const { code, said } of await Promise.all(clients.map(({ over }) => over))) assert.equal(code, 0, said);
  await counted(page, 'Transfers', 0);
  await counted(page, 'Ended', CLIENTS);
  await programs(page, 0);
  const stored = page.locator('.tile', { hasText: 'Stored' });
  assert.equal(await stored.locator('.value').textContent(), '160 MB');
  assert.equal(await stored.locator('.note').textContent(), '20 files');
  await view(page, 'Ended');
  await page.locator('.end[data-state=done] .detail', { hasText: /^Upload · stored · .* · took/ }).first().waitFor(PATIENCE);
  await page.locator('.key.first .figure', { hasText: /^0 B\/s$/ }).waitFor(PATIENCE);
  for (const { context, clean } of opened) {
    clean();
    await context.close();
  }
});

test('a cancel reaches the program with its reason, a failure is shown with its code', { skip }, async () => {
  const { page, context, clean } = await open(browser, site.linkFor('read,write,admin'));
  await activity(page);
  const client = new Client(site, 'put', '--bwlimit', '200k', sample('large.iso', 30 * MB));
  const row = page.locator('.job', { hasText: 'large.iso' });
  await row.waitFor(PATIENCE);
  await row.getByRole('button', { name: 'Cancel large.iso' }).click();
  const dialog = page.getByRole('dialog');
  assert.deepEqual(await violations(page), []);
  await dialog.getByLabel('Reason').fill('too large for today');
  await shot(page, 'activity-cancel-light');
  await dialog.getByRole('button', { name: 'Cancel transfer' }).click();
  const { code, said } = await client.over;
  assert.notEqual(code, 0);
  assert.match(said, /cancelled at the server: too large for today/);
  await view(page, 'Ended');
  await page.locator('.end[data-state=cancelled]', { hasText: 'too large for today' }).waitFor(PATIENCE);
  // One that fails: the name is taken by something else.
  const first = await new Client(site, 'put', sample('taken', 10), '--as', 'taken').over;
  assert.equal(first.code, 0, first.said);
  await new Client(site, 'put', sample('other', 11), '--as', 'taken').over;
  const failed = page.locator('.end[data-state=failed]', { hasText: 'exists' });
  await failed.waitFor(PATIENCE);
  await failed.getByRole('button', { name: 'Details of taken' }).click();
  await page.getByRole('dialog').getByText(/failed · exists/).waitFor(PATIENCE);
  await page.keyboard.press('Escape');
  assert.deepEqual(await violations(page), []);
  await shot(page, 'activity-ended-light');
  clean();
  await context.close();
});

test('a program that sends nothing is shown as stalled, and can be disconnected', { skip }, async () => {
  const { page, context, clean } = await open(browser, site.linkFor('read,write,admin'));
  await activity(page);
  const client = new Client(site, 'put', '--bwlimit', '1k', '--retries', '0', sample('slow.bin', 5 * MB));
  await page.locator('.job', { hasText: 'slow.bin' }).waitFor(PATIENCE);
  await view(page, 'Connections');
  const peer = page.locator('.peer', { hasText: 'udpack-client' });
  await peer.waitFor(PATIENCE);
  // By the keyboard alone.
  await peer.focus();
  await page.keyboard.press('Delete');
  await page.getByRole('dialog').getByLabel('Reason').fill('maintenance');
  await shot(page, 'activity-kick-light');
  await page.keyboard.press('Tab');
  await page.keyboard.press('Tab');
  await page.keyboard.press('Enter');
  const { code, said } = await client.over;
  assert.notEqual(code, 0);
  assert.match(said, /closed by an operator: maintenance/);
  await programs(page, 0);
  clean();
  await context.close();
});

test('who may only watch sees the same, and has no button that changes anything', { skip }, async () => {
  const { page, context, clean } = await open(browser, site.linkFor('watch'), { ...LOOKS.light });
  await connected(page);
  const client = new Client(site, 'put', '--bwlimit', '200k', sample('watched.bin', 20 * MB));
  await page.locator('.job', { hasText: 'watched.bin' }).waitFor(PATIENCE);
  await page.getByText('Read only').waitFor(PATIENCE);
  // What moved before the page was there is in the chart at once: the server has been running for longer.
  await page.waitForFunction(() => (document.querySelector('.plot .line.first')?.getAttribute('d') ?? '').split('L').length > 20, undefined, PATIENCE);
  for (const name of [/^Cancel/, /^Disconnect/, /^Shut down/]) assert.equal(await page.getByRole('button', { name }).count(), 0, `${name}`);
  await view(page, 'Connections');
  await page.locator('.peer', { hasText: 'udpack-client' }).focus();
  await page.keyboard.press('Delete');
  assert.equal(await page.getByRole('dialog').count(), 0);
  assert.equal(await page.getByRole('button', { name: /^Disconnect/ }).count(), 0);
  assert.equal(await page.getByRole('tab').count(), 0, 'there is nothing but activity');
  assert.deepEqual(await violations(page), []);
  await shot(page, 'activity-read-only-light');
  client.kill();
  await client.over;
  clean();
  await context.close();
});

test('who may not watch has no such page', { skip }, async () => {
  const { page, context, clean } = await open(browser, site.linkFor('read,write'));
  await connected(page);
  assert.deepEqual(await page.getByRole('tab').allTextContents(), ['Upload', 'Files']);
  clean();
  await context.close();
});

test('thousands of ended transfers leave the page quick', { skip }, async () => {
  const { page, context, clean } = await open(browser, site.linkFor('read,write,admin'));
  await activity(page);
  await view(page, 'Ended');
  const tree = `${directory}/many`;
  mkdirSync(tree);
  for (let n = 0; n < 3000; n += 1) writeFileSync(`${tree}/${n}`, `${n}`);
  // The longest task while thousands of ends come.
  await page.evaluate(() => {
    const seen = { longest: 0 };
    Object.assign(globalThis, { seen });
    new PerformanceObserver((list) => list.getEntries().forEach(({ duration }) => (seen.longest = Math.max(seen.longest, duration)))).observe({ entryTypes: ['longtask'] });
  });
  const { code, said } = await new Client(site, 'put', tree, '--as', 'many').over;
  assert.equal(code, 0, said);
  await counted(page, 'Transfers', 0);
  await page.getByRole('button', { name: 'Ended 1,000', exact: true }).waitFor(PATIENCE);
  assert.ok((await page.locator('.row').count()) < 60, 'rows only for what is seen');
  // Said, not asserted: it is a matter of the machine.
  console.log(`the longest task took ${await page.evaluate(() => (globalThis as unknown as { seen: { longest: number } }).seen.longest)} ms`);
  clean();
  await context.close();
});

test('a shutdown is asked for twice, announced, and carried out in order', { skip }, async () => {
  const other = await Site.start();
  const { page, context } = await open(browser, other.linkFor('admin'), { ...LOOKS.light, locale: 'zh-CN' });
  await connected(page);
  await page.getByRole('button', { name: '关闭服务器…' }).click();
  assert.deepEqual(await violations(page), []);
  await shot(page, 'activity-drain-zh-light');
  await page.getByRole('dialog').getByRole('button', { name: '关闭服务器', exact: true }).click();
  assert.equal(await other.ended, 0);
  await context.close();
  await other.stop();
});

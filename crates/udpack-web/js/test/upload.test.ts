/** The upload page, in a real Chromium: what people do to it, and what is on the server's disk then. */

import assert from 'node:assert/strict';
import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { after, before, test } from 'node:test';
import type { Browser, FileChooser, Page } from 'playwright-core';
import { launch } from './chromium.js';
import { connected, drop, LOOKS, open, shot, Site, skip, violations } from './pages.js';

/** BLAKE3 of `words`. */
const WORDS = '073acf80c9f552574db02fad710110d3b1cb06724ee70e3bfb8bb33a5d803ea1';

let browser: Browser;
let site: Site;
/** A server that takes 12 MB a second, so that something can happen on the way. */
let slow: Site;
let here: string;

before(async () => {
  if (skip) return;
  here = mkdtempSync(`${tmpdir()}/udpack-pages-`);
  [browser, site, slow] = await Promise.all([launch(), Site.start({ options: ['--allow-read', '--overwrite', 'always'] }), Site.start({ options: ['--bwlimit', '12M'] })]);
});

after(async () => {
  if (skip) return;
  await browser.close();
  await site.stop();
  await slow.stop();
  rmSync(here, { recursive: true, force: true });
});

/** Bytes that differ from file to file and within each. */
function content(size: number, seed: number): Buffer {
  const bytes = Buffer.alloc(size);
  for (let at = 0, x = seed + 1; at < size; at += 1) {
    x = (x * 1103515245 + 12345) & 0x7fffffff;
    bytes[at] = x >> 16;
  }
  return bytes;
}

function write(path: string, bytes: Buffer): string {
  mkdirSync(path.slice(0, path.lastIndexOf('/')), { recursive: true });
  writeFileSync(path, bytes);
  return path;
}

/** What is stored, by path: all below a directory of the server. */
function stored(directory: string): Map<string, Buffer> {
  const root = `${site.files}/${directory}`;
  const files = readdirSync(root, { recursive: true, withFileTypes: true }).filter((entry) => entry.isFile());
  return new Map(files.map(({ parentPath, name }) => [`${parentPath}/${name}`.slice(root.length + 1), readFileSync(`${parentPath}/${name}`)]));
}

async function state(page: Page, name: string, wanted: string): Promise<void> {
  await page.locator(`.row.file[data-state=${wanted}]`, { has: page.locator(`.name[title="${name}"]`) }).waitFor({ timeout: 30_000 });
}

test('a folder of 300 files is dropped, and all of them are on the disk', { skip }, async () => {
  const files = new Map<string, Buffer>();
  for (let n = 0; n < 300; n += 1) {
    const path = `${n % 7}/größe ${n}.bin`;
    files.set(path, content(n === 0 ? 3_000_000 : 40 * n, n));
    write(`${here}/folder/${path}`, files.get(path) as Buffer);
  }
  const { page, context, clean } = await open(browser, site.link);
  await connected(page);
  await shot(page, 'upload-empty-light');
  assert.deepEqual(await violations(page), []);
  await drop(page, `${here}/folder`);
  await page.getByText('300 of 300 files').waitFor({ timeout: 60_000 });
  await shot(page, 'upload-done-light');
  assert.deepEqual(await violations(page), []);
  const got = stored('folder');
  assert.deepEqual([...got.keys()].sort(), [...files.keys()].sort());
  for (const [path, bytes] of files) assert.ok(got.get(path)?.equals(bytes), path);
  assert.ok((await page.locator('.row.file').count()) < 40);
  clean();
  await context.close();
});

/** Waits until the bar of the first file that has one is not empty: something is durable. */
async function durable(page: Page): Promise<void> {
  await page.waitForFunction(() => [...document.querySelectorAll('.row.file [role=progressbar]')].some((bar) => Number(bar.getAttribute('aria-valuenow')) >= 1), undefined, { timeout: 30_000 });
}

test('a browser without WebTransport uploads all the same, and is told that it is over TCP', { skip }, async () => {
  const { page, context, clean } = await open(browser, 'about:blank');
  await page.addInitScript(() => void Reflect.deleteProperty(globalThis, 'WebTransport'));
  await page.goto(site.link);
  await connected(page);
  assert.equal(await page.locator('.state').textContent(), 'Connected over TCP');
  const bytes = content(3 << 20, 77);
  await drop(page, write(`${here}/over-tcp.bin`, bytes));
  await state(page, 'over-tcp.bin', 'done');
  assert.ok(readFileSync(`${site.files}/over-tcp.bin`).equals(bytes));
  assert.deepEqual(await violations(page), []);
  await shot(page, 'upload-tcp-light');
  clean();
  await context.close();
});

test('an upload that a reload breaks off goes on when the file is dropped again', { skip }, async () => {
  const bytes = content(30_000_000, 7);
  const path = write(`${here}/again/long.bin`, bytes);
  const { page, context, clean } = await open(browser, slow.link);
  // As in browsers without handles of files.
  await page.addInitScript(() => Object.assign(DataTransferItem.prototype, { getAsFileSystemHandle: undefined }));
  await page.reload();
  await connected(page);
  page.on('dialog', (dialog) => void dialog.accept());
  await drop(page, path);
  await durable(page);
  assert.match(await page.title(), /^\d+ % · udpack$/);
  await page.reload();
  await connected(page);
  const banner = page.locator('.banner', { hasText: '1 upload was interrupted: long.bin' });
  await banner.waitFor();
  assert.deepEqual(await violations(page), []);
  await shot(page, 'upload-interrupted-light');
  assert.equal(await page.locator('.row.file').count(), 1);
  await drop(page, path);
  await state(page, 'long.bin', 'done');
  assert.equal(await page.locator('.row.file').count(), 1);
  assert.equal(await banner.isHidden(), true);
  assert.ok(readFileSync(`${slow.files}/long.bin`).equals(bytes));
  clean();
  await context.close();
});

test('an upload that a reload breaks off goes on by itself where the browser keeps handles', { skip }, async () => {
  const bytes = content(30_000_000, 8);
  const { page, context, clean } = await open(browser, slow.link);
  await connected(page);
  const warnings: string[] = [];
  page.on('dialog', (dialog) => (warnings.push(dialog.type()), void dialog.accept()));
  await page.mouse.click(5, 400);
  await drop(page, write(`${here}/kept/kept.bin`, bytes), write(`${here}/kept/small.bin`, content(500, 1)));
  await durable(page);
  await page.reload();
  assert.deepEqual(warnings, ['beforeunload']);
  await connected(page);
  await state(page, 'kept.bin', 'done');
  assert.ok(readFileSync(`${slow.files}/kept.bin`).equals(bytes));
  // What is done is not remembered.
  await page.reload();
  await connected(page);
  assert.equal(await page.locator('.row.file').count(), 0);
  clean();
  await context.close();
});

test('a file that is paused goes on, and one that is cancelled leaves nothing at the server', { skip }, async () => {
  const bytes = content(60_000_000, 9);
  const path = write(`${here}/given/up.bin`, bytes);
  const { page, context, clean } = await open(browser, slow.link);
  await connected(page);
  await drop(page, path);
  await state(page, 'up.bin', 'sending');
  await durable(page);
  await page.getByRole('button', { name: 'Pause up.bin' }).click();
  await state(page, 'up.bin', 'paused');
  await shot(page, 'upload-paused-light');
  await page.getByRole('button', { name: 'Cancel up.bin' }).click();
  await state(page, 'up.bin', 'cancelled');
  assert.equal(slow.interrupted(), '');
  assert.equal(existsSync(`${slow.files}/up.bin`), false);
  await page.getByRole('button', { name: 'Retry up.bin' }).click();
  await page.getByRole('button', { name: 'Pause all' }).click();
  await state(page, 'up.bin', 'paused');
  await page.getByRole('button', { name: 'Resume all' }).click();
  await state(page, 'up.bin', 'done');
  assert.ok(readFileSync(`${slow.files}/up.bin`).equals(bytes));
  clean();
  await context.close();
});

test('of names that are taken the reader decides, for one or for all', { skip }, async () => {
  const names = ['a.txt', 'b.txt', 'c.txt', 'd.txt'];
  for (const name of names) write(`${site.files}/taken/${name}`, Buffer.from(`old ${name}`));
  for (const name of names) write(`${here}/taken/${name}`, Buffer.from(`new and longer ${name}`));
  const { page, context, clean } = await open(browser, site.linkFor('read,write,delete'));
  await connected(page);
  await drop(page, `${here}/taken`);
  const dialog = page.getByRole('dialog');
  const title = async (): Promise<string> => (await dialog.getByRole('heading').textContent()) ?? '';
  await dialog.waitFor();
  assert.deepEqual(await violations(page), []);
  await shot(page, 'conflict-light');
  const first = (await title()).split(' ')[0] as string;
  assert.ok(names.includes(first), first);
  await dialog.getByRole('button', { name: 'Replace' }).click();
  await page.waitForFunction((first) => document.querySelector('dialog h2')?.textContent?.startsWith(first) === false, first);
  const second = (await title()).split(' ')[0] as string;
  await dialog.getByRole('button', { name: 'Keep both' }).click();
  await page.waitForFunction((second) => document.querySelector('dialog h2')?.textContent?.startsWith(second) === false, second);
  await dialog.getByLabel('Do the same for all').check();
  await dialog.getByRole('button', { name: 'Skip' }).click();
  const rest = names.filter((name) => name !== first && name !== second);
  for (const name of rest) await state(page, `taken/${name}`, 'skipped');
  await state(page, `taken/${first}`, 'done');
  await state(page, `taken/${second}`, 'done');
  const got = stored('taken');
  assert.equal(`${got.get(first)}`, `new and longer ${first}`);
  assert.equal(`${got.get(second)}`, `old ${second}`);
  assert.equal(`${got.get(second.replace('.txt', ' (1).txt'))}`, `new and longer ${second}`);
  for (const name of rest) assert.equal(`${got.get(name)}`, `old ${name}`);
  assert.equal(got.size, 5);
  clean();
  await context.close();
});

test('what the server does not allow is not offered again', { skip }, async () => {
  const renames = await Site.start({ options: ['--overwrite', 'rename'] });
  write(`${renames.files}/mine.txt`, Buffer.from('old'));
  const path = write(`${here}/mine.txt`, Buffer.from('newer'));
  const { page, context, clean } = await open(browser, renames.link);
  await connected(page);
  await drop(page, path);
  const dialog = page.getByRole('dialog');
  await dialog.getByRole('button', { name: 'Replace' }).click();
  await dialog.getByText('does not allow').waitFor();
  assert.equal(await dialog.getByRole('button', { name: 'Replace' }).isDisabled(), true);
  await dialog.getByRole('button', { name: 'Keep both' }).click();
  await state(page, 'mine.txt', 'done');
  assert.equal(readFileSync(`${renames.files}/mine.txt`, 'utf8'), 'old');
  assert.equal(readFileSync(`${renames.files}/mine (1).txt`, 'utf8'), 'newer');
  clean();
  await context.close();
  await renames.stop();
});

test('a picture is pasted, and its check mark shows the hash', { skip }, async () => {
  const { page, context, clean } = await open(browser, site.link);
  await connected(page);
  await page.evaluate(() => {
    const transfer = new DataTransfer();
    transfer.items.add(new File(['no picture'], 'image.png', { type: 'image/png' }));
    transfer.items.add(new File(['words'], 'words.txt'));
    dispatchEvent(new ClipboardEvent('paste', { clipboardData: transfer, cancelable: true }));
  });
  await page.getByText('2 of 2 files').waitFor({ timeout: 30_000 });
  const pasted = readdirSync(site.files).filter((name) => /^pasted \d{4}-\d\d-\d\d \d\d\.\d\d\.\d\d\.png$/.test(name));
  assert.equal(pasted.length, 1);
  assert.equal(readFileSync(`${site.files}/words.txt`, 'utf8'), 'words');
  await page.getByRole('button', { name: 'words.txt: stored and checked' }).click();
  await page.getByRole('dialog').getByText(WORDS).waitFor();
  assert.deepEqual(await violations(page), []);
  await shot(page, 'hash-light');
  clean();
  await context.close();
});

test('the keyboard alone uploads, moves in the list, cancels, and sees the hash', { skip }, async () => {
  write(`${here}/keys/1.txt`, Buffer.from('one'));
  write(`${here}/keys/2.txt`, Buffer.from('two'));
  const { page, context, clean } = await open(browser, site.link);
  await connected(page);
  await page.evaluate(() => Object.assign(globalThis, { showOpenFilePicker: undefined }));
  // Early: the browser must have been told to hold choosers back before Enter opens one.
  const chooser = new Promise<FileChooser>((resolve) => page.once('filechooser', resolve));
  const focused = (): Promise<string> => page.evaluate(() => `${document.activeElement?.getAttribute('aria-label') ?? document.activeElement?.textContent}`);
  for (let n = 0; n < 12 && (await focused()) !== 'Choose files'; n += 1) await page.keyboard.press('Tab');
  await page.keyboard.press('Enter');
  await (await chooser).setFiles([`${here}/keys/1.txt`, `${here}/keys/2.txt`]);
  await page.getByText('2 of 2 files').waitFor({ timeout: 30_000 });
  for (let n = 0; n < 12 && !(await page.evaluate(() => document.activeElement?.matches('.row'))); n += 1) await page.keyboard.press('Tab');
  await page.keyboard.press('ArrowDown');
  assert.equal(await page.evaluate(() => document.activeElement?.querySelector('.name')?.textContent), '2.txt');
  await page.keyboard.press('Enter');
  await page.getByRole('dialog', { name: '2.txt is stored' }).waitFor();
  await page.keyboard.press('Escape');
  await page.getByRole('dialog').waitFor({ state: 'detached' });
  assert.equal(await page.evaluate(() => document.activeElement?.querySelector('.name')?.textContent), '2.txt');
  await page.keyboard.press('Delete');
  await page.getByText('1 of 1 file').waitFor();
  clean();
  await context.close();
});

test('a full disk and a bad name say which file it was, and what to do', { skip }, async (t) => {
  // A small file system of the server's own, in a namespace of its own.
  const script = 'mkdir uploads && mount -t tmpfs -o size=6m tmpfs uploads && exec "$@"';
  const around = ['unshare', '--user', '--map-root-user', '--mount', 'sh', '-c', script, 'sh', '{}'];
  let full: Site;
  try {
    full = await Site.start({ around, options: ['--min-free', '0', '--names', 'portable'] });
  } catch (error) {
    return t.skip(`SKIPPED: no file system of one's own here: ${error}`);
  }
  try {
    const { page, context } = await open(browser, full.link);
    await connected(page);
    await drop(page, write(`${here}/full/large.bin`, content(20_000_000, 3)), write(`${here}/full/small.bin`, content(1000, 4)), write(`${here}/full/what?: .txt`, Buffer.from('x')));
    await state(page, 'large.bin', 'failed');
    await state(page, 'small.bin', 'done');
    await state(page, 'what?: .txt', 'failed');
    const alert = page.getByRole('alert');
    assert.match((await alert.textContent()) ?? '', /2 files were not stored.*large\.bin: The disk of the server is full\. Ask the operator for room, then retry\./);
    assert.match((await page.locator('.row.file[data-state=failed]').nth(1).textContent()) ?? '', /does not store files of this name\. Rename it and drop it again\./);
    assert.deepEqual(await violations(page), []);
    await shot(page, 'upload-full-light');
    await alert.getByRole('button', { name: 'Show' }).click();
    await page.keyboard.press('Enter');
    await page.getByRole('dialog').getByRole('button', { name: 'Retry' }).waitFor();
    await shot(page, 'failure-light');
    await context.close();
  } finally {
    await full.stop();
  }
});

test('5,000 files have few elements, and few updates', { skip }, async () => {
  const { page, context, clean } = await open(browser, site.link);
  await connected(page);
  const got = await page.evaluate(async () => {
    const list = document.querySelector('.list') as HTMLElement;
    const figures = document.querySelector('.figures') as HTMLElement;
    let updates = 0;
    let most = 0;
    new MutationObserver(() => (updates += 1)).observe(figures, { childList: true, characterData: true, subtree: true });
    new MutationObserver(() => (most = Math.max(most, list.querySelectorAll('.row').length))).observe(list, { childList: true, subtree: true });
    const transfer = new DataTransfer();
    for (let n = 0; n < 5000; n += 1) transfer.items.add(new File([`content ${n}`], `many-${n}.txt`));
    const begun = performance.now();
    dispatchEvent(new ClipboardEvent('paste', { clipboardData: transfer, cancelable: true }));
    while (!figures.textContent?.startsWith('5000 of 5000')) await new Promise((resolve) => setTimeout(resolve, 100));
    return { updates, most, seconds: (performance.now() - begun) / 1000 };
  });
  assert.ok(got.most > 5 && got.most < 40, `${got.most} rows`);
  assert.ok(got.updates <= got.seconds * 4 + 2, `${got.updates} updates in ${got.seconds} s`);
  for (let n = 0; n < 5000; n += 1) assert.equal(readFileSync(`${site.files}/many-${n}.txt`, 'utf8'), `content ${n}`);
  clean();
  await context.close();
});

for (const [look, options] of Object.entries(LOOKS)) {
  test(`nothing is in the way of a screen reader, ${look}, in the midst of an upload`, { skip }, async () => {
    const { page, context, clean } = await open(browser, slow.link, { ...options, ...(look === 'phone' && { locale: 'zh-CN' }) });
    await connected(page);
    await shot(page, `upload-empty-${look}`);
    assert.deepEqual(await violations(page), []);
    const files = [1, 2, 3, 4, 5, 6].map((n) => write(`${here}/looks/holiday in the mountains ${n}.${look}.mov`, content(n === 3 ? 30_000_000 : 30_000 * n, n)));
    await drop(page, ...files);
    await durable(page);
    await shot(page, `upload-busy-${look}`);
    assert.deepEqual(await violations(page), []);
    await page.locator('.row.file[data-state=done]').nth(5).waitFor({ timeout: 60_000 });
    clean();
    await context.close();
  });
}

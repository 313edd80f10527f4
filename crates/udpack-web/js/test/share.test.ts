/** Drop links, in real Chromiums: one makes a link, others come with it. */

import assert from 'node:assert/strict';
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { after, before, test } from 'node:test';
import type { Browser, Locator, Page } from 'playwright-core';
import decodeQR from 'qr/decode.js';
import { launch } from './chromium.js';
import { connected, drop, LOOKS, open, shot, Site, skip, violations } from './pages.js';

let browser: Browser;
let site: Site;
let here: string;

before(async () => {
  if (skip) return;
  here = mkdtempSync(`${tmpdir()}/udpack-share-`);
  [browser, site] = await Promise.all([launch(), Site.start()]);
  mkdirSync(`${site.files}/photos`, { recursive: true });
  writeFileSync(`${site.files}/photos/ours.txt`, 'ours');
  writeFileSync(`${here}/small.bin`, Buffer.alloc(10_000, 'udpack'));
  writeFileSync(`${here}/large.bin`, Buffer.alloc(3_000_000, 'udpack'));
});

after(async () => {
  if (skip) return;
  await browser.close();
  await site.stop();
  rmSync(here, { recursive: true, force: true });
});

/** Opens the dialog of drop links, for the folder that is shown. */
async function dialogOf(page: Page): Promise<Locator> {
  await page.getByRole('tab', { name: 'Files' }).click();
  await page.getByRole('button', { name: 'Drop link' }).click();
  const dialog = page.getByRole('dialog');
  await dialog.waitFor();
  return dialog;
}

/** Makes the link that the dialog says. */
async function made(page: Page, dialog: Locator): Promise<string> {
  await dialog.getByRole('button', { name: 'Make the link' }).click();
  const ready = page.getByRole('dialog', { name: 'The drop link is ready' });
  await ready.getByRole('img', { name: 'QR code' }).waitFor();
  return ready.getByRole('textbox', { name: 'Link' }).inputValue();
}

/** What a camera reads from the picture. */
async function pictured(page: Page): Promise<string> {
  const code = await page.getByRole('img', { name: 'QR code' }).evaluate((svg) => {
    const size = Number(svg.getAttribute('viewBox')?.split(' ')[2]);
    const dots = [...(svg.querySelector('path')?.getAttribute('d') ?? '').matchAll(/M(\d+) (\d+)/g)].map(([, x, y]) => [Number(x), Number(y)]);
    return { size, dots };
  });
  const scale = 8;
  const data = new Uint8Array(code.size * code.size * scale * scale * 4).fill(255);
  for (const [x, y] of code.dots as [number, number][]) {
    for (let n = 0; n < scale * scale; n += 1) {
      const at = ((y * scale + Math.floor(n / scale)) * code.size * scale + x * scale + (n % scale)) * 4;
      data.fill(0, at, at + 3);
    }
  }
  return decodeQR({ width: code.size * scale, height: code.size * scale, data });
}

async function state(page: Page, name: string, wanted: string): Promise<void> {
  await page.locator(`.row.file[data-state=${wanted}]`, { has: page.locator(`.name[title="${name}"]`) }).waitFor({ timeout: 30_000 });
}

test('a link takes the files of another browser into its folder, up to its quota, until it is revoked', { skip }, async () => {
  const maker = await open(browser, site.linkFor('read,write,share'));
  const { page } = maker;
  await connected(page);
  const dialog = await dialogOf(page);
  await dialog.getByLabel('Folder that uploads go to').fill('/photos/from friends/');
  await dialog.getByLabel('Room, in MB').fill('1');
  await dialog.getByLabel('Valid for').selectOption({ label: '1 week' });
  assert.deepEqual(await violations(page), []);
  await shot(page, 'share-light');
  const link = await made(page, dialog);
  assert.deepEqual(await violations(page), []);
  await shot(page, 'share-done-light');
  assert.match(link, /^http:\/\/127\.0\.0\.1:\d+\/#t=[\w-]{43}$/);
  assert.equal(await pictured(page), link);
  await page.keyboard.press('Escape');

  const visitor = await open(browser, link);
  await connected(visitor.page);
  assert.equal(await visitor.page.getByRole('tab').count(), 0, 'uploads only');
  await drop(visitor.page, `${here}/small.bin`);
  await state(visitor.page, 'small.bin', 'done');
  assert.deepEqual(readFileSync(`${site.files}/photos/from friends/small.bin`), readFileSync(`${here}/small.bin`));
  await drop(visitor.page, `${here}/large.bin`);
  await state(visitor.page, 'large.bin', 'failed');
  await visitor.page.locator('.banner.bad').getByText('large.bin').waitFor();
  assert.deepEqual(await violations(visitor.page), []);
  await shot(visitor.page, 'share-quota-light');

  await dialogOf(page);
  await page.getByRole('list', { name: 'Links that are valid now' }).getByText('photos/from friends').waitFor();
  assert.deepEqual(await violations(page), []);
  await shot(page, 'share-links-light');
  await page.getByRole('button', { name: 'Revoke the link to photos/from friends' }).click();
  await page.getByText('The link is revoked.').waitFor();
  await visitor.page.getByText('This link is not valid any more').waitFor({ timeout: 30_000 });
  maker.clean();
  await maker.context.close();
  await visitor.context.close();
});

test('a link for one browser is for the first, which may load its page again', { skip }, async () => {
  const maker = await open(browser, site.linkFor('read,write,share'), LOOKS.dark);
  const { page } = maker;
  await connected(page);
  const dialog = await dialogOf(page);
  await dialog.getByLabel('Only for the first browser').check();
  await dialog.getByLabel('list and download, too').check();
  await shot(page, 'share-dark');
  const link = await made(page, dialog);
  await shot(page, 'share-done-dark');
  assert.match(link, /#t=once~[\w-]{43}$/);

  const first = await open(browser, link);
  await connected(first.page);
  await first.page.getByRole('tab', { name: 'Files' }).click();
  await first.page.getByRole('button', { name: 'photos', exact: true }).waitFor();
  const second = await open(browser, link, LOOKS.phone);
  await second.page.getByText('has been used in another one').waitFor();
  assert.deepEqual(await violations(second.page), []);
  await shot(second.page, 'share-used-phone');
  await first.page.reload();
  await connected(first.page);
  // The link itself, in the same tab.
  await first.page.goto('about:blank');
  await first.page.goto(link);
  await connected(first.page);
  maker.clean();
  for (const { context } of [maker, first, second]) await context.close();
});

test('a token that may make no links is offered none', { skip }, async () => {
  const { page, context, clean } = await open(browser, site.linkFor('read,write'));
  await connected(page);
  await page.getByRole('tab', { name: 'Files' }).click();
  await page.locator('.entry').first().waitFor();
  assert.equal(await page.getByRole('button', { name: 'Drop link' }).count(), 0);
  clean();
  await context.close();
});

test('the dialog of drop links fits a telephone', { skip }, async () => {
  const { page, context, clean } = await open(browser, site.linkFor('read,write,share'), LOOKS.phone);
  await connected(page);
  const dialog = await dialogOf(page);
  assert.deepEqual(await violations(page), []);
  await shot(page, 'share-phone');
  await made(page, dialog);
  assert.deepEqual(await violations(page), []);
  await shot(page, 'share-done-phone');
  clean();
  await context.close();
});

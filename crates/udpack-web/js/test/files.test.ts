/** The files page, in a real Chromium: directories, downloads, images. */

import assert from 'node:assert/strict';
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { after, before, test } from 'node:test';
import type { Browser, Page } from 'playwright-core';
import { launch } from './chromium.js';
import { connected, LOOKS, open, shot, Site, skip, violations } from './pages.js';

/** A picture of 1 × 1. */
const PIXEL = Buffer.from('iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==', 'base64');

let browser: Browser;
let site: Site;

before(async () => {
  if (skip) return;
  [browser, site] = await Promise.all([launch(), Site.start({ options: ['--allow-read'] })]);
  for (const directory of ['photos/2025', 'many', 'empty']) mkdirSync(`${site.files}/${directory}`, { recursive: true });
  writeFileSync(`${site.files}/file 10.txt`, 'ten');
  writeFileSync(`${site.files}/file 9.txt`, 'nine, and more than ten');
  writeFileSync(`${site.files}/größe.bin`, Buffer.alloc(5_000_000, 'udpack'));
  writeFileSync(`${site.files}/photos/pixel.png`, PIXEL);
  writeFileSync(`${site.files}/photos/broken.png`, 'no image');
  for (let n = 0; n < 9000; n += 1) writeFileSync(`${site.files}/many/${n}.txt`, '');
});

after(async () => {
  if (skip) return;
  await browser.close();
  await site.stop();
});

async function files(page: Page): Promise<void> {
  await connected(page);
  await page.getByRole('tab').nth(1).click();
  await page.locator('.entry').first().waitFor();
}

function names(page: Page): Promise<string[]> {
  return page.locator('.entry .name > .name').allTextContents();
}

test('a directory is listed, sorted as people sort, and its directories open', { skip }, async () => {
  const { page, context, clean } = await open(browser, site.link);
  await files(page);
  assert.deepEqual(await names(page), ['empty', 'many', 'photos', 'file 9.txt', 'file 10.txt', 'größe.bin']);
  await page.getByRole('button', { name: 'Size' }).click();
  assert.deepEqual((await names(page)).slice(3), ['größe.bin', 'file 9.txt', 'file 10.txt']);
  assert.equal(await page.getByRole('columnheader', { name: 'Size' }).getAttribute('aria-sort'), 'descending');
  await page.getByRole('button', { name: 'photos', exact: true }).click();
  await page.getByRole('button', { name: '2025', exact: true }).waitFor();
  await page.getByRole('button', { name: '2025', exact: true }).click();
  await page.getByText('nothing in this folder').waitFor();
  assert.deepEqual(await violations(page), []);
  await page.goBack();
  await page.getByRole('button', { name: '2025', exact: true }).waitFor();
  await page.getByRole('button', { name: 'All files' }).click();
  await page.getByRole('button', { name: 'many', exact: true }).waitFor();
  clean();
  await context.close();
});

test('9,000 files have few elements, and the keyboard reaches the last', { skip }, async () => {
  const { page, context, clean } = await open(browser, site.link);
  await files(page);
  await page.getByRole('button', { name: 'many', exact: true }).click();
  await page.getByText('9,000 entries').waitFor();
  assert.ok((await page.locator('.entry').count()) < 50);
  await page.locator('.entry').first().focus();
  await page.keyboard.press('End');
  assert.equal(await page.evaluate(() => document.activeElement?.querySelector('.name > .name')?.textContent), '8999.txt');
  assert.equal(await page.evaluate(() => document.activeElement?.getAttribute('aria-rowindex')), '9001');
  assert.ok((await page.locator('.entry').count()) < 50);
  clean();
  await context.close();
});

test('a file is downloaded by way of the browser, and to disk where the browser lets pages write', { skip }, async () => {
  const { page, context, clean } = await open(browser, site.link);
  await files(page);
  await page.evaluate(() => Object.assign(globalThis, { showSaveFilePicker: undefined }));
  const coming = page.waitForEvent('download');
  await page.locator('.entry').last().getByRole('button', { name: 'Download größe.bin' }).last().click();
  const download = await coming;
  assert.equal(download.suggestedFilename(), 'größe.bin');
  assert.ok(readFileSync(await download.path()).equals(readFileSync(`${site.files}/größe.bin`)));
  await page.getByText('Saved and checked').waitFor();
  assert.deepEqual(await violations(page), []);
  await shot(page, 'files-download-light');
  await page.getByRole('button', { name: 'Remove größe.bin from the list' }).click();
  // The browser's own file system stands for the disk.
  await page.evaluate(async () => {
    const handle = await (await navigator.storage.getDirectory()).getFileHandle('saved', { create: true });
    Object.assign(globalThis, { showSaveFilePicker: async () => handle });
  });
  await page.locator('.entry').last().getByRole('button', { name: 'Download größe.bin' }).last().click();
  await page.getByText('Saved and checked').waitFor();
  const saved = await page.evaluate(async () => {
    const file = await (await (await navigator.storage.getDirectory()).getFileHandle('saved')).getFile();
    return [file.size, (await file.text()).slice(0, 12)];
  });
  assert.deepEqual(saved, [5_000_000, 'udpackudpack']);
  clean();
  await context.close();
});

test('an image is shown, and what is none says so', { skip }, async () => {
  const { page, context, clean } = await open(browser, site.link);
  await files(page);
  await page.getByRole('button', { name: 'photos', exact: true }).click();
  await page.getByRole('button', { name: 'pixel.png', exact: true }).click();
  const image = page.getByRole('img', { name: 'pixel.png' });
  await image.waitFor({ state: 'attached' });
  await page.waitForFunction(() => document.querySelector<HTMLImageElement>('.preview img')?.naturalWidth === 1);
  assert.deepEqual(await violations(page), []);
  await page.keyboard.press('Escape');
  await page.getByRole('button', { name: 'broken.png', exact: true }).click();
  await page.getByText('cannot show this image').waitFor();
  clean();
  await context.close();
});

test('a token that may not read sees no files', { skip }, async () => {
  const writer = await Site.start();
  try {
    const { page, context, clean } = await open(browser, writer.link);
    await connected(page);
    await page.getByText('Drop files or folders here').waitFor();
    assert.equal(await page.getByRole('tab').count(), 0);
    clean();
    await context.close();
  } finally {
    await writer.stop();
  }
});

for (const [look, options] of Object.entries(LOOKS)) {
  test(`nothing is in the way of a screen reader among files, ${look}`, { skip }, async () => {
    const { page, context, clean } = await open(browser, site.link, options);
    await files(page);
    assert.deepEqual(await violations(page), []);
    await shot(page, `files-${look}`);
    clean();
    await context.close();
  });
}

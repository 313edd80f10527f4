/** The frame of the pages: the link, the connection, refusals; and the tables of their texts. */

import assert from 'node:assert/strict';
import { readdirSync, readFileSync } from 'node:fs';
import { after, before, test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { build } from 'esbuild';
import type { Browser } from 'playwright-core';
import { launch } from './chromium.js';
import { connected, LOOKS, open, shot, Site, skip, violations } from './pages.js';

const pages = fileURLToPath(new URL('../../../pages/', import.meta.url));

let browser: Browser;
let site: Site;

before(async () => {
  if (skip) return;
  [browser, site] = await Promise.all([launch(), Site.start({ options: ['--allow-read'] })]);
});

after(async () => {
  if (skip) return;
  await browser.close();
  await site.stop();
});

test('the link lets in, and its token is in the address bar no more, but survives a reload', { skip }, async () => {
  const { page, context, clean } = await open(browser, site.link);
  await connected(page);
  assert.equal(page.url(), `${site.origin}/`);
  assert.deepEqual(await page.evaluate(() => [Object.values(sessionStorage), Object.values(localStorage), document.cookie]), [[new URLSearchParams(new URL(site.link).hash.slice(1)).get('t')], [], '']);
  assert.equal(await page.evaluate(() => document.documentElement.lang), 'en');
  await page.reload();
  await connected(page);
  clean();
  await context.close();
});

test('a wrong token is refused with what to do, and a right one can be pasted', { skip }, async () => {
  const { page, context } = await open(browser, `${site.origin}/#t=wrong`);
  const alert = page.getByRole('alert');
  await alert.waitFor();
  assert.match((await alert.textContent()) ?? '', /does not know this link/);
  assert.deepEqual(await violations(page), []);
  await shot(page, 'refused-light');
  await page.getByRole('button', { name: 'Use another link' }).click();
  const input = page.getByLabel('Link or token');
  assert.deepEqual(await violations(page), []);
  await shot(page, 'token-light');
  await input.fill(site.link);
  await input.press('Enter');
  await connected(page);
  await context.close();
});

test('a server that does not answer is tried again, with the time', { skip }, async () => {
  const { page, context } = await open(browser, site.link, LOOKS.phone);
  await connected(page);
  await page.route('**/.well-known/udpack.json', (route) => route.abort());
  await page.reload();
  const alert = page.getByRole('alert');
  await alert.waitFor();
  assert.match((await alert.textContent()) ?? '', /does not answer.*tries again in \d+ s/);
  await shot(page, 'unreachable-phone');
  await page.unroute('**/.well-known/udpack.json');
  await page.getByRole('button', { name: 'Try now' }).click();
  await connected(page);
  await context.close();
});

test('each text is there in both languages, with the same values', async () => {
  const files = readdirSync(`${pages}src`, { recursive: true, encoding: 'utf8' }).filter((name) => name.endsWith('.ts') && readFileSync(`${pages}src/${name}`, 'utf8').includes('texts('));
  const contents = [...files.map((name) => `import './${name}';`), "export { tables } from './base/text.ts';"].join('\n');
  const outfile = fileURLToPath(new URL('../tables.mjs', import.meta.url));
  // Without a page: a module that has texts touches none while it is loaded.
  await build({ stdin: { contents, resolveDir: `${pages}src`, loader: 'ts' }, outfile, bundle: true, format: 'esm', platform: 'node', nodePaths: ['node_modules'], alias: { udpack: './src/index.ts', 'udpack/transfer': './src/transfer/index.ts' } });
  const { tables } = (await import(outfile)) as { tables: Map<string, Record<'en' | 'zh', Record<string, string>>> };
  assert.ok(tables.size >= 4, `${[...tables.keys()]}`);
  const values = (text: string): string[] => [...new Set([...text.matchAll(/\{(\w+)/g)].map(([, name]) => name as string))].sort();
  for (const [name, { en, zh }] of tables) {
    assert.deepEqual(Object.keys(zh).sort(), Object.keys(en).sort(), name);
    for (const [key, text] of Object.entries(en)) {
      const other = zh[key] as string;
      assert.deepEqual(values(other), values(text), `${name}.${key}`);
      assert.ok(other.trim() !== '' && text.trim() !== '', `${name}.${key} is empty`);
      // Names and units are the same; sentences are not.
      assert.ok(!/[a-z]{4}/i.test(text.replace(/\{[^}]*\}/g, '')) || /\p{Script=Han}/u.test(other), `${name}.${key} is not translated: ${other}`);
    }
  }
});

test('a Chinese reader gets Chinese', { skip }, async () => {
  const { page, context, clean } = await open(browser, site.link, { ...LOOKS.light, locale: 'zh-CN' });
  await connected(page);
  assert.equal(await page.evaluate(() => document.documentElement.lang), 'zh');
  await page.getByRole('tab', { name: '文件' }).waitFor();
  await shot(page, 'upload-zh-light');
  clean();
  await context.close();
});

/** A server with a certificate of an authority, in a real Chromium: the page and its WebTransport need no hash. */

import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { createHash, X509Certificate } from 'node:crypto';
import { chmodSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { test } from 'node:test';
import { launch } from './chromium.js';
import { connected, drop, open, Site, skip as missing } from './pages.js';

const HOST = 'files.example';
const skip = missing || (spawnSync('openssl', ['version']).error ? 'SKIPPED: not there: openssl' : false);

test('with --tls-cert a page connects by its name and is told no hashes', { skip }, async () => {
  const directory = mkdtempSync(`${tmpdir()}/udpack-certificate-`);
  const [chain, key] = [`${directory}/fullchain.pem`, `${directory}/privkey.pem`];
  const args = ['req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes', '-days', '30', '-subj', `/CN=${HOST}`, '-addext', `subjectAltName=DNS:${HOST}`, '-keyout', key, '-out', chain];
  const { status, stderr } = spawnSync('openssl', args, { encoding: 'utf8' });
  assert.equal(status, 0, stderr);
  chmodSync(key, 0o600);
  const spki = new X509Certificate(readFileSync(chain)).publicKey.export({ type: 'spki', format: 'der' });
  // The switch stands for an authority that the browser knows; for WebTransport it counts in the developers' mode only.
  const trusted = `--ignore-certificate-errors-spki-list=${createHash('sha256').update(spki).digest('base64')}`;
  const browser = await launch(trusted, '--webtransport-developer-mode', `--host-resolver-rules=MAP ${HOST} 127.0.0.1`);
  const site = await Site.start({ options: ['--public-host', HOST, '--tls-cert', chain, '--tls-key', key] });
  try {
    assert.match(site.link, /^https:\/\/files\.example:\d+\/#t=/);
    const { page, context, clean } = await open(browser, site.link);
    await connected(page);
    const told = await page.evaluate(async () => (await (await fetch('/.well-known/udpack.json')).json()) as { hashes: string[] });
    assert.deepEqual(told.hashes, []);
    writeFileSync(`${directory}/file`, 'bytes');
    await drop(page, `${directory}/file`);
    await page.locator('.row.file[data-state=done]').waitFor({ timeout: 30_000 });
    assert.equal(readFileSync(`${site.files}/file`, 'utf8'), 'bytes');
    // By the same certificate over TCP, as a browser without WebTransport does.
    await page.addInitScript(() => void Reflect.deleteProperty(globalThis, 'WebTransport'));
    await page.reload();
    await connected(page);
    assert.equal(await page.locator('.state').textContent(), 'Connected over TCP');
    clean();
    await context.close();
  } finally {
    await browser.close();
    await site.stop();
    rmSync(directory, { recursive: true, force: true });
  }
});

/** The committed bundles in Debian's Firefox ESR, which WebDriver BiDi drives. Skipped aloud where it or the server is missing. */

import assert from 'node:assert/strict';
import { type ChildProcess, spawn } from 'node:child_process';
import { existsSync, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { createInterface } from 'node:readline';
import type { Readable } from 'node:stream';
import { test } from 'node:test';
import { fileURLToPath } from 'node:url';

const FIREFOX = process.env.FIREFOX ?? '/usr/bin/firefox-esr';
const repository = fileURLToPath(new URL('../../../../..', import.meta.url));
const SERVER = process.env.UDPACK_WEB_SERVER ?? `${process.env.CARGO_TARGET_DIR ?? `${repository}target`}/debug/examples/web`;
const missing = [FIREFOX, SERVER].filter((path) => !existsSync(path));
const skip = missing.length > 0 ? `SKIPPED: not there: ${missing.join(', ')}` : false;

/** The first line that the expression finds, as what it finds in it. */
function line(stream: Readable, wanted: RegExp): Promise<string> {
  return new Promise((resolve) => createInterface({ input: stream }).on('line', (text) => wanted.test(text) && resolve(wanted.exec(text)?.[1] as string)));
}

/** What runs in the page. */
const PROGRAM = `
  const { connect } = await import('/udpack.js');
  const { download, upload } = await import('/transfer.js');
  const socket = await connect(endpoint);
  const echo = await socket.open('echo');
  await echo.send('say', 'größe');
  const back = (await echo.receive()).data;
  const math = await socket.open('math');
  let items = 0;
  for await (const _ of math.stream('count', 5000)) items += 1;
  const bytes = new Uint8Array(9_000_000).map((_, at) => at * 31 + (at >> 8));
  const [file] = await upload(socket, new File([bytes], 'firefox.bin')).done;
  let same = 0;
  for await (const part of download(socket, 'firefox.bin')) if (part.every((byte, at) => byte === bytes[same + at])) same += part.length;
  return JSON.stringify([back, items, file.state, same, (await socket.close()).name]);`;

test('Firefox connects, speaks on channels, and moves files both ways', { skip }, async (t) => {
  const profile = mkdtempSync(`${tmpdir()}/udpack-firefox-`);
  const running: ChildProcess[] = [];
  const pages = createServer((request, response) => {
    const isScript = ['/udpack.js', '/transfer.js', '/hash-worker.js'].includes(request.url ?? '');
    response.setHeader('content-type', isScript ? 'text/javascript' : 'text/html');
    response.end(isScript ? readFileSync(`${repository}crates/udpack-web/js/dist${request.url}`) : '<!doctype html>');
  });
  try {
    await new Promise<void>((resolve) => pages.listen(0, '127.0.0.1', resolve));
    const server = spawn(SERVER, ['127.0.0.1:0']);
    running.push(server);
    const endpoint = await line(server.stdout, /^(\{.*)$/);
    const firefox = spawn(FIREFOX, ['--headless', '--no-remote', '--profile', profile, '--remote-debugging-port', '0'], { env: { ...process.env, HOME: profile } });
    running.push(firefox);
    const driver = new WebSocket(`${await line(firefox.stderr, /WebDriver BiDi listening on (ws:\S+)/)}/session`);
    await new Promise((resolve) => driver.addEventListener('open', resolve));
    let last = 0;
    const call = (method: string, params: object): Promise<any> =>
      new Promise((resolve, reject) => {
        const id = (last += 1);
        driver.addEventListener('message', ({ data }) => {
          const answer = JSON.parse(data as string) as { id: number; error?: string; message?: string; result: unknown };
          if (answer.id === id) answer.error ? reject(new Error(`${method}: ${answer.message}`)) : resolve(answer.result);
        });
        driver.send(JSON.stringify({ id, method, params }));
      });
    t.diagnostic(`Firefox ${(await call('session.new', { capabilities: {} })).capabilities.browserVersion}`);
    const { context } = (await call('browsingContext.getTree', {})).contexts[0];
    await call('browsingContext.navigate', { context, url: `http://127.0.0.1:${(pages.address() as AddressInfo).port}/`, wait: 'complete' });
    const expression = `(async (endpoint) => {${PROGRAM}})(${endpoint})`;
    const got = await call('script.evaluate', { target: { context }, awaitPromise: true, expression });
    assert.equal(got.type, 'success', got.exceptionDetails?.text);
    assert.deepEqual(JSON.parse(got.result.value), ['größe', 5000, 'done', 9_000_000, 'normal']);
    driver.close();
  } finally {
    const ends = running.map((process) => new Promise((resolve) => process.once('exit', resolve)));
    for (const process of running) process.kill();
    await Promise.all(ends);
    pages.closeAllConnections();
    pages.close();
    rmSync(profile, { recursive: true, force: true, maxRetries: 5 });
  }
});

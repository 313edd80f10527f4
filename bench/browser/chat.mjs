/**
 * The page of examples/browser-chat in Chromium, as on a network of its own: `node chat.mjs PAGE [PROXY]`. Two people talk, by two
 * pages. Prints what carried it, or why it did not work. To be run where the page can be reached, as in a network namespace.
 */

import { chromium } from './common.mjs';

const [page, proxy] = process.argv.slice(2);
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium',
  headless: true,
  // Plain HTTP of another machine has no WebTransport, which is to be tried.
  args: ['--no-sandbox', '--disable-dev-shm-usage', `--unsafely-treat-insecure-origin-as-secure=${new URL(page).origin}`, ...(proxy ? [`--proxy-server=${proxy}`] : [])],
  env: { ...process.env, LC_ALL: 'C.UTF-8' },
});

/** The chat of one person, and what its page has opened. */
async function enter(name) {
  const tab = await (await browser.newContext()).newPage();
  let sockets = 0;
  tab.on('websocket', () => (sockets += 1));
  await tab.addInitScript(() => {
    const { WebTransport } = globalThis;
    globalThis.tried = 0;
    globalThis.WebTransport = WebTransport && class extends WebTransport {
      constructor(...given) {
        super(...given);
        globalThis.tried += 1;
      }
    };
  });
  await tab.goto(`${page}#${name}`);
  await tab.getByText(`connected as ${name}`).waitFor({ timeout: 30_000 });
  return { tab, say: async (text) => (await tab.getByRole('textbox').fill(text), tab.getByRole('button', { name: 'Say' }).click()), how: async () => ({ tried: await tab.evaluate(() => globalThis.tried), sockets }) };
}

try {
  const [ann, bob] = [await enter('ann'), await enter('bob')];
  for (const [from, name, text] of [[ann, 'ann', 'is anybody there?'], [bob, 'bob', 'I am']]) {
    await from.say(text);
    for (const { tab } of [ann, bob]) await tab.getByText(`${name}: ${text}`).waitFor({ timeout: 30_000 });
  }
  const { tried, sockets } = await ann.how();
  console.log(`${sockets > 0 ? 'wss' : 'webtransport'}, WebTransport tried: ${tried > 0 ? 'yes' : 'no'}`);
} catch (error) {
  console.log(`FAILED: ${error.message.split('\n')[0]}`);
  process.exitCode = 1;
} finally {
  await browser.close();
}

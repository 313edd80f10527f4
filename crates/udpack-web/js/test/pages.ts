/** The pages in a real Chromium, as `udpack-server --web` serves them; and what tests do to a page over and over. */

import assert from 'node:assert/strict';
import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import type { Browser, BrowserContext, BrowserContextOptions, Page } from 'playwright-core';
import { without } from './chromium.js';

const repository = fileURLToPath(new URL('../../../../..', import.meta.url));
export const SERVER = process.env.UDPACK_SERVER ?? `${process.env.CARGO_TARGET_DIR ?? `${repository}target`}/debug/udpack-server`;
/** Why browser tests cannot run here, if they cannot. */
export const skip = without(SERVER);

/** Where screenshots go: to be looked at, not to be kept. */
export const SHOTS = fileURLToPath(new URL('../../shots/', import.meta.url));

/** A server in a directory of its own. */
export class Site {
  /** The code with which it ends by itself. */
  readonly ended: Promise<number | null>;

  private constructor(
    private readonly directory: string,
    private readonly process: ChildProcess,
    readonly origin: string,
    /** Where uploads are stored. */
    readonly files: string,
  ) {
    this.ended = new Promise((resolve) => process.once('exit', resolve));
  }

  /** `around` runs the server, as in a namespace of its own; `{}` stands for the server and its arguments. */
  static async start({ options = [], around = ['{}'] }: { options?: string[]; around?: string[] } = {}): Promise<Site> {
    const directory = mkdtempSync(`${tmpdir()}/udpack-site-`);
    const line = [SERVER, '--quiet', '--listen', '127.0.0.1:0', '--web', '127.0.0.1:0', '--json', ...options];
    const [command, ...rest] = around.flatMap((word) => (word === '{}' ? line : [word])) as [string, ...string[]];
    const server = spawn(command, rest, { cwd: directory, stdio: ['ignore', 'pipe', 'inherit'] });
    const web = await new Promise<string>((resolve, reject) => {
      createInterface({ input: server.stdout }).on('line', (text) => {
        const { web } = JSON.parse(text) as { web?: string };
        if (web) resolve(web);
      });
      server.once('exit', (code) => reject(new Error(`the server ended with ${code}`)));
    });
    const site = new Site(directory, server, new URL(web).origin, `${directory}/uploads`);
    // By a name and a certificate of its own only the browser reaches it.
    if (!process.env.UDPACK_PAGES && site.origin.startsWith('http:')) {
      const embedded = Buffer.from(await (await fetch(`${site.origin}/app.js`)).arrayBuffer());
      assert.ok(embedded.equals(readFileSync(`${repository}crates/udpack-web/pages/dist/app.js`)), `${SERVER} has other pages in it: build it anew`);
    }
    return site;
  }

  /** The link that the server prints: its first token may write, and read where the server lets all. */
  get link(): string {
    return this.run('url', '--web').trim();
  }

  /** The link of a new token with these rights. */
  linkFor(scope: string, ...options: string[]): string {
    const { token } = JSON.parse(this.run('token', 'new', `test-${Math.random()}`, '--scope', scope, '--json', ...options)) as { token: string };
    return `${this.origin}/#t=${token}`;
  }

  /** The address for programs, with the first token. */
  get url(): string {
    return this.run('url').trim();
  }

  /** What the server keeps of interrupted uploads. */
  interrupted(): string {
    return this.run('uploads', 'list', '--json').trim();
  }

  private run(...args: string[]): string {
    const { status, stdout, stderr } = spawnSync(SERVER, args, { cwd: this.directory, encoding: 'utf8' });
    assert.equal(status, 0, stderr);
    return stdout;
  }

  async stop(): Promise<void> {
    this.process.kill('SIGKILL');
    await this.ended;
    rmSync(this.directory, { recursive: true, force: true });
  }
}

/** How a reader may have set up the browser. */
export const LOOKS = {
  light: { colorScheme: 'light', reducedMotion: 'reduce', viewport: { width: 1180, height: 780 } },
  dark: { colorScheme: 'dark', reducedMotion: 'reduce', viewport: { width: 1180, height: 780 } },
  phone: { colorScheme: 'light', reducedMotion: 'reduce', viewport: { width: 390, height: 780 }, hasTouch: true, deviceScaleFactor: 2 },
} as const satisfies Record<string, BrowserContextOptions>;

/** Opens a link in a browser of its own. What goes wrong in the page, or breaks its policy, fails `clean`. */
export async function open(browser: Browser, link: string, options: BrowserContextOptions = LOOKS.light): Promise<{ page: Page; context: BrowserContext; clean(): void }> {
  const context = await browser.newContext({ locale: 'en-GB', ...options });
  if (process.env.UDPACK_PAGES) {
    // While pages are written: the scripts and styles on the disk instead of those in the server.
    await context.route(/\/(app\.js|app\.css|worker\.js|icon\.svg)$/, async (route) => {
      const name = new URL(route.request().url()).pathname.slice(1);
      await route.fulfill({ response: await route.fetch(), body: readFileSync(`${repository}crates/udpack-web/pages/dist/${name}`) });
    });
  }
  const page = await context.newPage();
  const wrong: string[] = [];
  page.on('pageerror', (error) => wrong.push(`${error}`));
  page.on('console', (message) => {
    if (message.type() === 'error') wrong.push(message.text());
  });
  await page.goto(link);
  return { page, context, clean: () => assert.deepEqual(wrong, []) };
}

export async function connected(page: Page): Promise<void> {
  await page.locator('.state[data-look=good]').waitFor({ timeout: 10_000 });
}

export async function shot(page: Page, name: string): Promise<void> {
  mkdirSync(SHOTS, { recursive: true });
  await page.screenshot({ path: `${SHOTS}${name}.png` });
}

/** What axe says against the page: rule and element. */
export async function violations(page: Page): Promise<string[]> {
  await page.evaluate(readFileSync(fileURLToPath(new URL('../../node_modules/axe-core/axe.min.js', import.meta.url)), 'utf8'));
  return page.evaluate(async () => {
    const { axe } = globalThis as unknown as { axe: { run(options: object): Promise<{ violations: { id: string; nodes: { html: string; failureSummary: string }[] }[] }> } };
    const { violations } = await axe.run({ resultTypes: ['violations'] });
    return violations.flatMap(({ id, nodes }) => nodes.map(({ html, failureSummary }) => `${id}: ${html.slice(0, 200)}: ${failureSummary}`));
  });
}

/** Drags files and folders of this machine onto the page, as a hand does. */
export async function drop(page: Page, ...files: string[]): Promise<void> {
  const session = await page.context().newCDPSession(page);
  for (const type of ['dragEnter', 'dragOver', 'drop'] as const) {
    await session.send('Input.dispatchDragEvent', { type, x: 300, y: 300, data: { items: [], files, dragOperationsMask: 1 } });
  }
  await session.detach();
}

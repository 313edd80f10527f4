/**
 * The pages in a real Chromium: a server for them with their policy, the transfer server behind it, and what tests do to a
 * page over and over.
 */

import assert from 'node:assert/strict';
import { type ChildProcessWithoutNullStreams, spawn } from 'node:child_process';
import { existsSync, mkdirSync, readFileSync } from 'node:fs';
import { createServer, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { type Browser, type BrowserContext, type BrowserContextOptions, chromium, type Page } from 'playwright-core';

const CHROMIUM = process.env.CHROMIUM ?? '/usr/bin/chromium';
const repository = fileURLToPath(new URL('../../../../..', import.meta.url));
const SERVER = process.env.UDPACK_WEB_SERVER ?? `${process.env.CARGO_TARGET_DIR ?? `${repository}target`}/debug/examples/web`;
const missing = [CHROMIUM, SERVER].filter((path) => !existsSync(path));
/** Why browser tests cannot run here, if they cannot. */
export const skip = missing.length > 0 && process.env.UDPACK_BROWSER !== 'required' ? `SKIPPED: not there: ${missing.join(', ')}` : false;

/** Where screenshots go: to be looked at, not to be kept. */
export const SHOTS = fileURLToPath(new URL('../../shots/', import.meta.url));

/** The policy that a server sends with the pages. */
function policy(server: string): string {
  return [
    "default-src 'none'",
    "script-src 'self' 'wasm-unsafe-eval'",
    "style-src 'self'",
    "img-src 'self' blob:",
    `connect-src 'self' ${server}`,
    "worker-src 'self'",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
  ].join('; ');
}

const TYPES: Record<string, string> = { html: 'text/html', js: 'text/javascript', css: 'text/css', svg: 'image/svg+xml' };

/** A transfer server, and a server for its pages. */
export class Site {
  private constructor(
    private readonly process: ChildProcessWithoutNullStreams,
    private readonly pages: Server,
    readonly endpoint: { url: string; hashes: string[]; token: string; files: string },
  ) {}

  static async start(command: string[] = [SERVER], environment: NodeJS.ProcessEnv = {}): Promise<Site> {
    const server = spawn(command[0] as string, command.slice(1), { env: { ...process.env, ...environment } });
    server.stderr.pipe(process.stderr);
    const line = await new Promise<string>((resolve, reject) => {
      createInterface({ input: server.stdout }).once('line', resolve);
      server.once('exit', (code) => reject(new Error(`the server ended with ${code}`)));
    });
    const endpoint = JSON.parse(line) as Site['endpoint'];
    const pages = createServer((request, response) => {
      const path = new URL(request.url ?? '/', 'http://host').pathname;
      if (path === '/.well-known/udpack.json') {
        response.setHeader('content-type', 'application/json');
        return response.end(JSON.stringify({ protocol: 'udpack/1', host: null, port: Number(new URL(endpoint.url).port), path: '/udpack', hashes: endpoint.hashes }));
      }
      const name = path === '/' ? 'index.html' : path.slice(1);
      const file = `${repository}crates/udpack-web/pages/dist/${name}`;
      if (!/^[a-z.]+$/.test(name) || !existsSync(file)) {
        response.statusCode = 404;
        return response.end();
      }
      response.setHeader('content-type', TYPES[name.slice(name.lastIndexOf('.') + 1)] as string);
      response.setHeader('content-security-policy', policy(new URL(endpoint.url).origin));
      return response.end(readFileSync(file));
    });
    await new Promise<void>((resolve) => pages.listen(0, '127.0.0.1', resolve));
    return new Site(server, pages, endpoint);
  }

  /** The link that a server prints. */
  get link(): string {
    return `${this.origin}/#t=${encodeURIComponent(this.endpoint.token)}`;
  }

  get origin(): string {
    return `http://127.0.0.1:${(this.pages.address() as AddressInfo).port}`;
  }

  get files(): string {
    return this.endpoint.files;
  }

  async stop(): Promise<void> {
    this.pages.closeAllConnections();
    this.pages.close();
    const over = new Promise((resolve) => this.process.once('exit', resolve));
    this.process.kill('SIGKILL');
    await over;
  }
}

export function launch(): Promise<Browser> {
  // Every stream has pipes in shared memory, which containers have little of.
  return chromium.launch({ executablePath: CHROMIUM, headless: true, args: ['--no-sandbox', '--disable-dev-shm-usage'] });
}

/** How a reader may have set up the browser. */
export const LOOKS = {
  light: { colorScheme: 'light', viewport: { width: 1180, height: 780 } },
  dark: { colorScheme: 'dark', viewport: { width: 1180, height: 780 } },
  phone: { colorScheme: 'light', viewport: { width: 390, height: 780 }, hasTouch: true, deviceScaleFactor: 2 },
} as const satisfies Record<string, BrowserContextOptions>;

/** Opens a link in a browser of its own. What goes wrong in the page, or breaks its policy, fails `clean`. */
export async function open(browser: Browser, link: string, options: BrowserContextOptions = LOOKS.light): Promise<{ page: Page; context: BrowserContext; clean(): void }> {
  const context = await browser.newContext({ locale: 'en-GB', ...options });
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
  await page.locator('.state[data-look=good]').waitFor({ timeout: 20_000 });
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

/** The server of `examples/web.rs`, and empty pages that can load the committed bundles, for tests in a browser. */

import { type ChildProcessWithoutNullStreams, spawn } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { createServer, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import type { Browser, Page } from 'playwright-core';
import { without } from './chromium.js';

const repository = fileURLToPath(new URL('../../../../..', import.meta.url));
export const SERVER = process.env.UDPACK_WEB_SERVER ?? `${process.env.CARGO_TARGET_DIR ?? `${repository}target`}/debug/examples/web`;
/** Why tests cannot run here, if they cannot. */
export const skip = without(SERVER);

/** What a server prints for its pages. */
export interface Endpoint {
  url: string;
  /** Where it takes WebSockets, if it was started so. */
  socketUrl?: string;
  hashes: string[];
  token: string;
  /** The directory that holds what is uploaded. */
  files: string;
}

export class WebServer {
  private constructor(
    private readonly process: ChildProcessWithoutNullStreams,
    readonly endpoint: Endpoint,
  ) {}

  /** In `dir` it finds the keys and files of the one before it. */
  static async start({ address = '127.0.0.1:0', dir, tcp }: { address?: string; dir?: string; tcp?: string } = {}): Promise<WebServer> {
    const process = spawn(SERVER, [...(dir ? ['--dir', dir] : []), ...(tcp ? ['--tcp', tcp] : []), address]);
    const lines = createInterface({ input: process.stdout });
    const [line] = (await new Promise<string[]>((resolve, reject) => {
      lines.once('line', (line) => resolve([line]));
      process.once('exit', (code) => reject(new Error(`the server ended with ${code}`)));
    })) as [string];
    return new WebServer(process, JSON.parse(line) as Endpoint);
  }

  get port(): number {
    return Number(new URL(this.endpoint.url).port);
  }

  /** Drains: its clients are told to go. Resolves when it has ended. */
  async drain(): Promise<void> {
    const over = new Promise((resolve) => this.process.once('exit', resolve));
    this.process.stdin.end();
    await over;
  }

  kill(): Promise<void> {
    const over = new Promise<void>((resolve) => this.process.once('exit', () => resolve()));
    this.process.kill('SIGKILL');
    return over;
  }
}

/** Pages with nothing in them, which can import the bundles. */
export class Pages {
  /** What went wrong in a page without being caught. */
  readonly uncaught: string[] = [];

  private constructor(
    private readonly browser: Browser,
    private readonly server: Server,
  ) {}

  static async start(browser: Browser): Promise<Pages> {
    const server = createServer((request, response) => {
      const script = ['/udpack.js', '/mux.js', '/transfer.js', '/rooms.js', '/hash-worker.js'].includes(request.url ?? '');
      response.setHeader('content-type', script ? 'text/javascript' : 'text/html');
      response.end(script ? readFileSync(`${repository}crates/udpack-web/js/dist${request.url}`) : '<!doctype html><title>test</title>');
    });
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
    return new Pages(browser, server);
  }

  /** A page in a context of its own. */
  async open(): Promise<Page> {
    const page = await this.browser.newPage();
    page.on('pageerror', (error) => this.uncaught.push(`${error}`));
    await page.goto(`http://127.0.0.1:${(this.server.address() as AddressInfo).port}/`);
    return page;
  }

  stop(): void {
    this.server.close();
  }
}

/** What pages upload: bytes that differ from file to file and within each. */
export function content(size: number, seed: number): Uint8Array {
  const bytes = new Uint8Array(size);
  for (let at = 0, x = seed + 1; at < size; at += 1) {
    x = (x * 1103515245 + 12345) & 0x7fffffff;
    bytes[at] = x >> 16;
  }
  return bytes;
}

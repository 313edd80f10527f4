/** Where a page's own server is, and by which certificates it is known: `/.well-known/udpack.json`. */

import { ConnectError } from '../base/errors.js';
import { type Endpoint } from '../transport/choose.js';
import { CloseReason, Code } from '../wire/codes.js';

/** Asks for it anew: a restart or a renewal changes the hashes. Rejects with `ConnectError`. */
export async function discover(address: string, signal: AbortSignal): Promise<Endpoint> {
  let told: { protocol?: unknown; host?: unknown; port?: unknown; path?: unknown; hashes?: unknown };
  let asked = address;
  try {
    const response = await fetch(address, { cache: 'no-store', signal });
    if (!response.ok) {
      throw new Error(`${address} answers ${response.status}`);
    }
    asked = response.url;
    told = (await response.json()) as typeof told;
  } catch (error) {
    throw new ConnectError(new CloseReason(Code.CONNECTION_LOST, `the page's server does not answer: ${error}`, 'transport'));
  }
  const { protocol, host, port, path, hashes = [] } = told;
  if (
    protocol !== 'udpack/1' ||
    !(host === null || typeof host === 'string') ||
    typeof port !== 'number' ||
    typeof path !== 'string' ||
    !Array.isArray(hashes) ||
    !hashes.every((hash) => typeof hash === 'string')
  ) {
    throw new ConnectError(new CloseReason(Code.TRANSPORT_ERROR, `${address} is no udpack.json`, 'transport'));
  }
  try {
    const url = `https://${host ?? new URL(asked).hostname}:${port}${path}`;
    // Where pages come from there are WebSockets, too, by a certificate that the browser trusts for these already.
    return { url, socketUrl: socketAt(new URL(path, asked).href), hashes: hashes.map(hashOf) };
  } catch {
    throw new ConnectError(new CloseReason(Code.TRANSPORT_ERROR, `${address} has a hash that is none`, 'transport'));
  }
}

/** The same address for WebSockets. */
export function socketAt(url: string): string {
  return url.replace(/^http/, 'ws');
}

/**
 * Another node of the cluster at `HOST[:PORT]`, as `last` told it. A browser proves names alone, so without hashes the host must be
 * that of one of `urls`, or below it.
 *
 * @throws {ConnectError} when the page does not go there.
 */
export function nodeAt(told: string, last: Endpoint, urls: readonly string[]): Endpoint {
  const [, host, port = ':45456'] = /^([\w.-]+|\[[\da-f:.]+\])(:\d+)?$/.exec(told) ?? [];
  const mayGo = (url: string): boolean => `.${host}`.endsWith(`.${new URL(url).hostname}`);
  try {
    if (host !== undefined && (last.hashes.length || urls.some(mayGo))) {
      const url = `https://${host}${port}${new URL(last.url).pathname}`;
      return { ...last, url, socketUrl: socketAt(url) };
    }
  } catch {
    // What the program named is no whole URL.
  }
  throw new ConnectError(new CloseReason(Code.FORBIDDEN, 'this page does not go where it was told to', 'local'));
}

/** A SHA-256 as bytes: from base64 or 64 hexadecimal digits. Throws for anything else. */
export function hashOf(text: string): Uint8Array {
  const bytes = /^[0-9a-fA-F]{64}$/.test(text)
    ? Uint8Array.from(text.match(/../g) as string[], (digits) => Number.parseInt(digits, 16))
    : Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  if (bytes.length !== 32) {
    throw new Error('a SHA-256 has 32 bytes');
  }
  return bytes;
}

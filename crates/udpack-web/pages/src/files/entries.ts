/** What a directory holds: asked page by page, and sorted. */

import { compareNames } from '../base/format.js';
import { type Session } from '../frame/session.js';

/** A path as the server says it: text, or bytes where they are no text. */
export type Path = string | Uint8Array;

export interface Entry {
  readonly path: Path;
  /** The last part, as people can read it. */
  readonly name: string;
  readonly kind: string;
  readonly size: number;
  /** Seconds since 1970. */
  readonly mtime: number;
}

export type Column = 'name' | 'size' | 'mtime';

const PAGE = 4000;

/** The entries of a directory, in the order of the server, as its pages come. Rejects as a request does. */
export async function* entriesOf(session: Session, path: Path, signal: AbortSignal): AsyncGenerator<Entry[]> {
  let after: Path | undefined;
  while (true) {
    const { entries, more } = (await session.ask('list', { path, limit: PAGE, ...(after !== undefined && { after }) }, signal)) as { entries: Record<string, unknown>[]; more: boolean };
    const page = entries.map(entryOf);
    yield page;
    const last = page.at(-1);
    if (!more || last === undefined) {
      return;
    }
    after = last.path;
  }
}

function entryOf(told: Record<string, unknown>): Entry {
  const path = told.path as Path;
  return { path, name: nameOf(path), kind: `${told.kind}`, size: Number(told.size), mtime: Number(told.mtime) };
}

/** The last part of a path. */
export function nameOf(path: Path): string {
  const text = typeof path === 'string' ? path : new TextDecoder().decode(path);
  return text.slice(text.lastIndexOf('/') + 1);
}

/** Sorts in place: directories first. */
export function sort(entries: Entry[], column: Column, descending: boolean): void {
  const sign = descending ? -1 : 1;
  const byName = (a: Entry, b: Entry): number => compareNames(a.name, b.name);
  const by = column === 'name' ? byName : (a: Entry, b: Entry): number => a[column] - b[column] || byName(a, b);
  entries.sort((a, b) => Number(b.kind === 'dir') - Number(a.kind === 'dir') || sign * by(a, b));
}

/** Images that browsers show, by the ending of their name. */
const IMAGES: Readonly<Record<string, string>> = {
  avif: 'image/avif',
  bmp: 'image/bmp',
  gif: 'image/gif',
  jpeg: 'image/jpeg',
  jpg: 'image/jpeg',
  png: 'image/png',
  svg: 'image/svg+xml',
  webp: 'image/webp',
};

/** Larger ones are not shown beforehand. */
const IMAGE_MOST = 64 << 20;

/** The type of an image that can be shown, or undefined. */
export function imageType({ name, kind, size }: Entry): string | undefined {
  return kind === 'file' && size <= IMAGE_MOST ? IMAGES[name.slice(name.lastIndexOf('.') + 1).toLowerCase()] : undefined;
}

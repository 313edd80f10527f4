/**
 * Reads what `docs/PROTOCOL.md` holds for tests: the vectors, and blocks in general. With a JSON parser of its
 * own, because the document's JSON is stretched: binary, timestamps, floats told from integers, repeated keys.
 */

import { readFileSync } from 'node:fs';
import { Float, Timestamp } from '../src/wire/msgpack.js';

/** The document of the repository, found from the compiled test: `build/test/document.js`. */
export const DOCUMENT = readFileSync(new URL('../../../../../docs/PROTOCOL.md', import.meta.url), 'utf8');

const FIELDS = new Set('name kind expect limit hex event data id deadline seq key about body canonical'.split(' '));

export class Vector {
  readonly fields: [string, string][] = [];

  field(key: string): string | undefined {
    return this.fields.find(([name]) => name === key)?.[1];
  }

  get name(): string {
    return this.field('name') ?? 'a vector without a name';
  }

  get kind(): string {
    return this.field('kind') ?? '';
  }

  /** The code that must refuse it. */
  get refusal(): string | undefined {
    const expect = this.field('expect') ?? '';
    if (expect === 'ok') return undefined;
    if (!expect.startsWith('refuse ')) throw new Error(`${this.name}: expect is neither ok nor a refusal`);
    return expect.slice('refuse '.length);
  }

  get bytes(): Uint8Array {
    return readHex(this.field('hex') ?? '');
  }
}

/** The contents of all fenced blocks that begin with the tag. */
export function blocks(tag: string): string[] {
  return DOCUMENT.split(`\n\`\`\`${tag}\n`)
    .slice(1)
    .map((rest) => rest.split('\n```')[0] as string);
}

/** The vectors of all `vectors` blocks. */
export function vectors(): Vector[] {
  const all: Vector[] = [];
  for (const block of blocks('vectors')) {
    for (const paragraph of block.split('\n\n')) {
      const vector = new Vector();
      for (const line of paragraph.split('\n')) {
        const last = vector.fields.at(-1);
        if (line.startsWith(' ') && last) {
          last[1] += ` ${line.trim()}`;
          continue;
        }
        const colon = line.indexOf(':');
        const key = line.slice(0, colon);
        if (!FIELDS.has(key)) throw new Error(`unknown field: ${key}`);
        vector.fields.push([key, line.slice(colon + 1).trim()]);
      }
      all.push(vector);
    }
  }
  return all;
}

/** Reads `92 a1 65 (c0 c0)*3`. */
export function readHex(text: string): Uint8Array {
  const parts: Uint8Array[] = [];
  let rest = text.trim();
  while (rest !== '') {
    const group = /^\(([^)]*)\)\*(\d+)\s*/.exec(rest);
    const plain = /^(?:[0-9a-f]{2}\s*)+/.exec(rest);
    if (group) {
      const inner = readHex(group[1] as string);
      const repeated = new Uint8Array(inner.length * Number(group[2]));
      for (let at = 0; at < repeated.length; at += inner.length) repeated.set(inner, at);
      parts.push(repeated);
      rest = rest.slice(group[0].length);
    } else if (plain) {
      parts.push(Uint8Array.from(Buffer.from(plain[0].replaceAll(/\s/g, ''), 'hex')));
      rest = rest.slice(plain[0].length);
    } else {
      throw new Error(`no hex: ${rest.slice(0, 20)}`);
    }
  }
  return Uint8Array.from(Buffer.concat(parts));
}

/** Reads the document's JSON into what `Reader` with `tellFloats` makes of the same value. */
export function readJson(text: string): unknown {
  let at = 0;
  const space = (): void => {
    while (/\s/.test(text[at] ?? '')) at += 1;
  };
  const expect = (token: string): void => {
    space();
    if (!text.startsWith(token, at)) throw new Error(`expected ${token} in ${text.slice(at, at + 20)}`);
    at += token.length;
  };
  const next = (token: string): boolean => {
    space();
    if (!text.startsWith(token, at)) return false;
    at += token.length;
    return true;
  };
  const list = <T>(end: string, item: () => T): T[] => {
    const items: T[] = [];
    if (next(end)) return items;
    do items.push(item());
    while (next(','));
    expect(end);
    return items;
  };
  const value = (): unknown => {
    space();
    if (next('null')) return null;
    if (next('true')) return true;
    if (next('false')) return false;
    if (next('[')) return list(']', value);
    if (next('{')) {
      return stretched(
        list('}', (): [string, unknown] => {
          const key = value() as string;
          expect(':');
          return [key, value()];
        }),
      );
    }
    const token = /^(?:"(?:[^"\\]|\\.)*"|-?[0-9.eE+-]+)/.exec(text.slice(at))?.[0];
    if (token === undefined) throw new Error(`no JSON: ${text.slice(at, at + 20)}`);
    at += token.length;
    if (token.startsWith('"')) return JSON.parse(token) as string;
    if (/[.eE]/.test(token)) return new Float(Number(token));
    const integer = BigInt(token);
    return Number.isSafeInteger(Number(integer)) ? Number(integer) : integer;
  };
  const read = value();
  space();
  if (at !== text.length) throw new Error(`more than JSON: ${text.slice(at)}`);
  return read;
}

function stretched(pairs: [string, unknown][]): unknown {
  const [[key, value] = ['', null]] = pairs;
  switch (pairs.length === 1 ? key : '') {
    case '$bin':
      return readHex(value as string);
    case '$ts':
      return new Timestamp(readHex(value as string));
    case '$f64': {
      const bytes = readHex(value as string);
      return new Float(new DataView(bytes.buffer).getFloat64(0));
    }
    case '$map':
      return new Map(value as [unknown, unknown][]);
    case '$repeat': {
      const [what, times] = value as [unknown, number];
      if (typeof what === 'string') return what.repeat(times);
      if (what instanceof Uint8Array) return Uint8Array.from({ length: what.length * times }, (_, i) => what[i % what.length] as number);
      return Array.from({ length: times }, () => what);
    }
    case '$nest': {
      const [inner, times] = value as [unknown, number];
      let nested = inner;
      for (let i = 0; i < times; i += 1) nested = [nested];
      return nested;
    }
    default:
      return Object.fromEntries(pairs);
  }
}

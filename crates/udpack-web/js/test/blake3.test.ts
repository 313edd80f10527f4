/** BLAKE3 beside another implementation, that of `hash-wasm`, and beside vectors of its authors. */

import assert from 'node:assert/strict';
import { test } from 'node:test';
import { blake3 } from 'hash-wasm';
import { Hash, hashOf } from '../src/transfer/blake3.js';

/** The input of the authors' vectors: 0, 1, … 250, again and again. */
const input = Uint8Array.from({ length: 400_000 }, (_, at) => at % 251);
const hex = (hash: Uint8Array): string => Buffer.from(hash).toString('hex');

test("gives what the authors' vectors say", async () => {
  const vectors: [number, string][] = [
    [0, 'af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262'],
    [1, '2d3adedff11b61f14c886e35afa036736dcd87a74d27b5c1510225d0f592e213'],
    [1024, '42214739f095a406f3fc83deb889744ac00df831c10daa55189b5d121c855af7'],
    [1025, 'd00278ae47eb27b34faecf67b4fe263f82d5412916c1ffd97c8cb7fb814b8444'],
  ];
  for (const [length, hash] of vectors) assert.equal(hex(await hashOf(input.subarray(0, length))), hash);
});

test('agrees with another implementation around the borders of blocks, chunks and trees', async () => {
  const borders = [64, 128, 1024, 2048, 3072, 4096, 5120, 8192, 65_536, 66_560, 131_072, 262_144, 327_680];
  for (const border of borders) {
    for (const length of [border - 1, border, border + 1]) {
      const bytes = input.subarray(0, length);
      assert.equal(hex(await hashOf(bytes)), await blake3(bytes), `${length} bytes`);
    }
  }
});

test('does not depend on how the bytes come, and can be looked at in between', async () => {
  for (const step of [1, 63, 1000, 1024, 1025, 4096, 65_536, 100_000, 262_144]) {
    const total = step === 1 ? 5000 : input.length;
    const hash = await Hash.create();
    for (let at = 0; at < total; at += step) {
      hash.update(input.subarray(at, Math.min(at + step, total)));
      if (at === 3 * step) assert.equal(hex(hash.peek()), await blake3(input.subarray(0, 4 * step)), `4 times ${step} bytes`);
    }
    hash.update(new Uint8Array());
    assert.equal(hex(hash.peek()), await blake3(input.subarray(0, total)), `by ${step} bytes`);
  }
});

test('two hashes grow side by side', async () => {
  const [one, other] = [await Hash.create(), await Hash.create()];
  for (let at = 0; at < input.length; at += 10_000) {
    one.update(input.subarray(at, at + 10_000));
    other.update(input.subarray(at, at + 9_999));
    other.update(input.subarray(at, at + 1));
  }
  const mixed = Buffer.concat(Array.from({ length: input.length / 10_000 }, (_, at) => [input.subarray(at * 10_000, at * 10_000 + 9_999), input.subarray(at * 10_000, at * 10_000 + 1)]).flat());
  assert.equal(hex(one.peek()), await blake3(input));
  assert.equal(hex(other.peek()), await blake3(mixed));
});

/** When an upload goes over TCP, and when back. */

import assert from 'node:assert/strict';
import { test } from 'node:test';
import { Judge } from '../src/transfer/judge.js';

/** Tells a judge twice a second of bytes that arrive at these rates, a second each; what it says, with the half second. */
function judged(rates: readonly number[], judge = new Judge()): string[] {
  const said: string[] = [];
  let bytes = 0;
  for (let half = 0; half < 2 * rates.length; half += 1) {
    const rate = rates[half >> 1] as number;
    const verdict = judge.look(half * 500, bytes, rate >= 0);
    if (verdict !== 'stay') said.push(`${verdict} at ${half / 2}`);
    bytes += Math.max(0, rate) / 2;
  }
  return said;
}

const MIB = 2 ** 20;
const times = (seconds: number, rate: number): number[] => Array.from({ length: seconds }, () => rate);

test('a fast upload stays', () => {
  assert.deepEqual(judged(times(60, 3 * MIB)), []);
});

test('a slow one is tried over TCP, once, and stays there where that is faster', () => {
  assert.deepEqual(judged([...times(3, 0.4 * MIB), ...times(60, 8 * MIB)]), ['try at 3']);
  // Though it becomes slow there, too.
  assert.deepEqual(judged([...times(3, 0.4 * MIB), ...times(9, 8 * MIB), ...times(60, 0.1 * MIB)]), ['try at 3']);
});

test('it goes back where TCP is not much faster, and is not tried again', () => {
  assert.deepEqual(judged(times(60, MIB)), ['try at 3', 'back at 6.5']);
  assert.deepEqual(judged([...times(3, MIB), ...times(60, 1.4 * MIB)]), ['try at 3', 'back at 6.5']);
});

test('it goes back where nothing arrives over TCP', () => {
  assert.deepEqual(judged([...times(3, MIB), ...times(60, 0)]), ['try at 3', 'back at 13.5']);
});

test('one that becomes slow is tried then; one that sends nothing is not judged', () => {
  assert.deepEqual(judged([...times(9, 9 * MIB), ...times(9, 0.2 * MIB)]), ['try at 13.5', 'back at 17']);
  assert.deepEqual(judged([...times(2, 0.2 * MIB), -1, ...times(2, 0.2 * MIB), -1, ...times(2, 0.2 * MIB)]), []);
});

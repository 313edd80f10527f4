/** The Worker that hashes for an upload: a bundle of its own, `hash-worker.js`. */

import { Hash } from './blake3.js';
import { type Answer, type Told } from './hasher.js';

const scope = globalThis as unknown as { onmessage: (event: { data: Told }) => void; postMessage(answer: Answer, transfer?: ArrayBufferLike[]): void };
const hashes = new Map<number, Hash>();

async function take(told: Told): Promise<void> {
  if ('add' in told) {
    for (const id of told.add) {
      (await hashFor(id)).update(told.bytes);
    }
    const { length, buffer } = told.bytes;
    scope.postMessage({ added: length, buffer }, [buffer]);
  } else if ('peek' in told) {
    scope.postMessage({ hash: (await hashFor(told.peek)).peek(), of: told.peek });
  } else {
    hashes.delete(told.end);
  }
}

async function hashFor(id: number): Promise<Hash> {
  const hash = hashes.get(id) ?? (await Hash.create());
  hashes.set(id, hash);
  return hash;
}

// One after the other, though making a hash waits.
let last = Hash.create().then(() => scope.postMessage({ ready: true }));
scope.onmessage = ({ data }) => {
  last = last.then(() => take(data));
  // What fails ends the Worker's use: as an error that the page hears of.
  last.catch((error: unknown) => setTimeout(() => { throw error; }));
};

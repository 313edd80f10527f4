/** BLAKE3, by the WebAssembly of `hash-wasm`. A page needs `wasm-unsafe-eval` in its policy. */

import { createBLAKE3, type IHasher } from 'hash-wasm';

/** A hash that grows. */
export class Hash {
  private readonly hasher: IHasher;

  private constructor(hasher: IHasher) {
    this.hasher = hasher;
  }

  static async create(): Promise<Hash> {
    return new Hash((await createBLAKE3()).init());
  }

  update(bytes: Uint8Array): void {
    this.hasher.update(bytes);
  }

  /** The hash of what came so far. More may come. */
  peek(): Uint8Array {
    const state = this.hasher.save();
    const hash = this.hasher.digest('binary');
    this.hasher.load(state);
    return hash;
  }
}

let shared: Promise<IHasher> | undefined;

/** The hash of all of `bytes`, in this thread. */
export async function hashOf(bytes: Uint8Array): Promise<Uint8Array> {
  // One instance for all small files: to make one costs more than to hash them.
  const hasher = await (shared ??= createBLAKE3());
  return hasher.init().update(bytes).digest('binary');
}

export function equal(a: Uint8Array, b: Uint8Array): boolean {
  return a.length === b.length && a.every((byte, at) => byte === b[at]);
}

/**
 * BLAKE3: the tree of chunks. Its inner loop is WebAssembly with SIMD (`scripts/kernel.js`), four chunks at a time. A page needs
 * `wasm-unsafe-eval` in its policy.
 */

import { KERNEL } from './kernel.js';
import { TransferError } from './messages.js';

const CHUNK = 1024;
const BLOCK = 64;
const BLOCKS = CHUNK / BLOCK;
const VALUE = 32;
const LANES = 4;
/** Chunks whose part of the tree is made in one go: they fit into a processor's second cache. */
const TREE = 64;

/** In the kernel's memory: bytes to hash, and behind them the values made of them. */
const INPUT = 0;
const VALUES = TREE * CHUNK;

const CHUNK_START = 1;
const CHUNK_END = 2;
const PARENT = 4;
const ROOT = 8;

interface Kernel {
  readonly memory: Uint8Array;
  hash4(at: number, stride: number, blocks: number, last: number, low: number, high: number, step: number, first: number, end: number, out: number): void;
}

/** One for all hashes of a thread: nothing stays in its memory between two calls. */
let kernel: Promise<Kernel> | undefined;

async function load(): Promise<Kernel> {
  try {
    const code = Uint8Array.from(atob(KERNEL), (byte) => byte.charCodeAt(0));
    const { instance } = await WebAssembly.instantiate(code);
    const { memory, hash4 } = instance.exports as { memory: WebAssembly.Memory; hash4: Kernel['hash4'] };
    return { memory: new Uint8Array(memory.buffer), hash4 };
  } catch (error) {
    throw new TransferError('internal', `this browser or the page's policy has no WebAssembly with SIMD: ${error}`, false);
  }
}

/** A hash that grows. */
export class Hash {
  private readonly kernel: Kernel;
  /** The last chunk so far: whether it is the last of all decides how it is hashed. */
  private readonly held = new Uint8Array(CHUNK);
  private length = 0;
  /** Chunks before that one, and the roots of the whole trees that they make, the largest first. */
  private chunks = 0;
  private readonly roots: Uint8Array[] = [];

  private constructor(kernel: Kernel) {
    this.kernel = kernel;
  }

  /** Rejects with `TransferError` where there is no WebAssembly with SIMD. */
  static async create(): Promise<Hash> {
    return new Hash(await (kernel ??= load()));
  }

  update(bytes: Uint8Array): void {
    let at = 0;
    if (this.length > 0) {
      at = Math.min(CHUNK - this.length, bytes.length);
      this.held.set(bytes.subarray(0, at), this.length);
      this.length += at;
      if (at === bytes.length) {
        return;
      }
      this.add(this.held, 1);
    }
    while (bytes.length - at > CHUNK) {
      let chunks = TREE;
      while (chunks * CHUNK >= bytes.length - at || this.chunks % chunks !== 0) {
        chunks /= 2;
      }
      const end = at + chunks * CHUNK;
      this.add(bytes.subarray(at, end), chunks);
      at = end;
    }
    this.held.set(bytes.subarray(at));
    this.length = bytes.length - at;
  }

  /** The hash of what came so far. More may come. */
  peek(): Uint8Array {
    const { memory, hash4 } = this.kernel;
    const blocks = Math.max(1, Math.ceil(this.length / BLOCK));
    memory.fill(0, INPUT, INPUT + CHUNK);
    memory.set(this.held.subarray(0, this.length), INPUT);
    const end = CHUNK_END | (this.roots.length === 0 ? ROOT : 0);
    hash4(INPUT, 0, blocks, this.length - BLOCK * (blocks - 1), this.chunks, this.chunks / 2 ** 32, 0, CHUNK_START, end, VALUES);
    return this.roots.reduceRight((value, root, at) => this.join(root, value, at === 0 ? ROOT : 0), memory.slice(VALUES, VALUES + VALUE));
  }

  /** Adds whole chunks, as many as a power of 2 by which the number of those before can be divided. They are not the last. */
  private add(bytes: Uint8Array, chunks: number): void {
    const { memory, hash4 } = this.kernel;
    memory.set(bytes, INPUT);
    for (let at = 0; at < chunks; at += LANES) {
      hash4(INPUT + at * CHUNK, CHUNK, BLOCKS, BLOCK, this.chunks + at, this.chunks / 2 ** 32, 1, CHUNK_START, CHUNK_END, VALUES + at * VALUE);
    }
    // Of fewer than four the other lanes make values that nobody reads.
    for (let parents = chunks / 2; parents >= 1; parents /= 2) {
      for (let at = 0; at < parents; at += LANES) {
        hash4(VALUES + 2 * at * VALUE, BLOCK, 1, BLOCK, 0, 0, 0, PARENT, 0, VALUES + at * VALUE);
      }
    }
    let value: Uint8Array = memory.slice(VALUES, VALUES + VALUE);
    this.chunks += chunks;
    for (let trees = this.chunks / chunks; trees % 2 === 0; trees /= 2) {
      value = this.join(this.roots.pop() as Uint8Array, value, 0);
    }
    this.roots.push(value);
  }

  /** The value of the parent of two. */
  private join(left: Uint8Array, right: Uint8Array, root: number): Uint8Array {
    const { memory, hash4 } = this.kernel;
    memory.set(left, INPUT);
    memory.set(right, INPUT + VALUE);
    hash4(INPUT, 0, 1, BLOCK, 0, 0, 0, PARENT, root, VALUES);
    return memory.slice(VALUES, VALUES + VALUE);
  }
}

/** The hash of all of `bytes`, in this thread. Rejects as `Hash.create` does. */
export async function hashOf(bytes: Uint8Array): Promise<Uint8Array> {
  const hash = await Hash.create();
  hash.update(bytes);
  return hash.peek();
}

export function equal(a: Uint8Array, b: Uint8Array): boolean {
  return a.length === b.length && a.every((byte, at) => byte === b[at]);
}

/**
 * Where the files of an upload are hashed: in a Worker of its own, so that hashing and sending go on side by side, or in
 * this thread where there is none.
 */

import { Deferred, Signal } from '../base/async.js';
import { Hash } from './blake3.js';
import { TransferError } from './messages.js';

/** Hashes that grow, by number. */
export interface Hasher {
  /** It is of no use any more. */
  readonly failed: boolean;
  /** A new one. */
  begin(): number;
  /** Memory to read into: what was hashed before leaves its own for this, so that a browser need not collect it. */
  buffer(): ArrayBuffer;
  /** Takes memory back whose bytes need not be hashed. */
  free(buffer: ArrayBufferLike): void;
  /**
   * Adds bytes to each of some hashes. Takes the bytes: their memory is the Worker's for a while, and `buffer`'s afterwards.
   * Resolves when there is room for more. Rejects with `TransferError`.
   */
  update(ids: readonly number[], bytes: Uint8Array): Promise<void>;
  /** The hash of what came so far. More may come. Rejects with `TransferError`. */
  peek(id: number): Promise<Uint8Array>;
  /** Nothing more is wanted of it. */
  end(id: number): void;
  /** Nothing more is wanted of any. */
  close(): void;
}

/** What the Worker is told, and what it answers: `ready` first, then to each `add` the bytes, to each `peek` the hash. */
export type Told = { add: readonly number[]; bytes: Uint8Array } | { peek: number } | { end: number };
export type Answer = { ready: true } | { added: number; buffer: ArrayBufferLike } | { hash: Uint8Array; of: number };

/** Bytes that the Worker has been given and has not hashed. */
const AHEAD = 2 << 20;
/** What is read at once, and how many such buffers are kept: as many as the Worker may have, and those of the lanes. */
const READ = 256 << 10;
const FREE = AHEAD / READ + 16;
/** How long the Worker may take to start. */
const START_MS = 5000;

/** A Worker from the script at `script`, or this thread if it does not start there. */
export async function openHasher(script: string | URL | false | undefined): Promise<Hasher> {
  try {
    // Beside this bundle unless the page says where.
    const url = script ?? new URL('./hash-worker.js', import.meta.url);
    if (url !== false && typeof Worker === 'function') {
      return await WorkerHasher.start(new Worker(url, { type: 'module' }));
    }
  } catch {
    // The page's policy forbids it, or the script is not there.
  }
  return new ThreadHasher();
}

class Buffers {
  private readonly unused: ArrayBuffer[] = [];

  buffer(): ArrayBuffer {
    return this.unused.pop() ?? new ArrayBuffer(READ);
  }

  free(buffer: ArrayBufferLike): void {
    // Others come where a browser reads into memory of its own.
    if (buffer instanceof ArrayBuffer && buffer.byteLength === READ && this.unused.length < FREE) {
      this.unused.push(buffer);
    }
  }
}

export class ThreadHasher extends Buffers implements Hasher {
  readonly failed = false;
  private readonly hashes = new Map<number, Promise<Hash>>();
  private next = 1;

  begin(): number {
    const id = this.next;
    this.next += 1;
    this.hashes.set(id, Hash.create());
    return id;
  }

  async update(ids: readonly number[], bytes: Uint8Array): Promise<void> {
    for (const id of ids) {
      (await this.hashes.get(id))?.update(bytes);
    }
    this.free(bytes.buffer);
  }

  async peek(id: number): Promise<Uint8Array> {
    return (await (this.hashes.get(id) as Promise<Hash>)).peek();
  }

  end(id: number): void {
    this.hashes.delete(id);
  }

  close(): void {
    this.hashes.clear();
  }
}

class WorkerHasher extends Buffers implements Hasher {
  private readonly worker: Worker;
  private readonly peeks = new Map<number, Deferred<Uint8Array>>();
  private readonly moved = new Signal();
  private next = 1;
  private ahead = 0;
  private failure: TransferError | undefined;

  private constructor(worker: Worker) {
    super();
    this.worker = worker;
    worker.onmessage = ({ data }: MessageEvent<Answer>) => this.onAnswer(data);
    worker.onerror = (event) => {
      event.preventDefault();
      this.fail(new TransferError('internal', `hashing has failed: ${event.message}`, true));
    };
  }

  get failed(): boolean {
    return this.failure !== undefined;
  }

  static async start(worker: Worker): Promise<Hasher> {
    const ready = new Deferred<void>();
    worker.onmessage = () => ready.resolve();
    worker.onerror = (event) => {
      event.preventDefault();
      ready.reject(new Error('the Worker does not start'));
    };
    const timer = setTimeout(() => ready.reject(new Error('the Worker does not start in time')), START_MS);
    try {
      await ready.promise;
      return new WorkerHasher(worker);
    } catch (error) {
      worker.terminate();
      throw error;
    } finally {
      clearTimeout(timer);
    }
  }

  begin(): number {
    const id = this.next;
    this.next += 1;
    return id;
  }

  async update(ids: readonly number[], bytes: Uint8Array): Promise<void> {
    this.ahead += bytes.length;
    this.worker.postMessage({ add: ids, bytes } satisfies Told, [bytes.buffer]);
    while (this.ahead > AHEAD && this.failure === undefined) {
      await this.moved.wait();
    }
    this.check();
  }

  async peek(id: number): Promise<Uint8Array> {
    this.check();
    const hash = new Deferred<Uint8Array>();
    this.peeks.set(id, hash);
    this.worker.postMessage({ peek: id } satisfies Told);
    return hash.promise;
  }

  end(id: number): void {
    this.worker.postMessage({ end: id } satisfies Told);
  }

  close(): void {
    this.fail(new TransferError('cancelled', 'the upload is over', false));
    this.worker.terminate();
  }

  private check(): void {
    if (this.failure) {
      throw this.failure;
    }
  }

  private fail(error: TransferError): void {
    this.failure ??= error;
    for (const hash of this.peeks.values()) {
      hash.reject(this.failure);
    }
    this.moved.wake();
  }

  private onAnswer(answer: Answer): void {
    if ('added' in answer) {
      this.ahead -= answer.added;
      this.free(answer.buffer);
      this.moved.wake();
    } else if ('hash' in answer) {
      this.peeks.get(answer.of)?.resolve(answer.hash);
      this.peeks.delete(answer.of);
    }
  }
}

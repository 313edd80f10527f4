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
  /**
   * Adds bytes to each of some hashes. Takes the bytes: their memory may be the Worker's afterwards. Resolves when there
   * is room for more. Rejects with `TransferError`.
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
export type Answer = { ready: true } | { added: number } | { hash: Uint8Array; of: number };

/** Bytes that the Worker has been given and has not hashed. */
const AHEAD = 8 << 20;
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

export class ThreadHasher implements Hasher {
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

class WorkerHasher implements Hasher {
  private readonly worker: Worker;
  private readonly peeks = new Map<number, Deferred<Uint8Array>>();
  private readonly moved = new Signal();
  private next = 1;
  private ahead = 0;
  private failure: TransferError | undefined;

  private constructor(worker: Worker) {
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
    const isWhole = bytes.byteLength === bytes.buffer.byteLength;
    this.worker.postMessage({ add: ids, bytes } satisfies Told, isWhole ? [bytes.buffer] : []);
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
      this.moved.wake();
    } else if ('hash' in answer) {
      this.peeks.get(answer.of)?.resolve(answer.hash);
      this.peeks.delete(answer.of);
    }
  }
}

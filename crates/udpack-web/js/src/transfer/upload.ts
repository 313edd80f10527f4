/** Uploads of many files over several lanes, which go on over lost connections (PROTOCOL.md §11, "Coming back"). */

import { Deferred, Signal } from '../base/async.js';
import { type Socket } from '../client/socket.js';
import { equal, Hash, hashOf } from './blake3.js';
import { Lane } from './lane.js';
import { type Done, type Range, type Said, TransferError } from './messages.js';

/** What a server is to do when the name is taken. */
export type IfExists = 'same' | 'error' | 'skip' | 'overwrite' | 'rename';

export interface UploadOptions {
  /** Where a file goes; its `webkitRelativePath` or its name unless given. */
  path?: (file: File) => string;
  /** `same` unless given: a file of equal content is left, another one is an error. */
  ifExists?: IfExists | ((file: File) => IfExists);
  /** Files that are sent side by side; 4 unless given, at most 16. */
  lanes?: number;
  /** Gives everything up that is not done. */
  signal?: AbortSignal;
}

/** How far a file is. */
export interface FileProgress {
  readonly file: File;
  readonly path: string;
  readonly state: 'waiting' | 'sending' | 'checking' | 'done' | 'failed';
  /** Bytes that the server has received, and of those the ones that outlive its power cut. */
  readonly received: number;
  readonly safe: number;
  readonly done?: Done;
  readonly error?: TransferError;
}

/** Files up to this size are sent in one message. */
const SMALL = 64 << 10;
const CHUNK_MOST = 1 << 20;
const LANES_MOST = 16;
/** Files of a lane whose outcome is waited for while the next are sent. */
const CHECKING = 32;
/** How long a file that another client writes is offered again, and any without a move. */
const BUSY_MS = 20_000;
const PATIENCE_MS = 300_000;
const TRIES = 4;
const PAUSE_MS = 1000;

class Entry {
  state: FileProgress['state'] = 'waiting';
  received = 0;
  safe = 0;
  done: Done | undefined;
  error: TransferError | undefined;
  ifExists: IfExists;
  tries = 0;
  /** What was told in a `finish` or `put`. */
  told: { size: number; hash: Uint8Array } | undefined;
  since: number | undefined;
  cancel: (() => void) | undefined;
  /** Names the upload over all its offers. */
  readonly run = crypto.getRandomValues(new Uint8Array(16));

  constructor(
    readonly file: File,
    readonly path: string,
    ifExists: IfExists,
  ) {
    this.ifExists = ifExists;
  }

  get over(): boolean {
    return this.state === 'done' || this.state === 'failed';
  }

  get progress(): FileProgress {
    const { file, path, state, received, safe, done, error } = this;
    return { file, path, state, received, safe, ...(done && { done }), ...(error && { error }) };
  }
}

/** Uploads under way. */
export class Upload {
  /** Resolves when each file is done or has failed, with how each ended. Never rejects. */
  readonly done: Promise<FileProgress[]>;
  private readonly socket: Socket;
  private readonly entries: Entry[];
  private readonly waiting: Entry[];
  private readonly changed = new Signal();
  private readonly controller = new AbortController();

  /** Made by `upload`. */
  constructor(socket: Socket, files: readonly File[], options: UploadOptions) {
    const { ifExists = 'same', lanes = 4, signal } = options;
    const path = options.path ?? ((file) => file.webkitRelativePath || file.name);
    const policy = typeof ifExists === 'function' ? ifExists : () => ifExists;
    this.socket = socket;
    this.entries = files.map((file) => new Entry(file, path(file), policy(file)));
    this.waiting = [...this.entries];
    signal?.addEventListener('abort', () => this.cancel());
    if (signal?.aborted) {
      this.cancel();
    }
    const workers = Array.from({ length: Math.max(1, Math.min(lanes, LANES_MOST, files.length)) }, () => this.work());
    this.done = Promise.all(workers).then(() => this.files);
  }

  /** How far each file is, in the order they were given. */
  get files(): FileProgress[] {
    return this.entries.map((entry) => entry.progress);
  }

  /** Bytes of all files, and how many of them the server has received. */
  get total(): { bytes: number; received: number } {
    const sum = (of: (entry: Entry) => number): number => this.entries.reduce((total, entry) => total + of(entry), 0);
    return { bytes: sum((entry) => entry.file.size), received: sum((entry) => entry.received) };
  }

  /** Gives up a file, or all that are not done; the server removes what it has of them. */
  cancel(file?: File): void {
    for (const entry of this.entries) {
      if (!entry.over && (file === undefined || entry.file === file)) {
        this.fail(entry, new TransferError('cancelled', 'given up', false));
        entry.cancel?.();
      }
    }
    if (this.entries.every((entry) => entry.over)) {
      this.controller.abort(new TransferError('cancelled', 'given up', false));
    }
  }

  /** The state of all files whenever something has moved, the latest only, until all are over. */
  async *[Symbol.asyncIterator](): AsyncGenerator<FileProgress[], void, undefined> {
    while (this.entries.some((entry) => !entry.over)) {
      yield this.files;
      if (this.entries.some((entry) => !entry.over)) {
        await this.changed.wait();
      }
    }
    yield this.files;
  }

  private fail(entry: Entry, error: TransferError): void {
    entry.state = 'failed';
    entry.error = error;
    this.changed.wake();
  }

  /** One lane after the other, until no file waits. */
  private async work(): Promise<void> {
    let lane: Lane | undefined;
    const outcomes = new Set<Promise<void>>();
    while (true) {
      const entry = this.waiting.shift();
      if (entry === undefined) {
        if (outcomes.size === 0) {
          break;
        }
        await Promise.race(outcomes);
        continue;
      }
      if (entry.over) {
        continue;
      }
      try {
        if (lane === undefined || lane.over) {
          lane = await Lane.open(this.socket, this.controller.signal);
        }
        const { outcome } = await this.offer(lane, entry);
        const settled: Promise<void> = outcome
          .then((error) => (error ? this.again(entry, error) : undefined))
          .then(() => void outcomes.delete(settled));
        outcomes.add(settled);
        if (outcomes.size >= CHECKING) {
          await Promise.race(outcomes);
        }
      } catch (error) {
        await this.again(entry, error instanceof TransferError ? error : closed(error));
      }
    }
    await lane?.close();
  }

  /** Whether a file is offered again after an error, and when (the table of "Coming back"). */
  private async again(entry: Entry, error: TransferError): Promise<void> {
    if (entry.over) {
      return;
    }
    const now = performance.now();
    entry.since ??= now;
    const patience = error.reason === 'busy' ? BUSY_MS : PATIENCE_MS;
    const isLost = error.reason === 'lane_closed' || error.reason === 'busy';
    entry.tries += isLost ? 0 : 1;
    if (error.reason === 'exists' && entry.ifExists === 'error' && entry.told !== undefined && entry.tries === 1 && entry.since < now) {
      // It may be this upload's own file, stored by a server that was restarted since.
      entry.ifExists = 'same';
    } else if (!error.retry || entry.tries >= TRIES || now - entry.since > patience) {
      return this.fail(entry, error);
    }
    if (error.reason !== 'lane_closed') {
      await new Promise((resolve) => setTimeout(resolve, PAUSE_MS));
    }
    if (!entry.over) {
      entry.state = 'waiting';
      this.waiting.push(entry);
    }
  }

  /** Sends a file. `outcome` resolves when that is known, with the error unless the file is stored. */
  private async offer(lane: Lane, entry: Entry): Promise<{ outcome: Promise<TransferError | undefined> }> {
    const { file, path, run, ifExists } = entry;
    const outcome = new Deferred<TransferError | undefined>();
    const ready = new Deferred<{ have: Range[]; chunk: number }>();
    const settle = (error: TransferError | undefined): void => {
      lane.end(id);
      entry.cancel = undefined;
      outcome.resolve(error);
      ready.reject(error);
    };
    const id = lane.begin({
      said: (event, said) => this.said(entry, event, said, ready, settle),
      lost: settle,
    });
    entry.state = 'sending';
    entry.cancel = () => {
      void lane.send('cancel', { id }).catch(() => {});
      settle(entry.error);
    };
    this.changed.wake();
    const head = { id, path, mtime: Math.floor(file.lastModified / 1000), if_exists: ifExists, run };
    try {
      if (file.size <= SMALL) {
        const data = new Uint8Array(await file.arrayBuffer());
        const hash = await hashOf(data);
        entry.told = { size: data.length, hash };
        await lane.send('put', { ...head, hash, data });
      } else {
        await lane.send('file', { ...head, size: file.size, resume: true });
        const { have, chunk } = await ready.promise;
        await this.sendBytes(lane, entry, id, have, Math.max(1, Math.min(chunk, CHUNK_MOST)), () => outcome.settled);
      }
      if (!entry.over) {
        entry.state = 'checking';
        this.changed.wake();
      }
    } catch (error) {
      if (!outcome.settled) {
        // The file cannot be read, or has changed: what the server has of it stays for another offer.
        void lane.send('cancel', { id, keep: true }).catch(() => {});
        settle(error instanceof TransferError ? error : new TransferError('source_changed', `${error}`, false));
      }
    }
    return { outcome: outcome.promise };
  }

  private said(entry: Entry, event: string, said: Said, ready: Deferred<{ have: Range[]; chunk: number }>, settle: (error?: TransferError) => void): void {
    if (event === 'ready') {
      ready.resolve({ have: said.ranges('have'), chunk: said.number('chunk') });
    } else if (event === 'ack') {
      entry.received = said.number('recv');
      entry.safe = said.number('safe');
      entry.since = undefined;
    } else if (event === 'error') {
      settle(said.error());
    } else if (event === 'done') {
      const done = said.done();
      const { told } = entry;
      const isOurs = told !== undefined && told.size === done.size && equal(told.hash, done.hash);
      if (!isOurs && !(done.same && entry.ifExists === 'skip')) {
        settle(new TransferError('hash_mismatch', 'the server has stored something else', false));
      } else if (!entry.over) {
        entry.state = 'done';
        entry.done = done;
        entry.received = done.size;
        entry.safe = done.size;
        settle(undefined);
      }
    }
    this.changed.wake();
  }

  /** Sends what the server has not, and the hash of the whole. */
  private async sendBytes(lane: Lane, entry: Entry, id: number, have: Range[], chunk: number, stop: () => boolean): Promise<void> {
    const { file } = entry;
    const whole = await Hash.create();
    const send = async (from: number, to: number, hashes: boolean): Promise<void> => {
      let off = from;
      for await (const bytes of read(file, from, to)) {
        if (hashes) {
          whole.update(bytes);
        }
        for (let at = 0; at < bytes.length && !stop(); at += chunk) {
          const part = bytes.subarray(at, at + chunk);
          // The bytes come last, so that they can be passed on without being copied.
          await lane.send('chunk', { id, off, chunk: part });
          off += part.length;
        }
        if (stop()) {
          return;
        }
      }
    };
    let at = 0;
    for (const { off, len, hash } of have) {
      if (off + len > file.size || len === 0) {
        break;
      }
      await send(at, off, true);
      const here = await Hash.create();
      for await (const bytes of read(file, off, off + len)) {
        here.update(bytes);
        whole.update(bytes);
        if (stop()) {
          return;
        }
      }
      if (!equal(here.peek(), hash)) {
        await send(off, off + len, false);
      }
      at = off + len;
    }
    await send(at, file.size, true);
    if (!stop()) {
      entry.told = { size: file.size, hash: whole.peek() };
      await lane.send('finish', { id, ...entry.told });
    }
  }
}

/** The bytes of a part of a file, as the browser reads them. Throws when there are fewer. */
async function* read(file: File, from: number, to: number): AsyncGenerator<Uint8Array, void, undefined> {
  let left = to - from;
  if (left === 0) {
    return;
  }
  const reader = file.slice(from, to).stream().getReader();
  try {
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      left -= part.value.length;
      yield part.value;
    }
  } finally {
    void reader.cancel().catch(() => {});
  }
  if (left !== 0) {
    throw new TransferError('source_changed', 'the file has become shorter while it was read', true);
  }
}

function closed(error: unknown): TransferError {
  const { message = `${error}`, retry = false } = (error ?? {}) as { message?: string; retry?: boolean };
  return new TransferError('closed', message, retry);
}

/** Uploads a file or several. Run it in a Worker where the page must stay quick: hashing takes processor time. */
export function upload(socket: Socket, files: File | readonly File[], options: UploadOptions = {}): Upload {
  return new Upload(socket, files instanceof File ? [files] : files, options);
}

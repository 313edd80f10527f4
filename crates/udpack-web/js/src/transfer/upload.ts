/** Uploads of many files over several lanes, which go on over lost connections (PROTOCOL.md §11, "Coming back"). */

import { Deferred, handled, Signal } from '../base/async.js';
import { Emitter } from '../base/emitter.js';
import { type Socket } from '../client/socket.js';
import { equal, hashOf } from './blake3.js';
import { Entry, type FileProgress, GIVEN_UP, type IfExists } from './entry.js';
import { type Hasher, openHasher } from './hasher.js';
import { Judge } from './judge.js';
import { Lane } from './lane.js';
import { type Range, type Said, TransferError } from './messages.js';
import { type Item, itemsOf, type Sources, unreadable, walk } from './source.js';

export interface UploadOptions {
  /** Where an item goes: given its own path and, unless it is an empty directory, its file. To its own path unless given. */
  path?: (path: string, file?: File) => string;
  /** `same` unless given: a file of equal content is left, another one is an error. */
  ifExists?: IfExists | ((path: string) => IfExists);
  /**
   * Asked for a file whose name is taken: what to do with it. `error`, and a rejection, let it fail. Of several files one
   * is asked about after the other, while the rest goes on.
   */
  onConflict?: (file: FileProgress) => IfExists | Promise<IfExists>;
  /** Files that are sent side by side; 4 unless given, at most 16. */
  lanes?: number;
  /**
   * Whether what WebTransport carries slowly is tried over TCP, and stays there if that is faster. It is unless this is false, where
   * the socket's `transport` is `auto`.
   */
  move?: boolean;
  /** Gives everything up that is not done. */
  signal?: AbortSignal;
  /** The script of the Worker that hashes, `hash-worker.js` beside this bundle unless given. False hashes in this thread. */
  worker?: string | URL | false;
}

/** Of all files together. */
export interface UploadTotal {
  readonly files: number;
  readonly done: number;
  readonly failed: number;
  readonly bytes: number;
  /** Bytes that the server has received, and of those the ones that outlive its power cut. */
  readonly received: number;
  readonly safe: number;
  /** Whether all directories are read: there will be no more files. */
  readonly complete: boolean;
}

export interface UploadEvents {
  /** A file is offered again; `inMs` from now, unless the connection has to come back first. */
  retry: { readonly file: FileProgress; readonly error: TransferError; readonly inMs: number };
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
/** Between two states that a loop is given. */
const TELL_MS = 100;
/** How often it is asked whether TCP is to be tried. */
const JUDGE_MS = 500;
/** Sockets whose uploads were not faster over TCP. */
const vain = new WeakSet<Socket>();

/** How an offer ended: `stopped` by this side, or an error, or the file is stored. */
type Outcome = TransferError | 'stopped' | undefined;

interface Ready {
  readonly have: Range[];
  readonly chunk: number;
}

/** Uploads under way. */
export class Upload {
  /** Resolves when each file is done or has failed, with how each ended. Never rejects. */
  readonly done: Promise<FileProgress[]>;
  private readonly socket: Socket;
  /** Over which lanes are opened: that one, or another one over TCP. */
  private via: Socket;
  private readonly options: UploadOptions;
  private readonly entries: Entry[] = [];
  private readonly waiting: Entry[] = [];
  /** Given up, and the server may still have a part of them. */
  private readonly removals: Entry[] = [];
  /** Files that are not over; and those given up of which the server may still have something. */
  private left = 0;
  private going = 0;
  private readonly events = new Emitter<UploadEvents>();
  private readonly over = new Deferred<FileProgress[]>();
  /** Something has moved, and there is work for a lane, or never again. */
  private readonly changed = new Signal();
  private readonly work = new Signal();
  private readonly controller = new AbortController();
  private complete = false;
  private paused = false;
  private hasher: Promise<Hasher> | undefined;
  private asking: Promise<void> = Promise.resolve();

  /** Made by `upload`. */
  constructor(socket: Socket, sources: Sources, options: UploadOptions) {
    this.socket = socket;
    this.via = socket;
    this.options = options;
    this.done = this.over.promise;
    const { lanes = 4, signal } = options;
    const { items, later } = itemsOf(sources);
    for (const item of items) {
      this.add(item);
    }
    void this.list(later);
    signal?.addEventListener('abort', () => void this.cancel());
    if (signal?.aborted) {
      void this.cancel();
    }
    const workers = Array.from({ length: Math.max(1, Math.min(lanes, LANES_MOST)) }, () => this.serve());
    void Promise.all(workers).then(async () => {
      await (this.via === this.socket ? undefined : this.via.close());
      (await this.hasher)?.close();
    });
    if (options.move !== false && !vain.has(socket)) {
      void this.judge();
    }
  }

  /** Calls `listener` at each event until the returned function is called. */
  on<E extends keyof UploadEvents>(event: E, listener: (value: UploadEvents[E]) => void): () => void {
    return this.events.on(event, listener);
  }

  /** How far each file is, in the order they were given. */
  get files(): FileProgress[] {
    return this.entries.map((entry) => entry.progress);
  }

  get total(): UploadTotal {
    const total = { files: this.entries.length, done: 0, failed: 0, bytes: 0, received: 0, safe: 0, complete: this.complete };
    for (const { state, size, received, safe } of this.entries) {
      total.done += state === 'done' ? 1 : 0;
      total.failed += state === 'failed' ? 1 : 0;
      total.bytes += size;
      total.received += received;
      total.safe += safe;
    }
    return total;
  }

  /**
   * Sends nothing more of a file, or of all, until `resume`. The server keeps what it has, for a day by its default. A
   * file whose bytes are all sent is not held up.
   */
  pause(which?: File | string): void {
    this.paused ||= which === undefined;
    for (const entry of this.chosen(which)) {
      entry.paused = true;
      if (entry.state === 'waiting') {
        entry.state = 'paused';
      } else if (entry.state === 'sending') {
        entry.stop?.('hold');
      }
    }
    this.changed.wake();
  }

  /** Goes on with a file, or with all. */
  resume(which?: File | string): void {
    this.paused &&= which !== undefined;
    for (const entry of this.chosen(which)) {
      entry.paused = false;
      if (entry.state === 'paused') {
        this.enqueue(entry);
      }
    }
    this.changed.wake();
  }

  /**
   * Gives up a file, or all that are not done. Resolves when the server has removed what it had of them, or there is no
   * connection for that any more. A file whose bytes are all sent ends as the server says, and what is stored stays.
   */
  async cancel(which?: File | string): Promise<void> {
    const given = this.chosen(which);
    if (which === undefined) {
      this.complete = true;
    }
    for (const entry of given) {
      if (entry.gone === undefined) {
        entry.gone = new Deferred();
        this.going += 1;
      }
      if (entry.state !== 'checking') {
        this.giveUp(entry);
      }
    }
    this.settle();
    await Promise.all(given.map((entry) => entry.gone?.promise));
  }

  /** The state of all files whenever something has moved, the latest only and at most ten times a second, until all are over. */
  async *[Symbol.asyncIterator](): AsyncGenerator<FileProgress[], void, undefined> {
    while (!this.over.settled) {
      yield this.files;
      const pause = new Promise((resolve) => setTimeout(resolve, TELL_MS));
      for (const next of [this.changed.wait(), pause]) {
        await Promise.race([next, this.done]);
      }
    }
    yield this.files;
  }

  /** The files that are not over: of a name, or all. */
  private chosen(which: File | string | undefined): Entry[] {
    return this.entries.filter((entry) => !entry.over && (which === undefined || entry.file === which || entry.path === which));
  }

  private add(item: Item): void {
    const { path = (own: string) => own, ifExists = 'same' } = this.options;
    const to = path(item.path, 'file' in item ? item.file : undefined);
    const entry = new Entry(item, to, typeof ifExists === 'function' ? ifExists(to) : ifExists);
    entry.paused = this.paused;
    this.entries.push(entry);
    if (!entry.over) {
      this.left += 1;
      this.enqueue(entry);
    }
  }

  /** Adds what the sources have, as they tell it. */
  private async list(later: ReturnType<typeof itemsOf>['later']): Promise<void> {
    try {
      for await (const item of walk(later)) {
        if (this.complete) {
          break;
        }
        this.add(item);
        this.changed.wake();
      }
    } catch (error) {
      this.add({ path: '', error });
    }
    this.complete = true;
    this.settle();
  }

  /** Puts a file in line, unless it is paused. */
  private enqueue(entry: Entry): void {
    entry.state = entry.paused ? 'paused' : 'waiting';
    if (!entry.paused && !entry.queued) {
      entry.queued = true;
      this.waiting.push(entry);
      this.work.wake();
    }
  }

  private fail(entry: Entry, error: TransferError): void {
    entry.state = 'failed';
    entry.error = error;
    this.left -= 1;
    this.settle();
  }

  private giveUp(entry: Entry): void {
    const { stop } = entry;
    this.fail(entry, GIVEN_UP);
    if (stop) {
      stop('drop');
    } else {
      this.remove(entry);
    }
  }

  /** What of it is at the server is to go. */
  private remove(entry: Entry): void {
    if (entry.offered) {
      this.removals.push(entry);
      this.work.wake();
    } else {
      this.gone(entry);
    }
  }

  private gone(entry: Entry): void {
    if (entry.gone && !entry.gone.settled) {
      entry.gone.resolve();
      this.going -= 1;
      this.settle();
    }
  }

  private settle(): void {
    this.changed.wake();
    if (this.complete && this.left === 0) {
      if (!this.over.settled) {
        this.over.resolve(this.files);
      }
      this.work.wake();
      if (this.going === 0) {
        this.controller.abort(GIVEN_UP);
      }
    }
  }

  /** Has what WebTransport carries slowly go over TCP, as long as that is faster. */
  private async judge(): Promise<void> {
    const judge = new Judge();
    while (!this.over.settled) {
      await Promise.race([new Promise((resolve) => setTimeout(resolve, JUDGE_MS)), this.done]);
      const isSending = this.entries.some(({ state }) => state === 'sending') && (this.via !== this.socket || this.socket.transport === 'webtransport');
      const verdict = judge.look(performance.now(), this.total.received, isSending);
      if (verdict === 'try') {
        const other = await this.socket.overTcp()?.catch(() => undefined);
        if (!other || this.over.settled) {
          vain.add(this.socket);
          await other?.close();
          return;
        }
        void other.closed.then(() => this.via === other && this.move(this.socket));
        // It lives no longer than the one that it helps.
        void this.socket.closed.then(() => other.close());
        this.move(other);
      } else if (verdict === 'back' && this.via !== this.socket) {
        const other = this.via;
        vain.add(this.socket);
        this.move(this.socket);
        await other.close();
      }
    }
  }

  /** Sends what is under way over this connection: the server takes it away from the lane that has it. */
  private move(to: Socket): void {
    this.via = to;
    for (const entry of this.entries) {
      if (entry.state === 'sending' && entry.offered) {
        entry.stop?.('move');
        this.enqueue(entry);
      }
    }
  }

  /** One lane after the other, until there is nothing to do any more. */
  private async serve(): Promise<void> {
    let lane: Lane | undefined;
    // The server may still have to say something of files on these.
    const left: Lane[] = [];
    const open = async (): Promise<Lane> => {
      if (lane && lane.socket !== this.via) {
        left.push(lane);
        lane = undefined;
      }
      if (lane === undefined || lane.over) {
        lane = undefined;
        lane = await Lane.open(this.via, this.controller.signal);
      }
      return lane;
    };
    const outcomes = new Set<Promise<void>>();
    while (true) {
      const given = this.removals.shift();
      if (given) {
        await this.removeNow(given, open);
        continue;
      }
      const entry = this.waiting.shift();
      if (entry === undefined) {
        if (outcomes.size === 0 && this.over.settled && this.going === 0) {
          break;
        }
        await Promise.race([...outcomes, this.work.wait()]);
        continue;
      }
      entry.queued = false;
      if (entry.state !== 'waiting') {
        continue;
      }
      try {
        const on = await open();
        // It may have been paused or given up meanwhile.
        if (entry.state !== 'waiting') {
          continue;
        }
        const { outcome } = await this.offer(on, entry);
        const settled: Promise<void> = outcome
          .then((error) => (error instanceof TransferError ? this.again(entry, error) : undefined))
          .then(() => void outcomes.delete(settled));
        outcomes.add(settled);
        if (outcomes.size >= CHECKING) {
          await Promise.race(outcomes);
        }
      } catch (error) {
        await this.again(entry, error instanceof TransferError ? error : closed(error));
      }
    }
    await Promise.all([...left, lane].map((each) => each?.close()));
  }

  /** Whether a file is offered again after an error, and when (the table of "Coming back"). */
  private async again(entry: Entry, error: TransferError): Promise<void> {
    if (entry.over) {
      return;
    }
    if (entry.gone) {
      return this.giveUp(entry);
    }
    const now = performance.now();
    entry.since ??= now;
    const patience = error.reason === 'busy' ? BUSY_MS : PATIENCE_MS;
    const isLost = error.reason === 'lane_closed' || error.reason === 'busy';
    entry.tries += isLost ? 0 : 1;
    if (error.reason === 'exists' && entry.ifExists === 'error' && entry.told !== undefined && entry.tries === 1 && entry.since < now) {
      // It may be this upload's own file, stored by a server that was restarted since.
      entry.ifExists = 'same';
    } else if (error.reason === 'exists' && error.why === undefined && this.options.onConflict && !entry.asked) {
      entry.state = 'asking';
      this.changed.wake();
      // Not waited for: the lane goes on with other files.
      this.asking = this.asking.then(() => this.ask(entry, error));
      return;
    } else if (!error.retry || entry.tries >= TRIES || now - entry.since > patience) {
      return this.fail(entry, error);
    }
    entry.retries += 1;
    entry.trouble = error;
    entry.state = entry.paused ? 'paused' : 'waiting';
    this.changed.wake();
    const inMs = error.reason === 'lane_closed' ? 0 : PAUSE_MS;
    this.events.emit('retry', { file: entry.progress, error, inMs });
    if (inMs > 0) {
      await new Promise((resolve) => setTimeout(resolve, inMs));
    }
    if (entry.state === 'waiting') {
      this.enqueue(entry);
    }
  }

  private async ask(entry: Entry, error: TransferError): Promise<void> {
    if (entry.over) {
      return;
    }
    let answer: IfExists = 'error';
    try {
      answer = (await this.options.onConflict?.(entry.progress)) ?? 'error';
    } catch {
      // Whoever is asked gives it up.
    }
    if (entry.over) {
      return;
    }
    if (answer === 'error') {
      return this.fail(entry, error);
    }
    entry.asked = true;
    entry.ifExists = answer;
    this.enqueue(entry);
    this.changed.wake();
  }

  /** Sends a file. `outcome` resolves when that is known, with the error unless the file is stored. */
  private async offer(lane: Lane, entry: Entry): Promise<{ outcome: Promise<Outcome> }> {
    const { file, path } = entry;
    const outcome = new Deferred<Outcome>();
    const ready = new Deferred<Ready>();
    const settle = (how: Outcome): void => {
      if (outcome.settled) {
        return;
      }
      entry.stop = undefined;
      outcome.resolve(how);
      ready.reject(how);
      if (how !== 'stopped') {
        lane.end(id);
      }
    };
    const id = lane.begin({
      said: (event, said) => {
        if (entry.gone === undefined || !outcome.settled) {
          this.said(entry, event, said, ready, settle);
        } else if (event === 'error' || event === 'done') {
          // Given up, and the server has answered.
          lane.end(id);
          this.gone(entry);
        }
      },
      lost: (error) => {
        const isStopped = outcome.settled;
        settle(error);
        if (isStopped && entry.gone) {
          this.remove(entry);
        }
      },
    });
    entry.state = 'sending';
    entry.stop = (how) => {
      if (how !== 'move') {
        // A lane that is over is heard of by `lost`.
        handled(lane.send('cancel', how === 'hold' ? { id, keep: true } : { id }));
      }
      settle('stopped');
      if (how !== 'drop') {
        entry.state = 'paused';
        lane.end(id);
      }
    };
    this.changed.wake();
    try {
      if (file === undefined) {
        await lane.send('dir', { id, path });
      } else if (file.size <= SMALL) {
        const data = new Uint8Array(await file.arrayBuffer());
        const hash = await hashOf(data);
        if (!outcome.settled) {
          entry.told = { size: data.length, hash };
          await lane.send('put', { ...headOf(entry, id, file), hash, data });
        }
      } else {
        entry.offered = true;
        await lane.send('file', { ...headOf(entry, id, file), size: file.size, resume: true });
        const { have, chunk } = await ready.promise;
        await this.sendBytes(lane, entry, file, id, have, Math.max(1, Math.min(chunk, CHUNK_MOST)), () => outcome.settled);
      }
      if (!outcome.settled) {
        entry.state = 'checking';
        this.changed.wake();
      }
    } catch (error) {
      if (!outcome.settled) {
        // The file cannot be read, or has changed: what the server has of it stays for another offer.
        handled(lane.send('cancel', { id, keep: true }));
        settle(error instanceof TransferError ? error : new TransferError('source_changed', unreadable(error).message, false));
      }
    }
    return { outcome: outcome.promise };
  }

  private said(entry: Entry, event: string, said: Said, ready: Deferred<Ready>, settle: (how: Outcome) => void): void {
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
      const isOurs = entry.isDirectory || (told !== undefined && told.size === done.size && equal(told.hash, done.hash));
      if (!isOurs && !(done.same && entry.ifExists === 'skip')) {
        settle(new TransferError('hash_mismatch', 'the server has stored something else', false));
      } else if (!entry.over) {
        entry.state = 'done';
        entry.done = done;
        entry.received = done.size;
        entry.safe = done.size;
        this.left -= 1;
        settle(undefined);
        this.gone(entry);
        this.settle();
      }
    }
    this.changed.wake();
  }

  /** Has the server remove what it has of a file that was given up: takes the upload over, and cancels it. */
  private async removeNow(entry: Entry, open: () => Promise<Lane>): Promise<void> {
    const { file } = entry;
    for (let tries = 0; file && tries < TRIES; tries += 1) {
      const answer = new Deferred<TransferError | undefined>();
      try {
        const lane = await open();
        const id = lane.begin({
          said: (event, said) => {
            if (event === 'error') answer.resolve(said.error());
            if (event === 'done') answer.resolve(undefined);
          },
          lost: (error) => answer.resolve(error),
        });
        await lane.send('file', { ...headOf(entry, id, file), size: file.size, resume: true });
        await lane.send('cancel', { id });
        const error = await answer.promise;
        lane.end(id);
        if (!error?.retry) {
          break;
        }
      } catch (error) {
        if (!(error instanceof TransferError)) {
          break;
        }
      }
      await new Promise((resolve) => setTimeout(resolve, PAUSE_MS));
    }
    this.gone(entry);
  }

  /** Sends what the server has not, and the hash of the whole. */
  private async sendBytes(lane: Lane, entry: Entry, file: File, id: number, have: Range[], chunk: number, stop: () => boolean): Promise<void> {
    let hasher = await (this.hasher ??= openHasher(this.options.worker));
    if (hasher.failed) {
      this.hasher = openHasher(false);
      hasher = await this.hasher;
    }
    const whole = hasher.begin();
    const send = async (from: number, to: number, hashes: boolean): Promise<void> => {
      let off = from;
      for await (const bytes of read(file, from, to, hasher)) {
        for (let at = 0; at < bytes.length && !stop(); at += chunk) {
          const part = bytes.subarray(at, at + chunk);
          // The bytes come last, so that they can be passed on without being copied.
          await lane.send('chunk', { id, off, chunk: part });
          off += part.length;
        }
        if (stop()) {
          return;
        }
        // Last: their memory is the Worker's then.
        if (hashes) {
          await hasher.update([whole], bytes);
        } else {
          hasher.free(bytes.buffer);
        }
      }
    };
    try {
      let at = 0;
      for (const { off, len, hash } of have) {
        if (off + len > file.size || len === 0) {
          break;
        }
        await send(at, off, true);
        const here = hasher.begin();
        for await (const bytes of read(file, off, off + len, hasher)) {
          await hasher.update([here, whole], bytes);
          if (stop()) {
            break;
          }
        }
        const isEqual = !stop() && equal(await hasher.peek(here), hash);
        hasher.end(here);
        if (stop()) {
          return;
        }
        if (!isEqual) {
          await send(off, off + len, false);
        }
        at = off + len;
      }
      await send(at, file.size, true);
      if (!stop()) {
        const told = { size: file.size, hash: await hasher.peek(whole) };
        if (!stop()) {
          entry.told = told;
          await lane.send('finish', { id, ...told });
        }
      }
    } finally {
      hasher.end(whole);
    }
  }
}

/** What `file` and `put` begin with. */
function headOf(entry: Entry, id: number, file: File): Record<string, unknown> {
  return { id, path: entry.path, mtime: Math.floor(file.lastModified / 1000), if_exists: entry.ifExists, run: entry.run };
}

/** The bytes of a part of a file, in memory of the hasher's where the browser can. Throws when there are fewer. */
async function* read(file: File, from: number, to: number, hasher: Hasher): AsyncGenerator<Uint8Array, void, undefined> {
  let left = to - from;
  if (left === 0) {
    return;
  }
  const { reader, next } = readerOf(file.slice(from, to).stream(), hasher);
  try {
    for (let part = await next(); !part.done; part = await next()) {
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

interface Reading {
  readonly reader: { cancel(): Promise<void> };
  next(): Promise<{ done: false; value: Uint8Array } | { done: true; value?: unknown }>;
}

/** Chromium reads into memory that it is given several times as fast as into its own, which it has to collect, too. */
function readerOf(stream: ReadableStream<Uint8Array<ArrayBuffer>>, hasher: Hasher): Reading {
  try {
    const reader = stream.getReader({ mode: 'byob' });
    return { reader, next: () => fill(reader, hasher.buffer()) };
  } catch {
    const reader = stream.getReader();
    return { reader, next: () => reader.read() };
  }
}

/** A buffer full of bytes, or what there is left of them: each message costs, and a browser gives few bytes at once. */
async function fill(reader: ReadableStreamBYOBReader, into: ArrayBuffer): ReturnType<Reading['next']> {
  let buffer = into;
  let length = 0;
  while (length < buffer.byteLength) {
    const { done, value } = await reader.read(new Uint8Array(buffer, length));
    buffer = value?.buffer ?? buffer;
    if (done) {
      break;
    }
    length += value.length;
  }
  return length > 0 ? { done: false, value: new Uint8Array(buffer, 0, length) } : { done: true };
}

function closed(error: unknown): TransferError {
  const { message = `${error}`, retry = false } = (error ?? {}) as { message?: string; retry?: boolean };
  return new TransferError('closed', message, retry);
}

/**
 * Uploads files, directories with all that is in them, or what `dropped` gives. It begins at once, and reads directories
 * while it sends.
 */
export function upload(socket: Socket, sources: Sources, options: UploadOptions = {}): Upload {
  return new Upload(socket, sources, options);
}

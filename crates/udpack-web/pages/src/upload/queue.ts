/** The files of the page, and the uploads that carry them. It outlives sessions: what one leaves undone the next one takes up. */

import { type Socket } from 'udpack';
import { type FileProgress, type IfExists, type Item as Given, TransferError, upload, type Upload } from 'udpack/transfer';
import { PACE_MS, Rate } from '../base/paced.js';
import { Item } from './item.js';
import { Pending } from './pending.js';
import { type Found, permitted, reopen } from './sources.js';

/** What the reader answers about a name that is taken. */
export type Answer = { policy: 'overwrite' | 'rename' | 'skip' | 'error'; forAll: boolean };
/** Asks the reader; `denied` are answers that the server does not allow. */
export type AskConflict = (item: Item, denied: ReadonlySet<string>) => Promise<Answer>;

export interface Totals {
  files: number;
  done: number;
  failed: number;
  missing: number;
  /** Neither over nor waiting for the reader to give the file again. */
  active: number;
  paused: number;
  bytes: number;
  received: number;
  safe: number;
}

/** Items handed to an upload, one after the other, until it is told that there are no more. */
class Feed {
  private readonly waiting: Given[] = [];
  private wake: (() => void) | undefined;
  private ended = false;

  push(item: Given): void {
    this.waiting.push(item);
    this.wake?.();
  }

  end(): void {
    this.ended = true;
    this.wake?.();
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<Given> {
    while (true) {
      const next = this.waiting.shift();
      if (next) {
        yield next;
      } else if (this.ended) {
        return;
      } else {
        await new Promise<void>((resolve) => (this.wake = resolve));
      }
    }
  }
}

/** An upload under way. Its files are in the order in which they were fed. */
interface Run {
  readonly upload: Upload;
  readonly feed: Feed;
  readonly items: Item[];
}

export class Queue {
  readonly items: Item[] = [];
  readonly rate = new Rate();
  /** Something has changed. */
  onchange: () => void = () => {};
  onconflict: AskConflict = async () => ({ policy: 'error', forAll: false });
  private socket: Socket | undefined;
  private run: Run | undefined;
  private timer: ReturnType<typeof setInterval> | undefined;
  private paused = false;
  private forAll: Answer['policy'] | undefined;
  private readonly denied = new Set<string>();
  private pending: Pending | undefined;
  private readonly struck: number[] = [];
  private writing: Promise<void> = Promise.resolve();
  /** Bytes of files that are not in the list any more, so that the rate counts on. */
  private cleared = 0;

  /** Goes on over this socket. Finds what earlier pages left, at the first time. */
  async attach(socket: Socket, token: string): Promise<void> {
    this.socket = socket;
    for (const item of this.items.filter(({ state }) => state === 'waiting' || state === 'paused')) {
      this.feed(item);
    }
    this.changed();
    if (this.pending === undefined) {
      this.pending = await Pending.open(token);
      await this.findMissing();
    }
  }

  /** The session is over: what is not done waits for the next one. */
  detach(): void {
    this.socket = undefined;
    const { run } = this;
    this.run = undefined;
    if (run) {
      this.read(run);
      run.feed.end();
      void run.upload.cancel();
    }
    for (const item of this.items) {
      const isLost = item.error?.reason === 'closed' || item.error?.reason === 'lane_closed';
      if (item.state === 'removing') {
        item.state = 'cancelled';
      } else if (item.active || (item.state === 'failed' && isLost)) {
        item.state = 'waiting';
        item.error = undefined;
      }
    }
    clearInterval(this.timer);
    this.timer = undefined;
    this.changed();
  }

  get isPaused(): boolean {
    return this.paused;
  }

  get totals(): Totals {
    const totals: Totals = { files: 0, done: 0, failed: 0, missing: 0, active: 0, paused: 0, bytes: 0, received: 0, safe: 0 };
    for (const item of this.items) {
      const { state } = item;
      if (state === 'cancelled' || state === 'removing') {
        continue;
      }
      totals.files += 1;
      totals.done += state === 'done' || state === 'skipped' ? 1 : 0;
      totals.failed += state === 'failed' ? 1 : 0;
      totals.missing += state === 'missing' ? 1 : 0;
      totals.active += item.active ? 1 : 0;
      totals.paused += state === 'paused' ? 1 : 0;
      totals.bytes += item.size;
      totals.received += item.received;
      totals.safe += item.safe;
    }
    return totals;
  }

  /** Adds what is found, as it is found. A file that an earlier page left undone goes on where it was. Tells how many. */
  async add(found: AsyncIterable<Found>): Promise<number> {
    const missing = this.items.filter(({ state }) => state === 'missing');
    const byPath = new Map(missing.map((item) => [`${item.path}\0${item.size}\0${item.modified}`, item]));
    const byName = new Map(missing.map((item) => [`${item.name}\0${item.size}\0${item.modified}`, item]));
    let count = 0;
    for await (const given of found) {
      count += 1;
      const file = 'file' in given ? given.file : undefined;
      const key = file && `\0${file.size}\0${file.lastModified}`;
      const again = file && (byPath.get(given.path + key) ?? byName.get(file.name + key));
      if (again?.state === 'missing') {
        again.origin = given.origin ?? again.origin;
        this.begin(again, file as File);
        continue;
      }
      const item = new Item(given.path, file, file?.size ?? 0, file?.lastModified ?? 0, 'directory' in given, given.origin);
      this.items.push(item);
      if ('error' in given) {
        item.state = 'failed';
        item.error = new TransferError('unreadable', `${given.error}`, true);
      } else {
        this.feed(item);
      }
      this.changed();
    }
    return count;
  }

  pause(item?: Item): void {
    this.paused ||= item === undefined;
    this.run?.upload.pause(item && (item.file ?? item.path));
    this.tick();
  }

  resume(item?: Item): void {
    this.paused &&= item !== undefined;
    this.run?.upload.resume(item && (item.file ?? item.path));
    this.tick();
  }

  /** Gives an item up, or all; the server removes what it has of them. */
  async cancel(item?: Item): Promise<void> {
    const given = item ? [item] : this.items.filter((each) => each.active);
    const { run } = this;
    for (const each of given) {
      each.state = 'removing';
    }
    this.changed();
    const cancelled = item === undefined ? run?.upload.cancel() : run?.upload.cancel(item.file ?? item.path);
    if (item === undefined && run) {
      // Whoever gives all up begins anew with what comes.
      run.feed.end();
      this.run = this.run === run ? undefined : this.run;
    }
    await cancelled;
    if (run) {
      this.read(run);
    }
    for (const each of given) {
      if (each.state === 'removing') {
        each.state = 'cancelled';
      }
    }
    this.tick();
  }

  /** Offers an item again, or all that have failed. */
  retry(item?: Item): void {
    for (const each of item ? [item] : this.items.filter(({ state }) => state === 'failed')) {
      if (each.file || each.isDirectory) {
        this.feed(each);
      }
    }
    this.changed();
  }

  /** Takes items out of the list: one, or all that are stored, skipped or given up. */
  clear(item?: Item): void {
    const goes = (each: Item): boolean => (item ? each === item : each.over && each.state !== 'failed');
    for (const each of this.items.filter(goes)) {
      this.cleared += each.received;
      each.cleared = true;
      this.strike(each);
    }
    this.items.splice(0, this.items.length, ...this.items.filter((each) => !goes(each)));
    this.tick();
  }

  /** Reads missing files by their stored handles; asks for permission when `asks`, which needs a click. */
  async reopenMissing(asks: boolean): Promise<void> {
    const roots = new Map<FileSystemHandle, boolean>();
    for (const item of this.items.filter(({ state, origin }) => state === 'missing' && origin)) {
      const { root } = item.origin as { root: FileSystemHandle };
      if (!roots.has(root)) {
        roots.set(root, await permitted(root, asks));
      }
      const file = roots.get(root) ? await reopen(item.origin as NonNullable<Item['origin']>) : undefined;
      if (file && item.state === 'missing' && file.size === item.size && file.lastModified === item.modified) {
        this.begin(item, file);
      }
    }
  }

  forgetMissing(): void {
    for (const item of this.items.filter(({ state }) => state === 'missing')) {
      this.clear(item);
    }
  }

  /** Something of the list has changed other than by the server. */
  private changed(): void {
    this.onchange();
  }

  private begin(item: Item, file: File): void {
    item.file = file;
    this.feed(item);
    this.changed();
  }

  private async findMissing(): Promise<void> {
    try {
      for (const { record, path, size, modified, origin } of (await this.pending?.takeOver()) ?? []) {
        const item = new Item(path, undefined, size, modified, false, origin);
        item.record = record;
        item.state = 'missing';
        this.items.push(item);
      }
    } catch {
      this.pending = undefined;
    }
    this.changed();
    await this.reopenMissing(false);
  }

  private feed(item: Item): void {
    const { path, file } = item;
    item.state = this.paused ? 'paused' : 'waiting';
    item.received = 0;
    item.safe = 0;
    item.error = undefined;
    item.trouble = undefined;
    item.policy = undefined;
    item.rate.clear();
    if (this.socket === undefined) {
      return;
    }
    this.run ??= this.start(this.socket);
    item.at = this.run.items.push(item) - 1;
    this.run.feed.push(file ? { path, file } : { path, directory: true });
    this.timer ??= setInterval(() => this.tick(), PACE_MS);
  }

  private start(socket: Socket): Run {
    const feed = new Feed();
    const run: Run = { feed, items: [], upload: upload(socket, feed, { worker: 'worker.js', onConflict: (file) => this.conflict(run, file) }) };
    if (this.paused) {
      run.upload.pause();
    }
    this.rate.clear();
    return run;
  }

  private async conflict(run: Run, { path }: FileProgress): Promise<IfExists> {
    const item = run.items.findLast((each) => each.path === path);
    if (item === undefined) {
      return 'error';
    }
    item.state = 'asking';
    this.changed();
    let policy = this.forAll;
    if (policy === undefined) {
      const answer = await this.onconflict(item, this.denied);
      policy = answer.policy;
      this.forAll = answer.forAll && policy !== 'error' ? policy : undefined;
    }
    item.policy = policy;
    return policy;
  }

  /** Looks at the uploads: at most four times a second. */
  private tick(): void {
    const { run } = this;
    if (run) {
      this.read(run);
      if (run.items.every((item) => item.over)) {
        run.feed.end();
        this.run = undefined;
        this.forAll = undefined;
      }
    }
    this.rate.sample(this.cleared + this.items.reduce((sum, item) => sum + item.received, 0));
    if (this.run === undefined) {
      clearInterval(this.timer);
      this.timer = undefined;
    }
    this.write();
    this.changed();
  }

  private read(run: Run): void {
    const { files } = run.upload;
    for (const [at, progress] of files.entries()) {
      const item = run.items[at];
      // The last place counts of an item that was offered again. What was stored in spite of being given up is stored.
      if (item && item.at === at && !item.over && (item.state !== 'removing' || progress.state === 'done')) {
        this.show(item, progress);
      }
    }
  }

  private show(item: Item, { state, received, safe, retries, trouble, done, error }: FileProgress): void {
    item.received = received;
    item.safe = safe;
    item.retries = retries;
    item.trouble = trouble;
    item.done = done;
    item.error = error;
    item.state = state === 'done' && item.policy === 'skip' && done?.same ? 'skipped' : state;
    if (state === 'sending') {
      item.rate.sample(received);
    }
    if (state === 'done') {
      item.received = item.size;
      item.safe = item.size;
    }
    if (error?.reason === 'forbidden' && (item.policy === 'overwrite' || item.policy === 'rename')) {
      // The reader wanted what the server does not allow: they are asked again, without that.
      this.denied.add(item.policy);
      this.forAll = undefined;
      this.feed(item);
    }
  }

  private strike(item: Item): void {
    if (item.record !== undefined) {
      this.struck.push(item.record);
      item.record = undefined;
    }
  }

  /** Keeps the database as the list is: one transaction after the other. */
  private write(): void {
    const { pending } = this;
    if (pending === undefined) {
      return;
    }
    for (const item of this.items) {
      if (item.over && item.state !== 'failed') {
        this.strike(item);
      }
    }
    const fresh = this.items.filter((item) => item.active && item.record === undefined && !item.isDirectory && item.file);
    const gone = this.struck.splice(0);
    if (fresh.length === 0 && gone.length === 0) {
      return;
    }
    for (const item of fresh) {
      item.record = -1;
    }
    this.writing = this.writing.then(async () => {
      try {
        await pending.add(fresh);
        // What ended while it was written down is struck out at once.
        const late = fresh.filter((item) => item.cleared || (item.over && item.state !== 'failed')).map((item) => item.record ?? -1);
        await pending.remove([...gone, ...late].filter((record) => record >= 0));
      } catch {
        this.pending = undefined;
      }
    });
  }
}

/**
 * What is not uploaded yet, in the browser's database: after a reload or a crash the page knows which files to ask for, and
 * reads those itself of which it has handles. Where there is no database, as in private windows, the page works without it.
 */

import { type Item, type Origin } from './item.js';

interface FileRecord {
  id?: number;
  /** Server and token. */
  scope: string;
  /** The page that uploads it. */
  page: string;
  path: string;
  size: number;
  modified: number;
  root?: number;
  inner?: readonly string[];
}

export interface Missing {
  readonly record: number;
  readonly path: string;
  readonly size: number;
  readonly modified: number;
  readonly origin: Origin | undefined;
}

const LOCK = 'udpack page ';

function result<T>(request: IDBRequest<T>): Promise<T> {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

function finished(transaction: IDBTransaction): Promise<void> {
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve();
    transaction.onabort = transaction.onerror = () => reject(transaction.error);
  });
}

export class Pending {
  private readonly page = crypto.randomUUID();
  private readonly roots = new Map<FileSystemHandle, number>();

  private constructor(
    private readonly database: IDBDatabase,
    private readonly scope: string,
  ) {}

  /** Undefined where the browser keeps nothing. */
  static async open(token: string): Promise<Pending | undefined> {
    try {
      const digest = new Uint8Array(await crypto.subtle.digest('SHA-256', new TextEncoder().encode(token)));
      const scope = `${location.host} ${Array.from(digest.subarray(0, 8), (byte) => byte.toString(16).padStart(2, '0')).join('')}`;
      const opening = indexedDB.open('udpack', 1);
      opening.onupgradeneeded = () => {
        opening.result.createObjectStore('files', { keyPath: 'id', autoIncrement: true }).createIndex('scope', 'scope');
        opening.result.createObjectStore('roots', { autoIncrement: true });
      };
      const pending = new Pending(await result(opening), scope);
      // Held as long as the page is there: whoever finds a record knows by it whether its page still works on it.
      await new Promise<void>((resolve) => void navigator.locks.request(LOCK + pending.page, () => (resolve(), new Promise(() => {}))));
      return pending;
    } catch {
      return undefined;
    }
  }

  /** The files of pages that are gone. They are this page's from now on. */
  async takeOver(): Promise<Missing[]> {
    const { held = [] } = await navigator.locks.query();
    const alive = new Set(held.map(({ name }) => name));
    const transaction = this.database.transaction(['files', 'roots'], 'readwrite');
    const [files, roots] = [transaction.objectStore('files'), transaction.objectStore('roots')];
    const found: Missing[] = [];
    const handles = new Map<number, FileSystemHandle | undefined>();
    for (const record of (await result(files.index('scope').getAll(this.scope))) as FileRecord[]) {
      if (record.page === this.page || alive.has(LOCK + record.page)) {
        continue;
      }
      files.put({ ...record, page: this.page });
      const { root, inner = [] } = record;
      if (root !== undefined && !handles.has(root)) {
        const handle = (await result(roots.get(root))) as FileSystemHandle | undefined;
        handles.set(root, handle);
        if (handle) {
          this.roots.set(handle, root);
        }
      }
      const handle = root === undefined ? undefined : handles.get(root);
      found.push({ record: record.id as number, path: record.path, size: record.size, modified: record.modified, origin: handle && { root: handle, inner } });
    }
    await finished(transaction);
    return found;
  }

  /** Writes down those that are not. */
  async add(items: readonly Item[]): Promise<void> {
    const transaction = this.database.transaction(['files', 'roots'], 'readwrite');
    const [files, roots] = [transaction.objectStore('files'), transaction.objectStore('roots')];
    for (const item of items) {
      const record: FileRecord = { scope: this.scope, page: this.page, path: item.path, size: item.size, modified: item.modified };
      if (item.origin) {
        const { root, inner } = item.origin;
        if (!this.roots.has(root)) {
          this.roots.set(root, (await result(roots.add(root))) as number);
        }
        record.root = this.roots.get(root) as number;
        record.inner = inner;
      }
      const adding = files.add(record);
      adding.onsuccess = () => void (item.record = adding.result as number);
    }
    await finished(transaction);
  }

  /** Strikes records out. Handles go with the last of the scope's files. */
  async remove(records: readonly number[]): Promise<void> {
    const transaction = this.database.transaction(['files', 'roots'], 'readwrite');
    const files = transaction.objectStore('files');
    for (const record of records) {
      files.delete(record);
    }
    if ((await result(files.count())) === 0) {
      transaction.objectStore('roots').clear();
      this.roots.clear();
    }
    await finished(transaction);
  }
}

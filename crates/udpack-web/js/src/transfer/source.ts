/** What can be uploaded: files, handles of files and directories, what was dropped. All of it becomes a list of items. */

import { TransferError } from './messages.js';

/** A file, or a directory with nothing in it, and where it goes. `error`: it cannot be read. */
export type Item =
  | { readonly path: string; readonly file: File }
  | { readonly path: string; readonly directory: true }
  | { readonly path: string; readonly error: unknown };

/** What `webkitGetAsEntry` gives (a `FileSystemEntry` of the browser). */
export interface DroppedEntry {
  readonly name: string;
  readonly isFile: boolean;
  readonly isDirectory: boolean;
}

/** What was dropped or pasted (a `DataTransfer` of the browser). */
export interface Dropped {
  readonly items: ArrayLike<{ readonly kind: string; webkitGetAsEntry?(): DroppedEntry | null; getAsFile(): File | null }>;
}

export type Source = File | FileSystemFileHandle | FileSystemDirectoryHandle | DroppedEntry | Item;
export type Sources = Source | Iterable<Source> | AsyncIterable<Source>;

interface FileEntry extends DroppedEntry {
  file(done: (file: File) => void, failed: (error: unknown) => void): void;
}

interface DirectoryEntry extends DroppedEntry {
  createReader(): { readEntries(done: (entries: DroppedEntry[]) => void, failed: (error: unknown) => void): void };
}

/**
 * The files and directories of a drop or paste. Call it in the event's handler, before the first `await`: the browser
 * empties the event afterwards.
 */
export function dropped(event: Dropped): Source[] {
  return Array.from(event.items)
    .filter(({ kind }) => kind === 'file')
    .map((item) => item.webkitGetAsEntry?.() ?? item.getAsFile())
    .filter((source) => source !== null);
}

/** The items that are there at once; the sources that must be asked come back as `later`. */
export function itemsOf(sources: Sources): { items: Item[]; later: Iterable<Source> | AsyncIterable<Source> } {
  // The handle of a directory can be looped over as well, and is one source.
  const isOne = sources instanceof File || 'kind' in sources;
  if (!isOne && Symbol.asyncIterator in sources) {
    return { items: [], later: sources as AsyncIterable<Source> };
  }
  const list = !isOne && Symbol.iterator in sources ? [...sources] : [sources as Source];
  const begin = list.findIndex((source) => !(source instanceof File) && !('path' in source));
  const now = begin < 0 ? list : list.slice(0, begin);
  return { items: now.map((source) => (source instanceof File ? fileItem(source) : (source as Item))), later: list.slice(now.length) };
}

/** All items of the sources. What cannot be read is an item, too; it does not keep the others from coming. */
export async function* walk(sources: Iterable<Source> | AsyncIterable<Source>): AsyncGenerator<Item, void, undefined> {
  for await (const source of sources) {
    if (source instanceof File) {
      yield fileItem(source);
    } else if ('path' in source) {
      yield source;
    } else {
      yield* branch(source, source.name);
    }
  }
}

function fileItem(file: File): Item {
  return { path: file.webkitRelativePath || file.name, file };
}

/** The items of a file or directory that goes to `path`. */
async function* branch(source: FileSystemFileHandle | FileSystemDirectoryHandle | DroppedEntry, path: string): AsyncGenerator<Item, void, undefined> {
  try {
    if (isFile(source)) {
      yield { path, file: await fileOf(source) };
      return;
    }
    let isEmpty = true;
    for await (const child of childrenOf(source as FileSystemDirectoryHandle | DirectoryEntry)) {
      isEmpty = false;
      yield* branch(child, `${path}/${child.name}`);
    }
    if (isEmpty) {
      yield { path, directory: true };
    }
  } catch (error) {
    yield { path, error };
  }
}

function isFile(source: FileSystemFileHandle | FileSystemDirectoryHandle | DroppedEntry): source is FileSystemFileHandle | FileEntry {
  return 'kind' in source ? source.kind === 'file' : source.isFile;
}

function fileOf(source: FileSystemFileHandle | FileEntry): Promise<File> {
  return 'getFile' in source ? source.getFile() : new Promise((resolve, reject) => source.file(resolve, reject));
}

async function* childrenOf(source: FileSystemDirectoryHandle | DirectoryEntry): AsyncGenerator<FileSystemFileHandle | FileSystemDirectoryHandle | DroppedEntry> {
  if ('values' in source) {
    yield* source.values() as unknown as AsyncIterable<FileSystemFileHandle | FileSystemDirectoryHandle>;
    return;
  }
  const reader = source.createReader();
  while (true) {
    // A browser gives at most 100 at a time, and none when there are no more.
    const entries = await new Promise<DroppedEntry[]>((resolve, reject) => reader.readEntries(resolve, reject));
    if (entries.length === 0) {
      return;
    }
    yield* entries;
  }
}

/** Why an item cannot be uploaded. */
export function unreadable(error: unknown): TransferError {
  return error instanceof TransferError ? error : new TransferError('unreadable', `it cannot be read: ${error instanceof Error ? error.message : error}`, false);
}

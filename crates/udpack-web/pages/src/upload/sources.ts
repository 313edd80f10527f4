/** Files by drop, paste and dialogs, with handles where the browser gives any. */

import { dropped, type Item as Given, type Source, walk } from 'udpack/transfer';
import { type Origin } from './item.js';

interface Handled {
  getAsFileSystemHandle?(): Promise<FileSystemHandle | null>;
}

/** A file, an empty directory, or what cannot be read, and where it can be read again. */
export type Found = Given & { readonly origin?: Origin };

/**
 * What was dropped or pasted, directories with all that is in them. Call it in the event's handler: the browser empties the
 * event afterwards.
 */
export function fromTransfer(transfer: DataTransfer): AsyncGenerator<Found> {
  const items = Array.from(transfer.items).filter(({ kind }) => kind === 'file');
  const handles = items.map(async (item) => (item as Handled).getAsFileSystemHandle?.().catch(() => null));
  const plain = dropped(transfer);
  return (async function* () {
    for (const [at, source] of plain.entries()) {
      const handle = plain.length === handles.length ? await handles[at] : undefined;
      yield* found(handle ? (handle as unknown as Source) : source);
    }
  })();
}

export async function* found(...sources: Source[]): AsyncGenerator<Found> {
  for (const source of sources) {
    const root = source instanceof FileSystemHandle ? source : undefined;
    for await (const item of walk([source])) {
      // The first name is the handle's own.
      yield root ? { ...item, origin: { root, inner: item.path.split('/').slice(1) } } : item;
    }
  }
}

/** Pasted pictures are all called the same: the time tells them apart. */
export function named(item: Found, now: Date): Found {
  if (!('file' in item) || item.file.name !== 'image.png' || item.path !== 'image.png') {
    return item;
  }
  const two = (n: number): string => `${n}`.padStart(2, '0');
  const path = `pasted ${now.getFullYear()}-${two(now.getMonth() + 1)}-${two(now.getDate())} ${two(now.getHours())}.${two(now.getMinutes())}.${two(now.getSeconds())}.png`;
  return { ...item, path };
}

type Picking = {
  showOpenFilePicker?(options: { multiple: boolean }): Promise<FileSystemFileHandle[]>;
  showDirectoryPicker?(): Promise<FileSystemDirectoryHandle>;
};

/** Asks for files or a folder. Gives nothing when the reader changes their mind. */
export async function* pick(what: 'files' | 'folder'): AsyncGenerator<Found> {
  const { showOpenFilePicker, showDirectoryPicker } = globalThis as Picking;
  const picker = what === 'files' ? showOpenFilePicker && (() => showOpenFilePicker({ multiple: true })) : showDirectoryPicker && (async () => [await showDirectoryPicker()]);
  if (!picker) {
    return yield* found(...(await pickByInput(what)));
  }
  let handles: FileSystemHandle[];
  try {
    handles = await picker();
  } catch (error) {
    if ((error as Error).name === 'AbortError') {
      return;
    }
    // Forbidden here, as in a frame of another site.
    return yield* found(...(await pickByInput(what)));
  }
  yield* found(...(handles as unknown as Source[]));
}

function pickByInput(what: 'files' | 'folder'): Promise<File[]> {
  return new Promise((resolve) => {
    const input = document.createElement('input');
    input.type = 'file';
    input.multiple = true;
    input.webkitdirectory = what === 'folder';
    input.onchange = () => resolve([...(input.files ?? [])]);
    input.oncancel = () => resolve([]);
    input.click();
  });
}

export const canPickFolders: boolean = 'showDirectoryPicker' in globalThis || 'webkitdirectory' in (globalThis.HTMLInputElement?.prototype ?? {});

/** The file behind a stored handle, or undefined if it is gone or the reader does not permit it. */
export async function reopen({ root, inner }: Origin): Promise<File | undefined> {
  try {
    let handle = root;
    for (const [at, name] of inner.entries()) {
      const directory = handle as FileSystemDirectoryHandle;
      handle = at === inner.length - 1 ? await directory.getFileHandle(name) : await directory.getDirectoryHandle(name);
    }
    return await (handle as FileSystemFileHandle).getFile();
  } catch {
    return undefined;
  }
}

interface Permitting {
  queryPermission?(wanted: { mode: 'read' }): Promise<PermissionState>;
  requestPermission?(wanted: { mode: 'read' }): Promise<PermissionState>;
}

/** Whether a handle may be read; asks the reader only when `asks`, which needs a click. */
export async function permitted(root: FileSystemHandle, asks: boolean): Promise<boolean> {
  const handle = root as Permitting;
  try {
    if ((await handle.queryPermission?.({ mode: 'read' })) === 'granted') {
      return true;
    }
    return asks && (await handle.requestPermission?.({ mode: 'read' })) === 'granted';
  } catch {
    return false;
  }
}

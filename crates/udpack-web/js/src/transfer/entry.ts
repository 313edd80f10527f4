/** One file or directory of an upload: what is known of it, and what is under way for it. */

import { Deferred } from '../base/async.js';
import { type Done, TransferError } from './messages.js';
import { type Item, unreadable } from './source.js';

/** What a server is to do when the name is taken. */
export type IfExists = 'same' | 'error' | 'skip' | 'overwrite' | 'rename';

export type FileState =
  /** It has not begun, or is offered again soon. */
  | 'waiting'
  /** It was paused: the server keeps what it has. */
  | 'paused'
  | 'sending'
  /** All is sent; the server compares, syncs and stores. */
  | 'checking'
  /** The name is taken, and `onConflict` has not answered. */
  | 'asking'
  | 'done'
  | 'failed';

/** How far a file is. */
export interface FileProgress {
  readonly path: string;
  /** Not there for a directory, and for what could not be read. */
  readonly file?: File;
  readonly state: FileState;
  readonly size: number;
  /** Bytes that the server has received, and of those the ones that outlive its power cut. */
  readonly received: number;
  readonly safe: number;
  /** How often it was offered again, and why the last time. */
  readonly retries: number;
  readonly trouble?: TransferError;
  /** What the server has stored. */
  readonly done?: Done;
  /** Why it has failed. */
  readonly error?: TransferError;
}

export const GIVEN_UP = new TransferError('cancelled', 'given up', false);

/** What stops an offer: `hold` keeps what the server has of it, `drop` removes that, `move` is followed by another offer at once. */
export type Stop = (how: 'hold' | 'drop' | 'move') => void;

export class Entry {
  readonly path: string;
  readonly file: File | undefined;
  readonly isDirectory: boolean;
  readonly size: number;
  state: FileState = 'waiting';
  received = 0;
  safe = 0;
  done: Done | undefined;
  error: TransferError | undefined;
  trouble: TransferError | undefined;
  ifExists: IfExists;
  /** Refusals in a row, and all offers but the first. */
  tries = 0;
  retries = 0;
  /** It stands in line. */
  queued = false;
  paused = false;
  /** `onConflict` has answered. */
  asked = false;
  /** The server may have a part of it. */
  offered = false;
  /** What was told in a `finish` or `put`. */
  told: { size: number; hash: Uint8Array } | undefined;
  since: number | undefined;
  /** While it is on a lane. */
  stop: Stop | undefined;
  /** Given up: resolves when the server has nothing of it any more, or cannot be asked. */
  gone: Deferred<void> | undefined;
  /** Names the upload over all its offers. */
  readonly run = crypto.getRandomValues(new Uint8Array(16));

  constructor(item: Item, path: string, ifExists: IfExists) {
    this.path = path;
    this.file = 'file' in item ? item.file : undefined;
    this.isDirectory = 'directory' in item;
    this.size = this.file?.size ?? 0;
    this.ifExists = ifExists;
    if ('error' in item) {
      this.state = 'failed';
      this.error = unreadable(item.error);
    }
  }

  get over(): boolean {
    return this.state === 'done' || this.state === 'failed';
  }

  get progress(): FileProgress {
    const { path, file, state, size, received, safe, retries, trouble, done, error } = this;
    return { path, ...(file && { file }), state, size, received, safe, retries, ...(trouble && { trouble }), ...(done && { done }), ...(error && { error }) };
  }
}

/** One file of the upload page, over reloads and repeated tries. */

import { type Done, type FileState, type IfExists, type TransferError } from 'udpack/transfer';
import { Rate } from '../base/paced.js';

export type ItemState =
  | FileState
  /** The name was taken, and the reader wanted nothing done about it. */
  | 'skipped'
  /** Given up; `removing` until the server has removed what it had. */
  | 'removing'
  | 'cancelled'
  /** Of a page that is gone: the file itself has to be given again. */
  | 'missing';

/** Where a file can be read again after a reload: a handle that the browser keeps, and the way from it. */
export interface Origin {
  readonly root: FileSystemHandle;
  /** Names below a directory; none when `root` is the file. */
  readonly inner: readonly string[];
}

export class Item {
  state: ItemState = 'waiting';
  received = 0;
  safe = 0;
  retries = 0;
  trouble: TransferError | undefined;
  done: Done | undefined;
  error: TransferError | undefined;
  /** What the reader wanted done about a name that was taken. */
  policy: IfExists | undefined;
  /** Its place in the upload that carries it. */
  at = -1;
  /** Taken out of the list. */
  cleared = false;
  readonly rate = new Rate();
  /** Its record among those that outlive the page; undefined where there is none. */
  record: number | undefined;

  constructor(
    readonly path: string,
    public file: File | undefined,
    readonly size: number,
    readonly modified: number,
    readonly isDirectory: boolean,
    public origin: Origin | undefined,
  ) {}

  /** Nothing more happens to it by itself. */
  get over(): boolean {
    return this.state === 'done' || this.state === 'skipped' || this.state === 'failed' || this.state === 'cancelled';
  }

  /** It is to be sent or being sent. */
  get active(): boolean {
    return !this.over && this.state !== 'missing' && this.state !== 'removing';
  }

  get name(): string {
    return this.path.slice(this.path.lastIndexOf('/') + 1);
  }
}

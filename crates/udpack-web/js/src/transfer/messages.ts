/** What a server says on a lane (PROTOCOL.md §11). Unknown keys are ignored; what breaks its table is an error here. */

import { type Message } from '../channel/message.js';

/** What a transfer ends with when it does not succeed: a code of PROTOCOL.md §11, or this side's own word. */
export class TransferError extends Error {
  override readonly name: string = 'TransferError';
  /** `exists`, `quota`, `cancelled` and so on. */
  readonly reason: string;
  /** Whether the same again, later, makes sense. */
  readonly retry: boolean;
  /** Which of the several things that its reason stands for it is, where the server says so: `blocked` of `exists`. */
  readonly why: string | undefined;

  constructor(reason: string, message: string, retry: boolean, why?: string) {
    super(message);
    this.reason = reason;
    this.retry = retry;
    this.why = why;
  }
}

/** A range that a side holds, and its hash. */
export interface Range {
  readonly off: number;
  readonly len: number;
  readonly hash: Uint8Array;
}

export interface Done {
  readonly path: string;
  readonly size: number;
  readonly hash: Uint8Array;
  /** The file was there already, and nothing was written. */
  readonly same: boolean;
}

/** Most bytes of one `hole`. */
const MOST_ZEROS = 16_777_216;

/** What each message has beside its id. */
const TABLES: Readonly<Record<string, (said: Said) => unknown>> = {
  ready: (said) => [said.ranges('have'), said.number('chunk'), said.has('holes') && said.flag('holes')],
  ack: (said) => [said.number('recv'), said.number('safe')],
  done: (said) => said.done(),
  error: (said) => said.error(),
  file: (said) => [said.name('path'), said.number('size')],
  chunk: (said) => [said.number('off'), said.part('chunk')],
  // Comes only to who asks for holes, and this client does not.
  hole: (said) => [said.number('off'), said.zeros('len')],
  finish: (said) => [said.number('size'), said.hash('hash')],
};

/** Whether the event is one of those that a server says on a lane. */
export function isSaid(event: string): boolean {
  return Object.hasOwn(TABLES, event);
}

/** One message of a server, checked against its table. Its fields by their type. */
export class Said {
  readonly id: number;
  private readonly fields: Readonly<Record<string, unknown>>;

  constructor(message: Pick<Message, 'event' | 'data'>) {
    if (message.data === null || typeof message.data !== 'object' || message.data instanceof Map) {
      throw broken(`${message.event} has no fields`);
    }
    this.fields = message.data as Record<string, unknown>;
    this.id = this.number('id');
    TABLES[message.event]?.(this);
  }

  number(key: string): number {
    const value = this.fields[key];
    return typeof value === 'number' && Number.isSafeInteger(value) && value >= 0 ? value : this.bad(key);
  }

  text(key: string): string {
    const value = this.fields[key];
    return typeof value === 'string' ? value : this.bad(key);
  }

  /** A name is text where it is UTF-8, and binary where it is not. */
  name(key: string): string {
    const value = this.fields[key];
    return value instanceof Uint8Array ? new TextDecoder().decode(value) : this.text(key);
  }

  flag(key: string): boolean {
    const value = this.fields[key];
    return typeof value === 'boolean' ? value : this.bad(key);
  }

  hash(key: string): Uint8Array {
    const value = this.fields[key];
    return value instanceof Uint8Array && value.length === 32 ? value : this.bad(key);
  }

  /** Bytes of a file, at least one. */
  part(key: string): Uint8Array {
    const value = this.fields[key];
    return value instanceof Uint8Array && value.length > 0 ? value : this.bad(key);
  }

  /** How many zeros stand for a hole. */
  zeros(key: string): number {
    const value = this.number(key);
    return value > 0 && value <= MOST_ZEROS ? value : this.bad(key);
  }

  ranges(key: string): Range[] {
    const value = this.fields[key];
    if (!Array.isArray(value)) {
      return this.bad(key);
    }
    let from = 0;
    return value.map((range: unknown) => {
      const [off, len, hash] = (Array.isArray(range) ? range : []) as unknown[];
      if (!Number.isSafeInteger(off) || !Number.isSafeInteger(len) || !(hash instanceof Uint8Array && hash.length === 32) || (off as number) < from || (len as number) < 0) {
        return this.bad(key);
      }
      from = (off as number) + (len as number);
      return { off: off as number, len: len as number, hash };
    });
  }

  error(): TransferError {
    const why = this.has('why') ? this.text('why') : undefined;
    return new TransferError(this.text('code'), this.text('message'), this.flag('retry'), why);
  }

  done(): Done {
    const same = this.has('same') && this.flag('same');
    if (this.has('sync')) {
      this.text('sync');
    }
    return { path: this.name('path'), size: this.number('size'), hash: this.hash('hash'), same };
  }

  has(key: string): boolean {
    return (this.fields[key] ?? undefined) !== undefined;
  }

  private bad(key: string): never {
    throw broken(`${key} is missing or of another type`);
  }
}

function broken(message: string): TransferError {
  return new TransferError('bad_message', `the server breaks the protocol: ${message}`, false);
}

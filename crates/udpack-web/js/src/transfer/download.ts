/** A file from the server, checked, over lost connections. */

import { Signal } from '../base/async.js';
import { type Socket } from '../client/socket.js';
import { equal, Hash } from './blake3.js';
import { Lane } from './lane.js';
import { type Said, TransferError } from './messages.js';

/** Lanes that are lost one after the other without a byte between them. */
const TRIES = 4;
/** Chunks that wait for the reader before the lane is read no further. */
const AHEAD = 16;

export interface DownloadOptions {
  /** Gives it up. */
  signal?: AbortSignal;
}

/**
 * The bytes of a file, as they come. Only the end of the loop says that they are the file: size and hash are compared
 * then, and it throws `TransferError` where they differ, when the server refuses, and when it is given up.
 */
export async function* download(socket: Socket, path: string, options: DownloadOptions = {}): AsyncGenerator<Uint8Array, void, undefined> {
  const { signal = new AbortController().signal } = options;
  const hash = await Hash.create();
  let got = 0;
  for (let tries = 1; ; tries += 1) {
    const before = got;
    const lane = await Lane.open(socket, signal);
    try {
      for await (const bytes of one(lane, path, hash, () => got, signal)) {
        got += bytes.length;
        yield bytes;
      }
      return;
    } catch (error) {
      tries = got > before ? 0 : tries;
      if (!(error instanceof TransferError) || error.reason !== 'lane_closed' || !error.retry || tries >= TRIES) {
        throw error;
      }
    } finally {
      void lane.close();
    }
  }
}

/** What is missing, over one lane. The bytes that are there are proved by their hash. */
async function* one(lane: Lane, path: string, hash: Hash, got: () => number, signal: AbortSignal): AsyncGenerator<Uint8Array, void, undefined> {
  const queue: [string, Said][] = [];
  const changed = new Signal();
  let failure: TransferError | undefined;
  const id = lane.begin({
    async said(event, said) {
      queue.push([event, said]);
      changed.wake();
      // Not answered before there is room: the lane is read no further, and the server waits.
      while (queue.length > AHEAD && failure === undefined) {
        await changed.wait();
      }
    },
    lost(error) {
      failure ??= error;
      changed.wake();
    },
  });
  const abort = (): void => {
    failure = new TransferError('cancelled', 'given up', false);
    void lane.send('cancel', { id }).catch(() => {});
    changed.wake();
  };
  signal.addEventListener('abort', abort);
  let ended = false;
  try {
    signal.throwIfAborted();
    const begun = got();
    const have = begun > 0 ? [[0, begun, hash.peek()]] : undefined;
    await lane.send('get', { id, path, have });
    while (true) {
      const next = queue.shift();
      if (next === undefined) {
        if (failure) {
          throw failure;
        }
        await changed.wait();
        continue;
      }
      changed.wake();
      const [event, said] = next;
      if (event === 'error') {
        ended = true;
        throw said.error();
      }
      if (event === 'chunk') {
        const bytes = said.part('chunk');
        if (said.number('off') !== got()) {
          throw new TransferError('source_changed', 'the file has changed since it was begun', false);
        }
        hash.update(bytes);
        yield bytes;
      } else if (event === 'finish') {
        ended = true;
        if (said.number('size') !== got() || !equal(said.hash('hash'), hash.peek())) {
          throw new TransferError('hash_mismatch', 'what came is not the file', false);
        }
        await lane.send('done', { id }).catch(() => {});
        return;
      }
    }
  } finally {
    signal.removeEventListener('abort', abort);
    lane.end(id);
    failure ??= new TransferError('cancelled', 'given up', false);
    changed.wake();
    if (!ended) {
      void lane.send('cancel', { id }).catch(() => {});
    }
  }
}

/**
 * Volatile messages (PROTOCOL.md §7): the latest value for each event and key, by datagram, or on a stream of its own
 * when it is larger. What waits is bounded on both sides; the oldest go first and are counted.
 */

import { Signal } from '../base/async.js';
import { type Connection, ConnectionEnd } from '../transport/transport.js';
import { decodeVolatile, encodeVolatile, type WireVolatile } from '../wire/message.js';

const KEYS = 1024;
const BYTES = 1 << 20;

/** A volatile message that came. */
export interface VolatileMessage {
  readonly event: string;
  readonly data: unknown;
  /** Whose latest value it is, where the sender has several. */
  readonly key: string | undefined;
}

/** Values by key, the latest of each; the one that has waited longest goes first. */
class Latest<T> {
  readonly #values = new Map<string, { value: T; size: number }>();
  #held = 0;
  dropped = 0;

  set(key: string, value: T, size: number): void {
    this.#delete(key);
    this.#values.set(key, { value, size });
    this.#held += size;
    while (this.#values.size > KEYS || (this.#held > BYTES && this.#values.size > 1)) {
      this.shift();
      this.dropped += 1;
    }
  }

  shift(): T | undefined {
    const [first] = this.#values;
    if (first === undefined) {
      return undefined;
    }
    this.#delete(first[0]);
    return first[1].value;
  }

  #delete(key: string): void {
    this.#held -= this.#values.get(key)?.size ?? 0;
    this.#values.delete(key);
  }
}

function placeOf(event: string, key: string | undefined): string {
  return key === undefined ? event : `${event}\u0000${key}`;
}

export class Volatiles {
  readonly #out = new Latest<Uint8Array>();
  readonly #in = new Latest<VolatileMessage>();
  /** The last `seq` that was taken for each event and key, the latest last. */
  readonly #taken = new Map<string, bigint>();
  readonly #changed = new Signal();
  readonly #queued = new Signal();
  #seq = 0;
  #broken = 0;
  #over = false;
  /** Called with each message instead of queueing it; false queues it. */
  deliver: (message: VolatileMessage) => boolean = () => false;

  /** Messages that broke a rule, or gave way to newer ones here. */
  get dropped(): number {
    return this.#broken + this.#out.dropped + this.#in.dropped;
  }

  /** Queues a value; one that waits for the same event and key gives way. */
  send(limit: number, event: string, data: unknown, key: string | undefined): void {
    const bytes = encodeVolatile(limit, event, data, this.#seq, key);
    this.#seq += 1;
    this.#out.set(placeOf(event, key), bytes, bytes.length);
    this.#queued.wake();
  }

  /** The next message that came; `undefined` when the socket is over. */
  async receive(): Promise<VolatileMessage | undefined> {
    while (true) {
      const message = this.#in.shift();
      if (message !== undefined || this.#over) {
        return message;
      }
      await this.#changed.wait();
    }
  }

  /** Another session begins: its sender counts anew. */
  forget(): void {
    this.#taken.clear();
  }

  end(): void {
    this.#over = true;
    this.#changed.wake();
    this.#queued.wake();
  }

  /** Serves one connection until it is over. */
  serve(connection: Connection, limit: number): void {
    let over = false;
    void connection.closed.then(() => {
      over = true;
      this.#queued.wake();
    });
    void quietly(this.#write(connection, () => over || this.#over));
    void quietly(this.#readDatagrams(connection));
    void quietly(this.#readStreams(connection, limit));
  }

  async #write(connection: Connection, over: () => boolean): Promise<void> {
    while (!over()) {
      const bytes = this.#out.shift();
      if (bytes === undefined) {
        await this.#queued.wait();
      } else if (bytes.length <= connection.maxDatagram) {
        await connection.sendDatagram(bytes);
      } else {
        const stream = await connection.openUni();
        await quietly(stream.write(bytes).then(() => stream.finish()));
      }
    }
  }

  async #readDatagrams(connection: Connection): Promise<void> {
    for (let bytes = await connection.readDatagram(); bytes; bytes = await connection.readDatagram()) {
      this.#take(bytes);
    }
  }

  async #readStreams(connection: Connection, limit: number): Promise<void> {
    for (let stream = await connection.acceptUni(); stream; stream = await connection.acceptUni()) {
      const chunks: Uint8Array[] = [];
      let size = 0;
      try {
        for (let chunk = await stream.read(); chunk && size <= limit; chunk = await stream.read()) {
          chunks.push(chunk);
          size += chunk.length;
        }
      } catch (error) {
        if (error instanceof ConnectionEnd) {
          return;
        }
        size = limit + 1;
      }
      if (size > limit) {
        stream.stop(0);
        this.#broken += 1;
        continue;
      }
      const bytes = new Uint8Array(size);
      let at = 0;
      for (const chunk of chunks) {
        bytes.set(chunk, at);
        at += chunk.length;
      }
      this.#take(bytes);
    }
  }

  #take(bytes: Uint8Array): void {
    let message: WireVolatile;
    try {
      message = decodeVolatile(bytes);
    } catch {
      this.#broken += 1;
      return;
    }
    const { event, data, seq, key } = message;
    const place = placeOf(event, key);
    if (seq !== undefined) {
      if (BigInt(seq) <= (this.#taken.get(place) ?? -1n)) {
        return;
      }
      this.#taken.delete(place);
      this.#taken.set(place, BigInt(seq));
      if (this.#taken.size > KEYS) {
        this.#taken.delete(this.#taken.keys().next().value as string);
      }
    }
    const told = { event, data, key };
    if (!this.deliver(told)) {
      this.#in.set(place, told, bytes.length);
      this.#changed.wake();
    }
  }
}

/** Whatever goes wrong here is the connection's end, which the session sees, or costs a message that may be lost. */
async function quietly(work: Promise<unknown>): Promise<void> {
  await work.catch(() => {});
}

/** WebTransport behind the client's transport. What browsers do differently is told where it is dealt with. */

import { type Clock, Deferred, handled, sleep } from '../base/async.js';
import { ConnectError } from '../base/errors.js';
import { CloseReason, Code } from '../wire/codes.js';
import { type BidiStream, type ByteReceiver, type ByteSender, type Connection, ConnectionEnd, StreamEnd } from './transport.js';

/** Bytes of a close's text that WebTransport carries. */
const TEXT_BYTES = 1024;
/** Chromium cuts the codes of streams to 8 bits. One that does not fit is told by `$close` alone. */
const STREAM_CODE_MOST = 0xff;
/** Between two tries to open a stream, where the browser rejects instead of waiting for permission. */
const OPEN_PAUSE_MS = 20;
const OPEN_PAUSE_MOST_MS = 1000;

export interface WebTransportSettings {
  /** SHA-256 of the server's certificate, if no CA has signed it. */
  readonly hashes: readonly Uint8Array[];
  readonly clock: Clock;
}

/** Makes a connection with the browser's WebTransport. Rejects with `ConnectError`. */
export async function dialWebTransport(url: string, signal: AbortSignal, settings: WebTransportSettings): Promise<Connection> {
  if (typeof WebTransport === 'undefined') {
    const text = 'this page or program has no WebTransport: it needs a browser that has it, and https or 127.0.0.1';
    throw new ConnectError(new CloseReason(Code.TRANSPORT_ERROR, text, 'local'));
  }
  const options: WebTransportOptions = {};
  if (settings.hashes.length > 0) {
    options.serverCertificateHashes = settings.hashes.map((value) => ({
      algorithm: 'sha-256',
      value: value as Uint8Array<ArrayBuffer>,
    }));
  }
  let transport: WebTransport;
  try {
    transport = new WebTransport(url, options);
  } catch (error) {
    throw new ConnectError(new CloseReason(Code.TRANSPORT_ERROR, `${error}`, 'local'));
  }
  const connection = new WebTransportConnection(transport, settings.clock);
  const giveUp = (): void => connection.close(Code.CANCELLED, '');
  signal.addEventListener('abort', giveUp);
  try {
    await transport.ready;
    return connection;
  } catch {
    // A browser does not say why: a refused certificate, a blocked port and a dead server look alike.
    throw new ConnectError(await connection.closed);
  } finally {
    signal.removeEventListener('abort', giveUp);
  }
}

/** The code of a stream that the peer ended; undefined when the connection is what ended. */
function streamCode(error: unknown): number | undefined {
  const { source, streamErrorCode } = (error ?? {}) as { source?: string; streamErrorCode?: number | null };
  return source === 'stream' ? (streamErrorCode ?? 0) : undefined;
}

function ended(error: unknown): Error {
  const code = streamCode(error);
  return code === undefined ? new ConnectionEnd() : new StreamEnd(code);
}

/** What aborts a stream with a code. Browsers disagree about the constructor's arguments. */
function streamError(code: number): unknown {
  const streamErrorCode = code <= STREAM_CODE_MOST ? code : Code.CANCELLED;
  const make = WebTransportError as unknown as new (...args: unknown[]) => unknown;
  try {
    return new make({ message: '', streamErrorCode });
  } catch {
    return new make('', { streamErrorCode });
  }
}

class Sender implements ByteSender {
  readonly #writer: WritableStreamDefaultWriter<Uint8Array>;
  readonly #finishing: Set<Promise<void>>;
  readonly #stop = new Deferred<number>();
  readonly stopped = this.#stop.promise;

  constructor(stream: WritableStream<Uint8Array>, finishing: Set<Promise<void>>) {
    this.#writer = stream.getWriter();
    this.#finishing = finishing;
    this.#writer.closed.catch((error: unknown) => {
      const code = streamCode(error);
      if (code !== undefined) {
        this.#stop.resolve(code);
      }
    });
    // It rejects with the stream; writes tell the same.
    handled(this.#writer.ready);
  }

  async write(bytes: Uint8Array): Promise<void> {
    try {
      await this.#writer.write(bytes);
    } catch (error) {
      throw ended(error);
    }
  }

  async finish(): Promise<void> {
    const closing = this.#writer.close();
    this.#finishing.add(closing);
    try {
      await closing;
    } catch (error) {
      throw ended(error);
    } finally {
      this.#finishing.delete(closing);
    }
  }

  reset(code: number): void {
    handled(this.#writer.abort(streamError(code)));
  }
}

class Receiver implements ByteReceiver {
  readonly #reader: ReadableStreamDefaultReader<Uint8Array>;

  constructor(stream: ReadableStream<Uint8Array>) {
    this.#reader = stream.getReader();
    handled(this.#reader.closed);
  }

  async read(): Promise<Uint8Array | null> {
    try {
      const { done, value } = await this.#reader.read();
      return done ? null : value;
    } catch (error) {
      throw ended(error);
    }
  }

  stop(code: number): void {
    handled(this.#reader.cancel(streamError(code)));
  }
}

class WebTransportConnection implements Connection {
  readonly via = 'webtransport';
  readonly #transport: WebTransport;
  readonly #clock: Clock;
  readonly #bidi: ReadableStreamDefaultReader<WebTransportBidirectionalStream>;
  readonly #uni: ReadableStreamDefaultReader<ReadableStream<Uint8Array>>;
  readonly #datagramsIn: ReadableStreamDefaultReader<Uint8Array>;
  #datagramsOut: WritableStreamDefaultWriter<Uint8Array> | undefined;
  readonly #finishing = new Set<Promise<void>>();
  #local: CloseReason | undefined;
  #over = false;
  readonly closed: Promise<CloseReason>;

  constructor(transport: WebTransport, clock: Clock) {
    this.#transport = transport;
    this.#clock = clock;
    this.#bidi = transport.incomingBidirectionalStreams.getReader() as ReadableStreamDefaultReader<WebTransportBidirectionalStream>;
    this.#uni = transport.incomingUnidirectionalStreams.getReader() as ReadableStreamDefaultReader<ReadableStream<Uint8Array>>;
    this.#datagramsIn = transport.datagrams.readable.getReader() as ReadableStreamDefaultReader<Uint8Array>;
    for (const promise of [transport.ready, this.#bidi.closed, this.#uni.closed, this.#datagramsIn.closed]) {
      handled(promise as Promise<unknown>);
    }
    this.closed = transport.closed.then(
      ({ closeCode, reason }) => this.#local ?? new CloseReason(closeCode ?? 0, reason ?? '', 'peer'),
      (error: unknown) =>
        this.#local ?? new CloseReason(Code.CONNECTION_LOST, error instanceof Error ? error.message : '', 'transport'),
    );
    void this.closed.then(() => {
      this.#over = true;
    });
  }

  async openBidi(priority?: number): Promise<BidiStream> {
    const options = priority === undefined ? {} : { sendOrder: priority };
    const stream = await this.#opened(() => this.#transport.createBidirectionalStream(options));
    return { send: this.#sender(stream.writable), receive: new Receiver(stream.readable) };
  }

  async openUni(): Promise<ByteSender> {
    return this.#sender(await this.#opened(() => this.#transport.createUnidirectionalStream()));
  }

  async acceptBidi(): Promise<BidiStream | null> {
    const stream = await next(this.#bidi);
    return stream && { send: this.#sender(stream.writable), receive: new Receiver(stream.readable) };
  }

  async acceptUni(): Promise<ByteReceiver | null> {
    const stream = await next(this.#uni);
    return stream && new Receiver(stream);
  }

  get maxDatagram(): number {
    return this.#transport.datagrams.maxDatagramSize;
  }

  async sendDatagram(bytes: Uint8Array): Promise<void> {
    const { datagrams } = this.#transport as unknown as {
      datagrams: { writable?: WritableStream<Uint8Array>; createWritable?: () => WritableStream<Uint8Array> };
    };
    if (this.#datagramsOut === undefined) {
      // The property is the older form, the function the newer one; Safari has the function alone.
      const stream = datagrams.createWritable ? datagrams.createWritable() : datagrams.writable;
      this.#datagramsOut = (stream as WritableStream<Uint8Array>).getWriter();
      handled(this.#datagramsOut.closed);
      handled(this.#datagramsOut.ready);
    }
    try {
      await this.#datagramsOut.write(bytes);
    } catch (error) {
      throw ended(error);
    }
  }

  readDatagram(): Promise<Uint8Array | null> {
    return next(this.#datagramsIn);
  }

  /** Chromium 156 loses the page when a session ends while the end of one of its streams is on its way. */
  async finished(): Promise<void> {
    while (this.#finishing.size > 0 && !this.#over) {
      await Promise.allSettled(this.#finishing);
    }
  }

  close(code: number, text: string): void {
    if (this.#over || this.#local) {
      return;
    }
    this.#local = new CloseReason(code, text, 'local');
    try {
      this.#transport.close({ closeCode: code <= 0xffff_ffff ? code : Code.NORMAL, reason: cut(text) });
    } catch {
      // It is over already.
    }
  }

  #sender(stream: WritableStream<Uint8Array>): Sender {
    return new Sender(stream, this.#finishing);
  }

  /** Chromium rejects at once when the peer permits no further stream yet; others wait. */
  async #opened<T>(open: () => Promise<T>): Promise<T> {
    for (let pause = OPEN_PAUSE_MS; !this.#over; pause = Math.min(2 * pause, OPEN_PAUSE_MOST_MS)) {
      try {
        return await open();
      } catch {
        await Promise.race([sleep(this.#clock, pause), this.closed]);
      }
    }
    throw new ConnectionEnd();
  }
}

/** The next of a browser's stream of things; `null` when there will be no other. */
async function next<T>(reader: ReadableStreamDefaultReader<T>): Promise<T | null> {
  try {
    const { done, value } = await reader.read();
    return done ? null : value;
  } catch {
    return null;
  }
}

/** At most so many bytes of UTF-8, whole characters. */
function cut(text: string): string {
  const bytes = new TextEncoder().encode(text);
  return bytes.length <= TEXT_BYTES ? text : new TextDecoder().decode(bytes.subarray(0, TEXT_BYTES - 3)).replace(/\ufffd$/, '');
}

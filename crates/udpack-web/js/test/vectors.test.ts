/** Runs `docs/PROTOCOL.md` against this package: every vector, the sample sessions, the table of close codes. */

import assert from 'node:assert/strict';
import { test } from 'node:test';
import { UdpackError } from '../src/base/errors.js';
import { closeCodes, codeName } from '../src/wire/codes.js';
import * as control from '../src/wire/control.js';
import { FrameDecoder } from '../src/wire/frame.js';
import { decodeMessage, decodeVolatile, encodeFrame, encodeVolatile, plain, type WireMessage } from '../src/wire/message.js';
import { Float, Reader } from '../src/wire/msgpack.js';
import { Said, TransferError } from '../src/transfer/messages.js';
import * as rooms from '../src/rooms/messages.js';
import { decodeOpenOfClient } from './since.js';
import { blocks, DOCUMENT, readHex, readJson, type Vector, vectors } from './document.js';

/** Fewer than these, and the reader of the document has gone blind. */
const MIN_ACCEPTED = 180;
const MIN_REFUSED = 270;
const MIN_SESSION_FRAMES = 40;

const tables: Record<string, (message: WireMessage) => unknown> = {
  hello: control.decodeHello,
  welcome: control.decodeWelcome,
  open: decodeOpenOfClient,
  close: control.decodeClose,
  goaway: control.decodeGoAway,
  channels: control.decodeChannels,
  resume: control.decodeResume,
  ack: control.decodeAck,
  refresh: control.decodeRefresh,
  refreshed: control.decodeRefreshed,
  gap: (message) => rooms.decodeGap(message, control.fieldsOf),
  room: (message) => rooms.decodeRoom(message, control.fieldsOf),
  at: (message) => rooms.decodeAt(message, control.fieldsOf),
  mark: control.decodeMark,
  passed: control.decodePassed,
  fault: control.decodeFault,
};

/** The name of the code that refuses, or undefined. */
function refusal(work: () => unknown): string | undefined {
  try {
    work();
    return undefined;
  } catch (error) {
    assert.ok(error instanceof UdpackError, `${error}`);
    return codeName(error.code);
  }
}

function frames(limit: number | undefined, stream: Uint8Array, step: number): [Uint8Array[], string | undefined] {
  const decoder = new FrameDecoder(limit ?? 1_114_112);
  const bodies: Uint8Array[] = [];
  const code = refusal(() => {
    for (let at = 0; at < stream.length; at += step) {
      decoder.push(stream.subarray(at, at + step));
      for (let body = decoder.next(); body; body = decoder.next()) bodies.push(body);
    }
    decoder.finish();
  });
  return [bodies, code];
}

function items(body: Uint8Array): unknown[] {
  const reader = new Reader(body);
  reader.tellFloats = true;
  const value = reader.value();
  reader.finish();
  return value as unknown[];
}

function checkFrames(vector: Vector): void {
  const stream = vector.bytes;
  const limit = vector.field('limit');
  const bodies = vector.fields.filter(([key]) => key === 'body').map(([, hex]) => readHex(hex));
  const small = stream.length <= 4096 ? 1 : 4093;
  for (const step of [stream.length + 1, small, 3 * small]) {
    const [found, code] = frames(limit === undefined ? undefined : Number(limit), stream, step);
    assert.equal(code, vector.refusal);
    assert.equal(found.length, bodies.length);
    for (const [index, body] of found.entries()) assert.ok(Buffer.from(body).equals(bodies[index] as Uint8Array));
  }
}

function checkMessage(vector: Vector): void {
  const bytes = vector.bytes;
  const table = tables[vector.kind];
  // What a table refuses must still be a message, or this tests something else.
  const message = table || vector.refusal === undefined ? decodeMessage(bytes) : undefined;
  const code = refusal(() => (table ? table(decodeMessage(bytes)) : decodeMessage(bytes)));
  assert.equal(code, vector.refusal);
  if (code !== undefined || message === undefined) return;

  const event = readJson(vector.field('event') as string);
  const data = readJson(vector.field('data') as string);
  assert.deepEqual(message.event, event);
  assert.deepEqual(items(bytes).slice(0, 2), [event, data]);
  assert.deepEqual(plain(message.data), plain(data));
  const id = vector.field('id');
  assert.equal(message.id === undefined ? undefined : BigInt(message.id), id === undefined ? undefined : BigInt(id));
  const deadline = vector.field('deadline');
  assert.equal(message.deadline, deadline === undefined ? undefined : Number(deadline));
  if (vector.field('canonical') === 'yes' && !hasFloat32(data)) {
    const encoded = encodeFrame(bytes.length, message.event, message.data);
    assert.equal(Buffer.from(encoded.subarray(4)).toString('hex'), Buffer.from(bytes).toString('hex'));
  }
}

/** The writer makes every float one of 64 bits. */
function hasFloat32(data: unknown): boolean {
  return data instanceof Float && Math.fround(data.value) === data.value;
}

function checkVolatile(vector: Vector): void {
  const bytes = vector.bytes;
  assert.equal(
    refusal(() => decodeVolatile(bytes)),
    vector.refusal,
  );
  if (vector.refusal !== undefined) return;
  const said = ['event', 'data', 'seq', 'key']
    .map((field) => vector.field(field))
    .filter((text) => text !== undefined)
    .map(readJson);
  assert.deepEqual(items(bytes), said);
  const { event, data, seq, key } = decodeVolatile(bytes);
  assert.deepEqual([event, data, seq, key].slice(0, said.length), said.map(plain));
  if (vector.field('canonical') === 'yes' && typeof seq === 'number') {
    assert.deepEqual(encodeVolatile(bytes.length, event, data, seq, key), bytes);
  }
}

/** What a server says on a lane of file transfer. */
function checkReply(vector: Vector): void {
  const message = decodeMessage(vector.bytes);
  let reason: string | undefined;
  try {
    new Said(message);
  } catch (error) {
    assert.ok(error instanceof TransferError, `${error}`);
    reason = error.reason;
  }
  assert.equal(reason, vector.refusal);
  if (reason === undefined) checkMessage(vector);
}

function check(vector: Vector): void {
  switch (vector.kind) {
    case 'frame':
      return checkFrames(vector);
    case 'datagram':
      return checkVolatile(vector);
    case 'lane-reply':
      return checkReply(vector);
    case 'lane':
    case 'ask':
      // A client sends these; what a server refuses of them must still be a message.
      if (vector.refusal !== undefined) decodeMessage(vector.bytes);
      else checkMessage(vector);
      return;
    default:
      assert.ok(vector.kind === 'message' || tables[vector.kind], `unknown kind: ${vector.kind}`);
      return checkMessage(vector);
  }
}

test('every vector of the document holds', async (t) => {
  const all = vectors();
  const refused = all.filter((vector) => vector.refusal !== undefined).length;
  assert.ok(all.length - refused >= MIN_ACCEPTED, `accepted vectors found: ${all.length - refused}`);
  assert.ok(refused >= MIN_REFUSED, `refused vectors found: ${refused}`);
  const failures: string[] = [];
  for (const vector of all) {
    try {
      check(vector);
    } catch (error) {
      failures.push(`${vector.name} (${vector.kind}): ${error}`);
    }
  }
  assert.equal(failures.join('\n'), '');
  t.diagnostic(`${all.length} vectors`);
});

test('close codes of the document are those of the package', () => {
  const rows = [...DOCUMENT.matchAll(/^\| `0x([0-9a-f]+)` \| `(\w+)` \|.*$/gm)].map((row) => {
    const cells = row[0].split(' | ');
    return [Number.parseInt(row[1] as string, 16), row[2], cells.at(-2) === 'yes'];
  });
  assert.deepEqual(rows, closeCodes());
});

test('the sample sessions say what their bytes say', () => {
  let found = 0;
  for (const block of blocks('session')) {
    const records: { hex: string; json: string }[] = [];
    for (const line of block.split('\n').filter((line) => !line.startsWith('#'))) {
      const last = records.at(-1);
      if (!line.startsWith(' ')) records.push({ hex: line.replace(/^[CS] \d+/, ''), json: '' });
      else if (last && (line.trim().startsWith('[') || last.json !== '')) last.json += ` ${line.trim()}`;
      else if (last) last.hex += ` ${line.trim()}`;
    }
    for (const { hex, json } of records) {
      if (hex.trim() === 'FIN') continue;
      const [bodies, code] = frames(undefined, readHex(hex), 7);
      assert.equal(code, undefined);
      assert.equal(bodies.length, 1);
      const body = bodies[0] as Uint8Array;
      assert.deepEqual(items(body), readJson(json));
      const message = decodeMessage(body);
      tables[message.event.slice(1)]?.(message);
      found += 1;
    }
  }
  assert.ok(found >= MIN_SESSION_FRAMES, `frames found: ${found}`);
});

// Writes `src/transfer/kernel.ts`: the inner loop of BLAKE3 as WebAssembly with SIMD, which hashes four inputs side by side, as
// `blake3_hash_many` of the C implementation does. Its text is unrolled here and assembled by wabt. With `--check` it writes
// nothing and compares: the result is committed, and small enough to be read where this is not run.
import { readFileSync, writeFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import wabt from 'wabt';

const TARGET = fileURLToPath(new URL('../src/transfer/kernel.ts', import.meta.url));

const IV = [0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19];
/** Where each word of the message is in the next round. */
const ORDER = [2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8];
const ROUNDS = 7;
const COLUMNS = [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]];
const DIAGONALS = [[0, 5, 10, 15], [1, 6, 11, 12], [2, 7, 8, 13], [3, 4, 9, 14]];

const LANES = [0, 1, 2, 3];
const count = (n) => Array.from({ length: n }, (_, at) => at);

// The text of instructions. A variable holds the same word of all four inputs.
const get = (name) => `(local.get $${name})`;
const set = (name, value) => `(local.set $${name} ${value})`;
const splat = (value) => `(v128.const i32x4 ${LANES.map(() => value).join(' ')})`;
const add = (...terms) => terms.reduce((sum, term) => `(i32x4.add ${sum} ${term})`);
const xor = (a, b) => `(v128.xor ${get(a)} ${get(b)})`;
const shuffle = (bytes, a, b) => `(i8x16.shuffle ${bytes.join(' ')} ${get(a)} ${get(b)})`;
const words = (...picked) => picked.flatMap((word) => LANES.map((byte) => 4 * word + byte));

/** To the right. By whole bytes it is one shuffle. */
function rotate(name, bits) {
  if (bits % 8 === 0) {
    const bytes = count(16).map((at) => (at & ~3) + ((at + bits / 8) & 3));
    return set(name, shuffle(bytes, name, name));
  }
  return set(name, `(v128.or (i32x4.shr_u ${get(name)} (i32.const ${bits})) (i32x4.shl ${get(name)} (i32.const ${32 - bits})))`);
}

/** Half of BLAKE3's function G. */
function half([a, b, c, d], message, bitsOfD, bitsOfB) {
  return [set(a, add(get(a), get(b), get(message))), set(d, xor(d, a)), rotate(d, bitsOfD), set(c, add(get(c), get(d))), set(b, xor(b, c)), rotate(b, bitsOfB)];
}

/** Four rows of words become four columns. */
function transpose(a, b, c, d) {
  const [low, high] = [words(0, 4, 1, 5), words(2, 6, 3, 7)];
  const [first, last] = [words(0, 1, 4, 5), words(2, 3, 6, 7)];
  return [
    ...[set('t0', shuffle(low, a, b)), set('t1', shuffle(high, a, b)), set('t2', shuffle(low, c, d)), set('t3', shuffle(high, c, d))],
    ...[set(a, shuffle(first, 't0', 't2')), set(b, shuffle(last, 't0', 't2')), set(c, shuffle(first, 't1', 't3')), set(d, shuffle(last, 't1', 't3'))],
  ];
}

function compress() {
  const code = [0, 4, 8, 12].flatMap((word) => [
    ...LANES.map((lane) => set(`m${word + lane}`, `(v128.load offset=${4 * word} ${get(`p${lane}`)})`)),
    ...transpose(...LANES.map((lane) => `m${word + lane}`)),
  ]);
  code.push(...count(8).map((word) => set(`v${word}`, get(`h${word}`))), ...LANES.map((word) => set(`v${8 + word}`, splat(IV[word]))));
  code.push(set('v12', get('low')), set('v13', get('high')), set('v14', `(i32x4.splat ${get('length')})`), set('v15', `(i32x4.splat ${get('flags')})`));
  let order = count(16);
  for (let round = 0; round < ROUNDS; round += 1) {
    const message = order.map((word) => `m${word}`);
    for (const four of [COLUMNS, DIAGONALS]) {
      for (const state of four) {
        const names = state.map((word) => `v${word}`);
        code.push(...half(names, message.shift(), 16, 12), ...half(names, message.shift(), 8, 7));
      }
    }
    order = ORDER.map((from) => order[from]);
  }
  code.push(...count(8).map((word) => set(`h${word}`, xor(`v${word}`, `v${word + 8}`))));
  return code;
}

/**
 * hash4(at, stride, blocks, last, low, high, step, first, end, out): the chaining values of four inputs of as many blocks, the first
 * at `at`, each `stride` behind the one before, go to `out`, 32 bytes each. The last block has `last` bytes. The counter of an
 * input is `step` above the one before; its upper half is `high` for all. `first` and `end` are the flags of the first and of the
 * last block.
 */
function module() {
  const locals = (type, names) => names.map((name) => `(local $${name} ${type})`).join(' ');
  const many = (name, n) => count(n).map((at) => `${name}${at}`);
  const params = ['at', 'stride', 'blocks', 'last', 'counter', 'upper', 'step', 'first', 'end', 'out'].map((name) => `(param $${name} i32)`);
  const code = [
    ...count(8).map((word) => set(`h${word}`, splat(IV[word]))),
    ...LANES.map((lane) => set(`p${lane}`, `(i32.add ${get('at')} (i32.mul ${get('stride')} (i32.const ${lane})))`)),
    set('low', add(`(i32x4.splat ${get('counter')})`, `(i32x4.mul (i32x4.splat ${get('step')}) (v128.const i32x4 0 1 2 3))`)),
    set('high', `(i32x4.splat ${get('upper')})`),
    set('length', '(i32.const 64)'),
    set('flags', get('first')),
    '(loop $next',
    `(if (i32.eq ${get('blocks')} (i32.const 1)) (then ${set('length', get('last'))} ${set('flags', `(i32.or ${get('flags')} ${get('end')})`)}))`,
    ...compress(),
    set('flags', '(i32.const 0)'),
    ...LANES.map((lane) => set(`p${lane}`, `(i32.add ${get(`p${lane}`)} (i32.const 64))`)),
    `(br_if $next (local.tee $blocks (i32.sub ${get('blocks')} (i32.const 1)))))`,
    ...transpose('h0', 'h1', 'h2', 'h3'),
    ...transpose('h4', 'h5', 'h6', 'h7'),
    ...LANES.flatMap((lane) => [0, 4].map((word) => `(v128.store offset=${32 * lane + 4 * word} ${get('out')} ${get(`h${word + lane}`)})`)),
  ];
  return `(module (memory (export "memory") 2) (func (export "hash4") ${params.join(' ')}
${locals('i32', [...many('p', 4), 'length', 'flags'])} ${locals('v128', ['low', 'high', ...many('h', 8), ...many('v', 16), ...many('m', 16), ...many('t', 4)])}
${code.join('\n')}))`;
}

const { parseWat } = await wabt();
const parsed = parseWat('kernel.wat', module(), { simd: true });
parsed.validate();
const base64 = Buffer.from(parsed.toBinary({}).buffer).toString('base64');
const lines = base64.match(/.{1,120}/g).map((line) => `  '${line}'`);
const text = `// Made by scripts/kernel.js, which says what it does.
export const KERNEL =
${lines.join(' +\n')};
`;

if (!process.argv.includes('--check')) {
  writeFileSync(TARGET, text);
} else if (readFileSync(TARGET, 'utf8') !== text) {
  console.error('src/transfer/kernel.ts is not what scripts/kernel.js makes: run `npm run build` and commit it');
  process.exit(1);
}

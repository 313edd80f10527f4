/** The package as it is shipped: the bundle's size, what it needs of its surroundings, and the programs of the documents. */

import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { gzipSync } from 'node:zlib';

const root = fileURLToPath(new URL('../..', import.meta.url));
const repository = fileURLToPath(new URL('../../../../..', import.meta.url));
const LIMITS = { 'udpack.js': 25_000, 'mux.js': 7000, 'rooms.js': 2000 };

function run(...args: string[]): string {
  const { status, stdout, stderr } = spawnSync(process.execPath, args, { cwd: root, encoding: 'utf8' });
  assert.equal(status, 0, `${stdout}${stderr}`);
  return stdout;
}

test('the committed bundles are what the sources make', () => {
  run('scripts/build.js', '--check');
});

test('the bundle has at most 25 kB, compressed, what it loads where UDP does not pass 7 kB, and rooms 2 kB', (t) => {
  for (const [name, limit] of Object.entries(LIMITS)) {
    const bytes = gzipSync(readFileSync(`${root}/dist/${name}`), { level: 9 }).length;
    t.diagnostic(`${name}: ${bytes} bytes`);
    assert.ok(bytes <= limit, `${name}: ${bytes} bytes`);
  }
});

test('the bundle loads where there is no page, and says what is missing', () => {
  const program = `
    const { connect, ConnectError } = await import('${root}/dist/udpack.js');
    if (typeof document !== 'undefined' || typeof WebTransport !== 'undefined') throw new Error('this tests nothing');
    try { await connect({ url: 'https://127.0.0.1:1/udpack', token: 'x' }); } catch (error) {
      console.log(error instanceof ConnectError, error.code, error.retry, error.message.includes('WebTransport'));
    }`;
  assert.equal(run('--input-type=module', '--eval', program).trim(), 'true 243 false true');
});

/** The TypeScript programs of a document. */
function programs(path: string): string[] {
  const text = readFileSync(path, 'utf8');
  return [...text.matchAll(/^```ts\n(.*?)^```$/gms)].map(([, program]) => program as string);
}

test('the programs of the guide and the README compile, and the chat has at most 25 lines', () => {
  const all = [...programs(`${repository}/docs/GUIDE.md`), ...programs(`${root}/README.md`)];
  assert.ok(all.length >= 2, `${all.length} programs`);
  const chat = all.find((program) => program.includes("'chat'"));
  assert.ok(chat && chat.trimEnd().split('\n').length <= 25, 'the chat has more than 25 lines');
  mkdirSync(`${root}/build/programs`, { recursive: true });
  for (const [index, program] of all.entries()) writeFileSync(`${root}/build/programs/${index}.ts`, `${program}\nexport {};\n`);
  const options = { lib: ['ES2023', 'ESNext.Disposable', 'DOM', 'DOM.AsyncIterable'], noEmit: true, rootDir: '../..', noUnusedLocals: false, paths: { udpack: ['../../src/index.ts'], 'udpack/transfer': ['../../src/transfer/index.ts'] } };
  writeFileSync(`${root}/build/programs/tsconfig.json`, JSON.stringify({ extends: '../../tsconfig.json', compilerOptions: options, include: ['*.ts'] }));
  run('node_modules/typescript/bin/tsc', '-p', 'build/programs/tsconfig.json');
});

test('the programs of the example pages are sound, and none is long', () => {
  const scripts = ['chat', 'call', 'progress'].map((name) => `${repository}/examples/browser-${name}/page.js`);
  const lines = scripts.map((script) => readFileSync(script, 'utf8').trimEnd().split('\n').length);
  assert.ok((lines[0] as number) <= 25, `the chat has ${lines[0]} lines`);
  assert.ok(lines.every((count) => count <= 80), `${lines}`);
  mkdirSync(`${root}/build/pages`, { recursive: true });
  const compilerOptions = { lib: ['ES2023', 'ESNext.Disposable', 'DOM', 'DOM.AsyncIterable'], allowJs: true, checkJs: true, noEmit: true, rootDir: repository, noImplicitAny: true, exactOptionalPropertyTypes: false, noUncheckedIndexedAccess: false, verbatimModuleSyntax: false, module: 'ESNext', moduleResolution: 'Bundler', paths: { udpack: ['../../src/index.ts'] } };
  writeFileSync(`${root}/build/pages/tsconfig.json`, JSON.stringify({ extends: '../../tsconfig.json', compilerOptions, include: [], files: scripts }));
  run('node_modules/typescript/bin/tsc', '-p', 'build/pages/tsconfig.json');
});

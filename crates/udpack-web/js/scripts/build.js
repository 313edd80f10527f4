// Bundles the client into `dist/udpack.js`, what it loads where UDP does not pass into `dist/mux.js`, file transfer, with its
// BLAKE3, into `dist/transfer.js`, rooms with a history into `dist/rooms.js`, and the Worker that hashes into `dist/hash-worker.js`. With `--check` it writes nothing and
// compares: the bundles are committed, because programs without Node embed them. With `--maps` they get source maps, for the
// package: these are larger than all else, and made from the rest.
import { readFileSync, writeFileSync, mkdirSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { build } from 'esbuild';
import { apart } from './apart.js';

process.chdir(fileURLToPath(new URL('..', import.meta.url)));
const check = process.argv.includes('--check');
const maps = process.argv.includes('--maps');

const { outputFiles } = await build({
  entryPoints: { udpack: 'src/index.ts', transfer: 'src/transfer/index.ts', rooms: 'src/rooms/index.ts', 'hash-worker': 'src/transfer/hash-worker.ts', mux: 'src/transport/mux/index.ts' },
  outdir: 'dist',
  bundle: true,
  format: 'esm',
  target: 'es2022',
  minify: true,
  sourcemap: maps && 'linked',
  plugins: [apart],
  write: false,
  banner: { js: '/*! udpack, MIT OR Apache-2.0. Contains parts of @msgpack/msgpack, Copyright 2019 The MessagePack Community, ISC. */' },
});

let differs = false;
mkdirSync('dist', { recursive: true });
for (const { path, contents } of outputFiles) {
  const name = path.slice(path.lastIndexOf('/') + 1);
  if (!check) {
    writeFileSync(`dist/${name}`, contents);
    continue;
  }
  let committed;
  try {
    committed = readFileSync(`dist/${name}`);
  } catch {
    committed = Buffer.alloc(0);
  }
  if (!committed.equals(contents)) {
    console.error(`dist/${name} is not what the sources make: run \`npm run build\` and commit it`);
    differs = true;
  }
}
process.exit(differs ? 1 : 0);

// Builds the pages of `../pages` into `../pages/dist`, which servers embed. With `--check` it writes nothing and compares: these
// files are committed.
import { mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { build } from 'esbuild';
import { apart } from './apart.js';

process.chdir(fileURLToPath(new URL('..', import.meta.url)));
const check = process.argv.includes('--check');
const SOURCE = '../pages/src';
const TARGET = '../pages/dist';

const { outputFiles } = await build({
  entryPoints: { app: `${SOURCE}/main.ts`, style: `${SOURCE}/app.css`, worker: 'src/transfer/hash-worker.ts', mux: 'src/transport/mux/index.ts' },
  entryNames: '[name]',
  outdir: TARGET,
  bundle: true,
  format: 'esm',
  target: 'es2022',
  minify: true,
  // Packages are this one's; the pages have none of their own.
  nodePaths: ['node_modules'],
  alias: { udpack: './src/index.ts', 'udpack/transfer': './src/transfer/index.ts' },
  plugins: [apart],
  write: false,
  banner: { js: '/*! udpack, MIT OR Apache-2.0. Contains parts of @msgpack/msgpack, Copyright 2019 The MessagePack Community, ISC. */' },
});

const made = new Map(outputFiles.map(({ path, contents }) => [path.slice(path.lastIndexOf('/') + 1).replace('style.css', 'app.css'), Buffer.from(contents)]));
for (const name of ['index.html', 'icon.svg']) {
  made.set(name, readFileSync(`${SOURCE}/${name}`));
}

mkdirSync(TARGET, { recursive: true });
let differs = false;
for (const name of readdirSync(TARGET).filter((name) => !made.has(name))) {
  differs = true;
  if (check) console.error(`pages/dist/${name} is made by nothing`);
  else rmSync(`${TARGET}/${name}`);
}
for (const [name, contents] of made) {
  if (!check) {
    writeFileSync(`${TARGET}/${name}`, contents);
    continue;
  }
  let committed = Buffer.alloc(0);
  try {
    committed = readFileSync(`${TARGET}/${name}`);
  } catch {
    // Not there: it differs.
  }
  if (!committed.equals(contents)) {
    console.error(`pages/dist/${name} is not what the sources make: run \`npm run build\` and commit it`);
    differs = true;
  }
}
process.exit(check && differs ? 1 : 0);

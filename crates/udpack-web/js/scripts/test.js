// Compiles sources and tests, then runs the tests: `node scripts/test.js [FILE…]` runs some of them, by name.
import { spawnSync } from 'node:child_process';
import { readdirSync, rmSync } from 'node:fs';
import { fileURLToPath } from 'node:url';

const root = fileURLToPath(new URL('..', import.meta.url));
process.chdir(root);

function run(command, ...args) {
  const { status } = spawnSync(command, args, { stdio: 'inherit' });
  if (status !== 0) process.exit(status ?? 1);
}

rmSync('build', { recursive: true, force: true });
run(process.execPath, 'node_modules/typescript/bin/tsc', '-p', 'tsconfig.test.json');

const wanted = process.argv.slice(2);
const tests = readdirSync('build/test')
  .filter((name) => name.endsWith('.test.js'))
  .filter((name) => wanted.length === 0 || wanted.some((part) => name.includes(part)))
  .map((name) => `build/test/${name}`);
// Node 20 has WebSocket only by this option.
run(process.execPath, '--enable-source-maps', '--experimental-websocket', '--test', '--test-timeout=300000', ...tests);

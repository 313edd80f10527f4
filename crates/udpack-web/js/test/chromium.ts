/** The browser of the tests, and why a test cannot run without it or its server. */

import { existsSync } from 'node:fs';
import { type Browser, chromium } from 'playwright-core';

const CHROMIUM = process.env.CHROMIUM ?? '/usr/bin/chromium';

/** Why tests that need these programs cannot run here, if they cannot. */
export function without(...programs: string[]): string | false {
  const missing = [CHROMIUM, ...programs].filter((path) => !existsSync(path));
  return missing.length > 0 && process.env.UDPACK_BROWSER !== 'required' ? `SKIPPED: not there: ${missing.join(', ')}` : false;
}

/** `more` are switches beside those that every test needs. */
export function launch(...more: string[]): Promise<Browser> {
  return chromium.launch({
    executablePath: CHROMIUM,
    headless: true,
    // Every stream has pipes in shared memory, which containers have little of.
    args: ['--no-sandbox', '--disable-dev-shm-usage', ...more],
    // Where the locale says nothing of names in UTF-8, the browser cannot read such files, nor save them under their names.
    env: { ...process.env, LC_ALL: 'C.UTF-8' } as Record<string, string>,
  });
}

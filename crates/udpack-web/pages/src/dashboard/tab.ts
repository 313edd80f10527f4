/** A tab without anything in it yet. */

import { type Mounted, type Session } from '../frame/session.js';

export function mount(_root: HTMLElement, _session: Session): Mounted {
  return { unmount() {} };
}

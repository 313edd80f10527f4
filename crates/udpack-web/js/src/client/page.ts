/** A page that the reader leaves may come back as it was (the back/forward cache), and then with its session. */

import { type Session } from '../session/session.js';

/** The window, where there is one: not in a Worker. */
export function windowHere(): EventTarget | undefined {
  const here = globalThis as { document?: unknown; addEventListener?: unknown };
  return here.document && here.addEventListener ? (here as unknown as EventTarget) : undefined;
}

/** Lets the session sleep while its page does, and ends it with the page. */
export function follow(page: EventTarget, session: Session): void {
  const hide = (event: Event): void => ((event as PageTransitionEvent).persisted ? session.sleep() : session.quit());
  const show = (): void => session.wake();
  page.addEventListener('pagehide', hide);
  page.addEventListener('pageshow', show);
  void session.closed.promise.then(() => {
    page.removeEventListener('pagehide', hide);
    page.removeEventListener('pageshow', show);
  });
}

interface PageTransitionEvent extends Event {
  readonly persisted: boolean;
}

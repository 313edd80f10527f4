/** The token of the link: from the fragment, which is dropped at once, into the tab's own storage and nowhere else. */

const KEY = 'udpack token';

/** Takes the token out of the address bar, if there is one, and tells the one that counts. */
export function takeToken(): string | undefined {
  const token = tokenOf(location.hash);
  if (token !== undefined) {
    history.replaceState(history.state, '', location.pathname + location.search);
    return keepToken(token);
  }
  return sessionStorage.getItem(KEY) ?? undefined;
}

/** The token of a fragment, `#t=TOKEN`. */
export function tokenOf(fragment: string): string | undefined {
  const token = new URLSearchParams(fragment.replace(/^#/, '').replaceAll('+', '%2B')).get('t');
  return token === null || token === '' ? undefined : token;
}

/** Keeps a token for this tab; what the server is to be told from then on. */
export function keepToken(token: string): string {
  const kept = sessionStorage.getItem(KEY);
  const mine = kept?.startsWith(`${token}~`) ? kept : claimed(token);
  sessionStorage.setItem(KEY, mine);
  return mine;
}

/** Whether a token is for the first browser alone that comes with it. */
export function isOnce(token: string): boolean {
  return token.startsWith('once~');
}

/** Such a token with a secret of this tab: who knows the link alone comes in no more. */
function claimed(token: string): string {
  if (!isOnce(token) || token.indexOf('~', 5) >= 0) {
    return token;
  }
  const secret = btoa(String.fromCharCode(...crypto.getRandomValues(new Uint8Array(32))));
  return `${token}~${secret.replaceAll('+', '-').replaceAll('/', '_').replaceAll('=', '')}`;
}

export function forgetToken(): void {
  sessionStorage.removeItem(KEY);
}

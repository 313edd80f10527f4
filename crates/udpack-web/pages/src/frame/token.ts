/** The token of the link: from the fragment, which is dropped at once, into the tab's own storage and nowhere else. */

const KEY = 'udpack token';

/** Takes the token out of the address bar, if there is one, and tells the one that counts. */
export function takeToken(): string | undefined {
  const token = tokenOf(location.hash);
  if (token !== undefined) {
    history.replaceState(history.state, '', location.pathname + location.search);
    keepToken(token);
    return token;
  }
  return sessionStorage.getItem(KEY) ?? undefined;
}

/** The token of a fragment, `#t=TOKEN`. */
export function tokenOf(fragment: string): string | undefined {
  const token = new URLSearchParams(fragment.replace(/^#/, '').replaceAll('+', '%2B')).get('t');
  return token === null || token === '' ? undefined : token;
}

export function keepToken(token: string): void {
  sessionStorage.setItem(KEY, token);
}

export function forgetToken(): void {
  sessionStorage.removeItem(KEY);
}

/** What the page says in passing: toasts at its lower edge, and words for screen readers alone. */

import { h, iconButton } from './dom.js';
import { texts } from './text.js';

const t = texts('notice', { close: 'Close' }, { close: '关闭' });

const STAYS_MS = 6000;
const MOST = 4;

let polite: HTMLElement | undefined;
let quiet: HTMLElement | undefined;

/** The regions of the page that say it; to be put into the page once. */
export function notices(): HTMLElement[] {
  polite ??= h('div', { class: 'toasts', role: 'status', 'aria-live': 'polite' });
  quiet ??= h('div', { class: 'visually-hidden', role: 'status', 'aria-live': 'polite' });
  return [polite, quiet];
}

/** Shows a line for a few seconds; an error stays until it is closed. */
export function toast(text: string, kind: 'info' | 'error' = 'info'): void {
  const line: HTMLElement = h('div', { class: `toast ${kind}` }, h('span', {}, text), iconButton('close', t('close'), (): void => line.remove()));
  const [place] = notices() as [HTMLElement, HTMLElement];
  place.append(line);
  while (place.childElementCount > MOST) {
    place.firstElementChild?.remove();
  }
  if (kind === 'info') {
    setTimeout(() => line.remove(), STAYS_MS);
  }
}

/** Says a line to screen readers only. */
export function announce(text: string): void {
  const [, place] = notices() as [HTMLElement, HTMLElement];
  place.textContent = text;
}

/** A bar: what is durable, and behind it in a lighter colour what has merely arrived. */

import { h, setAttribute } from './dom.js';

export class ProgressBar {
  readonly root: HTMLElement;
  private readonly safe = h('div', { class: 'bar-safe' });
  private readonly ahead = h('div', { class: 'bar-ahead' });

  /** `label` is what screen readers call it. */
  constructor(label: string) {
    this.root = h('div', { class: 'bar', role: 'progressbar', 'aria-label': label, 'aria-valuemin': 0, 'aria-valuemax': 100, 'aria-valuenow': 0 }, this.ahead, this.safe);
  }

  /** Parts of `whole`; `text` is read out instead of the percentage. */
  set(safe: number, ahead: number, whole: number, text?: string): void {
    const share = (part: number): number => (whole > 0 ? Math.min(1, part / whole) : 1);
    this.safe.style.transform = `scaleX(${share(safe).toFixed(4)})`;
    this.ahead.style.transform = `scaleX(${share(ahead).toFixed(4)})`;
    setAttribute(this.root, 'aria-valuenow', Math.floor(share(safe) * 100));
    setAttribute(this.root, 'aria-valuetext', text);
  }

  set label(label: string) {
    setAttribute(this.root, 'aria-label', label);
  }
}

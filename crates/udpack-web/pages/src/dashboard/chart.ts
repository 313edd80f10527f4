/** Two rates as lines over the last minutes. */

import { draw, h, setAttribute, setText } from '../base/dom.js';
import { duration, rate } from '../base/format.js';
import { t } from './text.js';

const SECOND = 1000;
const MINUTE = 60 * SECOND;
/** How much is shown: the first that holds all there is, or the last. And how far apart the marks of its axis are. */
const SPANS = [
  { span: MINUTE, every: 15 * SECOND },
  { span: 2 * MINUTE, every: 30 * SECOND },
  { span: 5 * MINUTE, every: MINUTE },
] as const;
const LONGEST = 5 * MINUTE;
/** Room for the axes, in pixels. */
const LEFT = 78;
const RIGHT = 14;
const TOP = 10;
const BOTTOM = 24;
/** The highest rate that the scale has at least, in bytes a second. */
const LEAST = 4000;
/** Lines across, besides the one at the bottom. */
const STEPS = 4;

interface Sample {
  readonly at: number;
  readonly values: readonly [number, number];
}

export class Chart {
  readonly root: HTMLElement;
  private readonly svg = draw('svg', { role: 'img', class: 'plot' });
  private readonly grid = draw('g', { class: 'grid' });
  private readonly areas = [draw('path', { class: 'area first' }), draw('path', { class: 'area second' })] as const;
  private readonly lines = [draw('path', { class: 'line first' }), draw('path', { class: 'line second' })] as const;
  private readonly figures = [h('span', { class: 'figure' }), h('span', { class: 'figure' })] as const;
  private readonly span = h('span', { class: 'quiet span' });
  private readonly samples: Sample[] = [];
  private readonly resized = new ResizeObserver(() => this.show());

  constructor(private readonly names: readonly [string, string]) {
    const key = (which: 0 | 1): HTMLElement => h('div', { class: which === 0 ? 'key first' : 'key second' }, h('span', { class: 'swatch', 'aria-hidden': 'true' }), h('span', {}, names[which]), this.figures[which]);
    this.svg.append(this.grid, ...this.areas, ...this.lines);
    this.root = h('figure', { class: 'chart' }, h('figcaption', {}, key(0), key(1), this.span), this.svg);
    this.resized.observe(this.svg);
  }

  /** The rates from now on, in bytes a second. */
  sample(values: readonly [number, number], at = performance.now()): void {
    this.samples.push({ at, values });
    while (this.samples.length > 2 && at - (this.samples[1] as Sample).at > LONGEST) {
      this.samples.shift();
    }
  }

  /** What was before the page was there: rates of so many milliseconds each, the oldest first. */
  before(received: readonly number[], sent: readonly number[], every: number, now = performance.now()): void {
    this.samples.length = 0;
    received.forEach((rate, index) => this.sample([rate, sent[index] ?? 0], now - (received.length - 1 - index) * every));
  }

  close(): void {
    this.resized.disconnect();
  }

  show(now = performance.now()): void {
    const { width, height } = this.svg.getBoundingClientRect();
    if (width === 0) {
      return;
    }
    const most = Math.max(0, ...this.samples.flatMap(({ values }) => values));
    // Nothing at all is shown below a scale of some use.
    const scale = Math.max(most, LEAST);
    const step = niceStep(scale / STEPS);
    const top = step * Math.ceil(scale / step);
    const age = now - (this.samples[0]?.at ?? now);
    const { span, every } = SPANS.find(({ span }) => age <= span) ?? SPANS[2];
    const x = (at: number): number => LEFT + (width - LEFT - RIGHT) * (1 - (now - at) / span);
    const y = (value: number): number => TOP + (height - TOP - BOTTOM) * (1 - value / top);
    setAttribute(this.svg, 'viewBox', `0 0 ${width} ${height}`);
    setText(this.span, t('lastMinutes', { n: span / MINUTE }));
    this.grid.replaceChildren(...linesAcross(width, top, step, y), ...times(width, height, span, every));
    for (const which of [0, 1] as const) {
      const points = this.samples.map(({ at, values }) => `${Math.max(LEFT, x(at)).toFixed(1)} ${y(values[which]).toFixed(1)}`);
      const line = points.length > 1 ? `M${points.join('L')}` : '';
      setAttribute(this.lines[which], 'd', line);
      const [first, last] = [this.samples[0], this.samples.at(-1)];
      const base = y(0).toFixed(1);
      setAttribute(this.areas[which], 'd', first && last && line ? `${line}L${x(last.at).toFixed(1)} ${base}L${Math.max(LEFT, x(first.at)).toFixed(1)} ${base}Z` : '');
      setText(this.figures[which], rate(this.samples.at(-1)?.values[which] ?? 0));
    }
    setAttribute(this.svg, 'aria-label', t('chart', { first: this.names[0], a: this.figures[0].textContent ?? '', second: this.names[1], b: this.figures[1].textContent ?? '', most: rate(most) }));
  }
}

/** Lines across, with their rates. */
function linesAcross(width: number, top: number, step: number, y: (value: number) => number): SVGElement[] {
  const made: SVGElement[] = [];
  for (let value = 0; value <= top + step / 2; value += step) {
    made.push(draw('line', { x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value), class: value === 0 ? 'base' : 'rule' }));
    made.push(draw('text', { x: LEFT - 8, y: y(value) + 4, 'text-anchor': 'end' }, value === 0 ? '0' : rate(value)));
  }
  return made;
}

/** Marks below, with how long ago that was. */
function times(width: number, height: number, span: number, every: number): SVGElement[] {
  const made: SVGElement[] = [];
  for (let ago = 0; ago <= span; ago += every) {
    const x = width - RIGHT - ((width - LEFT - RIGHT) * ago) / span;
    made.push(draw('line', { x1: x, x2: x, y1: height - BOTTOM, y2: height - BOTTOM + 4, class: 'base' }));
    const label = ago === 0 ? t('now') : `−${duration(ago)}`;
    made.push(draw('text', { x: ago === 0 ? x + RIGHT - 4 : x, y: height - 6, 'text-anchor': ago === 0 ? 'end' : 'middle' }, label));
  }
  return made;
}

/** 1, 2 or 5 times a power of ten, the next above. */
export function niceStep(value: number): number {
  const power = 10 ** Math.floor(Math.log10(Math.max(value, 1)));
  const factor = [1, 2, 5].find((factor) => factor * power >= value) ?? 10;
  return factor * power;
}

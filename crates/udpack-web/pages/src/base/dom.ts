/** Elements without a framework: made in one expression, and never from markup. */

type Value = string | number | boolean | undefined | ((event: never) => unknown);
export type Child = Node | string | undefined | false;

/** Attributes by name; a function is a listener (`onclick`), `true` an empty attribute, `false` and `undefined` none. */
export type Attributes = Readonly<Record<string, Value>>;

/** An element with attributes and children. */
export function h<K extends keyof HTMLElementTagNameMap>(tag: K, attributes: Attributes = {}, ...children: Child[]): HTMLElementTagNameMap[K] {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === 'function') {
      element.addEventListener(name.slice(2), value as EventListener);
    } else {
      setAttribute(element, name, value);
    }
  }
  element.append(...children.filter((child) => child !== undefined && child !== false));
  return element;
}

/** Writes an attribute only where it differs: what is the same must not wake a screen reader. */
export function setAttribute(element: Element, name: string, value: string | number | boolean | undefined): void {
  if (value === undefined || value === false) {
    if (element.hasAttribute(name)) {
      element.removeAttribute(name);
    }
    return;
  }
  const text = value === true ? '' : `${value}`;
  if (element.getAttribute(name) !== text) {
    element.setAttribute(name, text);
  }
}

/** Writes a text only where it differs. */
export function setText(element: Element, text: string): void {
  if (element.textContent !== text) {
    element.textContent = text;
  }
}

/** Line drawings on a field of 24 × 24. */
const ICONS = {
  activity: 'M3 12h4l3 8 4-16 3 8h4',
  check: 'M5 12.5l4.5 4.5L19 7.5',
  close: 'M6 6l12 12M18 6L6 18',
  copy: 'M9 9h10v11H9zM5 15V4h10',
  download: 'M12 4v11m-5-4l5 5 5-5M5 20h14',
  eye: 'M2.5 12S6 5.5 12 5.5 21.5 12 21.5 12 18 18.5 12 18.5 2.5 12 2.5 12zM12 9.2a2.8 2.8 0 100 5.6 2.8 2.8 0 000-5.6z',
  file: 'M6 3h8l4 4v14H6zM14 3v4h4',
  folder: 'M3 6h6l2 2h10v11H3z',
  globe: 'M12 3a9 9 0 100 18 9 9 0 000-18zM3 12h18M12 3c3 3 3.5 6 3.5 9s-.5 6-3.5 9c-3-3-3.5-6-3.5-9S9 6 12 3z',
  link: 'M10 14a4 4 0 005.7 0l3-3A4 4 0 0013 5.3L11.8 6.5M14 10a4 4 0 00-5.7 0l-3 3A4 4 0 0011 18.7l1.2-1.2',
  people: 'M9 11a3.5 3.5 0 100-7 3.5 3.5 0 000 7zM2.5 20c0-4 3-6 6.5-6s6.5 2 6.5 6M16 4.5a3.5 3.5 0 010 6.5M18 14.5c2 .8 3.5 2.5 3.5 5.5',
  pause: 'M8 5v14M16 5v14',
  play: 'M7 5l12 7-12 7z',
  power: 'M12 3v8M6.5 6.5a8 8 0 1011 0',
  retry: 'M19 8a8 8 0 10.8 6M19.5 3.5V8H15',
  skip: 'M5 12h14M13 6l6 6-6 6',
  upload: 'M12 16V5m-5 4l5-5 5 5M5 20h14',
  wait: 'M12 7v5l3 2M12 3a9 9 0 100 18 9 9 0 000-18z',
  warning: 'M12 4l9 16H3zM12 10v4.5M12 17.2v.3',
} as const;

export type IconName = keyof typeof ICONS;

/** An icon beside a text, or in a button that has a label: nothing is told of it. */
export function icon(name: IconName): SVGSVGElement {
  return draw('svg', { viewBox: '0 0 24 24', class: 'icon', 'aria-hidden': 'true' }, draw('path', { d: ICONS[name] }));
}

/** As `h`, for drawings. */
export function draw<K extends keyof SVGElementTagNameMap>(tag: K, attributes: Readonly<Record<string, string | number>> = {}, ...children: (Node | string)[]): SVGElementTagNameMap[K] {
  const element = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const [name, value] of Object.entries(attributes)) {
    setAttribute(element, name, value);
  }
  element.append(...children);
  return element;
}

/** Another drawing for an icon that is there. */
export function setIcon(svg: SVGSVGElement, name: IconName): void {
  setAttribute(svg.firstElementChild as Element, 'd', ICONS[name]);
}

/** A button with a text, and an icon before it. */
/** A path in one line, of which the directories are shortened before the name is. */
export function pathParts(path: string): HTMLElement[] {
  const at = path.lastIndexOf('/') + 1;
  const name = h('span', { class: 'last' }, path.slice(at));
  return at > 0 ? [h('span', { class: 'quiet' }, path.slice(0, at)), name] : [name];
}

export function button(label: string, onclick: (event: MouseEvent) => unknown, options: { icon?: IconName; class?: string } = {}): HTMLButtonElement {
  return h('button', { type: 'button', class: options.class ?? 'button', onclick }, options.icon && icon(options.icon), h('span', {}, label));
}

/** A button that shows an icon only; `label` is what screen readers and tooltips say. */
export function iconButton(name: IconName, label: string, onclick: (event: MouseEvent) => unknown): HTMLButtonElement {
  return h('button', { type: 'button', class: 'icon-button', 'aria-label': label, title: label, onclick }, icon(name));
}

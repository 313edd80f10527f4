/** A list that has elements only for the rows that can be seen, so that thousands cost as little as twenty. */

import { h, setAttribute } from './dom.js';

/** The element of one item. */
export interface Row<T> {
  readonly root: HTMLElement;
  /** Shows the item as it is now. Called when it comes into view and at each refresh. */
  update(item: T): void;
}

export interface ListOptions<T> {
  /** What screen readers call the list. */
  label: string;
  /** The height of each row, in CSS pixels. */
  rowHeight: number;
  /** A list of items unless it is the body of a table, whose rows have cells. */
  roles?: { list: string; item: string };
  make(item: T): Row<T>;
  /** Enter on a row. */
  onenter?: (item: T) => void;
  /** Delete or Backspace on a row. */
  ondelete?: (item: T) => void;
}

/** Rows above and below what can be seen. */
const SPARE = 4;

/**
 * One row is in the order of the tab key, with its buttons; arrows, Home, End and Page keys move to others. The row that
 * has the focus keeps its element when it is scrolled away.
 */
export class VirtualList<T extends object> {
  readonly root: HTMLElement;
  private readonly space: HTMLElement;
  private readonly rows = new Map<T, Row<T>>();
  private items: readonly T[] = [];
  private active = 0;
  private readonly resized: ResizeObserver;

  constructor(private readonly options: ListOptions<T>) {
    const { label, roles = { list: 'list', item: 'listitem' } } = options;
    this.space = h('div', { class: 'list-space', role: roles.list, 'aria-label': label });
    this.root = h('div', { class: 'list', onscroll: () => this.show(false), onkeydown: (event: KeyboardEvent) => this.key(event), onfocusin: (event: FocusEvent) => this.focused(event) }, this.space);
    this.resized = new ResizeObserver(() => this.show(false));
    this.resized.observe(this.root);
  }

  /** Shows these items; the array is not copied. */
  set(items: readonly T[]): void {
    const focused = this.focusedItem();
    this.items = items;
    if (focused !== undefined && items.includes(focused)) {
      this.active = items.indexOf(focused);
    }
    this.active = Math.max(0, Math.min(this.active, items.length - 1));
    this.show(true);
  }

  /** Shows the items as they are now. */
  refresh(): void {
    this.show(true);
  }

  /** Scrolls an item into view, and gives its row the focus. */
  focus(index: number): void {
    if (index < 0 || index >= this.items.length) {
      return;
    }
    this.active = index;
    const { rowHeight } = this.options;
    const top = index * rowHeight;
    if (top < this.root.scrollTop) {
      this.root.scrollTop = top;
    } else if (top + rowHeight > this.root.scrollTop + this.root.clientHeight) {
      this.root.scrollTop = top + rowHeight - this.root.clientHeight;
    }
    this.show(false);
    this.rows.get(this.items[index] as T)?.root.focus({ preventScroll: true });
  }

  close(): void {
    this.resized.disconnect();
  }

  private focusedItem(): T | undefined {
    const { activeElement } = document;
    if (activeElement === null || !this.space.contains(activeElement)) {
      return undefined;
    }
    return [...this.rows].find(([, row]) => row.root.contains(activeElement))?.[0];
  }

  private show(updates: boolean): void {
    const { rowHeight, roles = { list: 'list', item: 'listitem' } } = this.options;
    const { items } = this;
    const first = Math.max(0, Math.floor(this.root.scrollTop / rowHeight) - SPARE);
    const last = Math.min(items.length, Math.ceil((this.root.scrollTop + this.root.clientHeight) / rowHeight) + SPARE);
    this.space.style.height = `${items.length * rowHeight}px`;
    const seen = new Map<T, number>();
    for (let index = first; index < last; index += 1) {
      seen.set(items[index] as T, index);
    }
    const focused = this.focusedItem();
    if (focused !== undefined && !seen.has(focused) && items[this.active] === focused) {
      seen.set(focused, this.active);
    }
    const inOrder = items[this.active];
    for (const [item, row] of this.rows) {
      if (!seen.has(item)) {
        row.root.remove();
        this.rows.delete(item);
      }
    }
    for (const [item, index] of seen) {
      let row = this.rows.get(item);
      const isNew = row === undefined;
      if (row === undefined) {
        row = this.options.make(item);
        row.root.setAttribute('role', roles.item);
        row.root.style.height = `${rowHeight}px`;
        this.rows.set(item, row);
      }
      if (isNew || updates) {
        row.update(item);
      }
      const y = `translateY(${index * rowHeight}px)`;
      if (row.root.style.transform !== y) {
        row.root.style.transform = y;
      }
      if (roles.item === 'row') {
        setAttribute(row.root, 'aria-rowindex', index + 2);
      } else {
        setAttribute(row.root, 'aria-posinset', index + 1);
        setAttribute(row.root, 'aria-setsize', items.length);
      }
      const order = item === inOrder ? 0 : -1;
      setAttribute(row.root, 'tabindex', order);
      for (const control of row.root.querySelectorAll('button, a')) {
        setAttribute(control, 'tabindex', order);
      }
    }
    this.order([...seen].sort(([, a], [, b]) => a - b).map(([item]) => (this.rows.get(item) as Row<T>).root));
  }

  /** Puts the rows in the order of the items, which is the one that screen readers read. */
  private order(roots: readonly HTMLElement[]): void {
    const { activeElement } = document;
    let at = this.space.firstElementChild;
    for (const root of roots) {
      if (root === at) {
        at = at.nextElementSibling;
      } else {
        this.space.insertBefore(root, at);
      }
    }
    // An element that is moved loses the focus.
    if (activeElement instanceof HTMLElement && activeElement !== document.activeElement && this.space.contains(activeElement)) {
      activeElement.focus({ preventScroll: true });
    }
  }

  private focused(event: FocusEvent): void {
    const item = [...this.rows].find(([, row]) => row.root.contains(event.target as Node))?.[0];
    const index = item === undefined ? -1 : this.items.indexOf(item);
    if (index >= 0 && index !== this.active) {
      this.active = index;
      this.show(false);
    }
  }

  private key(event: KeyboardEvent): void {
    const page = Math.max(1, Math.floor(this.root.clientHeight / this.options.rowHeight) - 1);
    const to = { ArrowDown: this.active + 1, ArrowUp: this.active - 1, Home: 0, End: this.items.length - 1, PageDown: this.active + page, PageUp: this.active - page }[event.key];
    const item = this.items[this.active];
    if (event.altKey || event.ctrlKey || event.metaKey || item === undefined) {
      return;
    }
    const onRow = event.target === this.rows.get(item)?.root;
    if (to !== undefined) {
      event.preventDefault();
      this.focus(Math.max(0, Math.min(to, this.items.length - 1)));
    } else if (onRow && event.key === 'Enter' && this.options.onenter) {
      event.preventDefault();
      this.options.onenter(item);
    } else if (onRow && (event.key === 'Delete' || event.key === 'Backspace') && this.options.ondelete) {
      event.preventDefault();
      this.options.ondelete(item);
    }
  }
}

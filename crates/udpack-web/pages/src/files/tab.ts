/** The files page: directories, downloads, images, and links for others to upload by. */

import { Fault } from 'udpack';
import { button, h, icon, iconButton, setAttribute, setText } from '../base/dom.js';
import { bytes, number, time } from '../base/format.js';
import { type Row, VirtualList } from '../base/list.js';
import { announce } from '../base/notice.js';
import { paced } from '../base/paced.js';
import { type Mounted, type Session } from '../frame/session.js';
import { Downloads } from './downloads.js';
import { type Column, type Entry, entriesOf, imageType, nameOf, type Path, sort } from './entries.js';
import { preview } from './preview.js';
import { share } from './share.js';
import { t } from './text.js';

const ROW_HEIGHT = 48;

export function mount(root: HTMLElement, session: Session): Mounted {
  const page = new FilesPage(root, session);
  return { unmount: () => page.close(), shown: (visible) => page.shown(visible) };
}

class FilesPage {
  private readonly downloads: Downloads;
  private readonly list: VirtualList<Entry>;
  private readonly way = h('ol', {});
  private readonly note = h('p', { class: 'empty quiet', role: 'status' });
  private readonly count = h('span', { class: 'quiet count' });
  private readonly table: HTMLElement;
  private readonly headers = new Map<Column, HTMLElement>();
  private readonly listening = new AbortController();
  private readonly update = paced(() => this.show());
  private entries: Entry[] = [];
  private path: Path = '';
  private loading: AbortController | undefined;
  private column: Column = 'name';
  private descending = false;
  private visible = false;

  constructor(
    root: HTMLElement,
    private readonly session: Session,
  ) {
    this.downloads = new Downloads(session.socket);
    this.list = new VirtualList<Entry>({ label: t('table'), rowHeight: ROW_HEIGHT, roles: { list: 'rowgroup', item: 'row' }, make: (entry) => this.row(entry), onenter: (entry) => void this.open(entry) });
    const header = (column: Column, label: string): HTMLElement => {
      const cell = h('div', { role: 'columnheader', class: column }, h('button', { type: 'button', title: t('sortBy', { column: label }), onclick: () => this.sortBy(column) }, label));
      this.headers.set(column, cell);
      return cell;
    };
    const head = h('div', { role: 'rowgroup' }, h('div', { role: 'row', class: 'head', 'aria-rowindex': 1 }, header('name', t('name')), header('size', t('size')), header('mtime', t('modified')), h('div', { role: 'columnheader', class: 'acts' }, h('span', { class: 'visually-hidden' }, t('actions')))));
    this.table = h('div', { class: 'table', role: 'table', 'aria-label': t('table') }, head, this.list.root);
    const bar = h(
      'div',
      { class: 'way' },
      h('nav', { 'aria-label': t('path') }, this.way),
      this.count,
      iconButton('retry', t('reload'), () => void this.load()),
      session.rights.share && button(t('share'), () => void share(session, typeof this.path === 'string' ? this.path : ''), { icon: 'link' }),
    );
    root.append(bar, this.table, this.note, this.downloads.root);
    addEventListener('popstate', () => this.visible && this.go(this.wanted, false), { signal: this.listening.signal });
    this.path = this.wanted;
    this.showWay();
    this.showSorting();
  }

  shown(visible: boolean): void {
    this.visible = visible;
    if (visible) {
      void this.load();
    }
  }

  close(): void {
    this.listening.abort();
    this.loading?.abort();
    this.update.stop();
    this.list.close();
    this.downloads.close();
  }

  /** The directory of the browser's history. */
  private get wanted(): Path {
    return (history.state as { path?: Path } | null)?.path ?? '';
  }

  private go(path: Path, remember = true): void {
    this.path = path;
    if (remember) {
      history.pushState({ ...(history.state as object | null), path }, '');
    }
    this.entries = [];
    this.list.set(this.entries);
    this.list.root.scrollTop = 0;
    this.showWay();
    void this.load();
  }

  private async load(): Promise<void> {
    this.loading?.abort();
    const loading = new AbortController();
    this.loading = loading;
    const fresh: Entry[] = [];
    const isFirst = this.entries.length === 0;
    this.say(isFirst ? t('loading') : '');
    try {
      for await (const page of entriesOf(this.session, this.path, loading.signal)) {
        fresh.push(...page);
        if (isFirst) {
          // Sorted when all is there: until then in the order in which it comes.
          this.entries = fresh;
          this.update();
        }
      }
      sort(fresh, this.column, this.descending);
      this.entries = fresh;
      this.show();
      this.say(fresh.length === 0 ? t('empty') : '');
    } catch (error) {
      if (!loading.signal.aborted) {
        this.entries = [];
        this.show();
        this.say(error instanceof Fault && error.fault === 'not_found' ? t('gone') : t('listFailed', { reason: (error as Error).message }));
      }
    }
  }

  private show(): void {
    this.list.set(this.entries);
    setAttribute(this.table, 'aria-rowcount', this.entries.length + 1);
    setText(this.count, t('count', { n: number(this.entries.length) }));
    this.table.hidden = this.entries.length === 0;
  }

  private say(text: string): void {
    this.note.hidden = text === '';
    setText(this.note, text);
    this.table.hidden = this.entries.length === 0;
  }

  private showWay(): void {
    const steps: [string, Path][] = [[t('root'), '']];
    if (typeof this.path === 'string') {
      const parts = this.path === '' ? [] : this.path.split('/');
      parts.forEach((part, at) => steps.push([part, parts.slice(0, at + 1).join('/')]));
    } else {
      steps.push([nameOf(this.path), this.path]);
    }
    this.way.replaceChildren(
      ...steps.map(([label, path], at) => {
        const isLast = at === steps.length - 1;
        return h('li', {}, h('button', { type: 'button', class: 'step', title: label, 'aria-current': isLast && 'page', onclick: () => this.go(path) }, label));
      }),
    );
  }

  private sortBy(column: Column): void {
    this.descending = this.column === column ? !this.descending : column !== 'name';
    this.column = column;
    sort(this.entries, column, this.descending);
    this.showSorting();
    this.show();
  }

  private showSorting(): void {
    for (const [column, cell] of this.headers) {
      setAttribute(cell, 'aria-sort', column !== this.column ? 'none' : this.descending ? 'descending' : 'ascending');
    }
  }

  private async open(entry: Entry): Promise<void> {
    if (entry.kind === 'dir') {
      this.go(entry.path);
      this.way.querySelector<HTMLElement>('li:last-child button')?.focus();
      announce(entry.name);
      return;
    }
    const type = imageType(entry);
    if (entry.kind === 'file' && (type === undefined || (await preview(this.session.socket, entry, type)))) {
      await this.downloads.start(entry);
    }
  }

  private row(entry: Entry): Row<Entry> {
    const { name, kind, size, mtime } = entry;
    const isFile = kind === 'file';
    const type = imageType(entry);
    const label = kind === 'dir' ? t('openOne', { name }) : type ? t('preview', { name }) : t('downloadOne', { name });
    const opens = kind === 'dir' || isFile;
    const title = opens ? h('button', { type: 'button', class: 'name', title: label, onclick: () => void this.open(entry) }, name) : h('span', { class: 'name', title: name }, name);
    const amount = isFile ? bytes(size) : kind === 'dir' ? '' : kind === 'link' ? t('kind') : t('other');
    const root = h(
      'div',
      { class: 'row entry', 'data-kind': kind },
      h('div', { role: 'cell', class: 'name' }, icon(kind === 'dir' ? 'folder' : type ? 'eye' : kind === 'link' ? 'link' : 'file'), title),
      h('div', { role: 'cell', class: 'size' }, amount),
      h('div', { role: 'cell', class: 'mtime' }, time(mtime)),
      h('div', { role: 'cell', class: 'acts' }, isFile && iconButton('download', t('downloadOne', { name }), () => void this.downloads.start(entry))),
    );
    return { root, update() {} };
  }
}

/** The upload page. */

import { ask } from '../base/dialog.js';
import { button, h, icon, setText } from '../base/dom.js';
import { bytes, duration, percent, rate } from '../base/format.js';
import { VirtualList } from '../base/list.js';
import { announce, toast } from '../base/notice.js';
import { paced } from '../base/paced.js';
import { ProgressBar } from '../base/progress.js';
import { type Mounted, type Session } from '../frame/session.js';
import { explain } from './failures.js';
import { Guard } from './guard.js';
import { type Item } from './item.js';
import { type Answer, Queue, type Totals } from './queue.js';
import { makeRow, ROW_HEIGHT, showDetails } from './row.js';
import { canPickFolders, type Found, fromTransfer, named, pick } from './sources.js';
import { t } from './text.js';

/** Names of interrupted files that are told one by one. */
const NAMES = 3;

let queue: Queue | undefined;
let guard: Guard | undefined;

export function mount(root: HTMLElement, { socket, token }: Session): Mounted {
  queue ??= new Queue();
  guard ??= new Guard();
  const page = new UploadPage(root, queue, guard);
  void queue.attach(socket, token);
  return { unmount: () => page.close() };
}

class UploadPage {
  private readonly list: VirtualList<Item>;
  private readonly drop: HTMLElement;
  private readonly missing = h('div', { class: 'banner', role: 'status' });
  private readonly failed = h('div', { class: 'banner bad', role: 'alert' });
  private readonly bar = new ProgressBar(t('total'));
  private readonly figures = h('div', { class: 'figures' });
  private readonly pauseAll: HTMLButtonElement;
  private readonly cancelAll: HTMLButtonElement;
  private readonly retryAll: HTMLButtonElement;
  private readonly clear: HTMLButtonElement;
  private readonly summary: HTMLElement;
  private readonly listening = new AbortController();
  private readonly update = paced(() => this.show());
  private told = -1;

  constructor(
    root: HTMLElement,
    private readonly queue: Queue,
    private readonly guard: Guard,
  ) {
    this.list = new VirtualList<Item>({
      label: t('files'),
      rowHeight: ROW_HEIGHT,
      make: (item) => makeRow(item, queue),
      onenter: (item) => void showDetails(item, queue),
      ondelete: (item) => (item.active ? void queue.cancel(item) : item.state === 'removing' ? undefined : queue.clear(item)),
    });
    const files = button(t('chooseFiles'), () => void this.add(pick('files')), { class: 'button primary', icon: 'file' });
    const folder = button(t('chooseFolder'), () => void this.add(pick('folder')), { icon: 'folder' });
    folder.hidden = !canPickFolders;
    this.drop = h(
      'div',
      { class: 'drop' },
      h('div', { class: 'drop-mark' }, icon('upload')),
      h('div', { class: 'drop-text' }, h('h2', {}, t('drop')), h('p', { class: 'quiet' }, t('dropHint'))),
      h('div', { class: 'drop-buttons' }, files, folder),
    );
    this.pauseAll = button(t('pauseAll'), () => (queue.isPaused ? queue.resume() : queue.pause()), { class: 'button small' });
    this.cancelAll = button(t('cancelAll'), () => void queue.cancel(), { class: 'button small' });
    this.retryAll = button(t('retryAll'), () => queue.retry(), { class: 'button small' });
    this.clear = button(t('clear'), () => queue.clear(), { class: 'button small' });
    this.summary = h('div', { class: 'summary' }, this.figures, h('div', { class: 'summary-buttons' }, this.pauseAll, this.cancelAll, this.retryAll, this.clear), this.bar.root);
    root.append(this.drop, this.missing, this.failed, this.summary, this.list.root);
    queue.onchange = () => this.update();
    queue.onconflict = (item, denied) => this.askConflict(item, denied);
    this.listen();
    this.show();
  }

  close(): void {
    this.listening.abort();
    this.update.stop();
    this.list.close();
    this.queue.onchange = () => {};
    this.queue.detach();
    this.guard.show(this.queue.totals);
  }

  /** Drops and pastes count anywhere on the page. */
  private listen(): void {
    const { signal } = this.listening;
    const isFiles = (event: DragEvent): boolean => event.dataTransfer?.types.includes('Files') ?? false;
    const over = (on: boolean): void => void document.body.classList.toggle('dropping', on);
    addEventListener('dragover', (event) => isFiles(event) && (event.preventDefault(), over(true)), { signal });
    addEventListener('dragleave', (event) => event.relatedTarget === null && over(false), { signal });
    addEventListener(
      'drop',
      (event) => {
        over(false);
        if (event.dataTransfer && isFiles(event)) {
          event.preventDefault();
          void this.add(fromTransfer(event.dataTransfer));
        }
      },
      { signal },
    );
    addEventListener(
      'paste',
      (event) => {
        if (event.clipboardData?.types.includes('Files') && !document.querySelector('dialog[open]')) {
          event.preventDefault();
          const now = new Date();
          const given = fromTransfer(event.clipboardData);
          void this.add(
            (async function* () {
              for await (const item of given) yield named(item, now);
            })(),
          );
        }
      },
      { signal },
    );
  }

  private async add(found: AsyncIterable<Found>): Promise<void> {
    const before = this.queue.items.length;
    const count = await this.queue.add(found);
    if (count > 0 && before === 0) {
      this.list.root.scrollTop = 0;
    }
  }

  private show(): void {
    const { items, totals } = this.queue;
    this.drop.classList.toggle('compact', items.length > 0);
    this.list.root.hidden = items.length === 0;
    this.summary.hidden = items.length === 0;
    this.list.set(items);
    this.showTotals(totals);
    this.showMissing(totals);
    this.showFailed(totals);
    this.guard.show(totals);
    this.tell(totals);
  }

  private showTotals(totals: Totals): void {
    const { files, done, active, failed, bytes: all, received, safe } = totals;
    const parts = [t('ofFiles', { done, all: files })];
    if (active > 0) {
      parts.push(t('ofBytes', { done: bytes(safe), all: bytes(all) }), percent(safe, all));
      const speed = this.queue.rate.perSecond;
      if (speed !== undefined && speed > 0 && !this.queue.isPaused) {
        parts.push(rate(speed), t('left', { time: duration(((all - received) / speed) * 1000) }));
      }
    } else {
      parts.push(bytes(all));
    }
    setText(this.figures, parts.join(' · '));
    this.bar.set(safe, received, all, t('safe', { done: bytes(safe), all: bytes(all) }));
    setText(this.pauseAll.lastElementChild as Element, this.queue.isPaused ? t('resumeAll') : t('pauseAll'));
    this.pauseAll.hidden = active === 0;
    this.cancelAll.hidden = active === 0;
    this.retryAll.hidden = failed === 0;
    this.clear.hidden = !this.queue.items.some((item) => item.over && item.state !== 'failed');
  }

  private showMissing({ missing }: Totals): void {
    this.missing.hidden = missing === 0;
    if (missing === 0 || this.missing.dataset.count === `${missing}`) {
      return;
    }
    this.missing.dataset.count = `${missing}`;
    const items = this.queue.items.filter(({ state }) => state === 'missing');
    const first = items.slice(0, NAMES).map(({ name }) => name).join(', ');
    const names = items.length > NAMES ? t('missingMore', { names: first, n: items.length - NAMES }) : first;
    const goOn = button(t('continue'), () => void this.queue.reopenMissing(true), { class: 'button primary' });
    goOn.hidden = !items.some(({ origin }) => origin);
    this.missing.replaceChildren(h('p', {}, t('missingMany', { n: missing, names })), goOn, button(t('forget', { n: missing }), () => this.queue.forgetMissing()));
  }

  private showFailed({ failed }: Totals): void {
    this.failed.hidden = failed === 0;
    const first = this.queue.items.find(({ state }) => state === 'failed');
    const reason = first?.error ? explain(first.path, first.error) : '';
    const key = `${failed} ${reason}`;
    if (first === undefined || this.failed.dataset.key === key) {
      return;
    }
    this.failed.dataset.key = key;
    this.failed.replaceChildren(
      icon('warning'),
      h('p', {}, failed === 1 ? reason : t('failedMany', { n: failed, reason })),
      button(t('show'), () => this.list.focus(this.queue.items.indexOf(first)), { class: 'button small' }),
    );
  }

  /** Screen readers hear each quarter, and the end. */
  private tell({ active, done, files, bytes: all, safe }: Totals): void {
    const quarter = active === 0 ? 4 : Math.min(3, Math.floor((safe / Math.max(1, all)) * 4));
    if (quarter === this.told) {
      return;
    }
    const begun = this.told >= 0;
    this.told = files === 0 ? -1 : quarter;
    if (files === 0 || (quarter === 4 && !begun)) {
      return;
    }
    if (quarter < 4) {
      announce(t('safe', { done: bytes(safe), all: bytes(all) }));
    } else if (done > 0) {
      const text = done === files ? t('doneAll', { files }) : t('doneSome', { done, files });
      announce(text);
      if (document.visibilityState === 'hidden' || document.querySelector('.panel.upload')?.hasAttribute('hidden')) {
        toast(text);
      }
    }
  }

  private async askConflict(item: Item, denied: ReadonlySet<string>): Promise<Answer> {
    const { name, path } = item;
    const all = h('input', { type: 'checkbox', id: 'conflict-all' });
    const policy = await ask<Answer['policy']>(
      t('conflictTitle', { name }),
      [
        h('p', {}, t('conflictBody', { path })),
        denied.size > 0 && h('p', { class: 'quiet' }, t('denied')),
        h('label', { class: 'check', for: 'conflict-all' }, all, h('span', {}, t('conflictAll'))),
      ],
      [
        { label: t('replace'), value: 'overwrite', kind: 'danger', disabled: denied.has('overwrite') },
        { label: t('keepBoth'), value: 'rename', disabled: denied.has('rename') },
        { label: t('skip'), value: 'skip', kind: 'primary' },
      ],
    );
    return { policy: policy ?? 'error', forAll: all.checked };
  }
}

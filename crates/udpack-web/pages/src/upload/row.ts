/** One file of the list. */

import { h, icon, type IconName, iconButton, pathParts, setAttribute, setIcon, setText } from '../base/dom.js';
import { ask } from '../base/dialog.js';
import { bytes, duration, hex, rate } from '../base/format.js';
import { toast } from '../base/notice.js';
import { ProgressBar } from '../base/progress.js';
import { type Row } from '../base/list.js';
import { explain, reasonOf } from './failures.js';
import { type Item } from './item.js';
import { type Queue } from './queue.js';
import { t } from './text.js';

export const ROW_HEIGHT = 64;

const MARKS: Record<Item['state'], IconName> = {
  asking: 'warning',
  cancelled: 'close',
  checking: 'wait',
  done: 'check',
  failed: 'warning',
  missing: 'warning',
  paused: 'pause',
  removing: 'wait',
  sending: 'upload',
  skipped: 'skip',
  waiting: 'wait',
};

export function makeRow(item: Item, queue: Queue): Row<Item> {
  const { path, name } = item;
  const mark = icon('wait');
  const markButton = h('button', { type: 'button', class: 'mark', onclick: () => showDetails(item, queue) }, mark);
  const title = h('div', { class: 'name path', title: path }, ...pathParts(path));
  const detail = h('div', { class: 'detail' });
  const bar = new ProgressBar(t('progressOf', { name }));
  const pause = iconButton('pause', t('pauseOne', { name }), () => queue.pause(item));
  const resume = iconButton('play', t('resumeOne', { name }), () => queue.resume(item));
  const retry = iconButton('retry', t('retryOne', { name }), () => queue.retry(item));
  const cancel = iconButton('close', t('cancelOne', { name }), () => void queue.cancel(item));
  const clear = iconButton('close', t('clearOne', { name }), () => queue.clear(item));
  const acts = h('div', { class: 'acts' }, pause, resume, retry, cancel, clear);
  const root = h('div', { class: 'row file' }, markButton, h('div', { class: 'what' }, title, detail, bar.root), acts);
  return {
    root,
    update() {
      const { state } = item;
      setAttribute(root, 'data-state', state);
      setIcon(mark, MARKS[state]);
      const label = state === 'done' ? t('showHash', { name }) : t('details', { name });
      setAttribute(markButton, 'aria-label', label);
      setAttribute(markButton, 'title', label);
      setText(detail, detailOf(item));
      const moves = state === 'sending' || state === 'checking' || state === 'paused' || (state === 'waiting' && item.received > 0);
      bar.root.hidden = !moves;
      if (moves) {
        bar.set(item.safe, item.received, item.size);
      }
      show(pause, state === 'waiting' || state === 'sending');
      show(resume, state === 'paused');
      show(retry, (state === 'failed' || state === 'cancelled') && (item.file !== undefined || item.isDirectory));
      show(cancel, item.active);
      show(clear, state === 'failed' || state === 'missing');
    },
  };
}

/** Hides a button; the focus goes to its row, and not to the top of the page. */
function show(control: HTMLButtonElement, visible: boolean): void {
  if (control.hidden === visible) {
    const had = document.activeElement === control;
    control.hidden = !visible;
    if (had && !visible) {
      control.closest<HTMLElement>('.row')?.focus({ preventScroll: true });
    }
  }
}

/** What is told below the name. */
function detailOf(item: Item): string {
  const { state, size, received, error, trouble, done } = item;
  switch (state) {
    case 'done':
      return [item.isDirectory ? t('directory') : bytes(size), done && done.path !== item.path ? t('storedAs', { path: done.path }) : done?.same ? t('doneSame') : t('done'), done && !item.isDirectory && hex(done.hash).slice(0, 16)].filter(Boolean).join(' · ');
    case 'failed':
      return error ? reasonOf(error) : '';
    case 'sending': {
      const speed = item.rate.perSecond;
      const parts = [t('ofBytes', { done: bytes(received), all: bytes(size) })];
      if (speed !== undefined && speed > 0) {
        parts.push(rate(speed), t('left', { time: duration(((size - received) / speed) * 1000) }));
      }
      return parts.join(' · ');
    }
    case 'waiting':
      return trouble ? t('retrying', { n: item.retries + 1, reason: reasonOf(trouble) }) : `${bytes(size)} · ${t('waiting')}`;
    case 'paused':
      return `${t('ofBytes', { done: bytes(received), all: bytes(size) })} · ${t('paused')}`;
    default:
      return `${bytes(size)} · ${t(state)}`;
  }
}

/** The hash of what is stored, or why it is not. */
export async function showDetails(item: Item, queue: Queue): Promise<void> {
  const { done, error, name, path } = item;
  if (done) {
    const hash = hex(done.hash);
    const choice = await ask(
      t('hashTitle', { name }),
      [h('p', { class: 'quiet' }, done.path), h('p', {}, t('hashText')), h('p', { class: 'mono hash' }, hash)],
      [
        { label: t('copy'), value: 'copy', kind: 'primary' },
        { label: t('close'), value: 'close' },
      ],
    );
    if (choice === 'copy') {
      await navigator.clipboard?.writeText(hash).then(() => toast(t('copied')), () => {});
    }
    return;
  }
  const text = error ? explain(path, error) : detailOf(item);
  const canRetry = item.state === 'failed' && (item.file !== undefined || item.isDirectory);
  const choice = await ask(
    name,
    [h('p', {}, text), error && h('p', { class: 'mono quiet' }, error.message)],
    [...(canRetry ? [{ label: t('retry'), value: 'retry', kind: 'primary' as const }] : []), { label: t('close'), value: 'close' }],
  );
  if (choice === 'retry') {
    queue.retry(item);
  }
}

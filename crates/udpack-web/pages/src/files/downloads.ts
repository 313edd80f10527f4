/** Downloads under way: straight to disk where the browser lets a page write files, else by way of the browser's own store. */

import { type Socket } from 'udpack';
import { download } from 'udpack/transfer';
import { h, iconButton, setText } from '../base/dom.js';
import { bytes, duration, rate } from '../base/format.js';
import { toast } from '../base/notice.js';
import { paced, Rate } from '../base/paced.js';
import { ProgressBar } from '../base/progress.js';
import { type Entry } from './entries.js';
import { t } from './text.js';

type Saving = { showSaveFilePicker?(options: { suggestedName: string }): Promise<FileSystemFileHandle> };

/** Where bytes go. The file is there only after `close`. */
interface Target {
  write(part: Uint8Array): Promise<void>;
  close(): Promise<void>;
  abort(): Promise<void>;
}

export class Downloads {
  readonly root = h('div', { class: 'downloads', role: 'list', 'aria-label': t('downloads') });
  private readonly running = new Set<AbortController>();

  constructor(private readonly socket: Socket) {
    this.root.hidden = true;
  }

  /** Fetches a file. Call it in a click: the browser asks where to put it. */
  async start(entry: Entry): Promise<void> {
    const { name, size } = entry;
    const target = await targetFor(name);
    if (target === undefined) {
      return;
    }
    const controller = new AbortController();
    this.running.add(controller);
    const bar = new ProgressBar(name);
    const detail = h('div', { class: 'detail' });
    let over = false;
    const line: HTMLElement = h(
      'div',
      { class: 'download', role: 'listitem' },
      h('div', { class: 'what' }, h('div', { class: 'name', title: name }, name), detail, bar.root),
      iconButton('close', t('cancelOne', { name }), (): void => {
        controller.abort();
        if (over) this.remove(line);
      }),
    );
    this.root.append(line);
    this.root.hidden = false;
    let got = 0;
    const speed = new Rate();
    const show = paced(() => {
      speed.sample(got);
      bar.set(got, got, size);
      const perSecond = speed.perSecond;
      const parts = [`${bytes(got)} / ${bytes(size)}`];
      if (perSecond) parts.push(rate(perSecond), duration(((size - got) / perSecond) * 1000));
      if (!over) setText(detail, parts.join(' · '));
    });
    try {
      for await (const part of download(this.socket, entry.path as string, { signal: controller.signal })) {
        await target.write(part);
        got += part.length;
        show();
      }
      await target.close();
      over = true;
      show.stop();
      bar.set(1, 1, 1);
      setText(detail, `${bytes(got)} · ${t('checked')}`);
      const close = line.querySelector('button') as HTMLButtonElement;
      close.setAttribute('aria-label', t('dismiss', { name }));
      close.title = t('dismiss', { name });
    } catch (error) {
      over = true;
      show.stop();
      await target.abort().catch(() => {});
      this.remove(line);
      if (!controller.signal.aborted) {
        toast(t('failed', { name, reason: (error as Error).message }), 'error');
      }
    } finally {
      this.running.delete(controller);
    }
  }

  /** Gives all up. */
  close(): void {
    for (const controller of this.running) {
      controller.abort();
    }
  }

  private remove(line: HTMLElement): void {
    line.remove();
    this.root.hidden = this.root.childElementCount === 0;
  }
}

/** Undefined when the reader changed their mind. */
async function targetFor(name: string): Promise<Target | undefined> {
  const { showSaveFilePicker } = globalThis as Saving;
  if (showSaveFilePicker) {
    try {
      const stream = await (await showSaveFilePicker({ suggestedName: name })).createWritable();
      return { write: (part) => stream.write(part as Uint8Array<ArrayBuffer>), close: () => stream.close(), abort: () => stream.abort() };
    } catch (error) {
      if ((error as Error).name === 'AbortError') {
        return undefined;
      }
      // Not allowed here: by way of the browser's store.
    }
  }
  return storeTarget(name);
}

/** Parts are handed to the browser as blobs, which it keeps on disk when they are many. */
const TOGETHER = 4 << 20;

function storeTarget(name: string): Target {
  let parts: Uint8Array[] = [];
  let length = 0;
  const blobs: Blob[] = [];
  const pack = (): void => {
    blobs.push(new Blob(parts as Uint8Array<ArrayBuffer>[]));
    parts = [];
    length = 0;
  };
  return {
    async write(part) {
      parts.push(part);
      length += part.length;
      if (length >= TOGETHER) pack();
    },
    async close() {
      pack();
      const url = URL.createObjectURL(new Blob(blobs));
      h('a', { href: url, download: name }).click();
      setTimeout(() => URL.revokeObjectURL(url), 60_000);
    },
    async abort() {
      parts = [];
      blobs.length = 0;
    },
  };
}

/** An image, checked by its hash before it is shown. */

import { type Socket } from 'udpack';
import { download } from 'udpack/transfer';
import { ask } from '../base/dialog.js';
import { h } from '../base/dom.js';
import { bytes } from '../base/format.js';
import { type Entry } from './entries.js';
import { t } from './text.js';

/** Shows the image until the dialog is closed. Resolves with whether the reader wants to have it. */
export async function preview(socket: Socket, entry: Entry, type: string): Promise<boolean> {
  const controller = new AbortController();
  const place = h('div', { class: 'preview' }, h('p', { class: 'quiet', role: 'status' }, t('loading')));
  let url: string | undefined;
  const load = async (): Promise<void> => {
    const parts: Uint8Array[] = [];
    try {
      for await (const part of download(socket, entry.path as string, { signal: controller.signal })) {
        parts.push(part);
      }
      url = URL.createObjectURL(new Blob(parts as Uint8Array<ArrayBuffer>[], { type }));
      const image = h('img', { alt: entry.name, src: url, onerror: () => place.replaceChildren(h('p', {}, t('notImage'))) });
      place.replaceChildren(image);
    } catch (error) {
      place.replaceChildren(h('p', { role: 'alert' }, t('failed', { name: entry.name, reason: (error as Error).message })));
    }
  };
  const choice = await ask(
    entry.name,
    [place, h('p', { class: 'quiet' }, bytes(entry.size))],
    [
      { label: t('download'), value: true, kind: 'primary' },
      { label: t('close'), value: false },
    ],
    { class: 'wide', onopen: () => void load() },
  );
  controller.abort();
  if (url !== undefined) {
    URL.revokeObjectURL(url);
  }
  return choice === true;
}

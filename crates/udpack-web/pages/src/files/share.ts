/** A drop link: a token of its own, with a folder, room, an end and the number of its uses, as link and QR code. */

import { Fault } from 'udpack';
import { ask, type Action } from '../base/dialog.js';
import { h } from '../base/dom.js';
import { toast } from '../base/notice.js';
import { type Session } from '../frame/session.js';
import { qrCode } from './qr.js';
import { t } from './text.js';

const HOUR = 3600;

/** Asks what the link may do, and shows it. */
export async function share(session: Session, prefix: string): Promise<void> {
  const folder = h('input', { type: 'text', id: 'share-prefix', value: prefix, 'aria-describedby': 'share-prefix-hint', autofocus: true, autocomplete: 'off', spellcheck: 'false' });
  const quota = h('input', { type: 'number', id: 'share-quota', min: 1, step: 1, 'aria-describedby': 'share-quota-hint' });
  const ends: [string, number][] = [
    [t('hour'), HOUR],
    [t('day'), 24 * HOUR],
    [t('week'), 7 * 24 * HOUR],
    [t('days30'), 30 * 24 * HOUR],
    [t('never'), 0],
  ];
  const expiry = h('select', { id: 'share-expiry' }, ...ends.map(([label, seconds]) => h('option', { value: seconds, selected: seconds === 24 * HOUR }, label)));
  const once = h('input', { type: 'checkbox', id: 'share-once' });
  const made = await ask<'make'>(
    t('shareTitle'),
    [
      field('share-prefix', t('prefix'), folder, t('prefixHint')),
      h('div', { class: 'two' }, field('share-expiry', t('expiry'), expiry), field('share-quota', t('quota'), quota, t('quotaHint'))),
      h('label', { class: 'check', for: 'share-once' }, once, h('span', {}, t('once'))),
    ],
    [{ label: t('create'), value: 'make', kind: 'primary' }],
  );
  if (made === undefined) {
    return;
  }
  const megabytes = Number(quota.value);
  const seconds = Number(expiry.value);
  const wanted = {
    prefix: folder.value.trim().replace(/^\/+|\/+$/g, ''),
    once: once.checked,
    ...(megabytes > 0 && { quota: Math.round(megabytes * 1e6) }),
    ...(seconds > 0 && { expires_s: seconds }),
  };
  try {
    const { url, token } = (await session.ask('share', wanted)) as { url?: string; token?: string };
    await show(linkOf(url, token));
  } catch (error) {
    const reason = error instanceof Fault ? error.message : `${(error as Error).message}`;
    toast(t('shareFailed', { reason }), 'error');
  }
}

/** The server may not know by which name this page reached it: then the page does. */
function linkOf(url: string | undefined, token: string | undefined): string {
  return url ?? `${location.origin}/#t=${encodeURIComponent(token ?? '')}`;
}

async function show(link: string): Promise<void> {
  const input = h('input', { type: 'text', id: 'share-link', readonly: true, value: link, class: 'mono' });
  const actions: Action<'copy' | 'close'>[] = [
    { label: t('copy'), value: 'copy', kind: 'primary' },
    { label: t('close'), value: 'close' },
  ];
  const choice = await ask(t('shareDone'), [h('div', { class: 'share-code' }, qrCode(link, t('qr'))), field('share-link', t('kind'), input), h('p', { class: 'quiet' }, t('shareNote'))], actions, {
    onopen: () => input.select(),
  });
  if (choice === 'copy') {
    await navigator.clipboard?.writeText(link).then(() => toast(t('copied')), () => {});
  }
}

function field(id: string, label: string, control: HTMLElement, hint?: string): HTMLElement {
  return h('div', { class: 'field' }, h('label', { for: id }, label), control, hint !== undefined && h('p', { id: `${id}-hint`, class: 'quiet small' }, hint));
}

/** A drop link: a token of its own, with a folder, room, an end and the number of its uses, as link and QR code. */

import { Fault } from 'udpack';
import { ask, type Action } from '../base/dialog.js';
import { button, h } from '../base/dom.js';
import { bytes, duration } from '../base/format.js';
import { toast } from '../base/notice.js';
import { type Session } from '../frame/session.js';
import { nameOf, type Path } from './entries.js';
import { qrCode } from './qr.js';
import { t } from './text.js';

const HOUR = 3600;

/** A link that was made before, as the server tells of it. */
interface Link {
  name: string;
  prefix: Path;
  read: boolean;
  write: boolean;
  once: boolean;
  used: boolean;
  quota?: number;
  expires_ms?: number;
}

/** Asks what the link may do, and shows it. Links that were made before can be revoked meanwhile. */
export async function share(session: Session, prefix: string): Promise<void> {
  const { read, write } = session.rights;
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
  const readToo = h('input', { type: 'checkbox', id: 'share-read' });
  const links = h('div', { hidden: true });
  void showLinks(session, links);
  const made = await ask<'make'>(
    t('shareTitle'),
    [
      field('share-prefix', t('prefix'), folder, t('prefixHint')),
      h('div', { class: 'two' }, field('share-expiry', t('expiry'), expiry), field('share-quota', t('quota'), quota, t('quotaHint'))),
      h('label', { class: 'check', for: 'share-once' }, once, h('span', {}, t('once'))),
      read && write && h('label', { class: 'check', for: 'share-read' }, readToo, h('span', {}, t('readToo'))),
      links,
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
    read: readToo.checked || !write,
    write,
    ...(megabytes > 0 && { quota: Math.round(megabytes * 1e6) }),
    ...(seconds > 0 && { expires_s: seconds }),
  };
  try {
    const { name, url, token } = (await session.ask('share', wanted)) as { name: string; url?: string; token: string };
    await show(session, name, linkOf(url, token), once.checked);
  } catch (error) {
    toast(t('shareFailed', { reason: reasonOf(error) }), 'error');
  }
}

/** Where others reach the page: by the name in the address bar, unless only this machine knows it by that. */
function linkOf(url: string | undefined, token: string): string {
  const here = /^(localhost|127\..*|\[::1\])$/.test(location.hostname);
  return here && url !== undefined ? url : `${location.origin}/#t=${encodeURIComponent(token)}`;
}

async function show(session: Session, name: string, link: string, once: boolean): Promise<void> {
  const input = h('input', { type: 'text', id: 'share-link', readonly: true, value: link, class: 'mono' });
  const actions: Action<'copy' | 'revoke' | 'close'>[] = [
    { label: t('copy'), value: 'copy', kind: 'primary' },
    { label: t('revoke'), value: 'revoke', kind: 'danger' },
    { label: t('close'), value: 'close' },
  ];
  const choice = await ask(t('shareDone'), [h('div', { class: 'share-code' }, qrCode(link, t('qr'))), field('share-link', t('kind'), input), h('p', { class: 'quiet' }, t(once ? 'shareNoteOnce' : 'shareNote'))], actions, {
    onopen: () => input.select(),
  });
  if (choice === 'copy') {
    await navigator.clipboard?.writeText(link).then(() => toast(t('copied')), () => {});
  } else if (choice === 'revoke') {
    await revoke(session, name);
  }
}

/** Fills in the links that are valid now, if there are any. */
async function showLinks(session: Session, place: HTMLElement): Promise<void> {
  try {
    const { shares } = (await session.ask('shares', {})) as { shares: Link[] };
    const rows = shares.map((link) => {
      const folder = link.prefix.length === 0 ? t('root') : typeof link.prefix === 'string' ? link.prefix : nameOf(link.prefix);
      const details = [
        link.write && t('mayWrite'),
        link.read && t('mayRead'),
        link.quota !== undefined && t('roomOf', { size: bytes(link.quota) }),
        link.expires_ms !== undefined && t('ends', { time: duration(link.expires_ms) }),
        link.once && (link.used ? t('used') : t('unused')),
      ];
      const end = button(t('revoke'), () => void revoke(session, link.name).then((gone) => gone && row.remove()), { class: 'button small' });
      end.setAttribute('aria-label', t('revokeOne', { name: folder }));
      const row: HTMLLIElement = h('li', {}, h('div', { class: 'what' }, h('span', { class: 'name', title: folder }, folder), h('span', { class: 'quiet small' }, details.filter(Boolean).join(' · '))), end);
      return row;
    });
    place.append(h('h3', { class: 'small', id: 'share-links' }, t('links')), h('ul', { class: 'links', 'aria-labelledby': 'share-links', tabindex: 0 }, ...rows));
    place.hidden = rows.length === 0;
  } catch {
    // The list is an extra.
  }
}

async function revoke(session: Session, name: string): Promise<boolean> {
  try {
    await session.ask('unshare', { name });
    toast(t('revoked'));
    return true;
  } catch (error) {
    toast(reasonOf(error), 'error');
    return false;
  }
}

function reasonOf(error: unknown): string {
  return error instanceof Fault ? error.message : `${(error as Error).message}`;
}

function field(id: string, label: string, control: HTMLElement, hint?: string): HTMLElement {
  return h('div', { class: 'field' }, h('label', { for: id }, label), control, hint !== undefined && h('p', { id: `${id}-hint`, class: 'quiet small' }, hint));
}

/** The rows of the lists: one thing each, what is known of it, and what can be done. */

import { h, icon, type IconName, iconButton, pathParts, setAttribute, setIcon, setText } from '../base/dom.js';
import { bytes, duration, number, percent, rate } from '../base/format.js';
import { type Row } from '../base/list.js';
import { ProgressBar } from '../base/progress.js';
import { type Node, type Peer, type Quota, type Room, type Transfer } from './feed.js';
import { t } from './text.js';

export const ROW_HEIGHT = 60;

const STATES = { waiting: true, receiving: true, checking: true, syncing: true, storing: true, sending: true, done: true, failed: true, cancelled: true, suspended: true } as const;
const ENDS: Readonly<Record<string, IconName>> = { done: 'check', failed: 'warning', cancelled: 'close', suspended: 'pause' };

/** A word of the server's in the language of the page, or as it is. */
function word(told: string): string {
  return told in STATES ? t(told as keyof typeof STATES) : told;
}

export function pathOf({ job }: Transfer): string {
  return typeof job.path === 'string' ? job.path : new TextDecoder().decode(job.path);
}

export function nameOf(transfer: Transfer): string {
  const path = pathOf(transfer);
  return path.slice(path.lastIndexOf('/') + 1);
}

/** How long it has been running, in milliseconds. */
function ageOf({ job, at }: Transfer): number {
  return Number(job.secs) * 1000 + performance.now() - at;
}

/** The parts of a line that are there. */
function line(...parts: (string | false | undefined)[]): string {
  return parts.filter((part) => part !== undefined && part !== false && part !== '').join(' · ');
}

/** What all rows look like: a mark, two lines, figures at the right, and perhaps a button. */
class Cells {
  readonly mark = icon('wait');
  readonly title = h('div', { class: 'name' });
  readonly detail = h('div', { class: 'detail' });
  readonly first = h('div', {});
  readonly second = h('div', { class: 'quiet' });
  readonly bar: ProgressBar | undefined;
  readonly root: HTMLElement;

  constructor(kind: string, act: HTMLElement | undefined, progress?: string, onmark?: { label: string; run(): void }) {
    this.bar = progress === undefined ? undefined : new ProgressBar(progress);
    const mark = onmark === undefined ? h('span', { class: 'mark' }, this.mark) : h('button', { type: 'button', class: 'mark', 'aria-label': onmark.label, title: onmark.label, onclick: () => onmark.run() }, this.mark);
    this.root = h('div', { class: `row thing ${kind}` }, mark, h('div', { class: 'what' }, this.title, this.detail, this.bar?.root), h('div', { class: 'sums' }, this.first, this.second), act);
  }

  name(path: string): void {
    this.title.classList.add('path');
    this.title.replaceChildren(...pathParts(path));
    setAttribute(this.title, 'title', path);
  }

  /** What is in no path. */
  call(name: string, more = name): void {
    setText(this.title, name);
    setAttribute(this.title, 'title', more);
  }

  tell(detail: string): void {
    setText(this.detail, detail);
    setAttribute(this.detail, 'title', detail);
  }
}

export function runningRow(transfer: Transfer, act: { details(one: Transfer): void; cancel?(one: Transfer): void }): Row<Transfer> {
  const name = nameOf(transfer);
  const button = act.cancel && iconButton('close', t('cancelOne', { name }), () => act.cancel?.(transfer));
  const cells = new Cells('job', button, t('progressOf', { name }), { label: t('detailsOf', { name }), run: () => act.details(transfer) });
  cells.name(pathOf(transfer));
  setIcon(cells.mark, transfer.job.kind === 'get' ? 'download' : 'upload');
  return {
    root: cells.root,
    update(one) {
      const { job } = one;
      const [done, size] = [Number(job.bytes), job.size === undefined || job.size === null ? undefined : Number(job.size)];
      const phase = job.phase ?? '';
      setAttribute(cells.root, 'data-phase', phase);
      setAttribute(cells.root, 'data-stalled', job.stalled === true);
      const share = size === undefined ? bytes(done) : line(percent(done, size), t('bytesOf', { done: bytes(done), all: bytes(size) }));
      cells.tell(line(job.stalled ? t('stalled') : word(phase), share, job.peer, t('age', { time: duration(ageOf(one)) })));
      cells.bar?.set(job.kind === 'get' ? done : Number(job.safe), done, size ?? 0, share);
      if (cells.bar) {
        cells.bar.root.hidden = size === undefined;
      }
      const speed = Number(job.rate ?? 0);
      setText(cells.first, speed > 0 ? rate(speed) : '');
      setText(cells.second, speed > 0 && size !== undefined && size > done ? t('left', { time: duration(((size - done) / speed) * 1000) }) : '');
    },
  };
}

/** What is said of a job that is over, in one line. */
export function endOf({ job }: Transfer): string {
  const took = t('took', { time: duration(Number(job.secs) * 1000) });
  return line(word(job.state), job.code ?? '', job.text ?? '', job.peer, took);
}

export function endedRow(transfer: Transfer, details: (one: Transfer) => void): Row<Transfer> {
  const name = nameOf(transfer);
  const cells = new Cells('end', undefined, undefined, { label: t('detailsOf', { name }), run: () => details(transfer) });
  cells.name(pathOf(transfer));
  const direction = transfer.job.kind === 'get' ? t('download') : t('upload');
  return {
    root: cells.root,
    update(one) {
      const { job, at } = one;
      setAttribute(cells.root, 'data-state', job.state);
      setIcon(cells.mark, ENDS[job.state] ?? 'wait');
      cells.tell(line(direction, endOf(one)));
      setText(cells.first, bytes(Number(job.bytes)));
      setText(cells.second, t('ago', { time: duration(Number(job.ago ?? 0) * 1000 + performance.now() - at) }));
    },
  };
}

export function peerName({ told }: Peer): string {
  return `${told.peer}` || `${told.address}`;
}

export function peerRow(peer: Peer, own: boolean, kick: ((one: Peer) => void) | undefined): Row<Peer> {
  const button = kick && !own ? iconButton('close', t('kickOne', { name: peerName(peer) }), () => kick(peer)) : kick && h('span', { class: 'no-act' });
  const cells = new Cells('peer', button);
  const web = peer.told.transport !== 'quic';
  setIcon(cells.mark, web ? 'globe' : 'link');
  return {
    root: cells.root,
    update(one) {
      const { told, at } = one;
      const name = peerName(one);
      cells.call(own ? line(name, t('thisPage')) : name);
      setAttribute(cells.root, 'data-away', told.connected === false);
      const age = Number(told.age ?? 0) * 1000 + performance.now() - at;
      const trip = Number(told.rtt ?? 0) * 1000;
      cells.tell(
        line(told.connected === false && t('outOfReach'), `${told.address}`, `${told.agent ?? ''}`, t('channels', { n: number(Number(told.channels ?? 0)) }), t('roundTrip', { time: `${number(trip, trip < 10 ? 1 : 0)} ms` }), t('age', { time: duration(age) })),
      );
      setText(cells.first, `↓ ${bytes(Number(told.received ?? 0))}`);
      setText(cells.second, `↑ ${bytes(Number(told.sent ?? 0))}`);
    },
  };
}

export function roomRow(): Row<Room> {
  const cells = new Cells('room', undefined);
  setIcon(cells.mark, 'people');
  return {
    root: cells.root,
    update({ name, members }) {
      cells.call(name);
      setText(cells.first, t('members', { n: number(members) }));
    },
  };
}

export function nodeRow(): Row<Node> {
  const cells = new Cells('node', undefined);
  setIcon(cells.mark, 'globe');
  return {
    root: cells.root,
    update({ id, told, own }) {
      const name = `${told.name ?? ''}` || id;
      cells.call(own ? line(name, t('thisServer')) : name, id);
      const state = told.lost === true ? t('nodeLost') : told.draining === true ? t('nodeDraining') : told.degraded === true && t('nodeDegraded');
      setAttribute(cells.root, 'data-away', told.lost === true);
      setAttribute(cells.root, 'data-full', told.degraded === true && told.lost !== true);
      const count = (key: string): string => number(Number(told[key] ?? 0));
      cells.tell(line(state, `${told.address ?? ''}`, t('roomsOf', { n: count('rooms') })));
      setText(cells.first, t('socketsOf', { n: count('sockets') }));
      setText(cells.second, t('members', { n: count('members') }));
    },
  };
}

export function quotaRow({ peer }: Quota): Row<Quota> {
  const name = peer ?? t('server');
  const cells = new Cells('quota', undefined, t('progressOf', { name }));
  setIcon(cells.mark, 'folder');
  cells.call(name);
  return {
    root: cells.root,
    update({ prefix, used, quota }) {
      cells.tell(line(prefix === undefined ? t('all') : prefix, used === undefined && t('notCounted')));
      cells.bar?.set(used ?? 0, used ?? 0, quota);
      setText(cells.first, used === undefined ? bytes(quota) : t('bytesOf', { done: bytes(used), all: bytes(quota) }));
      setText(cells.second, used === undefined ? '' : percent(used, quota));
      setAttribute(cells.root, 'data-full', used !== undefined && used > quota * 0.9);
    },
  };
}

/** The activity page: what the server does, as it does it; and for administrators the means to stop it. */

import { Fault } from 'udpack';
import { ask } from '../base/dialog.js';
import { button, type Child, h, icon, setAttribute, setText } from '../base/dom.js';
import { bytes, duration, number, percent } from '../base/format.js';
import { VirtualList } from '../base/list.js';
import { toast } from '../base/notice.js';
import { paced } from '../base/paced.js';
import { ProgressBar } from '../base/progress.js';
import { type Mounted, type Session } from '../frame/session.js';
import { Chart } from './chart.js';
import { Feed, type Node, type Peer, type Quota, type Room, type State, type Transfer } from './feed.js';
import { endedRow, endOf, nameOf, nodeRow, pathOf, peerName, peerRow, quotaRow, roomRow, ROW_HEIGHT, runningRow } from './rows.js';
import { t } from './text.js';

export function mount(root: HTMLElement, session: Session): Mounted {
  const page = new ActivityPage(root, session);
  return { unmount: () => page.close(), shown: (visible) => page.shown(visible) };
}

/** How often the lines of the chart get another point, and clocks go on, in milliseconds. */
const SECOND = 1000;
/** Bytes of a reason that the server takes. */
const REASON = 256;

type View = 'running' | 'ended' | 'sockets' | 'rooms' | 'nodes' | 'quotas';

/** A list, its button, and what is said where it is empty. */
interface Part {
  readonly button: HTMLButtonElement;
  readonly count: HTMLElement;
  readonly list: { readonly root: HTMLElement; close(): void };
  readonly empty: string;
  /** Shows it as it is now; how many are listed, and how many there are. */
  show(): [number, number];
  /** Those there are. */
  total(): number;
}

class ActivityPage {
  private readonly feed: Feed;
  private readonly chart = new Chart([t('receivingRate'), t('sendingRate')]);
  private readonly tiles = {
    transfers: new Tile(t('running')),
    stored: new Tile(t('stored')),
    sockets: new Tile(t('sockets')),
    memory: new Tile(t('memory')),
    disk: new Tile(t('diskFree'), true),
    uptime: new Tile(t('uptime')),
  };
  private readonly draining = h('div', { class: 'banner', role: 'status' }, icon('power'), h('p', {}, t('draining')));
  private readonly degraded = h('div', { class: 'banner bad', role: 'status' }, icon('warning'), h('p', {}, t('degraded')));
  private readonly drain: HTMLButtonElement;
  private readonly parts: Record<View, Part>;
  private readonly empty = h('p', { class: 'empty quiet' });
  private readonly more = h('p', { class: 'quiet more' });
  private readonly update = paced(() => this.show());
  private readonly timer: ReturnType<typeof setInterval>;
  private view: View = 'running';
  private visible = false;

  constructor(root: HTMLElement, { rights, socket }: Session) {
    const { admin } = rights;
    this.feed = new Feed(
      socket,
      () => this.update(),
      (received, sent, every) => this.chart.before(received, sent, every),
    );
    const sample = (): void => {
      const { state } = this.feed;
      if (state !== undefined) {
        this.chart.sample([state.receiveRate, state.sendRate]);
      }
      this.update();
    };
    const cancel = admin ? (one: Transfer): void => void this.cancel(one) : undefined;
    const kick = admin ? (one: Peer): void => void this.kick(one) : undefined;
    const isOwn = ({ id }: Peer): boolean => id === socket.sessionId;
    const { feed } = this;
    this.parts = {
      running: this.part<Transfer>('running', t('running'), t('noRunning'), {
        make: (one) => runningRow(one, { details: (one) => void details(one), ...(cancel && { cancel }) }),
        items: () => feed.running,
        onenter: (one) => void details(one),
        ...(cancel && { ondelete: cancel }),
      }),
      ended: this.part<Transfer>('ended', t('ended'), t('noEnded'), { make: (one) => endedRow(one, (one) => void details(one)), items: () => feed.ended, onenter: (one) => void details(one) }),
      sockets: this.part<Peer>('sockets', t('sockets'), t('noSockets'), { make: (one) => peerRow(one, isOwn(one), kick), items: () => feed.peers, total: () => feed.state?.sockets ?? 0, ...(kick && { ondelete: (one: Peer) => !isOwn(one) && kick(one) }) }),
      rooms: this.part<Room>('rooms', t('rooms'), t('noRooms'), { make: () => roomRow(), items: () => feed.rooms, total: () => feed.state?.rooms ?? 0 }),
      nodes: this.part<Node>('nodes', t('nodes'), t('noNodes'), { make: () => nodeRow(), items: () => feed.nodes }),
      quotas: this.part<Quota>('quotas', t('quotas'), t('noQuotas'), { make: (one) => quotaRow(one), items: () => feed.quotas }),
    };
    this.drain = button(t('drain'), () => void this.askDrain(), { class: 'button small danger', icon: 'power' });
    this.drain.hidden = !admin;
    const views = h('div', { class: 'views', role: 'group', 'aria-label': t('list') }, ...Object.values(this.parts).map((part) => part.button));
    const bar = h('div', { class: 'views-bar' }, views, !admin && h('span', { class: 'chip' }, icon('eye'), t('readOnly')), this.drain);
    const tiles = h('dl', { class: 'tiles' }, ...Object.values(this.tiles).map((tile) => tile.root));
    root.append(this.draining, this.degraded, tiles, this.chart.root, bar, ...Object.values(this.parts).map(({ list }) => list.root), this.empty, this.more);
    this.timer = setInterval(sample, SECOND);
    this.select('running');
  }

  shown(visible: boolean): void {
    this.visible = visible;
    this.update();
  }

  close(): void {
    clearInterval(this.timer);
    this.update.stop();
    this.feed.close();
    this.chart.close();
    for (const { list } of Object.values(this.parts)) {
      list.close();
    }
  }

  private part<T extends object>(view: View, label: string, empty: string, of: { make(item: T): ReturnType<typeof runningRow> | { root: HTMLElement; update(item: T): void }; items(): readonly T[]; total?(): number; onenter?(item: T): void; ondelete?(item: T): void }): Part {
    const { onenter, ondelete } = of;
    const list = new VirtualList<T>({ label, rowHeight: ROW_HEIGHT, make: of.make as never, ...(onenter && { onenter }), ...(ondelete && { ondelete }) });
    const count = h('span', { class: 'badge' });
    const chosen = h('button', { type: 'button', 'aria-pressed': 'false', onclick: () => this.select(view) }, h('span', {}, label), count);
    const total = (): number => of.total?.() ?? of.items().length;
    const show = (): [number, number] => {
      const items = of.items();
      list.set(items);
      return [items.length, total()];
    };
    return { button: chosen, count, list, empty, show, total };
  }

  private select(view: View): void {
    this.view = view;
    for (const [name, { button, list }] of Object.entries(this.parts)) {
      setAttribute(button, 'aria-pressed', name === view ? 'true' : 'false');
      list.root.hidden = name !== view;
    }
    this.show();
  }

  private show(): void {
    const { state } = this.feed;
    this.draining.hidden = state?.draining !== true;
    this.degraded.hidden = state?.degraded !== true;
    this.parts.nodes.button.hidden = state?.degraded === undefined;
    this.drain.disabled = state === undefined || state.draining;
    if (!this.visible) {
      return;
    }
    for (const { count, total } of Object.values(this.parts)) {
      setText(count, number(total()));
    }
    const part = this.parts[this.view];
    const [listed, all] = part.show();
    part.list.root.hidden = listed === 0;
    this.empty.hidden = listed > 0;
    setText(this.empty, part.empty);
    this.more.hidden = all <= listed;
    setText(this.more, t('more', { n: number(all - listed) }));
    if (state !== undefined) {
      this.showState(state);
    }
    this.chart.show();
  }

  private showState(state: State): void {
    const { transfers, stored, sockets, memory, disk, uptime } = this.tiles;
    transfers.show(number(state.puts + state.gets), t('inAndOut', { in: number(state.puts), out: number(state.gets) }));
    stored.show(bytes(state.stored), state.failed > 0 ? `${t('files', { n: number(state.files) })} · ${t('failedCount', { n: number(state.failed) })}` : t('files', { n: number(state.files) }));
    sockets.show(number(state.sockets), `${t('rooms')}: ${number(state.rooms)}`);
    memory.root.hidden = state.memory === undefined;
    memory.show(bytes(state.memory ?? 0));
    const { diskFree, diskTotal } = state;
    disk.root.hidden = diskFree === undefined;
    if (diskFree !== undefined && diskTotal !== undefined) {
      disk.show(bytes(diskFree), t('of', { all: bytes(diskTotal) }), [diskTotal - diskFree, diskTotal]);
    }
    uptime.show(duration(state.uptime * 1000 + performance.now() - state.at));
  }

  private async cancel(transfer: Transfer): Promise<void> {
    const reason = await askReason(t('cancelTitle', { name: nameOf(transfer) }), t('cancelBody'), t('cancel'));
    if (reason !== undefined) {
      await this.attempt(this.feed.cancel(transfer.job.id, reason));
    }
  }

  private async kick(peer: Peer): Promise<void> {
    const reason = await askReason(t('kickTitle', { name: peerName(peer) }), t('kickBody'), t('kick'));
    if (reason !== undefined) {
      await this.attempt(this.feed.kick(peer.id, reason));
    }
  }

  private async askDrain(): Promise<void> {
    const sure = await ask(
      t('drainTitle'),
      [h('p', {}, t('drainBody'))],
      [
        { label: t('close'), value: false, kind: 'primary' },
        { label: t('drainDo'), value: true, kind: 'danger' },
      ],
    );
    if (sure) {
      await this.attempt(this.feed.drain());
    }
  }

  /** What is over by itself meanwhile is no failure. */
  private async attempt(done: Promise<void>): Promise<void> {
    try {
      await done;
    } catch (error) {
      if (!(error instanceof Fault && error.fault === 'not_found')) {
        toast(t('refused', { reason: (error as Error).message }), 'error');
      }
    }
  }
}

/** One figure of the server, with a word below and perhaps a bar. */
class Tile {
  private readonly value = h('span', { class: 'value' });
  private readonly note = h('span', { class: 'note quiet' });
  private readonly bar: ProgressBar | undefined;
  readonly root: HTMLElement;

  constructor(label: string, bar = false) {
    this.bar = bar ? new ProgressBar(label) : undefined;
    this.root = h('div', { class: 'tile' }, h('dt', {}, label), h('dd', {}, this.value, this.note, this.bar?.root));
  }

  show(value: string, note = '', share?: readonly [number, number]): void {
    setText(this.value, value);
    setText(this.note, note);
    if (share !== undefined) {
      this.bar?.set(share[0], share[0], share[1], percent(share[0], share[1]));
    }
  }
}

/** Asks for a reason, which may be empty; undefined when it shall not be done. */
async function askReason(title: string, body: string, act: string): Promise<string | undefined> {
  const input = h('input', { id: 'reason', type: 'text', maxlength: REASON / 4, autocomplete: 'off', autofocus: true });
  const sure = await ask(
    title,
    [h('p', {}, body), h('div', { class: 'field' }, h('label', { for: 'reason' }, t('reason')), input)],
    [
      { label: t('close'), value: false },
      { label: act, value: true, kind: 'danger' },
    ],
  );
  return sure ? input.value.trim() : undefined;
}

/** All that is known of a transfer. */
async function details(transfer: Transfer): Promise<void> {
  const { job } = transfer;
  const rows: Child[] = [h('p', { class: 'mono' }, pathOf(transfer))];
  if (job.state !== 'running') {
    rows.push(h('p', {}, endOf(transfer)));
  } else {
    const size = job.size === undefined || job.size === null ? bytes(Number(job.bytes)) : t('bytesOf', { done: bytes(Number(job.bytes)), all: bytes(Number(job.size)) });
    rows.push(h('p', {}, `${job.kind === 'get' ? t('download') : t('upload')} · ${job.peer} · ${size}`));
  }
  await ask(nameOf(transfer), rows, [{ label: t('close'), value: 'close', kind: 'primary' }]);
}

/** What a server tells of itself and its transfers, kept up to date: the channels `stats` and `transfers`. */

import { type Channel, ClosedError, type Socket } from 'udpack';
import { type Job, Jobs } from 'udpack/transfer';

/** A job as the page keeps it: the same object for as long as it is shown. */
export interface Transfer {
  job: Job;
  /** When it was told, in milliseconds of `performance.now()`. */
  at: number;
}

/** A socket as the page keeps it. */
export interface Peer {
  readonly id: string;
  told: Readonly<Record<string, unknown>>;
  at: number;
}

export interface Room {
  readonly name: string;
  readonly members: number;
}

/** A node of the server's cluster. */
export interface Node {
  readonly id: string;
  /** What it told last; it changes. */
  told: Readonly<Record<string, unknown>>;
  /** It is the server of this page. */
  readonly own: boolean;
}

export interface Quota {
  /** The name of the token; undefined for the quota of the whole server. */
  readonly peer?: string;
  readonly prefix?: string;
  /** Undefined where nothing was counted yet. */
  readonly used?: number;
  readonly quota: number;
}

/** The state of the server, as far as the page shows it. */
export interface State {
  readonly at: number;
  readonly uptime: number;
  readonly draining: boolean;
  readonly received: number;
  readonly sent: number;
  readonly receiveRate: number;
  readonly sendRate: number;
  readonly puts: number;
  readonly gets: number;
  readonly done: number;
  readonly failed: number;
  readonly cancelled: number;
  readonly files: number;
  readonly stored: number;
  readonly memory?: number;
  readonly diskFree?: number;
  readonly diskTotal?: number;
  readonly sockets: number;
  readonly rooms: number;
  /** Whether the server's cluster misses messages; undefined where it is in none. */
  readonly degraded?: boolean;
}

/** Ended jobs that are shown; the oldest go. */
const ENDED = 1000;
/** How long to wait before a lost channel is opened anew, in milliseconds. */
const PAUSE = 500;

export class Feed {
  state: State | undefined;
  /** The last to end first. */
  ended: Transfer[] = [];
  peers: Peer[] = [];
  rooms: Room[] = [];
  quotas: Quota[] = [];
  /** This server first; none where it is in no cluster. */
  nodes: Node[] = [];
  private readonly byId = new Map<number, Transfer>();
  private inOrder: Transfer[] | undefined;
  private jobs: Jobs | undefined;
  private stats: Channel | undefined;
  private over = false;

  /** `onchange` is called whenever something is told, and `onhistory` with the bytes a second of the time before. */
  constructor(
    private readonly socket: Socket,
    private readonly onchange: () => void,
    private readonly onhistory: (received: number[], sent: number[], everyMs: number) => void,
  ) {
    void this.keep(() => this.watchJobs());
    void this.keep(() => this.watchStats());
  }

  /** Those that run, in the order in which they began. */
  get running(): readonly Transfer[] {
    this.inOrder ??= [...this.byId.values()];
    return this.inOrder;
  }

  close(): void {
    this.over = true;
    void this.jobs?.close().catch(() => {});
    void this.stats?.close().catch(() => {});
  }

  async cancel(job: number, reason: string): Promise<void> {
    await this.jobs?.cancel(job, reason === '' ? undefined : reason);
  }

  async kick(socket: string, reason: string): Promise<void> {
    await this.stats?.request('kick', { socket, ...(reason !== '' && { reason }) });
  }

  async drain(): Promise<void> {
    await this.stats?.request('drain', {});
  }

  /** Watches again whenever the watch was lost with its connection. */
  private async keep(watch: () => Promise<void>): Promise<void> {
    while (!this.over) {
      try {
        await watch();
        return;
      } catch (error) {
        if (!(error instanceof ClosedError) || !error.retry) {
          return;
        }
        await new Promise((resolve) => setTimeout(resolve, PAUSE));
      }
    }
  }

  private async watchJobs(): Promise<void> {
    this.jobs = await Jobs.open(this.socket);
    this.byId.clear();
    [this.inOrder, this.ended] = [undefined, []];
    for await (const told of this.jobs) {
      this.tell(told);
      this.onchange();
    }
  }

  private tell(jobs: readonly Job[]): void {
    const at = performance.now();
    const over: Transfer[] = [];
    for (const job of jobs) {
      const known = this.byId.get(job.id);
      const transfer = known ?? { job, at };
      Object.assign(transfer, { job, at });
      if (job.state === 'running') {
        if (known === undefined) {
          this.byId.set(job.id, transfer);
          this.inOrder = undefined;
        }
        continue;
      }
      if (this.byId.delete(job.id)) {
        this.inOrder = undefined;
      }
      over.push(transfer);
    }
    // Those of a list come with the last to end first, and others one by one.
    this.ended.unshift(...over);
    this.ended.length = Math.min(this.ended.length, ENDED);
  }

  private async watchStats(): Promise<void> {
    const channel = (await this.socket.open('stats', { resumable: false, yields: true })) as unknown as Channel;
    this.stats = channel;
    for await (const { event, data } of channel) {
      if (event === 'history') {
        const { every, received, sent } = data as { every: number; received: (number | bigint)[]; sent: (number | bigint)[] };
        const rates = (moved: (number | bigint)[]): number[] => moved.map((bytes) => Number(bytes) / every);
        this.onhistory(rates(received), rates(sent), every * 1000);
      } else if (event === 'stats') {
        this.take(data as Record<string, unknown>);
        this.onchange();
      }
    }
  }

  private take(told: Record<string, unknown>): void {
    const at = performance.now();
    const number = (from: Record<string, unknown>, key: string): number => Number(from[key] ?? 0);
    const optional = (key: string): number | undefined => (told[key] === undefined || told[key] === null ? undefined : Number(told[key]));
    const list = (key: string): Record<string, unknown>[] => (Array.isArray(told[key]) ? (told[key] as Record<string, unknown>[]) : []);
    const jobs = (told.jobs ?? {}) as Record<string, unknown>;
    const cluster = (told.cluster ?? undefined) as Record<string, unknown> | undefined;
    const [memory, diskFree, diskTotal] = ['memory', 'disk_free', 'disk_total'].map(optional);
    this.state = {
      at,
      uptime: number(told, 'uptime'),
      draining: told.draining === true,
      received: number(told, 'received'),
      sent: number(told, 'sent'),
      receiveRate: number(told, 'receive_rate'),
      sendRate: number(told, 'send_rate'),
      puts: number(jobs, 'puts'),
      gets: number(jobs, 'gets'),
      done: number(jobs, 'done'),
      failed: number(jobs, 'failed'),
      cancelled: number(jobs, 'cancelled'),
      files: number(told, 'files'),
      stored: number(told, 'stored'),
      ...(memory !== undefined && { memory }),
      ...(diskFree !== undefined && { diskFree }),
      ...(diskTotal !== undefined && { diskTotal }),
      sockets: number(told, 'sockets_in_all'),
      rooms: number(told, 'rooms_in_all'),
      ...(cluster && { degraded: cluster.degraded === true }),
    };
    const nodes = new Map(this.nodes.map((node) => [node.id, node]));
    const others = Array.isArray(cluster?.nodes) ? (cluster.nodes as Record<string, unknown>[]) : [];
    const all = cluster ? [(cluster.own ?? {}) as Record<string, unknown>, ...others] : [];
    this.nodes = all.map((told, index) => Object.assign(nodes.get(`${told.id}`) ?? { id: `${told.id}`, own: index === 0 }, { told }));
    const known = new Map(this.peers.map((peer) => [peer.id, peer]));
    this.peers = list('sockets').map((told) => {
      const id = `${told.id}`;
      return Object.assign(known.get(id) ?? { id }, { told, at });
    });
    const rooms = new Map(this.rooms.map((room) => [room.name, room]));
    this.rooms = list('rooms').map(({ name, members }) => Object.assign(rooms.get(`${name}`) ?? { name: `${name}` }, { members: Number(members) }));
    this.quotas = list('quotas').map(({ peer, prefix, used, quota }) => ({
      ...(typeof peer === 'string' && { peer }),
      ...(typeof prefix === 'string' && { prefix }),
      ...(used !== null && used !== undefined && { used: Number(used) }),
      quota: Number(quota),
    }));
  }
}

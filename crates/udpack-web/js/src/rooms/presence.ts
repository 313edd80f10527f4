/** Who is present in a room: fed with the messages `presence_state` and `presence_diff` of a channel. */

import { type Message } from '../channel/message.js';

/** One session of one peer, and what it says about itself. */
export interface PresenceEntry<Meta = unknown> {
  readonly peer: string;
  readonly session: string;
  readonly meta: Meta;
}

/** What one message changed. A new meta is a leave and a join. */
export interface PresenceDiff<Meta = unknown> {
  readonly joins: PresenceEntry<Meta>[];
  readonly leaves: PresenceEntry<Meta>[];
  /** Why all of `leaves` have left, where the server says it: `node_lost` when their server is out of reach for the others. */
  readonly why?: string;
}

/** A server sends no more entries for one room. */
const ENTRIES = 60_000;

export class PresenceMap<Meta = unknown> {
  readonly room: string;
  private readonly bySession = new Map<string, PresenceEntry<Meta>>();

  constructor(room: string) {
    this.room = room;
  }

  /** Takes a message in and says what it changed; `undefined` for one that is not about this room's presence. */
  apply(message: Pick<Message, 'event' | 'data'>): PresenceDiff<Meta> | undefined {
    const data = message.data as { room?: unknown; entries?: unknown; joins?: unknown; leaves?: unknown; why?: unknown } | null;
    if (data === null || typeof data !== 'object' || data.room !== this.room) {
      return undefined;
    }
    const diff: PresenceDiff<Meta> = { joins: [], leaves: [] };
    if (message.event === 'presence_state') {
      const entries = entriesOf<Meta>(data.entries);
      if (entries === undefined) return undefined;
      const there = new Set(entries.map(placeOf));
      for (const [place, entry] of this.bySession) {
        if (!there.has(place)) this.remove(entry, diff);
      }
      for (const entry of entries) {
        const known = this.bySession.get(placeOf(entry));
        if (known === undefined || JSON.stringify(known.meta, plainly) !== JSON.stringify(entry.meta, plainly)) this.insert(entry, diff);
      }
      return diff;
    }
    if (message.event === 'presence_diff') {
      const joins = entriesOf<Meta>(data.joins);
      const leaves = entriesOf<Meta>(data.leaves);
      if (joins === undefined || leaves === undefined) return undefined;
      for (const entry of leaves) this.remove(entry, diff);
      for (const entry of joins) this.insert(entry, diff);
      return typeof data.why === 'string' ? { ...diff, why: data.why } : diff;
    }
    return undefined;
  }

  /** The ids of those present, in order. */
  get peers(): string[] {
    return [...new Set([...this.bySession.values()].map((entry) => entry.peer))].sort();
  }

  /** Everything that this peer's sessions say about themselves, in the order of the sessions' ids. */
  metas(peer: string): Meta[] {
    const entries = [...this.bySession.values()].filter((entry) => entry.peer === peer);
    return entries.sort((a, b) => (a.session < b.session ? -1 : 1)).map((entry) => entry.meta);
  }

  private insert(entry: PresenceEntry<Meta>, diff: PresenceDiff<Meta>): void {
    this.remove(entry, diff);
    if (this.bySession.size < ENTRIES) {
      this.bySession.set(placeOf(entry), entry);
      diff.joins.push(entry);
    }
  }

  private remove(entry: PresenceEntry<Meta>, diff: PresenceDiff<Meta>): void {
    const known = this.bySession.get(placeOf(entry));
    if (known !== undefined) {
      this.bySession.delete(placeOf(entry));
      diff.leaves.push(known);
    }
  }
}

function placeOf(entry: PresenceEntry): string {
  return `${entry.peer}\u0000${entry.session}`;
}

function entriesOf<Meta>(list: unknown): PresenceEntry<Meta>[] | undefined {
  const isEntry = (each: unknown): boolean => {
    const { peer, session } = (each ?? {}) as { peer?: unknown; session?: unknown };
    return typeof peer === 'string' && typeof session === 'string';
  };
  return Array.isArray(list) && list.every(isEntry) ? (list as PresenceEntry<Meta>[]) : undefined;
}

/** Makes values comparable that JSON cannot write. */
function plainly(_: string, value: unknown): unknown {
  return typeof value === 'bigint' ? `${value}n` : value instanceof Map ? [...value] : value;
}

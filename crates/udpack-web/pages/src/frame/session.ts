/** What the frame gives its tabs: the socket, what the token may do, and questions to the server. */

import { Channel, ClosedError, Fault, Socket } from 'udpack';

/** What the token may do, as far as the page shows something for it. */
export interface Rights {
  readonly read: boolean;
  readonly write: boolean;
  readonly share: boolean;
  /** See the transfers of all, and end them. */
  readonly admin: boolean;
  /** See the transfers of all. */
  readonly watch: boolean;
}

/** One admitted socket. It outlives lost connections; when it is over for good, the tabs are unmounted. */
export interface Session {
  readonly socket: Socket;
  readonly rights: Rights;
  /** The token that let it in. */
  readonly token: string;
  /** Asks on a lane (`list`, `stat` …), which is opened when it is first needed. Rejects as `channel.request` does. */
  ask(request: string, fields: object, signal?: AbortSignal): Promise<unknown>;
}

/** What a tab's module exports. `root` is empty, and is hidden while another tab is shown. */
export type Mount = (root: HTMLElement, session: Session) => Mounted;

export interface Mounted {
  /** The session is over: stops everything. The frame empties `root`. */
  unmount(): void;
  /** The tab has come to the front or has left it. */
  shown?(visible: boolean): void;
}

/** A lane for questions alone, so that none waits behind a file. */
class Questions {
  private lane: Promise<Channel> | undefined;

  constructor(private readonly socket: Socket) {}

  async ask(request: string, fields: object, signal?: AbortSignal): Promise<unknown> {
    for (let tries = 1; ; tries += 1) {
      this.lane ??= this.socket.open('transfer', { resumable: false, yields: true, priority: 'high' }) as unknown as Promise<Channel>;
      const { lane } = this;
      try {
        return await (await lane).request(request, fields, signal && { signal });
      } catch (error) {
        if (!(error instanceof ClosedError)) {
          throw error;
        }
        // The lane went with its connection; questions may be asked twice.
        this.lane = this.lane === lane ? undefined : this.lane;
        if (!error.retry || tries >= 3) {
          throw error;
        }
      }
    }
  }
}

/** Finds out what the token may do, and makes the session of a socket. */
export async function begin(socket: Socket, token: string): Promise<Session> {
  const questions = new Questions(socket);
  const ask: Session['ask'] = (request, fields, signal) => questions.ask(request, fields, signal);
  return { socket, token, ask, rights: await rightsOf(ask) };
}

async function rightsOf(ask: Session['ask']): Promise<Rights> {
  try {
    const told = (await ask('rights', {})) as Record<string, unknown>;
    const has = (right: string): boolean => told[right] === true;
    return { read: has('read'), write: has('write'), share: has('share'), admin: has('admin'), watch: has('watch') || has('admin') };
  } catch (error) {
    if (!(error instanceof Fault) || error.fault !== 'no_handler') {
      throw error;
    }
  }
  // A server that does not tell: what it refuses when it is asked is not offered.
  const read = await ask('list', { limit: 1 }).then(
    () => true,
    (error: unknown) => !(error instanceof Fault && error.fault === 'forbidden'),
  );
  return { read, write: true, share: false, admin: false, watch: false };
}

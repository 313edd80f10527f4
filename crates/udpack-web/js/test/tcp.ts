/** A TCP path that can break: passes connections on to a server on this machine, until they are cut. */

import { createConnection, createServer, type AddressInfo, type Server, type Socket } from 'node:net';

export class TcpRelay {
  private readonly open = new Set<Socket>();
  /** How many there were. */
  connections = 0;
  /** Takes no connection while it is true. */
  closed = false;

  private constructor(
    private readonly server: Server,
    readonly port: number,
  ) {}

  /** One on a free port of 127.0.0.1, in front of a server there. */
  static async start(to: number): Promise<TcpRelay> {
    const server = createServer((front) => {
      if (relay.closed) {
        front.destroy();
        return;
      }
      relay.connections += 1;
      const back = createConnection(to, '127.0.0.1');
      for (const [one, other] of [[front, back], [back, front]] as const) {
        relay.open.add(one);
        one.on('error', () => {});
        one.on('close', () => (relay.open.delete(one), other.destroy()));
        one.pipe(other);
      }
    });
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
    const relay = new TcpRelay(server, (server.address() as AddressInfo).port);
    return relay;
  }

  /** Breaks each connection. */
  cut(): void {
    for (const socket of this.open) socket.destroy();
  }

  stop(): void {
    this.cut();
    this.server.close();
  }
}

/** A path that can break: passes UDP on between a browser and a server, until it is cut. */

import { createSocket, type Socket } from 'node:dgram';

export class Relay {
  /** How often it was cut. */
  cuts = 0;
  /** Bytes that it has passed on to the server. */
  passed = 0;
  /** Loses everything, so that nobody learns anything, until it is false again. */
  silent = false;
  /** Loses longer packets on their way to the server: what a file is made of does not get there, messages do. */
  longest = Infinity;
  private front: Socket | undefined;
  private readonly backs = new Map<number, Socket>();

  private constructor(
    readonly port: number,
    private readonly server: number,
  ) {}

  /** One on a free port of 127.0.0.1, in front of a server there. */
  static async start(server: number): Promise<Relay> {
    const front = createSocket('udp4');
    await bound(front, 0);
    const relay = new Relay(front.address().port, server);
    relay.listen(front);
    return relay;
  }

  /** Nothing passes any more: whoever sends learns that nobody is there. Until `mend`. */
  async cut(): Promise<void> {
    this.cuts += 1;
    for (const back of this.backs.values()) back.close();
    this.backs.clear();
    const { front } = this;
    this.front = undefined;
    if (front) await new Promise<void>((resolve) => front.close(resolve));
  }

  async mend(): Promise<void> {
    const front = createSocket('udp4');
    await bound(front, this.port);
    this.listen(front);
  }

  private listen(front: Socket): void {
    this.front = front;
    front.on('error', () => {});
    front.on('message', (bytes, from) => {
      if (this.silent || bytes.length > this.longest) return;
      let back = this.backs.get(from.port);
      if (!back) {
        back = createSocket('udp4');
        back.on('error', () => {});
        back.on('message', (answer) => void (this.silent || this.front?.send(answer, from.port, '127.0.0.1')));
        this.backs.set(from.port, back);
      }
      this.passed += bytes.length;
      back.send(bytes, this.server, '127.0.0.1');
    });
  }
}

function bound(socket: Socket, port: number): Promise<void> {
  return new Promise((resolve, reject) => {
    socket.once('error', reject);
    socket.bind(port, '127.0.0.1', resolve);
  });
}

/** A path that can break: passes UDP on between a browser and a server, until it is cut. */

import { createSocket, type Socket } from 'node:dgram';

export class Relay {
  /** How often it was cut. */
  cuts = 0;
  /** Bytes that it has passed on to the server. */
  passed = 0;
  /** Loses everything, so that nobody learns anything, until it is false again. */
  silent = false;
  /** Loses each packet of this number, and its multiples, towards the server; and how long it holds up the others, in milliseconds. */
  losesEach = 0;
  delayMs = 0;
  private packets = 0;
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

  private later(pass: () => void): void {
    if (this.delayMs > 0) setTimeout(pass, this.delayMs);
    else pass();
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
        back.on('message', (answer) => void (this.silent || this.later(() => this.front?.send(answer, from.port, '127.0.0.1'))));
        this.backs.set(from.port, back);
      }
      this.packets += 1;
      if (this.losesEach > 0 && this.packets % this.losesEach === 0) return;
      this.passed += bytes.length;
      const to = back;
      // The other side may be gone by then.
      this.later(() => this.backs.get(from.port) === to && to.send(bytes, this.server, '127.0.0.1'));
    });
  }
}

function bound(socket: Socket, port: number): Promise<void> {
  return new Promise((resolve, reject) => {
    socket.once('error', reject);
    socket.bind(port, '127.0.0.1', resolve);
  });
}

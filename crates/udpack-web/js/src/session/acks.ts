/** Which channels have something to confirm, gathered for a moment (PROTOCOL.md §8), and marks that were passed (§7). */

import { type Clock, type Stop } from '../base/async.js';
import { type Channel, internals } from '../channel/channel.js';
import { type Outbox } from '../channel/outbox.js';
import { encodeFrame, type U64, U64_MAX } from '../wire/message.js';

const FRAMES = 256;
const BYTES = 128 << 10;
const GATHER_MS = 5;
const CONTROL_FRAME = 4096;

export class Acks {
  readonly #clock: Clock;
  readonly #due = new Set<Channel>();
  readonly #marks = new Map<Channel, U64>();
  #control: Outbox | undefined;
  #stop: Stop | undefined;

  constructor(clock: Clock) {
    this.#clock = clock;
  }

  /** Confirms on this connection's control stream from now on; on none without one. */
  use(control: Outbox | undefined): void {
    this.#control = control;
    this.#stop?.();
    this.#stop = undefined;
    if (control === undefined) {
      this.#marks.clear();
    } else if (this.#due.size > 0) {
      this.#soon();
    }
  }

  /** The channel has received something, or takes nothing more. */
  received(channel: Channel): void {
    this.#due.add(channel);
    const core = channel[internals];
    if (core.receivedCount - core.ackedCount >= FRAMES || core.ackBytes >= BYTES) {
      this.now();
    } else {
      this.#soon();
    }
  }

  passed(channel: Channel, mark: U64): void {
    this.#marks.set(channel, mark);
    this.#soon();
  }

  /** Sends all that is due, as far as the control stream has room. */
  now(): void {
    const control = this.#control;
    if (control === undefined) {
      return;
    }
    for (const channel of this.#due) {
      if (!control.hasRoom) {
        return this.#soon();
      }
      this.#due.delete(channel);
      const core = channel[internals];
      if (!channel.resumable || (!core.refusing && core.ackedCount === core.receivedCount)) {
        continue;
      }
      core.ackedCount = core.receivedCount;
      core.ackBytes = 0;
      const received = core.refusing ? U64_MAX : core.receivedCount;
      control.push(encodeFrame(CONTROL_FRAME, '$ack', { channel: channel.id, own: channel.own, received }));
    }
    for (const [channel, mark] of this.#marks) {
      if (!control.hasRoom) {
        return this.#soon();
      }
      this.#marks.delete(channel);
      control.push(encodeFrame(CONTROL_FRAME, '$passed', { channel: channel.id, own: channel.own, mark }));
    }
  }

  forget(channel: Channel): void {
    this.#due.delete(channel);
    this.#marks.delete(channel);
  }

  #soon(): void {
    this.#stop ??= this.#clock.after(GATHER_MS, () => {
      this.#stop = undefined;
      this.now();
    });
  }
}

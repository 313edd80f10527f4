/** Time for tests: it moves when it is told to, or to the next timer when nothing else can happen. */

import type { Clock, Stop } from '../src/base/async.js';

interface Timer {
  at: number;
  run: () => void;
}

export class FakeClock implements Clock {
  private time = 0;
  private timers: Timer[] = [];

  now(): number {
    return this.time;
  }

  after(ms: number, run: () => void): Stop {
    const timer = { at: this.time + ms, run };
    this.timers.push(timer);
    return () => {
      this.timers = this.timers.filter((each) => each !== timer);
    };
  }

  /** Runs what becomes due in so many milliseconds, in order. */
  async advance(ms: number): Promise<void> {
    const until = this.time + ms;
    await settle();
    while (this.step(until)) await settle();
    this.time = until;
  }

  /** Moves to the next timer until the condition holds. */
  async until(condition: () => boolean, what = 'the condition'): Promise<void> {
    for (let steps = 0; ; steps += 1) {
      await settle();
      if (condition()) return;
      if (steps > 20_000 || !this.step(Number.POSITIVE_INFINITY)) throw new Error(`${what} does not come about`);
    }
  }

  /** The result of a promise, however far the time must move. */
  async result<T>(promise: Promise<T>): Promise<T> {
    let over = false;
    const done = (): void => {
      over = true;
    };
    promise.then(done, done);
    await this.until(() => over, 'a result');
    return promise;
  }

  private step(until: number): boolean {
    const next = this.timers.reduce<Timer | undefined>((least, each) => (least && least.at <= each.at ? least : each), undefined);
    if (!next || next.at > until) return false;
    this.timers = this.timers.filter((each) => each !== next);
    this.time = Math.max(this.time, next.at);
    next.run();
    return true;
  }
}

/** Until everything that can run without time has run. */
export async function settle(): Promise<void> {
  for (let turn = 0; turn < 3; turn += 1) await new Promise((resolve) => setImmediate(resolve));
}

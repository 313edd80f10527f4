/** Small pieces for waiting: a promise with its handles outside, a flag that wakes, a clock that tests replace. */

/** A promise that is settled from outside. Nobody need look at it: a rejection is never unhandled. */
export class Deferred<T> {
  readonly promise: Promise<T>;
  resolve!: (value: T) => void;
  reject!: (error: unknown) => void;
  settled = false;

  constructor() {
    this.promise = new Promise<T>((resolve, reject) => {
      this.resolve = (value) => {
        this.settled = true;
        resolve(value);
      };
      this.reject = (error) => {
        this.settled = true;
        reject(error);
      };
    });
    handled(this.promise);
  }
}

/** Marks a rejection as seen, for whoever does not wait for it. Those who do still get it. */
export function handled<T>(promise: Promise<T>): Promise<T> {
  promise.catch(() => {});
  return promise;
}

/** Something may have changed: whoever waits looks again. */
export class Signal {
  #waiting: (() => void)[] = [];

  /** Resolves at the next `wake`. */
  wait(): Promise<void> {
    return new Promise((resolve) => this.#waiting.push(resolve));
  }

  wake(): void {
    const woken = this.#waiting;
    this.#waiting = [];
    for (const resolve of woken) {
      resolve();
    }
  }
}

/** Stops a timer; does nothing when it has run. */
export type Stop = () => void;

/** Time, in milliseconds. */
export interface Clock {
  now(): number;
  after(ms: number, run: () => void): Stop;
}

/** Timers hold no more than this; what is longer is waited for in parts. */
const LONGEST = 2 ** 31 - 1;

/** The time of the program that runs. */
export const realClock: Clock = {
  now: () => performance.now(),
  after(ms, run) {
    let timer: ReturnType<typeof setTimeout>;
    const arm = (left: number): void => {
      const part = Math.min(left, LONGEST);
      timer = setTimeout(() => (left > part ? arm(left - part) : run()), part);
    };
    arm(ms);
    return () => clearTimeout(timer);
  },
};

/** Resolves after `ms`. */
export function sleep(clock: Clock, ms: number): Promise<void> {
  return new Promise((resolve) => void clock.after(ms, resolve));
}

/** The result of `work`, or `late()` after `ms`. The work goes on. */
export async function within<T>(clock: Clock, ms: number, work: Promise<T>, late: () => T): Promise<T> {
  const over = new Deferred<T>();
  const stop = clock.after(ms, () => {
    try {
      over.resolve(late());
    } catch (error) {
      over.reject(error);
    }
  });
  try {
    return await Promise.race([work, over.promise]);
  } finally {
    stop();
  }
}

/** At most four updates of the page a second, however often something moves. */

export const PACE_MS = 250;

/** A function that runs `update` soon: at once when nothing ran for a while, else when the pace allows it. */
export function paced(update: () => void, ms: number = PACE_MS): { (): void; stop(): void } {
  let last = Number.NEGATIVE_INFINITY;
  let timer: ReturnType<typeof setTimeout> | undefined;
  const run = (): void => {
    timer = undefined;
    last = performance.now();
    update();
  };
  const ask = (): void => {
    timer ??= setTimeout(run, Math.max(0, last + ms - performance.now()));
  };
  return Object.assign(ask, { stop: () => clearTimeout(timer) });
}

/** Bytes a second over the last seconds. */
export class Rate {
  private readonly samples: [number, number][] = [];

  constructor(private readonly overMs = 5000) {}

  /** The count now; it never goes down. */
  sample(count: number, now: number = performance.now()): void {
    this.samples.push([now, count]);
    while (this.samples.length > 2 && now - (this.samples[1] as [number, number])[0] > this.overMs) {
      this.samples.shift();
    }
  }

  /** Undefined before there are two samples. */
  get perSecond(): number | undefined {
    const [first, last] = [this.samples[0], this.samples.at(-1)];
    if (first === undefined || last === undefined || last[0] - first[0] < 200) {
      return undefined;
    }
    return Math.max(0, ((last[1] - first[1]) * 1000) / (last[0] - first[0]));
  }

  clear(): void {
    this.samples.length = 0;
  }
}

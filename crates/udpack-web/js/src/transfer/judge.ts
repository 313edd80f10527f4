/**
 * Whether an upload goes over TCP instead. Browsers leave a page no choice of congestion control: where packets are lost at
 * random, WebTransport may get a twentieth of what the system's TCP does. Only a trial tells.
 */

/** What is under this rate over WebTransport, in bytes a second, is worth a trial. */
const SLOW = 2 << 20;
/** For so long a rate is measured. */
const WINDOW_MS = 3000;
/** How long a trial waits until the first bytes have arrived. */
const FIRST_MS = 10_000;
/** A trial must be so many times as fast. */
const GAIN = 1.5;

export class Judge {
  private phase: 'before' | 'trial' | 'over' = 'before';
  private from: { at: number; bytes: number } | undefined;
  private slow = 0;

  /**
   * Told several times a second how many bytes the server has, and whether something is being sent. `try`: go over TCP, and tell on;
   * `back`: that is not faster.
   */
  look(now: number, bytes: number, isSending: boolean): 'stay' | 'try' | 'back' {
    if (!isSending || this.phase === 'over') {
      this.from = undefined;
      return 'stay';
    }
    this.from ??= { at: now, bytes };
    const took = now - this.from.at;
    const rate = ((bytes - this.from.bytes) / took) * 1000;
    if (this.phase === 'before') {
      if (took < WINDOW_MS) {
        return 'stay';
      }
      this.from = undefined;
      if (rate >= SLOW) {
        return 'stay';
      }
      this.slow = rate;
      this.phase = 'trial';
      return 'try';
    }
    if (took < WINDOW_MS || (bytes === this.from.bytes && took < FIRST_MS)) {
      return 'stay';
    }
    this.phase = 'over';
    return rate > this.slow * GAIN ? 'stay' : 'back';
  }
}

/** While files are on their way: the percentage in the title, a warning before the page is left, a screen that stays on. */

import { percent } from '../base/format.js';
import { type Totals } from './queue.js';
import { t } from './text.js';

const TITLE = 'udpack';

export class Guard {
  private busy = false;
  private lock: WakeLockSentinel | undefined;
  private asking = false;

  constructor() {
    document.addEventListener('visibilitychange', () => void this.keepAwake());
  }

  show(totals: Totals): void {
    const isBusy = totals.active > 0;
    const title = isBusy ? `${percent(totals.safe, totals.bytes)} · ${TITLE}` : TITLE;
    if (document.title !== title) {
      document.title = title;
    }
    if (isBusy !== this.busy) {
      this.busy = isBusy;
      if (isBusy) {
        addEventListener('beforeunload', warn);
      } else {
        removeEventListener('beforeunload', warn);
      }
      void this.keepAwake();
    }
  }

  /** The browser takes a lock away whenever the page is hidden. */
  private async keepAwake(): Promise<void> {
    if (this.asking || !('wakeLock' in navigator)) {
      return;
    }
    this.asking = true;
    try {
      if (this.busy && document.visibilityState === 'visible' && (this.lock === undefined || this.lock.released)) {
        this.lock = await navigator.wakeLock.request('screen');
      }
      if (!this.busy) {
        await this.lock?.release();
        this.lock = undefined;
      }
    } catch {
      // Refused, as on a battery that is nearly empty.
    } finally {
      this.asking = false;
    }
  }
}

function warn(event: BeforeUnloadEvent): void {
  event.preventDefault();
  event.returnValue = t('leave');
}

/** Listeners by event. One that throws does not keep the others from being called. */

export class Emitter<Events extends object> {
  readonly #listeners = new Map<keyof Events, Set<(value: never) => void>>();

  /** Calls `listener` at each `event` until the returned function is called. */
  on<E extends keyof Events>(event: E, listener: (value: Events[E]) => void): () => void {
    const set = this.#listeners.get(event) ?? new Set();
    this.#listeners.set(event, set);
    set.add(listener as (value: never) => void);
    return () => set.delete(listener as (value: never) => void);
  }

  emit<E extends keyof Events>(event: E, value: Events[E]): void {
    for (const listener of [...(this.#listeners.get(event) ?? [])]) {
      guarded(() => (listener as (value: Events[E]) => void)(value));
    }
  }
}

/** Runs a listener of the application. An error of its is reported, as for an event of the DOM. */
export function guarded(listener: () => void): void {
  try {
    listener();
  } catch (error) {
    reportError(error);
  }
}

/** Reports an error of the application's code that nobody waits for, as the platform does for its own events. */
export function reportError(error: unknown): void {
  const platform = (globalThis as { reportError?: (error: unknown) => void }).reportError;
  if (platform) {
    platform.call(globalThis, error);
  } else {
    console.error(error);
  }
}

/** How an application describes its events, so that names and data are checked by the compiler. */

/**
 * The events of one direction: `{ said: { from: string; text: string }; add: (pair: [number, number]) => number }`.
 * A function type is a request: its argument is the data, its result the answer; an `AsyncIterable` is an answer of
 * items.
 */
export type EventMap = Record<string, any>;

export type Name<Events extends EventMap> = Extract<keyof Events, string>;

/** The data of an event or a request. */
export type DataOf<T> = T extends (...args: infer Args) => unknown ? (Args extends [infer Data, ...unknown[]] ? Data : undefined) : T;

/** The answer to a request. */
export type ReplyOf<T> = T extends (...args: never[]) => infer Reply ? Awaited<Reply> : unknown;

/** The items of an answer. */
export type ItemOf<T> = ReplyOf<T> extends AsyncIterable<infer Item> ? Item : unknown;

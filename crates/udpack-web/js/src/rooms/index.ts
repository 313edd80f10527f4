/** Rooms with a history: positions that are kept, and channels that go on where others were. */

export { history, positions } from './history.js';
export { subscribe, Subscription } from './subscription.js';

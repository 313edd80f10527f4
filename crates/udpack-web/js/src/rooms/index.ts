/** Rooms: who is present in them, and those with a history: positions that are kept, and channels that go on where others were. */

export { history, positions } from './history.js';
export { type PresenceDiff, type PresenceEntry, PresenceMap } from './presence.js';
export { subscribe, Subscription } from './subscription.js';

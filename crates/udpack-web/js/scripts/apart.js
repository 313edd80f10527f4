/** Keeps the WebSocket transport in a bundle of its own, `mux.js` beside the one that imports it when it is needed. */
export const apart = {
  name: 'apart',
  setup({ onResolve }) {
    onResolve({ filter: /\/mux\/index\.js$/ }, ({ kind }) => (kind === 'dynamic-import' ? { path: './mux.js', external: true } : undefined));
  },
};

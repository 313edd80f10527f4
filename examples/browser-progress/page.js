// @ts-check
import { connect } from 'udpack';

const [state, form, text, list] = /** @type {[HTMLElement, HTMLFormElement, HTMLInputElement, HTMLElement]} */ (['state', 'form', 'text', 'jobs'].map((id) => document.getElementById(id)));

const socket = await connect({ token: '' });
state.textContent = 'connected';
socket.on('state', ({ state: now }) => (state.textContent = now));

/** @typedef {{ start(steps: number): AsyncIterable<{ done: number; total: number }> }} Jobs */
/** @type {import('udpack').Channel<{}, Jobs>} */
let jobs = await socket.open('jobs');

/** @param {string} name */
function add(name) {
  const row = document.createElement('li');
  const bar = Object.assign(document.createElement('progress'), { max: 1, value: 0 });
  bar.setAttribute('aria-label', name);
  const button = document.createElement('button');
  const [title, told] = ['span', 'small'].map((tag) => document.createElement(tag));
  title.textContent = name;
  row.append(title, button, bar, told);
  list.append(row);
  void run();

  async function run() {
    const control = new AbortController();
    button.textContent = 'Stop';
    button.onclick = () => control.abort();
    told.textContent = 'waiting';
    let word = 'done';
    try {
      if ((await Promise.race([jobs.closed, undefined])) !== undefined) jobs = await socket.open('jobs');
      const begun = performance.now();
      for await (const { done, total } of jobs.stream('start', 300, { signal: control.signal })) {
        bar.value = done / total;
        told.textContent = `${Math.floor((100 * done) / total)} %, ${Math.ceil(((total - done) * (performance.now() - begun)) / done / 1000)} s left`;
      }
    } catch (error) {
      word = control.signal.aborted ? 'stopped' : `failed: ${/** @type {Error} */ (error).message}`;
    }
    told.textContent = word;
    button.textContent = 'Do again';
    button.onclick = () => run();
  }
}

form.onsubmit = (event) => {
  event.preventDefault();
  add(text.value);
  form.reset();
};

// @ts-check
import { connect } from 'udpack';

const [state, log, form, text] = /** @type {[HTMLElement, HTMLElement, HTMLFormElement, HTMLInputElement]} */ (['state', 'log', 'form', 'text'].map((id) => document.getElementById(id)));
const name = decodeURIComponent(location.hash.slice(1)) || 'guest';
const show = (/** @type {string} */ line) => (log.append(Object.assign(document.createElement('p'), { textContent: line })), log.scrollTo(0, log.scrollHeight));

const socket = await connect({ token: name });
state.textContent = `connected as ${name}`;
socket.on('state', ({ state: now }) => (state.textContent = now === 'connected' ? `connected as ${name}` : now));

async function stay() {
  /** @type {import('udpack').Channel<{ said: { from: string; text: string } }, { join: { room: string }; say: { room: string; text: string } }>} */
  const chat = await socket.open('chat');
  chat.on('said', ({ from, text }) => show(`${from}: ${text}`));
  chat.on('$gap', ({ lost }) => show(`(${lost} messages are missing)`));
  await chat.send('join', { room: 'lobby' });
  form.onsubmit = (event) => (event.preventDefault(), void chat.send('say', { room: 'lobby', text: text.value }), form.reset());
  if ((await chat.closed).retry) await stay();
}
await stay();

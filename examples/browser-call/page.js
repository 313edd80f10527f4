// @ts-check
import { connect } from 'udpack';

/** @typedef {{ n: number; key: boolean; at: number; data: Uint8Array }} Picture */
const [state, people] = /** @type {HTMLElement[]} */ (['state', 'people'].map((id) => document.getElementById(id)));
const name = decodeURIComponent(location.hash.slice(1)) || `guest ${Math.floor(Math.random() * 1000)}`;
const [width, height, framerate] = [320, 240, 15];

const socket = await connect({ token: name });
await socket.open('call');
state.textContent = `connected as ${name}`;
socket.on('state', ({ state: now }) => (state.textContent = now === 'connected' ? `connected as ${name}` : now));

/** A person's picture, and what is known of it. @param {string} who */
function place(who) {
  const canvas = Object.assign(document.createElement('canvas'), { width, height });
  const figure = document.createElement('figure');
  const caption = document.createElement('figcaption');
  figure.append(canvas, caption);
  people.append(figure);
  const brush = /** @type {CanvasRenderingContext2D} */ (canvas.getContext('2d'));
  const output = (/** @type {VideoFrame} */ frame) => (brush.drawImage(frame, 0, 0), frame.close(), (spot.shown += 1));
  const decoder = new VideoDecoder({ output, error: () => others.delete(who) });
  decoder.configure({ codec: 'vp8' });
  const spot = { canvas, brush, decoder, next: -1, whole: false, shown: 0, dropped: 0, say: (/** @type {string} */ text) => (caption.textContent = `${who}: ${text}`) };
  return spot;
}

/** @type {Map<string, ReturnType<typeof place>>} */
const others = new Map();
/** @param {string} who @param {Picture} picture */
function take(who, { n, key, at, data }) {
  const spot = others.get(who) ?? place(who);
  others.set(who, spot);
  spot.dropped += spot.next < 0 ? 0 : Math.max(0, n - spot.next);
  // A picture says how it differs from the one before: behind a gap only a whole one helps.
  spot.whole = key || (spot.whole && n === spot.next);
  spot.next = n + 1;
  if (spot.whole) spot.decoder.decode(new EncodedVideoChunk({ type: key ? 'key' : 'delta', timestamp: at, data }));
  else socket.sendLatest('whole', who), (spot.dropped += 1);
  spot.say(`${spot.shown} pictures, ${spot.dropped} dropped`);
}

let wanted = true;
socket.on('volatile', ({ event, key, data }) => {
  if (event === 'whole' && key === name) wanted = true;
  else if (event === 'picture' && key) take(key, /** @type {Picture} */ (data));
});

const own = place(`${name} (you)`);
const video = document.createElement('video');
if (!location.search.includes('synthetic')) {
  video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { width, height } }).catch(() => null);
  if (video.srcObject) await video.play();
}
let sent = 0;
const output = (/** @type {EncodedVideoChunk} */ chunk) => {
  const data = new Uint8Array(chunk.byteLength);
  chunk.copyTo(data);
  socket.sendLatest('picture', name, { n: sent, key: chunk.type === 'key', at: chunk.timestamp, data });
  own.say(`${(sent += 1)} pictures`);
};
const encoder = new VideoEncoder({ output, error: ({ message }) => own.say(message) });
encoder.configure({ codec: 'vp8', width, height, framerate, bitrate: 400_000, latencyMode: 'realtime' });
setInterval(() => {
  if (video.srcObject) own.brush.drawImage(video, 0, 0, width, height);
  else paint(own.brush, performance.now() / 1000);
  const frame = new VideoFrame(own.canvas, { timestamp: Math.round(performance.now() * 1000) });
  if (encoder.encodeQueueSize < 3) encoder.encode(frame, { keyFrame: wanted }), (wanted = false);
  frame.close();
}, 1000 / framerate);

/** What is sent where there is no camera. @param {CanvasRenderingContext2D} brush @param {number} turn */
function paint(brush, turn) {
  brush.fillStyle = `hsl(${(turn * 30) % 360} 60% 30%)`;
  brush.fillRect(0, 0, width, height);
  brush.fillStyle = '#fff';
  brush.fillRect(148 + 100 * Math.cos(turn), 108 + 70 * Math.sin(turn), 24, 24);
}

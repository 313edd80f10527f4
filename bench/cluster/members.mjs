// Members of a room of Socket.IO, in turn at these ports, and one more client that sends: what `udpack-bench-cluster members` is for udpack.
// They speak the protocol of Socket.IO by themselves, over the WebSockets of `ws`: its own client costs more than the server.
import WebSocket from 'ws';

const [members, count, steady, ...ports] = process.argv.slice(2).map(Number);
const WINDOW = 4;
const TEXT = 'one of forty-four bytes, as in other fanouts';
const REST = 15_000;
const now = () => Number(process.hrtime.bigint()) / 1e6;
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** A socket that is let in; `heard` is called with the data of each `said`. */
function connect(port, heard) {
  const socket = new WebSocket(`ws://127.0.0.1:${port}/socket.io/?EIO=4&transport=websocket`, { perMessageDeflate: false });
  return new Promise((resolve, reject) => {
    socket.on('error', reject);
    socket.on('message', (data) => {
      const text = data.toString();
      if (text.startsWith('42')) heard(JSON.parse(text.slice(2)));
      else if (text.startsWith('430')) socket.emit('joined');
      else if (text === '2') socket.send('3');
      else if (text.startsWith('0')) socket.send('40');
      else if (text.startsWith('40')) resolve(socket);
    });
  });
}

async function join(port, heard) {
  const socket = await connect(port, heard);
  const joined = new Promise((resolve) => socket.once('joined', resolve));
  socket.send('420["join"]');
  await joined;
  return socket;
}

const millis = [];
let [seen, more] = [0, () => {}];
const last = new Array(members).fill(-1);
let broken = false;
for (let at = 0; at < members; at += 1) {
  await join(ports[at % ports.length], ([, n, sent]) => {
    broken ||= n <= last[at];
    last[at] = n;
    seen += 1;
    if (!steady) {
      millis.push(now() - sent);
      if (seen % members === 0) more();
    }
  });
}
await sleep(6000);
const sender = await connect(ports[0], () => {});
const say = (n) => sender.send(`42${JSON.stringify(['said', n, now(), TEXT])}`);
const begun = now();
if (steady) {
  console.log('begun');
  const messages = steady * 50;
  for (let n = 0; n < messages; n += 1) {
    await sleep(Math.max(0, begun + n * 20 - now()));
    say(n);
  }
  await sleep(REST);
  console.log(JSON.stringify({ sent: messages * members, lost: messages * members - seen, told: 0 }));
} else {
  await new Promise((resolve) => {
    let [sent, done] = [0, 0];
    more = () => {
      done += 1;
      if (sent < count) say(sent++);
      if (done === count) resolve();
    };
    while (sent < Math.min(WINDOW, count)) say(sent++);
  });
  const took = (now() - begun) / 1000;
  millis.sort((a, b) => a - b);
  const rank = (share) => millis[Math.floor(millis.length * share)];
  console.log(JSON.stringify({ rate: millis.length / took, p50: rank(0.5), p99: rank(0.99) }));
}
if (broken) {
  console.error('doubled or reordered');
  process.exit(1);
}
process.exit(0);

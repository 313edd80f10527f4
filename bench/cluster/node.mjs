// A server of Socket.IO: members join, whatever is said goes to all of them. With a URL it shares its rooms by the Redis adapter.
// Prints its port.
import { createServer } from 'node:http';
import { createAdapter } from '@socket.io/redis-adapter';
import { createClient } from 'redis';
import { Server } from 'socket.io';

const [broker] = process.argv.slice(2);
const http = createServer();
const io = new Server(http, { transports: ['websocket'], serveClient: false });
if (broker !== undefined) {
  const publisher = createClient({ url: broker });
  const subscriber = publisher.duplicate();
  // It connects again by itself.
  for (const client of [publisher, subscriber]) client.on('error', () => {});
  await Promise.all([publisher.connect(), subscriber.connect()]);
  io.adapter(createAdapter(publisher, subscriber));
}
io.on('connection', (socket) => {
  socket.on('join', async (done) => {
    await socket.join('all');
    done();
  });
  socket.on('said', (...data) => io.to('all').emit('said', ...data));
});
http.listen(0, '127.0.0.1', () => console.log(http.address().port));

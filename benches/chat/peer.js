'use strict';
// What Banter is measured against: the same protocol on Socket.IO 4, as short as it can be. One
// process, everything in memory, nothing on the disk, no presence but a table of names, no limits.
// Passwords are hashed as Banter does it: argon2id, 19 MiB, two passes.

const { createHmac, timingSafeEqual } = require('node:crypto');
const http = require('node:http');
const argon2 = require('@node-rs/argon2');
const { Server } = require('socket.io');

const SECRET = process.env.JWT_SECRET;
const WEEK = 7 * 24 * 3600;
const HASHING = { algorithm: argon2.Algorithm.Argon2id, memoryCost: 19_456, timeCost: 2, parallelism: 1 };

const users = new Map();
const online = new Map();
const channels = new Map();

const base64 = (value) => Buffer.from(JSON.stringify(value)).toString('base64url');
const signature = (text) => createHmac('sha256', SECRET).update(text).digest('base64url');

function issue(name) {
  const iat = Math.floor(Date.now() / 1000);
  const text = `${base64({ alg: 'HS256', typ: 'JWT' })}.${base64({ name, iat, exp: iat + WEEK })}`;
  return { token: `${text}.${signature(text)}`, expiresIn: (iat + WEEK) * 1000 };
}

function nameOf(token) {
  const [head, body, given] = String(token).split('.');
  const right = Buffer.from(signature(`${head}.${body}`));
  const claimed = Buffer.from(String(given));
  if (right.length !== claimed.length || !timingSafeEqual(right, claimed)) throw new Error('Token is invalid');
  const { name, exp } = JSON.parse(Buffer.from(body, 'base64url'));
  if (exp * 1000 < Date.now()) throw new Error('Token is invalid');
  return name;
}

const server = http.createServer(async (request, response) => {
  const answer = (status, body) => {
    response.writeHead(status, { 'content-type': 'application/json' }).end(JSON.stringify(body));
  };
  try {
    const chunks = [];
    for await (const chunk of request) chunks.push(chunk);
    if (request.url === '/health') return answer(200, { status: 'ok' });
    const { name, password } = JSON.parse(Buffer.concat(chunks));
    if (request.url === '/auth/register') {
      if (users.has(name)) return answer(409, { error: 'User with name already exists' });
      users.set(name, await argon2.hash(password, HASHING));
      return answer(200, issue(name));
    }
    if (request.url === '/auth/login') {
      const right = users.has(name) && await argon2.verify(users.get(name), password);
      return right ? answer(200, issue(name)) : answer(401, { error: 'Wrong name or password' });
    }
    return answer(404, { error: 'Not found' });
  } catch (error) {
    return answer(400, { error: String(error) });
  }
});

const io = new Server(server, { pingInterval: 15_000, pingTimeout: 10_000 });

io.use((socket, next) => {
  try {
    socket.data.name = nameOf(socket.handshake.auth.token);
    next();
  } catch (error) {
    next(error);
  }
});

io.on('connection', (socket) => {
  const { name } = socket.data;
  if (online.has(name)) {
    socket.emit('name_taken', {});
    socket.disconnect();
    return;
  }
  online.set(name, socket);
  socket.emit('logged_in', { session: socket.id, resumed: false, channels: [] });
  socket.on('channel:join', ({ channel }, ack) => {
    if (!channels.has(channel)) channels.set(channel, []);
    socket.join(channel);
    const messages = channels.get(channel);
    ack({ messages: messages.slice(-25).map((message) => JSON.stringify(message)), last: messages.length });
    io.to(channel).emit('user : joined', { username: name, channel });
  });
  socket.on('message:post', ({ channel, message }, ack) => {
    if (!socket.rooms.has(channel)) return ack({ error: 'You have not joined this channel', code: 'not_joined' });
    const messages = channels.get(channel);
    const event = { message, user: name, date: new Date().toISOString(), id: messages.length + 1, channel };
    messages.push(event);
    socket.to(channel).emit('message:post', event);
    return ack({ id: event.id, date: event.date });
  });
  socket.on('disconnecting', () => {
    online.delete(name);
    for (const channel of socket.rooms) {
      if (channel !== socket.id) socket.to(channel).emit('user : quit', { username: name, channel });
    }
  });
});

// The benchmark asks for what is in use, not for what the collector has not got round to.
process.on('SIGUSR2', () => global.gc?.());
server.listen(Number(process.env.PORT), '127.0.0.1', () => console.log('listening'));

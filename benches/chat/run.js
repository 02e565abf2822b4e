'use strict';
// Banter beside a peer (peer.js), on one machine in one run, the two taking turns. What counts is the
// ratio: absolute numbers are the machine's, which this load generator shares with the servers.

const assert = require('node:assert');
const { setTimeout: sleep } = require('node:timers/promises');
const { Client, request } = require('./lib/client.js');
const { banter, peer } = require('./lib/servers.js');

const ROUNDS = 3;
const PASSWORD = 'correct horse battery staple';
/** Everything ends by then, come what may. */
const DEADLINE = 150_000;

const LOGINS = { seconds: 2, atOnce: 8 };
const TRIPS = { seconds: 2 };
const ROOM = { clients: 100, posters: 10, inFlight: 4, seconds: 3 };
const IDLE = { first: 100, all: 1_000, atOnce: 50 };

setTimeout(() => {
  console.error(`not done after ${DEADLINE / 1000} s`);
  process.exit(1);
}, DEADLINE).unref();

const median = (values) => [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)];
const quantile = (values, q) => [...values].sort((a, b) => a - b)[Math.floor((values.length - 1) * q)];

/** Calls `work(i)` for i from 0 to `count` - 1, so many at a time. */
async function each(count, atOnce, work) {
  let next = 0;
  await Promise.all(Array.from({ length: atOnce }, async () => {
    while (next < count) await work(next++);
  }));
}

/** Calls `work` again and again for a time, so many at once; gives how many were done a second. */
async function rate(seconds, atOnce, work) {
  const start = performance.now();
  let done = 0;
  await Promise.all(Array.from({ length: atOnce }, async () => {
    while (performance.now() - start < seconds * 1000) {
      await work();
      done += 1;
    }
  }));
  return done / ((performance.now() - start) / 1000);
}

async function post(server, path, body) {
  const { status, json } = await request(server.port, 'POST', path, body);
  assert.strictEqual(status, 200, `${server.name} ${path}: ${JSON.stringify(json)}`);
  return json;
}

/** Runs `measure` on both servers in turn, ROUNDS times; gives the results by server. */
async function inTurns(servers, measure) {
  const results = servers.map(() => []);
  for (let round = 0; round < ROUNDS; round++) {
    for (const [i, server] of servers.entries()) results[i].push(await measure(server, i, round));
  }
  return results;
}

async function logins(servers) {
  for (const server of servers) await post(server, '/auth/register', { name: 'lena', password: PASSWORD });
  const results = await inTurns(servers, (server) =>
    rate(LOGINS.seconds, LOGINS.atOnce, () => post(server, '/auth/login', { name: 'lena', password: PASSWORD })));
  return results.map(median);
}

async function roundTrips(servers, tokens) {
  const clients = [];
  for (const server of servers) {
    const client = await new Client(server.port, tokens[0]).open();
    await client.emit('channel:join', { channel: 'alone' });
    clients.push(client);
  }
  const results = await inTurns(servers, async (_, i, round) => {
    const times = [];
    const end = performance.now() + TRIPS.seconds * 1000;
    for (let n = 0; performance.now() < end; n++) {
      const start = performance.now();
      await clients[i].emit('message:post', { channel: 'alone', message: `round ${round}, message ${n}` });
      times.push(performance.now() - start);
    }
    return times;
  });
  for (const client of clients) client.close();
  return results.map((rounds) => rounds.flat());
}

async function deliveries(servers, tokens) {
  const rooms = [];
  for (const server of servers) {
    const room = [];
    await each(ROOM.clients, 10, async (i) => {
      const client = await new Client(server.port, tokens[1 + i]).open();
      await client.emit('channel:join', { channel: 'room' });
      room.push(client);
    });
    rooms.push(room);
  }
  const results = await inTurns(servers, async (server, i, round) => {
    const room = rooms[i];
    const sum = () => room.reduce((total, client) => total + client.deliveries, 0);
    const [before, cpu, start] = [sum(), server.cpu(), performance.now()];
    let posts = 0;
    await Promise.all(room.slice(0, ROOM.posters).flatMap((client, poster) =>
      Array.from({ length: ROOM.inFlight }, async (_, hand) => {
        for (let n = 0; performance.now() - start < ROOM.seconds * 1000; n++) {
          const message = `round ${round}, ${poster}.${hand}, message ${n}: what people write in a room`;
          await client.emit('message:post', { channel: 'room', message });
          posts += 1;
        }
      })));
    // An ack says nothing of the others: wait until everybody has everything.
    const expected = posts * (ROOM.clients - 1);
    const patience = performance.now() + 10_000;
    while (sum() - before < expected && performance.now() < patience) await sleep(5);
    const seconds = (performance.now() - start) / 1000;
    assert.strictEqual(sum() - before, expected, `${server.name}: messages were lost or doubled`);
    return { rate: expected / seconds, cpu: ((server.cpu() - cpu) / expected) * 1e6 };
  });
  for (const client of rooms.flat()) client.close();
  return results.map((rounds) => ({ rate: median(rounds.map((r) => r.rate)), cpu: median(rounds.map((r) => r.cpu)) }));
}

/** On servers that have just started: what else they did would blur the memory. */
async function idle(servers, tokens) {
  const results = [];
  for (const server of servers) {
    const clients = [];
    const open = async (i) => clients.push(await new Client(server.port, tokens[i]).open());
    await each(IDLE.first, IDLE.atOnce, open);
    await sleep(1_000);
    const before = await server.memory();
    const start = performance.now();
    await each(IDLE.all - IDLE.first, IDLE.atOnce, (i) => open(IDLE.first + i));
    const seconds = (performance.now() - start) / 1000;
    await sleep(1_000);
    const more = IDLE.all - IDLE.first;
    const all = await server.memory();
    results.push({ rate: more / seconds, each: (all - before) / more, all: all / 1024 });
    for (const client of clients) client.close();
  }
  return results;
}

function print(rows) {
  const number = (value) => (value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2));
  const table = [['', 'Banter', 'peer', 'Banter / peer'], null];
  for (const [what, ours, theirs] of rows) table.push([what, number(ours), number(theirs), (ours / theirs).toFixed(2)]);
  const widths = [0, 1, 2, 3].map((i) => Math.max(...table.filter(Boolean).map((row) => row[i].length)));
  for (const row of table) {
    const cells = row
      ? row.map((cell, i) => (i ? cell.padStart(widths[i]) : cell.padEnd(widths[i])))
      : widths.map((width, i) => (i ? `${'-'.repeat(width - 1)}:` : '-'.repeat(width)));
    console.log(`| ${cells.join(' | ')} |`);
  }
}

async function main() {
  const servers = [banter(), peer()];
  const [ours] = servers;
  try {
    await Promise.all(servers.map((server) => server.start()));
    // Tokens of the one are good at the other, for they have the same secret.
    const tokens = [];
    await each(IDLE.all, 16, async (i) => {
      tokens[i] = (await post(ours, '/auth/register', { name: `user${i}`, password: PASSWORD })).token;
    });
    const login = await logins(servers);
    const trips = await roundTrips(servers, tokens);
    const room = await deliveries(servers, tokens);
    for (const server of servers) {
      await server.stop();
      await server.start();
    }
    const quiet = await idle(servers, tokens);
    const both = (what, values, of) => [what, ...values.map(of)];
    print([
      both('logins a second', login, (value) => value),
      both('a post until its ack, median, ms', trips, (times) => quantile(times, 0.5)),
      both('a post until its ack, 99 of 100, ms', trips, (times) => quantile(times, 0.99)),
      both(`deliveries a second, ${ROOM.clients} in a room`, room, (r) => r.rate),
      both('processor time of a delivery, µs', room, (r) => r.cpu),
      both('sessions opened a second', quiet, (q) => q.rate),
      both('memory of an idle WebSocket, KiB', quiet, (q) => q.each),
      both(`memory with ${IDLE.all} of them, all processes, MiB`, quiet, (q) => q.all),
    ]);
    console.log('\nBanter has each post on the disk before it acknowledges it; the peer keeps everything in memory.');
  } finally {
    await Promise.all(servers.map((server) => server.stop()));
  }
}

main().then(() => process.exit(0), (error) => {
  console.error(error);
  process.exit(1);
});

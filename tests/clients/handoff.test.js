'use strict';
// Connections: none lost on the way to its worker, none left over, and bad ones harm nobody.

const assert = require('node:assert');
const crypto = require('node:crypto');
const fs = require('node:fs');
const net = require('node:net');
const { suite } = require('./lib/suite.js');
const { until, within } = require('./lib/wait.js');

/** A raw connection that says `bytes`; gives what came back until it is closed. */
function raw(port, bytes, { localAddress = '127.0.0.1', deadline = 30_000 } = {}) {
  const closed = new Promise((resolve, reject) => {
    const socket = net.connect({ host: '127.0.0.1', port, localAddress });
    let text = '';
    socket.on('connect', () => socket.write(bytes));
    socket.on('data', (chunk) => { text += chunk.toString('latin1'); });
    socket.on('error', (error) => (['ECONNRESET', 'EPIPE'].includes(error.code) ? resolve(text) : reject(error)));
    socket.on('close', () => resolve(text));
    setTimeout(() => socket.destroy(), deadline + 1_000).unref();
  });
  return within('the server closes the connection', closed, deadline);
}

// What happens here happens before any store is asked, so one store is enough.
suite('connections', { store: 'embedded', workers: 2, env: { BANTER_GRACE: '1', BANTER_PING_INTERVAL: '60', BANTER_PING_TIMEOUT: '60' } }, (scenario, banter) => {
  const descriptors = () => {
    const { master, workers } = banter().roles();
    const count = (pid) => fs.readdirSync(`/proc/${pid}/fd`).length;
    return { master: count(master), ...Object.fromEntries([...workers].map(([number, pid]) => [`worker ${number}`, count(pid)])) };
  };
  const noMoreThan = (before) => until(
    `as few descriptors as before (${JSON.stringify(before)})`,
    () => {
      const now = descriptors();
      return Object.entries(before).every(([who, count]) => now[who] <= count);
    },
    20_000,
  ).catch((error) => {
    throw new Error(`${error.message}; now ${JSON.stringify(descriptors())}`);
  });
  const hello = (localAddress) => banter().api('GET', '/health', { localAddress });
  const slow = [];

  scenario('slow connections are opened (they are looked at in the end)', async () => {
    // Said in pieces, so that no single byte counts as progress for long.
    for (const bytes of ['', 'GET /health HTTP/1.1\r\n', 'GET /health HTTP/1.1\r\nHost: x\r\nX-Slow: ', 'POST /auth/login HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"name"']) {
      const start = performance.now();
      const closed = raw(banter().port, bytes, { localAddress: '127.0.12.1', deadline: 90_000 })
        .then((answer) => ({ answer, took: performance.now() - start }), (error) => error);
      slow.push({ bytes, closed });
    }
    assert.strictEqual((await hello('127.0.12.1')).status, 200, 'they are in nobody\'s way');
  });

  scenario('a thousand connections from twenty addresses: none is lost, each address keeps its worker, no descriptor stays', async () => {
    const address = (i) => `127.0.11.${(i % 20) + 1}`;
    await Promise.all(Array.from({ length: 40 }, (_, i) => hello(address(i))));
    const before = descriptors();
    const workers = new Map();
    for (let batch = 0; batch < 10; batch++) {
      const answers = await Promise.all(Array.from({ length: 100 }, (_, i) => hello(address(i))));
      for (const [i, answer] of answers.entries()) {
        assert.strictEqual(answer.status, 200);
        const known = workers.get(address(i));
        if (known === undefined) workers.set(address(i), answer.json.worker);
        else assert.strictEqual(answer.json.worker, known, `${address(i)} stays with its worker`);
      }
    }
    assert.strictEqual(new Set(workers.values()).size, 2, 'both workers have their share');
    await noMoreThan(before);
  });

  scenario('connections that are opened and left at once, or reset, leave nothing behind', async () => {
    await hello('127.0.11.1');
    const before = descriptors();
    for (let batch = 0; batch < 5; batch++) {
      await Promise.all(Array.from({ length: 60 }, (_, i) => new Promise((resolve, reject) => {
        const socket = net.connect({ host: '127.0.0.1', port: banter().port, localAddress: `127.0.11.${i + 1}` });
        socket.on('error', reject);
        socket.on('close', resolve);
        socket.on('connect', () => (i % 2 ? socket.resetAndDestroy() : socket.destroy()));
      })));
    }
    assert.strictEqual((await hello('127.0.11.2')).status, 200);
    await noMoreThan(before);
  });

  scenario('sixty Socket.IO clients come, chat and go, and no descriptor stays', async (world) => {
    const key = banter().key();
    await hello('127.0.11.1');
    // The master's store opens files when it is first used.
    const { master, ...before } = descriptors();
    const people = [];
    for (let i = 0; i < 60; i += 10) {
      people.push(...await Promise.all(Array.from({ length: 10 }, (_, j) => world.person('many', {
        version: (j % 4) + 1,
        transport: ['polling', 'websocket', 'upgrade'][j % 3],
        localAddress: `127.0.13.${i + j + 1}`,
      }))));
      if (i === 0) people.splice(0).forEach((client) => client.close());
    }
    await Promise.all(people.map((client) => world.restJoin(client, key)));
    await people[0].post(key, 'hello everybody');
    await Promise.all(people.slice(1).map((client) => client.waitFor('message:post', (m) => m.message === 'hello everybody')));
    for (const client of people) client.close();
    await noMoreThan(before);
    assert.ok(descriptors().master < master + people.length, 'nor in the master');
  });

  scenario('garbage instead of HTTP gets a 400, or at least an end, and the next client is served', async () => {
    const port = banter().port;
    const cases = {
      'words': 'HELLO THERE\r\n\r\n',
      'random bytes': Buffer.concat([crypto.randomBytes(500), Buffer.from('\r\n\r\n')]),
      'a TLS hello': Buffer.from('16030100c8010000c40303', 'hex'),
      'nul bytes': Buffer.alloc(2_000),
      'a bad version': 'GET /health HTTP/9.9\r\nHost: x\r\n\r\n',
      'a header without a colon': 'GET /health HTTP/1.1\r\nHost x\r\n\r\n',
      'an endless header': `GET /health HTTP/1.1\r\nX: ${'x'.repeat(1_000_000)}`,
      'endless headers': `GET /health HTTP/1.1\r\n${'X: y\r\n'.repeat(100_000)}`,
      'a bad length': 'POST /auth/login HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n',
      'two lengths': 'POST /auth/login HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdefgh',
      'a bad chunk': 'POST /auth/login HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\nZZZ\r\n',
    };
    const pids = banter().roles();
    await Promise.all(Object.entries(cases).map(async ([what, bytes]) => {
      const answer = await raw(port, bytes, { deadline: 60_000 });
      assert.ok(answer === '' || /^HTTP\/1\.[01] (4\d\d|505)/.test(answer), `${what}: ${answer.slice(0, 100)}`);
      assert.doesNotMatch(answer, /<html|panicked|\.rs:/i, what);
    }));
    assert.strictEqual((await hello()).status, 200);
    assert.deepStrictEqual(banter().roles(), pids, 'no process died of it');
  });

  scenario('a WebSocket that sends rubbish after its handshake is closed and harms nobody', async (world) => {
    const ann = await world.person('ann');
    const key = banter().key();
    await ann.join(key);
    const { token } = await banter().register();
    const shake = (eio) => `GET /socket.io/?EIO=${eio}&transport=websocket&token=${token} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: ${crypto.randomBytes(16).toString('base64')}\r\n\r\n`;
    for (const eio of [3, 4]) {
      const rubbish = Buffer.concat([Buffer.from(shake(eio)), Buffer.alloc(4_000, 0xff)]);
      const answer = await raw(banter().port, rubbish, { deadline: 60_000 });
      assert.match(answer, /^HTTP\/1\.1 101/);
    }
    await ann.post(key, 'still well');
    assert.deepStrictEqual(ann.life.map(({ what }) => what), ['connect']);
  });

  scenario('a client that stops reading while its room is flooded is closed; the others get everything in order', async (world) => {
    const key = banter().key();
    const ann = await world.person('ann', { localAddress: '127.0.14.1' });
    const bob = await world.person('bob', { localAddress: '127.0.14.2', version: 2 });
    const stuck = await world.person('stuck', { localAddress: '127.0.14.3' });
    for (const client of [ann, bob, stuck]) await world.restJoin(client, key);
    await ann.waitFor('user : joined', (p) => p.username === stuck.name);
    stuck.stopReading();
    const text = 'x'.repeat(15_000);
    const end = performance.now() + 90_000;
    let count = 0;
    while (!ann.all('user : quit', (p) => p.username === stuck.name).length) {
      assert.ok(performance.now() < end, `after ${count} messages of 15 kB the one that reads nothing is still there`);
      const start = performance.now();
      await Promise.all(Array.from({ length: 20 }, () => ann.post(key, text)));
      count += 20;
      assert.ok(performance.now() - start < 15_000, 'posting does not wait for it');
    }
    console.log(`    closed after ${count} messages of 15 kB`);
    await bob.when('everything', () => bob.texts(key).length >= count, 30_000);
    const ids = bob.all('message:post', (m) => m.channel === key).map(({ id }) => id);
    assert.deepStrictEqual(ids, ids.map((_, i) => ids[0] + i), 'dense, in order');
    assert.strictEqual(ids.length, count);
    assert.deepStrictEqual(bob.life.map(({ what }) => what), ['connect']);
  }, { timeout: 180_000 });

  scenario('connections that never finish their request are closed by the server', async () => {
    for (const { bytes, closed } of slow) {
      const outcome = await closed;
      assert.ok(!(outcome instanceof Error), `after saying ${JSON.stringify(bytes)}: ${outcome.message}`);
      const { answer, took } = outcome;
      console.log(`    ${JSON.stringify(bytes.slice(0, 40))}: closed after ${(took / 1000).toFixed(1)} s`);
      if (!bytes.startsWith('POST')) continue;
      assert.ok(took < 40_000, `a body that is never finished: ${took.toFixed(0)} ms`);
      const [head, body] = answer.split('\r\n\r\n');
      assert.match(head, /^HTTP\/1\.1 408 /);
      assert.match(head, /^content-type: application\/json/im);
      assert.match(head, /^access-control-allow-origin: \*/im);
      assert.strictEqual(typeof JSON.parse(body).error, 'string');
    }
  }, { timeout: 120_000 });
});

'use strict';
// A worker that is told to stop: its requests are finished, its sockets closed one after the other, and
// their clients go on elsewhere as if nothing had been.

const assert = require('node:assert');
const net = require('node:net');
const { describe, test } = require('node:test');
const { suite, World } = require('./lib/suite.js');
const { startBanter } = require('./lib/banter.js');
const { keepPosting, assertComplete } = require('./lib/flow.js');
const { until, within } = require('./lib/wait.js');

const COMING_AND_GOING = /^user : (quit|joined|left)$/;

/** What the tests of a server with two workers do. */
const tools = (banter) => ({
  personOn: async (world, worker, prefix, options = {}) => {
    const localAddress = await banter().addressOfWorker(worker);
    return world.person(prefix, { localAddress, reconnection: true, keepUp: true, ...options });
  },
  workers: () => {
    const numbers = banter().workerNumbers();
    assert.strictEqual(numbers.length, 2, `two workers: ${numbers}`);
    return numbers;
  },
  /** SIGTERM to a worker, as `systemctl restart` sends it. Gives the pid that it had. */
  stopWorker: (number) => {
    const pid = banter().workerPid(number);
    process.kill(pid, 'SIGTERM');
    return pid;
  },
  /** Waits until another process serves in the place of the one that had this pid. */
  replaced: async (number, old) => {
    await until(`another process for worker ${number}`, () => {
      const pid = banter().roles().workers.get(number);
      return pid && pid !== old;
    }, 20_000);
    await banter().everybodyServes(20_000);
  },
});

/** A connection of its own from this address; `text` is all that came, `ended` how it ended. */
async function rawConnection(port, localAddress) {
  const socket = net.connect({ port, host: '127.0.0.1', localAddress });
  await within('a connection', new Promise((resolve, reject) => socket.once('connect', resolve).once('error', reject)));
  const connection = { socket, text: '', ended: undefined };
  socket.setEncoding('utf8');
  socket.on('data', (text) => { connection.text += text; });
  socket.on('end', () => { connection.ended ??= 'end'; });
  socket.on('error', (error) => { connection.ended ??= error.code; });
  socket.on('close', () => { connection.ended ??= 'close'; });
  return connection;
}

suite('two workers that are restarted', { workers: 2, env: { BANTER_DRAIN: '1', BANTER_GRACE: '8' } }, (scenario, banter) => {
  const { personOn, workers, stopWorker, replaced } = tools(banter);

  for (const [version, transport] of [[1, 'polling'], [1, 'websocket'], [2, 'polling'], [2, 'websocket'], [3, 'upgrade'], [4, 'polling'], [4, 'websocket']]) {
    scenario(`a rolling restart under load: client ${version} over ${transport} misses nothing and resumes, and the room hears of nobody`, async (world) => {
      const [w1, w2] = workers();
      const key = banter().key();
      const ann = await personOn(world, w1, 'ann', { version, transport });
      const bob = await personOn(world, w2, 'bob');
      for (const client of [ann, bob]) await world.restJoin(client, key);
      for (const client of [ann, bob]) await client.waitFor('user : joined', (p) => p.username === bob.name);
      const heard = [ann, bob].map((client) => client.mark());
      const first = (await bob.post(key, 'first')).id;
      await ann.waitFor('message:post', (m) => m.id === first);
      const posters = [keepPosting(ann, key, 'ann'), keepPosting(bob, key, 'bob')];
      const bothGoOn = async () => {
        const mark = posters.map(({ ids }) => ids.length);
        await until('both go on posting', () => posters.every(({ ids }, i) => ids.length >= mark[i] + 10), 20_000);
      };
      await bothGoOn();
      for (const worker of [w1, w2]) {
        await replaced(worker, stopWorker(worker));
        await bothGoOn();
      }
      await Promise.all(posters.map(({ stop }) => stop()));
      assert.ok(ann.connections >= 2, `${ann} had to come back`);

      const last = Math.max(...posters.flatMap(({ ids }) => ids));
      for (const [i, client] of [ann, bob].entries()) {
        await client.when('everything posted', () => {
          const ids = client.known.get(key);
          return Array.from({ length: last - first + 1 }, (_, n) => first + n).every((id) => ids.has(id));
        }, 15_000);
        assertComplete(client, key, first, last);
        const logins = client.all('logged_in', () => true, heard[i]);
        assert.deepStrictEqual(logins.filter(({ resumed }) => !resumed), [], `${client} always resumes`);
        assert.deepStrictEqual(client.all('name_taken'), []);
        assert.deepStrictEqual(client.log.slice(heard[i]).filter(({ event }) => COMING_AND_GOING.test(event)), [], `what ${client} hears of the others`);
      }
      const { json } = await banter().api('GET', `/channels/${key}/messages?after=${first}&limit=200`, { token: bob.token });
      const texts = json.messages.map((m) => JSON.parse(m).message);
      assert.strictEqual(new Set(texts).size, texts.length, 'no message twice in the history');
    });
  }

  for (const transport of ['polling', 'websocket']) {
    scenario(`a client over ${transport} that presents no secret finds its old session gone when it comes back`, async (world) => {
      const [w1, w2] = workers();
      const key = banter().key();
      const ann = await personOn(world, w1, 'ann', { version: 1, transport, keepUp: false });
      const bob = await personOn(world, w2, 'bob');
      for (const client of [ann, bob]) await world.restJoin(client, key);
      for (const client of [ann, bob]) await client.waitFor('user : joined', (p) => p.username === bob.name);
      const heard = bob.mark();
      const old = stopWorker(w1);
      // Whatever its poll is answered with takes a polling client out of its session.
      await bob.post(key, 'while it drains');
      await ann.when('back', () => ann.all('logged_in').length === 2, 20_000);
      assert.strictEqual(ann.lastLogin.resumed, true);
      const probed = banter().logs().split('\n').filter((line) => line.includes('name_contested') && line.includes(ann.name));
      assert.deepStrictEqual(probed, [], 'nobody had to find out that it is gone');
      await ann.waitFor('message:post', (m) => m.message === 'while it drains');
      await replaced(w1, old);
      assert.deepStrictEqual(bob.log.slice(heard).filter(({ event }) => COMING_AND_GOING.test(event)), []);
      assert.deepStrictEqual(ann.all('name_taken'), []);
    });
  }

  scenario('a request in progress is finished, an idle connection is closed, and a new one is served elsewhere', async (world) => {
    const [w1, w2] = workers();
    const localAddress = await banter().addressOfWorker(w1);
    const ann = await personOn(world, w1, 'ann');
    const idle = await rawConnection(banter().port, localAddress);
    idle.socket.write('GET /health HTTP/1.1\r\nHost: x\r\n\r\n');
    await until('an answer', () => idle.text.includes(`"worker":${w1}`));
    const body = JSON.stringify({ name: `slow${Date.now()}`, password: 'slow but sure' });
    const busy = await rawConnection(banter().port, localAddress);
    busy.socket.write(`POST /auth/register HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: ${body.length}\r\n\r\n${body.slice(0, 9)}`);
    // The request has begun once it has been read, as has one that came later.
    await banter().api('GET', '/health', { localAddress });
    const old = stopWorker(w1);
    await until('the idle connection is closed', () => idle.ended, 10_000);
    assert.strictEqual(idle.ended, 'end', 'in good order');
    assert.strictEqual(await banter().workerOfAddress(localAddress), w2);
    await ann.waitForLife('disconnect');
    assert.strictEqual(busy.ended, undefined, 'not closed while its request is under way');
    busy.socket.write(body.slice(9));
    await until('the answer', () => busy.text.endsWith('}'));
    assert.match(busy.text, /^HTTP\/1\.1 200 OK\r\n/);
    assert.match(busy.text, /\r\nconnection: close\r\n/i);
    await until('the end', () => busy.ended);
    assert.strictEqual(busy.ended, 'end');
    await replaced(w1, old);
  });
});

suite('two workers that close their sockets over a while', { workers: 2, env: { BANTER_DRAIN: '3', BANTER_GRACE: '8' } }, (scenario, banter) => {
  const { personOn, workers, stopWorker, replaced } = tools(banter);

  scenario('sockets are closed one after the other: the first is back before the last is closed', async (world) => {
    const [w1] = workers();
    const people = [];
    for (let i = 0; i < 8; i++) people.push(await personOn(world, w1, 'crowd', { transport: i % 2 ? 'websocket' : 'polling', version: i % 4 + 1 }));
    const order = [];
    for (const person of people) {
      person.socket.on('disconnect', () => order.push('gone'));
      person.socket.on('logged_in', () => order.push('back'));
    }
    const old = stopWorker(w1);
    for (const person of people) await person.when('back', () => person.all('logged_in').length === 2, 20_000);
    assert.strictEqual(order.filter((what) => what === 'gone').length, people.length, `each was closed once: ${order}`);
    assert.ok(order.indexOf('back') < order.lastIndexOf('gone') - 2, `one after the other: ${order}`);
    assert.deepStrictEqual(people.flatMap((person) => person.all('logged_in').slice(1).filter(({ resumed }) => !resumed)), []);
    await replaced(w1, old);
  });
});

suite('two workers that close all sockets at once', { workers: 2, env: { BANTER_DRAIN: '0', BANTER_GRACE: '8' } }, (scenario, banter) => {
  const { personOn, workers, stopWorker, replaced } = tools(banter);

  for (const [version, transport] of [[4, 'websocket'], [1, 'websocket'], [4, 'polling']]) {
    scenario(`what client ${version} over ${transport} has asked is answered before its transport is closed`, async (world) => {
      const [w1] = workers();
      const ann = await personOn(world, w1, 'ann', { version, transport });
      const key = banter().key();
      await world.restJoin(ann, key);
      const acks = [];
      const posts = 20;
      for (let i = 0; i < posts; i++) {
        ann.socket.emit('message:post', { channel: key, message: `post ${i}`, nonce: `n${i}` }, (ack) => {
          acks.push({ id: ack.id, connection: ann.connections });
          ann.stir();
        });
      }
      await ann.when('the first ack', () => acks.length > 0);
      const old = stopWorker(w1);
      await ann.waitForLife('disconnect');
      const first = acks[0].id;
      if (transport === 'websocket') {
        assert.deepStrictEqual(acks, Array.from({ length: posts }, (_, i) => ({ id: first + i, connection: 1 })));
      }
      // A poll takes along what there is, and no other comes: the client asks again for the rest.
      await ann.when('back', () => ann.all('logged_in').length === 2, 20_000);
      for (let i = acks.length; i < posts; i++) {
        const { id } = await ann.post(key, `post ${i}`, { nonce: `n${i}` });
        assert.strictEqual(id, first + i, 'as it was stored, or stored now, in order');
      }
      await replaced(w1, old);
    });
  }
});

suite('a master that is restarted', { workers: 2 }, (scenario, banter) => {
  const { personOn, workers } = tools(banter);

  scenario('no connection is refused or reset, no socket is closed, and posts go on', async (world) => {
    const [w1, w2] = workers();
    const key = banter().key();
    const ann = await personOn(world, w1, 'ann');
    const bob = await personOn(world, w2, 'bob', { version: 2 });
    for (const client of [ann, bob]) await world.restJoin(client, key);
    const first = (await bob.post(key, 'first')).id;
    await ann.waitFor('message:post', (m) => m.id === first);
    const posters = [keepPosting(ann, key, 'ann'), keepPosting(bob, key, 'bob')];
    let going = true;
    let served = 0;
    const failures = [];
    const callers = Array.from({ length: 12 }, async (_, i) => {
      while (going) {
        try {
          const { status } = await banter().api('GET', '/channels', { token: ann.token, localAddress: `127.0.20.${i + 1}`, deadline: 20_000 });
          if (status !== 200) failures.push(status);
          served += 1;
        } catch (error) {
          failures.push(error.message);
        }
      }
    });
    for (let round = 0; round < 5; round++) {
      const mark = served;
      await until('the callers are served', () => served >= mark + 100, 20_000);
      const old = banter().masterPid();
      process.kill(old, 'SIGTERM');
      await until('another master', () => ![undefined, old].includes(banter().roles().master), 20_000);
    }
    const mark = served;
    await until('the callers are served', () => served >= mark + 100, 20_000);
    going = false;
    await Promise.all(callers);
    await Promise.all(posters.map(({ stop }) => stop()));
    assert.deepStrictEqual(failures, [], `of ${served} requests`);
    for (const client of [ann, bob]) {
      assert.deepStrictEqual(client.life.map(({ what }) => what), ['connect'], `${client} was never disconnected`);
    }
  });
});

describe('stopping', () => {
  test('a second SIGTERM closes a draining worker at once, and `banter serve` waits for no drain', { timeout: 120_000 }, async () => {
    const banter = await startBanter({ workers: 1, env: { BANTER_DRAIN: '3000' } });
    const world = new World(banter);
    try {
      const ann = await world.person('ann', { reconnection: true, keepUp: true });
      const pid = banter.workerPid(0);
      process.kill(pid, 'SIGTERM');
      await until('it drains', () => banter.logs().includes('event="draining"'));
      assert.strictEqual(banter.workerPid(0), pid, 'it has time');
      assert.ok(ann.socket.connected);
      process.kill(pid, 'SIGTERM');
      await ann.waitForLife('disconnect');
      await until('another worker', () => banter.roles().workers.get(0) !== pid, 10_000);
      await ann.when('back', () => ann.all('logged_in').length === 2, 20_000);
      // Stopping has to take less than a drain does, and the master hears how the session ended.
      await banter.stop();
      assert.doesNotMatch(banter.logs(), /could not be told/);
    } finally {
      world.close();
      await banter.remove();
    }
  });
});

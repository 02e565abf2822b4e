'use strict';
// Several workers, and what happens when processes die.

const assert = require('node:assert');
const fs = require('node:fs');
const path = require('node:path');
const { describe, test } = require('node:test');
const { suite, World } = require('./lib/suite.js');
const { assertLike } = require('./lib/like.js');
const { startBanter } = require('./lib/banter.js');
const { keepPosting, assertComplete } = require('./lib/flow.js');
const { until } = require('./lib/wait.js');

const onlineCount = async (banter, token, key, localAddress) => {
  const { json } = await banter.api('GET', '/channels', { token, localAddress });
  return json.channels.find((channel) => channel.key === key)?.onlineCount;
};

suite('two workers', { workers: 2, env: { BANTER_GRACE: '8' } }, (scenario, banter) => {
  /** Someone whose connection is on this worker. */
  const personOn = async (world, worker, prefix, options = {}) => {
    const localAddress = await banter().addressOfWorker(worker);
    return world.person(prefix, { localAddress, ...options });
  };
  const workers = () => {
    const numbers = banter().workerNumbers();
    assert.strictEqual(numbers.length, 2, `two workers: ${numbers}`);
    return numbers;
  };
  const bothServe = (deadline) => until('both workers serve', async () => {
    if (banter().workerNumbers().length < 2) return false;
    const seen = new Set();
    for (let host = 1; host <= 40 && seen.size < 2; host++) {
      seen.add(await banter().workerOfAddress(`127.0.9.${host}`).catch(() => undefined));
      seen.delete(undefined);
    }
    return seen.size === 2;
  }, deadline);
  const created = async (token) => (await banter().api('POST', '/channels', { token, body: { name: 'cluster' } })).json.key;

  scenario('people on different workers chat, and both workers give the same counts and lists', async (world) => {
    const [w1, w2] = workers();
    const ann = await personOn(world, w1, 'ann', { version: 2, transport: 'polling' });
    const bob = await personOn(world, w2, 'bob');
    const key = await created(ann.token);
    await world.restJoin(ann, key);
    await world.restJoin(bob, key);
    await ann.waitFor('user : joined', (p) => p.username === bob.name);
    for (let i = 0; i < 20; i++) {
      const there = await ann.post(key, `from ann ${i} ä`);
      const back = await bob.post(key, `from bob ${i} 😀`);
      assert.strictEqual(back.id, there.id + 1);
    }
    await bob.when('all of ann\'s', () => bob.texts(key).length === 20);
    await ann.when('all of bob\'s', () => ann.texts(key).length === 20);
    assert.deepStrictEqual(bob.texts(key), Array.from({ length: 20 }, (_, i) => `from ann ${i} ä`));
    assert.deepStrictEqual(ann.texts(key), Array.from({ length: 20 }, (_, i) => `from bob ${i} 😀`));
    const counts = () => Promise.all([ann, bob].map((one) => onlineCount(banter(), one.token, key, one.localAddress)));
    assert.deepStrictEqual(await counts(), [2, 2]);
    const lists = await Promise.all([ann, bob].map((one) => world.restJoin(one, key)));
    const names = (list) => list.onlineUsers.map(({ username }) => username).sort();
    assert.deepStrictEqual(names(lists[0]), names(lists[1]));
    assert.deepStrictEqual(names(lists[0]), [ann.name, bob.name].sort());
    await ann.emitAck('user : status_changed', { channel: key, status: 'away' });
    await bob.waitFor('user : status_changed', (p) => p.user === ann.name);
    ann.quit();
    await bob.waitFor('user : quit', (p) => p.username === ann.name);
    await until('both count one', async () => (await counts()).every((count) => count === 1), 5_000);
  });

  scenario('a name is online once in the whole server, and a session secret works on any worker', async (world) => {
    const [w1, w2] = workers();
    const ann = await personOn(world, w1, 'ann');
    const bob = await personOn(world, w1, 'bob');
    const key = banter().key();
    await ann.join(key);
    await bob.join(key);
    const elsewhere = await banter().addressOfWorker(w2);
    const second = world.client({ token: ann.token, localAddress: elsewhere }).start();
    await second.waitFor('name_taken', () => true, { deadline: 15_000 });
    const third = await world.connect({ token: ann.token, session: ann.lastLogin.session, localAddress: elsewhere, resume: { [key]: 0 } });
    assert.strictEqual(third.lastLogin.resumed, true);
    await ann.waitForLife('disconnect');
    await bob.post(key, 'to the new place');
    await third.waitFor('message:post', (m) => m.message === 'to the new place');
    assert.deepStrictEqual(bob.all('user : quit'), []);
    assert.deepStrictEqual(bob.all('user : joined', (p) => p.username === ann.name), []);
  });

  scenario('a join by REST that lands on another worker joins the socket where it is, and its answer ends where live events begin', async (world) => {
    const [w1, w2] = workers();
    const ann = await personOn(world, w1, 'ann', { version: 1, transport: 'polling' });
    const bob = await personOn(world, w2, 'bob');
    const key = banter().key();
    await world.restJoin(bob, key);
    const poster = keepPosting(bob, key, 'flow');
    try {
      await until('thirty posts', () => poster.ids.length >= 30);
      const answer = await world.restJoin(ann, key, { localAddress: await banter().addressOfWorker(w2) });
      const ids = answer.messages.map((m) => JSON.parse(m).id);
      assert.strictEqual(ids.length, 25);
      assert.ok(answer.onlineUsers.some(({ username }) => username === ann.name));
      await ann.when('ten live messages', () => ann.texts(key).length >= 10);
      const live = ann.all('message:post', (m) => m.channel === key).map(({ id }) => id);
      assert.deepStrictEqual(live, live.map((_, i) => ids.at(-1) + 1 + i), 'no gap, no overlap');
      await ann.waitFor('user : joined', (p) => p.username === ann.name && p.channel === key);
      await bob.waitFor('user : joined', (p) => p.username === ann.name && p.channel === key);
    } finally {
      await poster.stop();
    }
  });

  for (const { version, transport } of [
    { version: 4, transport: 'websocket' },
    { version: 2, transport: 'websocket' },
    { version: 1, transport: 'polling' },
    { version: 3, transport: 'upgrade' },
  ]) {
    scenario(`kill -9 of a worker under load: client ${version} over ${transport} is back in its room with every message once, and the room hears only of who stays away`, async (world) => {
      const [victim, survivor] = workers();
      const key = banter().key();
      const bob = await personOn(world, survivor, 'bob', { keepUp: true });
      const ann = await personOn(world, victim, 'ann', { version, transport, reconnection: true, keepUp: true });
      const eve = await personOn(world, victim, 'eve', { version: 4, transport: 'websocket' });
      for (const client of [bob, ann, eve]) await world.restJoin(client, key);
      await bob.waitFor('user : joined', (p) => p.username === eve.name);
      const heard = bob.mark();
      const first = (await bob.post(key, 'first')).id;
      await ann.waitFor('message:post', (m) => m.id === first);
      const posters = [keepPosting(ann, key, 'ann'), keepPosting(bob, key, 'bob')];
      await until('both post', () => posters.every(({ ids }) => ids.length >= 20));

      const killed = performance.now();
      const old = banter().kill9Worker(victim);
      await until('another process for the worker', () => {
        const pid = banter().roles().workers.get(victim);
        return pid && pid !== old;
      }, 5_000);
      await bothServe(10_000);
      console.log(`    worker ${victim} serves again ${(performance.now() - killed).toFixed(0)} ms after kill -9`);
      await ann.when('back after the kill', () => ann.connections >= 2 && ann.log.some((one) => one.event === 'logged_in' && one.connection >= 2), 20_000);
      console.log(`    its client is back after ${(performance.now() - killed).toFixed(0)} ms`);
      assert.strictEqual(ann.lastLogin.resumed, true);
      const mark = posters.map(({ ids }) => ids.length);
      await until('both go on posting', () => posters.every(({ ids }, i) => ids.length >= mark[i] + 20), 20_000);
      await bob.waitFor('user : quit', (p) => p.username === eve.name, { since: heard, deadline: 30_000 });
      await Promise.all(posters.map(({ stop }) => stop()));

      const last = Math.max(...posters.flatMap(({ ids }) => ids));
      for (const client of [ann, bob]) {
        await client.when('everything posted', () => {
          const ids = client.known.get(key);
          return Array.from({ length: last - first + 1 }, (_, i) => first + i).every((id) => ids.has(id));
        }, 15_000);
        assertComplete(client, key, first, last);
      }
      const about = bob.log.slice(heard).filter(({ event }) => /^user : (quit|joined|left)$/.test(event))
        .map(({ event, payload }) => [event, payload.username ?? payload.user]);
      assert.deepStrictEqual(about, [['user : quit', eve.name]], 'only the one who stayed away, once');
      const own = ann.log.filter(({ event, payload }) => event === 'user : quit' && payload.username === ann.name);
      assert.deepStrictEqual(own, []);
      // Stored once each, however often they were tried.
      const { json } = await banter().api('GET', `/channels/${key}/messages?after=${first}&limit=200`, { token: bob.token });
      const texts = json.messages.map((m) => JSON.parse(m).message);
      assert.strictEqual(new Set(texts).size, texts.length, 'no message twice in the history');
      // The worker that is new knows the whole state.
      for (const worker of [victim, survivor]) {
        const localAddress = await banter().addressOfWorker(worker);
        const { onlineUsers } = await world.restJoin(bob, key, { localAddress });
        assert.deepStrictEqual(onlineUsers.map(({ username }) => username).sort(), [ann.name, bob.name].sort(), `as worker ${worker} sees it`);
      }
    });
  }

  scenario('kill -9 of the master: nobody is disconnected, posts wait and succeed, and newcomers are served soon', async (world) => {
    const [w1, w2] = workers();
    const key = banter().key();
    const ann = await personOn(world, w1, 'ann', { version: 1, transport: 'polling' });
    const bob = await personOn(world, w2, 'bob', { version: 4, transport: 'websocket' });
    const carl = await personOn(world, w1, 'carl', { version: 2, transport: 'websocket' });
    for (const client of [ann, bob, carl]) await world.restJoin(client, key);
    await ann.waitFor('user : joined', (p) => p.username === carl.name);
    await ann.emitAck('user : status_changed', { channel: key, status: 'away' });
    const first = (await bob.post(key, 'first')).id;
    const heard = bob.mark();
    // A connection that is accepted and not handed over yet dies with the master. A polling client
    // makes new ones all the time: let the one that follows this message pass before.
    await ann.waitFor('message:post', (m) => m.id === first);
    for (let i = 0; i < 3; i++) await banter().healthy(10_000);

    const killed = performance.now();
    const old = banter().kill9Master();
    await until('the master is dead', () => !fs.existsSync(`/proc/${old}/exe`), 10_000);
    const during = await Promise.all([ann, bob, carl].flatMap((client) => [1, 2, 3].map((i) => client.emitAck('message:post', { channel: key, message: `during ${i}`, nonce: `during-${i}` }, 20_000))));
    console.log(`    posts go through ${(performance.now() - killed).toFixed(0)} ms after the master was killed`);
    assert.deepStrictEqual(during.filter(({ id }) => id === undefined), [], 'all of them were stored');
    const ids = during.map(({ id }) => id).sort((a, b) => a - b);
    assert.deepStrictEqual(ids, ids.map((_, i) => first + 1 + i), 'dense');
    assert.notStrictEqual(banter().masterPid(), old);

    await banter().healthy(10_000);
    const dora = await world.person('dora');
    console.log(`    a newcomer is in ${(performance.now() - killed).toFixed(0)} ms after the master was killed`);
    const { onlineUsers } = await world.restJoin(dora, key);
    assert.deepStrictEqual(
      onlineUsers.map(({ username, status }) => [username, status]).sort(),
      [[ann.name, 'away'], [bob.name, 'online'], [carl.name, 'online'], [dora.name, 'online']].sort(),
      'the new master knows who is where, and how they are',
    );
    await dora.post(key, 'hello from the newcomer');
    for (const client of [ann, bob, carl]) {
      await client.waitFor('message:post', (m) => m.message === 'hello from the newcomer');
      assert.deepStrictEqual(client.life.map(({ what }) => what), ['connect'], `${client} was never disconnected`);
    }
    const about = bob.log.slice(heard).filter(({ event }) => /^user : (quit|joined|left)$/.test(event)).map(({ event, payload }) => [event, payload.username]);
    assert.deepStrictEqual(about, [['user : joined', dora.name]]);
    const second = world.client({ token: ann.token }).start();
    await second.waitFor('name_taken', () => true, { deadline: 15_000 });
    ann.quit();
    await bob.waitFor('user : quit', (p) => p.username === ann.name);
  });

  scenario('a worker that hangs loses its sessions, and whatever becomes of it, no ghost stays and the others go on', async (world) => {
    const [victim, survivor] = workers();
    const key = await created((await banter().register()).token);
    const bob = await personOn(world, survivor, 'bob');
    const ann = await personOn(world, victim, 'ann', { reconnection: true, keepUp: true });
    const eve = await personOn(world, victim, 'eve');
    for (const client of [bob, ann, eve]) await world.restJoin(client, key);
    await bob.waitFor('user : joined', (p) => p.username === eve.name);
    const heard = bob.mark();
    const first = (await bob.post(key, 'first')).id;
    await ann.waitFor('message:post', (m) => m.id === first);
    const poster = keepPosting(bob, key, 'bob');
    const pid = banter().workerPid(victim);
    process.kill(pid, 'SIGSTOP');
    try {
      await bob.waitFor('user : quit', (p) => p.username === eve.name, { since: heard, deadline: 40_000 });
    } finally {
      try {
        process.kill(pid, 'SIGCONT');
      } catch {
        // Whoever supervises it has killed it, as is right.
      }
    }
    await bothServe(15_000);
    if (ann.connections < 2 && !ann.socket.connected) await ann.when('back', () => ann.socket.connected, 30_000);
    await poster.stop();
    // Nobody who is gone is listed, by either worker; whoever is connected is.
    const dora = await world.person('dora');
    await dora.join(key);
    for (const worker of [victim, survivor]) {
      const localAddress = await banter().addressOfWorker(worker);
      await until(`worker ${worker} has it right`, async () => {
        const { onlineUsers } = await world.restJoin(bob, key, { localAddress });
        const names = onlineUsers.map(({ username }) => username);
        return !names.includes(eve.name) && names.includes(bob.name) && names.includes(dora.name);
      }, 15_000);
    }
    const counts = await Promise.all([victim, survivor].map(async (worker) => onlineCount(banter(), bob.token, key, await banter().addressOfWorker(worker))));
    assert.strictEqual(counts[0], counts[1], 'both workers count the same');
    const quits = bob.all('user : quit', (p) => p.username === eve.name, heard);
    assert.strictEqual(quits.length, 1);
  });

  scenario('both workers killed at once: everyone comes back to their rooms and misses nothing', async (world) => {
    const [w1, w2] = workers();
    const key = banter().key();
    const ann = await personOn(world, w1, 'ann', { reconnection: true, keepUp: true, version: 4 });
    const bob = await personOn(world, w2, 'bob', { reconnection: true, keepUp: true, version: 2, transport: 'websocket' });
    for (const client of [ann, bob]) await world.restJoin(client, key);
    const first = (await bob.post(key, 'first')).id;
    await ann.waitFor('message:post', (m) => m.id === first);
    const marks = [ann.mark(), bob.mark()];
    banter().kill9Worker(w1);
    banter().kill9Worker(w2);
    for (const [i, client] of [ann, bob].entries()) {
      await client.waitFor('logged_in', (p) => p.resumed === true, { since: marks[i], deadline: 20_000 });
    }
    const { id } = await ann.post(key, 'all back');
    await bob.waitFor('message:post', (m) => m.id === id);
    for (const [i, client] of [ann, bob].entries()) {
      assert.deepStrictEqual(client.log.slice(marks[i]).filter(({ event }) => /^user : (quit|joined)$/.test(event)), []);
    }
    await bothServe(10_000);
  });
});

describe('state', () => {
  test('accounts, channels, messages, ids and the generated secret survive a restart', { timeout: 120_000 }, async () => {
    const banter = await startBanter({ env: { JWT_SECRET: undefined } });
    try {
      const key = banter.key('räum');
      let world = new World(banter);
      const ann = await world.person('ann');
      await ann.join(key);
      const posted = [];
      for (let i = 0; i < 30; i++) posted.push(await ann.post(key, `message ${i} 😀`, { nonce: `n${i}` }));
      const created = await banter.api('POST', '/channels', { token: ann.token, body: { name: 'Lasting' } });
      assert.strictEqual(created.status, 201);
      world.close();

      const files = fs.readdirSync(banter.stateDir, { recursive: true }).map(String);
      const secrets = files.filter((name) => /secret/i.test(name));
      assert.ok(secrets.length > 0, `a secret is kept among ${files.join(', ')}`);
      for (const name of secrets) {
        assert.strictEqual(fs.statSync(path.join(banter.stateDir, name)).mode & 0o777, 0o600, `mode of ${name}`);
      }

      await banter.restart();
      world = new World(banter);
      const again = await world.connect({ token: ann.token, name: ann.name });
      assert.strictEqual(again.lastLogin.resumed, false);
      const login = await banter.api('POST', '/auth/login', { body: { name: ann.name, password: ann.user.password } });
      assert.strictEqual(login.status, 200, login.text);
      const list = await banter.api('GET', '/channels', { token: login.json.token });
      assert.deepStrictEqual(
        list.json.channels.map(({ name, onlineCount: count }) => [name, count]),
        [['General', 0], ['Programming', 0], ['Random', 0], ['Lasting', 0]],
      );
      assert.strictEqual(list.json.channels[3].key, created.json.key);
      const taken = await banter.api('POST', '/auth/register', { body: { name: ann.name, password: 'another one' } });
      assert.strictEqual(taken.status, 409);
      const history = await again.join(key, 0);
      assertLike(
        history.messages.map((m) => JSON.parse(m)),
        posted.map(({ id, date }, i) => ({ id, date, user: ann.name, channel: key, message: `message ${i} 😀` })),
      );
      const next = await again.post(key, 'after the restart');
      assert.strictEqual(next.id, posted.at(-1).id + 1, 'ids go on');
      const repeated = await again.post(key, 'message 29 😀', { nonce: 'n29' });
      assert.strictEqual(repeated.id, posted.at(-1).id, 'a nonce is remembered across the restart');
      world.close();
    } finally {
      await banter.stop();
    }
  });
});

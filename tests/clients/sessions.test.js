'use strict';
// Sessions: how they end, how they are lost, resumed and taken over.

const assert = require('node:assert');
const { suite } = require('./lib/suite.js');
const { assertLike } = require('./lib/like.js');
const { VERSIONS, TRANSPORTS } = require('./lib/client.js');

const strictlyRising = (ids) => ids.every((id, i) => i === 0 || id > ids[i - 1]);

/** Two people in one channel, with a little behind them. */
async function pair(world, banter, options) {
  const key = banter.key();
  const bob = await world.person('bob', { version: 4 });
  const ann = await world.person('ann', options);
  await world.restJoin(bob, key);
  await world.restJoin(ann, key);
  await bob.waitFor('user : joined', (p) => p.username === ann.name);
  const before = await bob.post(key, 'before');
  await ann.waitFor('message:post', (m) => m.message === 'before');
  return { key, ann, bob, before, heard: bob.mark() };
}

/** What the room heard about someone coming or going, up to a message posted now. */
async function rumours(world, banter, { key, bob, heard, ann }) {
  const witness = await world.person('witness');
  await witness.join(key);
  await witness.post(key, `marker of ${witness.name}`);
  await bob.waitFor('message:post', (m) => m.message === `marker of ${witness.name}`);
  return bob.log.slice(heard)
    .filter(({ event, payload }) => /^user : (quit|joined|left)$/.test(event) && (payload.username ?? payload.user) === ann.name)
    .map(({ event }) => event);
}

// Heartbeats are short, so that a polling client that fell silent is noticed soon.
const LIVELY = { BANTER_PING_INTERVAL: '1', BANTER_PING_TIMEOUT: '2' };

suite('lost and resumed', { env: { ...LIVELY, BANTER_GRACE: '15' } }, (scenario, banter) => {
  for (const version of VERSIONS) {
    for (const transport of TRANSPORTS) {
      const title = `client ${version} over ${transport}`;

      scenario(`${title}: naming its last id it gets each missed message exactly once, its own with their nonces, and the room hears nothing`, async (world) => {
        const it = await pair(world, banter(), { version, transport });
        const { key, ann, bob, before } = it;
        const own = await ann.post(key, 'my own', { nonce: 'nonce of mine' });
        const session = ann.lastLogin.session;
        await ann.destroyTransport({ reset: version % 2 === 0 });
        const missed = [await bob.post(key, 'missed 1 ä😀'), await bob.post(key, 'missed 2')];

        const since = ann.mark();
        ann.resume = { [key]: before.id };
        ann.session = session;
        const login = await ann.open();
        assert.strictEqual(login.resumed, true);
        assert.notStrictEqual(login.session, session, 'the session secret is new with each connection');
        assertLike(login.channels, [{ key, last: missed.at(-1).id }]);
        const live = await bob.post(key, 'live again');
        await ann.waitFor('message:post', (m) => m.id === live.id, { since });

        assert.strictEqual(ann.log[since].event, 'logged_in', 'logged_in comes first');
        const got = ann.all('message:post', () => true, since);
        assert.deepStrictEqual(got.map(({ id }) => id), [own.id, ...missed.map(({ id }) => id), live.id]);
        assert.deepStrictEqual(got.map(({ message }) => message), ['my own', 'missed 1 ä😀', 'missed 2', 'live again']);
        assert.strictEqual(got[0].user, ann.name);
        assert.strictEqual(got[0].nonce, 'nonce of mine');
        assert.strictEqual(got[0].date, own.date);
        await ann.post(key, 'it can post at once, being in its rooms');
        assert.deepStrictEqual(await rumours(world, banter(), it), [], 'neither quit nor join was heard');
      });

      scenario(`${title}: naming nothing it gets everything it may have missed at least once, without its own`, async (world) => {
        const it = await pair(world, banter(), { version, transport });
        const { key, ann, bob } = it;
        await ann.post(key, 'my own');
        await ann.destroyTransport();
        const missed = [await bob.post(key, 'missed 1'), await bob.post(key, 'missed 2')];

        const since = ann.mark();
        // Without the secret either: the server may need a while to see that the old one is dead.
        const login = await ann.reopen();
        assert.strictEqual(login.resumed, true);
        const live = await bob.post(key, 'live again');
        await ann.waitFor('message:post', (m) => m.id === live.id, { since });
        const last = ann.connections;
        const got = ann.log.slice(since)
          .filter((one) => one.event === 'message:post' && one.connection === last)
          .map(({ payload }) => payload);
        const ids = got.map(({ id }) => id);
        for (const { id } of [...missed, live]) assert.ok(ids.includes(id), `message ${id} is among ${ids}`);
        assert.ok(strictlyRising(ids), `in order, none twice: ${ids}`);
        assert.deepStrictEqual(got.filter(({ user }) => user === ann.name), [], 'without its own');
        assert.deepStrictEqual(await rumours(world, banter(), it), []);
      });
    }

    for (const transport of ['polling', 'websocket']) {
      const title = `client ${version} over ${transport}`;

      scenario(`${title}: a closed tab (close frame, or a polling close packet) is a quit at once`, async (world) => {
        const { key, ann, bob } = await pair(world, banter(), { version, transport });
        ann.socket.io.engine.close();
        assertLike(await bob.waitFor('user : quit', () => true, { deadline: 5_000 }), { username: ann.name, channel: key });
        ann.session = undefined;
        const login = await ann.reopen();
        assert.strictEqual(login.resumed, false, 'there is nothing to resume');
        assert.deepStrictEqual(login.channels, []);
      });

      scenario(`${title}: packet 41 is a quit at once`, async (world) => {
        const { key, ann, bob } = await pair(world, banter(), { version, transport });
        ann.socket.io.engine.write('1');
        assertLike(await bob.waitFor('user : quit', () => true, { deadline: 5_000 }), { username: ann.name, channel: key });
      });

      scenario(`${title}: with its session secret a client takes over at once, though its old connection is alive`, async (world) => {
        const it = await pair(world, banter(), { version, transport });
        const { key, ann, bob, before } = it;
        const secret = ann.lastLogin.session;
        const start = performance.now();
        const next = await world.connect({ version, transport, token: ann.token, name: ann.name, session: secret, resume: { [key]: before.id } });
        const took = performance.now() - start;
        assert.strictEqual(next.lastLogin.resumed, true);
        assert.ok(took < 2_500, `at once, not after probing: ${took.toFixed(0)} ms`);
        const { id } = await bob.post(key, 'to the new one');
        await next.waitFor('message:post', (m) => m.id === id);
        // A polling connection has no stream that could be cut between polls: it ends with its next one.
        await ann.waitForLife('disconnect', { deadline: 20_000 });
        assert.ok(!ann.texts(key).includes('to the new one'), 'the old one hears nothing any more');
        assert.deepStrictEqual(await rumours(world, banter(), it), []);

        const third = world.client({ version, transport, token: ann.token, name: ann.name, session: secret }).start();
        await third.waitFor('name_taken', () => true, { deadline: 15_000 });
        await bob.post(key, 'still the new one');
        await next.waitFor('message:post', (m) => m.message === 'still the new one');
      });
    }
  }

  scenario('`resume` alone takes over nothing that lives', async (world) => {
    const { key, ann, bob } = await pair(world, banter(), { version: 4, transport: 'websocket' });
    const second = world.client({ version: 4, token: ann.token, resume: { [key]: 0 } }).start();
    await second.waitFor('name_taken', () => true, { deadline: 15_000 });
    await second.waitForLife('disconnect');
    assert.deepStrictEqual(second.log.map(({ event }) => event), ['name_taken']);
    await bob.post(key, 'alive?');
    await ann.waitFor('message:post', (m) => m.message === 'alive?');
    assert.deepStrictEqual(ann.life.map(({ what }) => what), ['connect']);
  });

  scenario('the secret of someone else\'s session takes over nothing', async (world) => {
    const { key, ann, bob } = await pair(world, banter(), { version: 4, transport: 'websocket' });
    const eve = await banter().register('eve');
    const client = await world.connect({ version: 4, token: eve.token, session: ann.lastLogin.session, resume: { [key]: 0 } });
    assert.strictEqual(client.lastLogin.resumed, false);
    assert.deepStrictEqual(client.lastLogin.channels, []);
    await bob.post(key, 'private');
    await ann.waitFor('message:post', (m) => m.message === 'private');
    await client.join(banter().key());
    assert.deepStrictEqual(client.all('message:post'), [], 'naming a channel in `resume` does not join it');
    assert.deepStrictEqual(ann.life.map(({ what }) => what), ['connect']);
  });

  scenario('a nonsense session or resume neither lets in wrongly nor breaks anything', async (world) => {
    const { ann, bob, key } = await pair(world, banter(), { version: 4, transport: 'websocket' });
    const user = await banter().register('odd');
    const nonsense = ['junk', '{', '[]', 5, null, [], { x: 'y' }, { x: -1 }, { x: 1.5 }, { x: 1e300 }, { x: null }, Object.fromEntries(Array.from({ length: 1000 }, (_, i) => [`k${i}`, i]))];
    for (const version of [2, 4]) {
      for (const resume of nonsense) {
        for (const session of ['', 'x'.repeat(1000), undefined]) {
          const client = world.client({ version, token: user.token, resume, session }).start();
          await client.when('an outcome', () => client.life.some(({ what }) => what === 'connect_error') || client.log.length > 0);
          const first = client.log[0]?.event ?? 'connect_error';
          assert.ok(['logged_in', 'connect_error', 'name_taken'].includes(first), first);
          if (first === 'logged_in') assert.strictEqual(client.lastLogin.resumed, false);
          client.quit();
        }
      }
    }
    await bob.post(key, 'unharmed');
    await ann.waitFor('message:post', (m) => m.message === 'unharmed');
  });

  scenario('more than 200 missed messages in several channels come all, once, in order, before anything new', async (world) => {
    const { key, ann, bob, before } = await pair(world, banter(), { version: 4, transport: 'websocket' });
    const other = banter().key();
    await ann.join(other);
    await bob.join(other);
    const session = ann.lastLogin.session;
    await ann.destroyTransport();
    const missed = await Promise.all(Array.from({ length: 700 }, (_, i) => bob.post(i % 7 ? key : other, `missed ${i}`)));
    const since = ann.mark();
    ann.session = session;
    ann.resume = { [key]: before.id, [other]: 0 };
    ann.start();
    // New ones while the replay is under way.
    const live = [];
    for (let i = 0; i < 20; i++) live.push(await bob.post(key, `live ${i}`));
    // One channel may be up to date before the other.
    for (const [channel, { id }] of [[key, live.at(-1)], [other, missed[693]]]) {
      await ann.waitFor('message:post', (m) => m.id === id && m.channel === channel, { since, deadline: 30_000 });
    }
    assert.deepStrictEqual(ann.texts(key, since), [
      ...missed.map((_, i) => i).filter((i) => i % 7).map((i) => `missed ${i}`),
      ...live.map((_, i) => `live ${i}`),
    ]);
    assert.deepStrictEqual(ann.texts(other, since), missed.map((_, i) => i).filter((i) => !(i % 7)).map((i) => `missed ${i}`));
    const ids = ann.all('message:post', (m) => m.channel === key, since).map(({ id }) => id);
    assert.ok(strictlyRising(ids) && ids.length === ids.at(-1) - before.id, 'dense');
  });

  scenario('a lost session keeps its status and its place on the list, and a resumed one can go on joining and leaving', async (world) => {
    const it = await pair(world, banter(), { version: 3, transport: 'websocket' });
    const { key, ann, bob } = it;
    await ann.emitAck('user : status_changed', { channel: key, status: 'away' });
    await bob.waitFor('user : status_changed');
    await ann.destroyTransport();
    const { onlineUsers } = await world.restJoin(bob, key);
    assertLike(onlineUsers.find(({ username }) => username === ann.name), { username: ann.name, status: 'away' });
    ann.session = ann.lastLogin.session;
    await ann.open();
    const again = await world.restJoin(bob, key);
    assertLike(again.onlineUsers.find(({ username }) => username === ann.name), { username: ann.name, status: 'away' });
    const other = banter().key();
    await world.restJoin(ann, other);
    await ann.waitFor('user : joined', (p) => p.channel === other);
    assert.deepStrictEqual(await ann.emitAck('user : left', { channel: key }), {});
    await bob.waitFor('user : left', (p) => p.user === ann.name);
    const events = bob.log.slice(it.heard).filter(({ event }) => event === 'user : quit' || event === 'user : joined');
    assert.deepStrictEqual(events, [], 'nothing but the leaving was heard');
  });
});

suite('grace', { env: { ...LIVELY, BANTER_GRACE: '2' } }, (scenario, banter) => {
  for (const { version, transport } of [
    { version: 1, transport: 'websocket' },
    { version: 2, transport: 'polling' },
    { version: 3, transport: 'upgrade' },
    { version: 4, transport: 'websocket' },
    { version: 4, transport: 'polling' },
  ]) {
    scenario(`client ${version} over ${transport} that does not come back quits once in each channel when its grace ends`, async (world) => {
      const it = await pair(world, banter(), { version, transport });
      const { key, ann, bob } = it;
      const other = banter().key();
      await ann.join(other);
      await world.restJoin(bob, other);
      const lost = performance.now();
      await ann.destroyTransport();
      const { onlineUsers } = await world.restJoin(bob, key);
      assert.ok(onlineUsers.some(({ username }) => username === ann.name), 'still on the list during its grace');
      await bob.when('a quit in both channels', () => bob.all('user : quit').length >= 2, 15_000);
      const took = performance.now() - lost;
      assert.ok(took > 1_500, `the grace of 2 s was given: quit after ${took.toFixed(0)} ms`);
      const witness = await world.person('witness');
      for (const channel of [key, other]) {
        const { onlineUsers: now } = await world.restJoin(witness, channel);
        assert.ok(!now.some(({ username }) => username === ann.name), 'off the list');
        await witness.post(channel, 'marker');
        await bob.waitFor('message:post', (m) => m.channel === channel && m.message === 'marker');
      }
      const quits = bob.all('user : quit').sort((a, b) => (a.channel < b.channel ? -1 : 1));
      assertLike(quits, [key, other].sort().map((channel) => ({ username: ann.name, channel })));

      ann.session = ann.lastLogin.session;
      ann.resume = { [key]: 0 };
      const login = await ann.open();
      assert.strictEqual(login.resumed, false, 'too late to resume');
      assert.deepStrictEqual(login.channels, []);
      const refused = await ann.emitAck('message:post', { channel: key, message: 'x' });
      assert.strictEqual(refused.code, 'not_joined');
    });
  }

  scenario('a session that was resumed does not quit when the grace of its loss would have ended', async (world) => {
    const it = await pair(world, banter(), { version: 4, transport: 'websocket' });
    const { key, ann, bob } = it;
    await ann.destroyTransport();
    ann.session = ann.lastLogin.session;
    await ann.open();
    // Someone lost after that ends after that: its quit is the marker.
    const late = await world.person('late');
    await late.join(key);
    await late.destroyTransport();
    await bob.waitFor('user : quit', (p) => p.username === late.name, { deadline: 15_000 });
    assert.deepStrictEqual(await rumours(world, banter(), it), []);
    await bob.post(key, 'still here');
    await ann.waitFor('message:post', (m) => m.message === 'still here');
  });
});

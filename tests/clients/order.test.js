'use strict';
// Order, ids and acks of posts; bad payloads; limits; nonces.

const assert = require('node:assert');
const { suite } = require('./lib/suite.js');
const { assertLike } = require('./lib/like.js');

const dense = (ids) => ids.every((id, i) => i === 0 || id === ids[i - 1] + 1);
const LIMIT = 16 * 1024;

suite('posting', {}, (scenario, banter) => {
  for (const { version, transport } of [
    { version: 1, transport: 'websocket' },
    { version: 2, transport: 'polling' },
    { version: 3, transport: 'upgrade' },
    { version: 4, transport: 'websocket' },
  ]) {
    scenario(`500 posts in one burst by client ${version} over ${transport} are handled and heard in the order sent`, async (world) => {
      const key = banter().key();
      const ann = await world.person('ann', { version, transport });
      const bob = await world.person('bob', { version: 4 });
      const carl = await world.person('carl', { version: 2, transport: 'polling' });
      for (const client of [ann, bob, carl]) await world.restJoin(client, key);
      const texts = Array.from({ length: 500 }, (_, i) => `burst ${i}`);
      const order = [];
      const acks = await Promise.all(texts.map(async (text, i) => {
        const ack = await ann.emitAck('message:post', { channel: key, message: text }, 60_000);
        order.push(i);
        return ack;
      }));
      assert.deepStrictEqual(acks.filter(({ error }) => error), [], 'no error among the acks');
      const ids = acks.map(({ id }) => id);
      assert.ok(dense(ids), 'ids rise by one with each event, in the order sent');
      assert.deepStrictEqual(order, texts.map((_, i) => i), 'acks come in the order sent');
      for (const client of [bob, carl]) {
        await client.when('all 500', () => client.texts(key).length >= 500, 30_000);
        assert.deepStrictEqual(client.texts(key), texts, `what ${client} heard`);
        assert.deepStrictEqual(client.all('message:post', (m) => m.channel === key).map(({ id }) => id), ids);
      }
    });
  }

  scenario('posts of many people at once to several channels: each channel has one order, the same for everyone', async (world) => {
    const keys = [banter().key(), banter().key(), banter().key()];
    const people = await Promise.all(Array.from({ length: 4 }, (_, i) => world.person('p', { version: (i % 4) + 1, transport: i % 2 ? 'polling' : 'websocket' })));
    for (const client of people) for (const key of keys) await world.restJoin(client, key);
    const rounds = 25;
    const acks = new Map(keys.map((key) => [key, []]));
    await Promise.all(people.map((client, who) => Promise.all(
      Array.from({ length: rounds }, (_, i) => keys.map((key) => client.post(key, `${who}:${i}`)
        .then(({ id }) => acks.get(key).push({ id, text: `${who}:${i}`, who })))).flat(),
    )));
    const total = people.length * rounds;
    for (const key of keys) {
      const all = acks.get(key).sort((a, b) => a.id - b.id);
      assert.ok(dense(all.map(({ id }) => id)), `ids of ${key} are dense`);
      assert.strictEqual(all.length, total);
      for (const [who, client] of people.entries()) {
        const expected = all.filter((one) => one.who !== who);
        await client.when('everything', () => client.texts(key).length >= expected.length);
        const heard = client.all('message:post', (m) => m.channel === key);
        assert.deepStrictEqual(heard.map(({ id }) => id), expected.map(({ id }) => id), `${client} hears in the order of ids`);
        assert.deepStrictEqual(heard.map(({ message }) => message), expected.map(({ text }) => text));
        const own = all.filter((one) => one.who === who).map(({ text }) => text);
        assert.deepStrictEqual(own, Array.from({ length: rounds }, (_, i) => `${who}:${i}`), 'each sender\'s own order holds');
      }
    }
  });

  scenario('what was sent as join, post, leave, post in one go is handled in that order', async (world) => {
    const key = banter().key();
    const ann = await world.person('ann', { version: 4 });
    const [joined, posted, left, refused] = await Promise.all([
      ann.emitAck('channel:join', { channel: key }),
      ann.emitAck('message:post', { channel: key, message: 'inside' }),
      ann.emitAck('user : left', { channel: key }),
      ann.emitAck('message:post', { channel: key, message: 'outside' }),
    ]);
    assertLike(joined.onlineUsers, [{ username: ann.name, status: 'online' }]);
    assert.strictEqual(typeof posted.id, 'number', JSON.stringify(posted));
    assert.deepStrictEqual(left, {});
    assert.strictEqual(refused.code, 'not_joined');
  });

  scenario('channel:join answers what came after an id, with no gap and no overlap with what follows, while others post', async (world) => {
    const key = banter().key();
    const ann = await world.person('ann');
    await world.restJoin(ann, key);
    for (let i = 0; i < 40; i++) await ann.post(key, `${i}`);
    let posting = true;
    let latest = 40;
    const poster = (async () => {
      for (let i = 40; posting; i++) await ann.post(key, `${i}`);
    })();
    try {
      for (let round = 0; round < 8; round++) {
        const bob = await world.person('bob', { version: (round % 4) + 1, transport: round % 2 ? 'polling' : 'websocket' });
        // Far less than 200 messages ago, so that the answer holds all that came after it.
        const after = round % 2 ? latest - 10 : undefined;
        const answer = await bob.join(key, after);
        const ids = answer.messages.map((m) => JSON.parse(m).id);
        assert.ok(dense(ids), 'history is dense');
        // On a quick day more than an answer holds has come since; then the latest ones are in it.
        if (answer.more) assert.strictEqual(ids.length, 200);
        else if (after !== undefined) assert.strictEqual(ids[0], after + 1);
        else assert.strictEqual(ids.length, 25);
        assert.strictEqual(answer.last, ids.at(-1), '`last` is where the history ends');
        latest = answer.last;
        await bob.when('ten live messages', () => bob.texts(key).length >= 10);
        const live = bob.all('message:post', (m) => m.channel === key).map(({ id }) => id);
        assert.strictEqual(live[0], ids.at(-1) + 1, 'live events start right behind the history');
        assert.ok(dense(live), 'live events are dense');
        bob.quit();
      }
    } finally {
      posting = false;
      await poster;
    }
  });

  scenario('channel:join says `more` when over 200 were missed and `reset` when the id lies beyond the last', async (world) => {
    const key = banter().key();
    const ann = await world.person('ann');
    await world.restJoin(ann, key);
    const acks = await Promise.all(Array.from({ length: 230 }, (_, i) => ann.post(key, `${i}`)));
    const ids = acks.map(({ id }) => id);
    const bob = await world.person('bob');
    const far = await bob.join(key, ids[9]);
    assert.strictEqual(far.more, true);
    assert.ok(far.messages.length <= 200);
    const near = await bob.join(key, ids[39]);
    assert.ok(!near.more, '190 missed: nothing more');
    assert.deepStrictEqual(near.messages.map((m) => JSON.parse(m).id), ids.slice(40));
    assert.strictEqual(near.last, ids.at(-1));
    assert.ok(!near.reset);
    const none = await bob.join(key, ids.at(-1));
    assert.deepStrictEqual(none.messages, []);
    assert.ok(!none.reset && !none.more);
    const beyond = await bob.join(key, ids.at(-1) + 1000);
    assert.strictEqual(beyond.reset, true);
    assert.deepStrictEqual(beyond.messages.map((m) => JSON.parse(m).id), ids.slice(-25), 'the latest ones instead');
  });

  for (const { version, transport } of [
    { version: 1, transport: 'polling' },
    { version: 2, transport: 'websocket' },
    { version: 3, transport: 'polling' },
    { version: 4, transport: 'websocket' },
  ]) {
    scenario(`each bad payload of client ${version} over ${transport} gets an error and a code, and harms nobody`, async (world) => {
      const key = banter().key();
      const ann = await world.person('ann', { version, transport });
      const bob = await world.person('bob');
      await world.restJoin(ann, key);
      await world.restJoin(bob, key);
      const good = { channel: key, message: 'fine' };
      const long = { channel: key, message: 'x'.repeat(LIMIT + 1) };
      const cases = [
        ['message:post', null, 'bad_payload'],
        ['message:post', 'text', 'bad_payload'],
        ['message:post', 5, 'bad_payload'],
        ['message:post', true, 'bad_payload'],
        ['message:post', [], 'bad_payload'],
        ['message:post', [good], 'bad_payload'],
        ['message:post', {}, 'bad_payload'],
        ['message:post', { channel: key }, 'bad_payload'],
        ['message:post', { message: 'x' }, 'bad_payload'],
        ['message:post', { channel: key, message: null }, 'bad_payload'],
        ['message:post', { channel: key, message: 5 }, 'bad_payload'],
        ['message:post', { channel: key, message: { text: 'x' } }, 'bad_payload'],
        ['message:post', { channel: key, message: ['x'] }, 'bad_payload'],
        ['message:post', { channel: key, message: true }, 'bad_payload'],
        ['message:post', { channel: 5, message: 'x' }, 'bad_payload'],
        ['message:post', { channel: { key }, message: 'x' }, 'bad_payload'],
        ['message:post', { ...good, nonce: 5 }, 'bad_payload'],
        ['message:post', { ...good, nonce: 'n'.repeat(65) }, 'bad_payload'],
        ['message:post', { ...good, nonce: 'ä'.repeat(33) }, 'bad_payload'],
        ['message:post', { channel: key, message: '' }, undefined],
        ['message:post', { channel: key, message: ' \n\t\u00a0\u3000 ' }, undefined],
        ['message:post', long, 'too_large'],
        ['message:post', { channel: key, message: 'ä'.repeat(LIMIT / 2) + 'x' }, 'too_large'],
        ['message:post', { channel: key, message: 'y'.repeat(500_000) }, 'too_large'],
        ['message:post', { channel: `${key}-other`, message: 'x' }, 'not_joined'],
        ['user : left', null, 'bad_payload'],
        ['user : left', {}, 'bad_payload'],
        ['user : left', { channel: 5 }, 'bad_payload'],
        ['user : status_changed', null, 'bad_payload'],
        ['user : status_changed', { channel: key }, 'bad_payload'],
        ['user : status_changed', { channel: key, status: 5 }, 'bad_payload'],
        ['user : status_changed', { channel: key, status: 'invisible' }, 'bad_payload'],
        ['user : status_changed', { channel: `${key}-other`, status: 'away' }, 'not_joined'],
        ['channel:join', null, 'bad_payload'],
        ['channel:join', {}, 'bad_payload'],
        ['channel:join', { channel: '' }, 'bad_payload'],
        ['channel:join', { channel: 'k'.repeat(129) }, undefined],
        ['channel:join', { channel: key, after: 'x' }, 'bad_payload'],
        ['channel:join', { channel: key, after: -1 }, 'bad_payload'],
        ['channel:join', { channel: key, after: 1.5 }, 'bad_payload'],
        ['channel:typing', null, undefined],
        ['no such event', { channel: key }, undefined],
        ['no such event', null, undefined],
      ];
      const codes = ['bad_payload', 'too_large', 'not_joined', 'rate_limited', 'unavailable', 'forbidden'];
      for (const [event, payload, code] of cases) {
        const what = `${event} ${JSON.stringify(payload)?.slice(0, 100)}`;
        const answer = await ann.emitAck(event, payload);
        assert.strictEqual(typeof answer?.error, 'string', `${what}: ${JSON.stringify(answer)}`);
        assert.ok(codes.includes(answer.code), `${what}: ${JSON.stringify(answer)}`);
        if (code) assert.strictEqual(answer.code, code, `${what}: ${answer.error}`);
      }
      // None of them without an ack does anything either.
      for (const [event, payload] of cases) ann.emit(event, payload);
      ann.socket.emit('message:post');
      ann.socket.emit('message:post', 1, 2, 3);
      ann.socket.emit('user : left');
      const bare = await new Promise((resolve) => { ann.socket.emit('message:post', resolve); });
      assert.strictEqual(bare.code, 'bad_payload', 'an event with nothing but an ack');

      const { id } = await ann.post(key, 'all is well');
      const heard = await bob.waitFor('message:post', (m) => m.id === id);
      assert.strictEqual(heard.message, 'all is well');
      assert.deepStrictEqual(bob.texts(key), ['all is well'], 'none of the bad ones was stored or heard');
      assert.deepStrictEqual(bob.all('user : left'), []);
      assert.deepStrictEqual(bob.all('user : status_changed'), []);
      assert.deepStrictEqual(ann.life.map(({ what }) => what), ['connect'], 'the connection went on working');
      assert.deepStrictEqual(ann.log.filter(({ event }) => !['logged_in', 'user : joined'].includes(event)), [], 'and got nothing unasked');
    });

    scenario(`binary payloads and a lone surrogate of client ${version} over ${transport} get an answer and harm nobody`, async (world) => {
      const key = banter().key();
      const ann = await world.person('ann', { version, transport });
      const bob = await world.person('bob');
      await world.restJoin(ann, key);
      await world.restJoin(bob, key);
      for (const payload of [Buffer.from('binary'), { channel: key, message: Buffer.from('binary') }, { channel: key, message: 'x', extra: Buffer.alloc(1000) }]) {
        const answer = await ann.emitAck('message:post', payload);
        assert.ok(typeof answer?.error === 'string' || Number.isInteger(answer?.id), JSON.stringify(answer));
        if (!('extra' in payload)) assert.strictEqual(answer.code, 'bad_payload');
      }
      await ann.post(key, 'after binary');
      await bob.waitFor('message:post', (m) => m.message === 'after binary');
      const answer = await ann.emitAck('message:post', { channel: key, message: 'lone \ud800 surrogate' });
      assert.ok(typeof answer?.error === 'string' || Number.isInteger(answer?.id), JSON.stringify(answer));
      await ann.post(key, 'after the surrogate');
      await bob.waitFor('message:post', (m) => m.message === 'after the surrogate');
      assert.deepStrictEqual(ann.life.map(({ what }) => what), ['connect']);
    });
  }

  scenario('messages at the limit of 16 KiB of UTF-8 are taken whole; surrounding white space stays', async (world) => {
    const key = banter().key();
    const ann = await world.person('ann', { version: 1, transport: 'polling' });
    const bob = await world.person('bob', { version: 2, transport: 'polling' });
    await world.restJoin(ann, key);
    await world.restJoin(bob, key);
    for (const message of ['x'.repeat(LIMIT), 'ä'.repeat(LIMIT / 2), '😀'.repeat(LIMIT / 4), '\\'.repeat(LIMIT), '\u0001'.repeat(LIMIT)]) {
      const { id } = await ann.post(key, message);
      const heard = await bob.waitFor('message:post', (m) => m.id === id);
      assert.ok(heard.message === message, `${message.slice(0, 3)}…: the same at the other end`);
    }
    const { id } = await ann.post(key, '  kept  ');
    assert.strictEqual((await bob.waitFor('message:post', (m) => m.id === id)).message, '  kept  ');
  });

  scenario('a nonce makes a repeated post the same message: same id and date, heard once, per user and channel', async (world) => {
    const [one, two] = [banter().key(), banter().key()];
    const ann = await world.person('ann');
    const bob = await world.person('bob');
    for (const client of [ann, bob]) for (const key of [one, two]) await world.restJoin(client, key);
    const nonce = 'n'.repeat(64);
    const first = await ann.post(one, 'once', { nonce });
    const again = await ann.post(one, 'once', { nonce });
    assert.deepStrictEqual(again, first);
    const together = await Promise.all(Array.from({ length: 5 }, () => ann.post(one, 'together', { nonce: 'together' })));
    assert.strictEqual(new Set(together.map(({ id }) => id)).size, 1, 'five at once are one message');
    const elsewhere = await ann.post(two, 'once', { nonce });
    const other = await bob.post(one, 'mine', { nonce });
    assert.notStrictEqual(other.id, first.id, 'another user\'s nonce is another nonce');
    await ann.post(two, 'marker');
    await ann.post(one, 'marker');
    await bob.waitFor('message:post', (m) => m.channel === one && m.message === 'marker');
    await bob.waitFor('message:post', (m) => m.channel === two && m.message === 'marker');
    assert.deepStrictEqual(bob.texts(one), ['once', 'together', 'marker']);
    assert.deepStrictEqual(bob.texts(two), ['once', 'marker'], `${elsewhere.id} stands in its own channel`);
  });

  scenario('an old client that asks for no ack gets none, and nothing else either', async (world) => {
    const key = banter().key();
    const ann = await world.person('ann', { version: 1, transport: 'websocket' });
    await world.restJoin(ann, key);
    await ann.waitFor('user : joined');
    const packets = [];
    ann.socket.io.engine.on('packet', ({ type, data }) => packets.push([type, data]));
    ann.emit('message:post', { channel: key, message: 'no ack, please' });
    ann.emit('user : status_changed', { channel: key, status: 'away' });
    await ann.emitAck('message:post', { channel: key, message: 'with one' });
    const messages = packets.filter(([type]) => type === 'message');
    assert.strictEqual(messages.length, 1, `only the one ack: ${JSON.stringify(messages)}`);
  });
});

suite('rate of posts', { env: { BANTER_POST_RATE: '2' } }, (scenario, banter) => {
  scenario('posting beyond the rate is refused with retryAfter, and waiting that long helps', async (world) => {
    const key = banter().key();
    const ann = await world.person('ann');
    const bob = await world.person('bob');
    await world.restJoin(ann, key);
    await world.restJoin(bob, key);
    const answers = await Promise.all(Array.from({ length: 40 }, (_, i) => ann.emitAck('message:post', { channel: key, message: `${i}` })));
    const taken = answers.filter(({ id }) => id !== undefined);
    const refused = answers.filter(({ id }) => id === undefined);
    assert.ok(taken.length >= 6 && taken.length <= 12, `a burst of 6, and little more: ${taken.length}`);
    for (const answer of refused) {
      assert.strictEqual(answer.code, 'rate_limited', JSON.stringify(answer));
      assert.strictEqual(typeof answer.error, 'string');
      assert.ok(answer.retryAfter > 0 && answer.retryAfter < 10_000, `retryAfter in ms: ${answer.retryAfter}`);
    }
    await bob.post(key, 'others are not limited');
    const { retryAfter } = refused.at(-1);
    await new Promise((resolve) => setTimeout(resolve, retryAfter + 50));
    await ann.post(key, 'after waiting');
    await bob.waitFor('message:post', (m) => m.message === 'after waiting');
    assert.strictEqual(bob.texts(key).length, taken.length + 1, 'what was refused was not heard');
  });
});

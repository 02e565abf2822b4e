'use strict';
// What people do all day, with every client and over every transport.

const assert = require('node:assert');
const { suite } = require('./lib/suite.js');
const { assertLike } = require('./lib/like.js');
const { SECRET } = require('./lib/banter.js');
const { VERSIONS, TRANSPORTS, parseMessage } = require('./lib/client.js');
const { sign } = require('./lib/jwt.js');

const ISO = /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$/;

/** Texts that encodings tend to break. */
const TEXTS = {
  'plain ASCII': 'hello',
  'German': 'Grüße aus Köln, ä',
  'Japanese': '日本語のテキスト',
  'emoji, beyond the basic plane': '😀 👩‍👩‍👧‍👦 🇩🇪',
  'only characters U+0080 to U+00FF': Array.from({ length: 128 }, (_, i) => String.fromCharCode(0x80 + i)).join(''),
  'what looks like UTF-8 decoded as Latin-1': 'Ã¤ Ã¼ â\u0082¬',
  'quotes, backslashes, line breaks': '"quoted" \\back\\slash\\u00e4 \'single\'\nnew line\r\n\ttab',
  'JSON and HTML': '{"message":"x"} <b>bold</b> &amp; </script>',
  'separators of the protocols': '12:40/a,1["x"]\u001e5:3\u2028\u2029',
  'escape characters': '\u0001\u007f\ufffd',
};

suite('chat', { env: { BANTER_GRACE: '2' } }, (scenario, banter) => {
  for (const version of VERSIONS) {
    for (const transport of TRANSPORTS) {
      const other = { version: (version % 4) + 1, transport: TRANSPORTS[(TRANSPORTS.indexOf(transport) + 1) % 3] };
      const title = `client ${version} over ${transport}`;

      scenario(`${title}: logged_in comes first; joins, posts, history and presence agree with another client`, async (world) => {
        const key = banter().key();
        const ann = await world.person('ann', { version, transport });
        assert.strictEqual(ann.log[0].event, 'logged_in', 'the first event of a connection');
        assert.strictEqual(ann.log[0].args.length, 1, 'logged_in has one payload');
        const login = ann.lastLogin;
        assert.strictEqual(typeof login.session, 'string');
        assert.ok(login.session.length >= 16, 'the session is a secret, not a number to guess');
        assert.strictEqual(login.resumed, false);
        assert.deepStrictEqual(login.channels, []);

        const list = await banter().api('GET', '/channels', { token: ann.token });
        assert.deepStrictEqual(
          list.json.channels.slice(0, 3).map(({ name, key }) => [name, key]),
          [['General', 'general'], ['Programming', 'programming'], ['Random', 'random']],
        );

        // One joins by REST, the other by event.
        const joined = await world.restJoin(ann, key);
        assert.strictEqual(joined.key, key);
        assert.deepStrictEqual(joined.messages, []);
        assertLike(joined.onlineUsers, [{ username: ann.name, status: 'online' }]);
        await ann.waitFor('user : joined', (p) => p.username === ann.name && p.channel === key);

        const bob = await world.person('bob', other);
        const answer = await bob.join(key);
        assert.deepStrictEqual(answer.messages, []);
        assert.deepStrictEqual(
          answer.onlineUsers.map(({ username }) => username).sort(),
          [ann.name, bob.name].sort(),
        );
        for (const client of [ann, bob]) {
          const heard = await client.waitFor('user : joined', (p) => p.username === bob.name);
          assertLike(heard, { username: bob.name, channel: key });
        }

        // With an ack, and without one.
        const ack = await ann.post(key, 'with an ack');
        assert.ok(Number.isInteger(ack.id), `an id is a whole number: ${ack.id}`);
        assert.match(ack.date, ISO);
        const first = await bob.waitFor('message:post', (m) => m.message === 'with an ack');
        assertLike(first, { message: 'with an ack', user: ann.name, date: ack.date, id: ack.id, channel: key });
        bob.emit('message:post', { channel: key, message: 'without an ack' });
        const second = await ann.waitFor('message:post', (m) => m.message === 'without an ack');
        assert.strictEqual(second.user, bob.name);
        assert.strictEqual(second.id, ack.id + 1);
        assert.deepStrictEqual(ann.texts(key), ['without an ack'], 'a sender does not get its own message');

        // History: strings of JSON, the same as the events were.
        const history = await banter().api('GET', `/channels/${key}/messages?start=0&end=25`, { token: bob.token });
        assert.strictEqual(history.status, 200, history.text);
        for (const message of history.json.messages) assert.strictEqual(typeof message, 'string');
        assert.deepStrictEqual(history.json.messages.map((m) => JSON.parse(m)), [first, second]);
        const carl = await world.person('carl', { version, transport });
        const late = await world.restJoin(carl, key);
        assert.deepStrictEqual(late.messages.map((m) => JSON.parse(m)), [first, second]);
      });

      scenario(`${title}: every character arrives as it was sent, both ways and in the history`, async (world) => {
        const key = banter().key('räum 日本');
        const ann = await world.person('ann', { version, transport });
        const bob = await world.person('bob', other);
        await world.restJoin(ann, key);
        await world.restJoin(bob, key);
        for (const [what, text] of Object.entries(TEXTS)) {
          const out = await ann.post(key, text);
          const heard = await bob.waitFor('message:post', (m) => m.id === out.id);
          assert.strictEqual(heard.message, text, `${what}, sent by ${ann}, heard by ${bob}`);
          assert.strictEqual(heard.channel, key);
          const back = await bob.post(key, text);
          const echo = await ann.waitFor('message:post', (m) => m.id === back.id);
          assert.strictEqual(echo.message, text, `${what}, sent by ${bob}, heard by ${ann}`);
          assert.strictEqual(echo.channel, key);
        }
        const sent = Object.values(TEXTS).flatMap((text) => [text, text]);
        const { json } = await banter().api('GET', `/channels/${encodeURIComponent(key)}/messages?start=0&end=100`, { token: ann.token });
        assert.deepStrictEqual(json.messages.map((m) => JSON.parse(m).message), sent);
        const again = await ann.join(key);
        assert.deepStrictEqual(again.messages.map((m) => parseMessage(m).message), sent.slice(-25), 'the ack of channel:join');
      });

      scenario(`${title}: status and typing are relayed, leaving and quitting are told once a channel`, async (world) => {
        const [one, two] = [banter().key(), banter().key()];
        const ann = await world.person('ann', { version, transport });
        const bob = await world.person('bob', other);
        for (const channel of [one, two]) {
          await world.restJoin(bob, channel);
          await ann.join(channel);
        }

        assert.deepStrictEqual(await ann.emitAck('user : status_changed', { channel: one, status: 'away' }), {});
        const changed = await bob.waitFor('user : status_changed');
        assertLike(changed, { channel: one, user: ann.name, status: 'away' });
        const dave = await world.person('dave', other);
        const late = await world.restJoin(dave, one);
        assertLike(
          late.onlineUsers.find(({ username }) => username === ann.name),
          { username: ann.name, status: 'away' },
          'a late joiner sees the status',
        );
        assert.deepStrictEqual(await ann.emitAck('user : status_changed', { channel: one, status: 'online' }), {});
        await bob.waitFor('user : status_changed', (p) => p.status === 'online');

        ann.emit('channel:typing', { channel: one });
        assertLike(await bob.waitFor('user : typing'), { username: ann.name, channel: one });

        const third = banter().key();
        await ann.join(third);
        await world.restJoin(bob, third);
        assert.deepStrictEqual(await ann.emitAck('user : left', { channel: third }), {});
        const left = await bob.waitFor('user : left');
        assertLike(left, { channel: third, user: ann.name });
        assert.match(left.date, ISO);
        const refused = await ann.emitAck('message:post', { channel: third, message: 'from outside' });
        assert.strictEqual(refused.code, 'not_joined');
        assert.strictEqual(ann.all('user : left').length, 0, 'the leaver does not hear it');
        assert.strictEqual(ann.all('user : status_changed').length, 0, 'the sender does not hear its status');
        assert.strictEqual(ann.all('user : typing').length, 0, 'the typist does not hear it');

        // The next message is behind everything that the quit could have caused.
        const since = bob.mark();
        ann.quit();
        await bob.when('a quit in both channels', () => bob.all('user : quit', (p) => p.username === ann.name).length >= 2);
        await dave.post(one, 'a marker');
        await bob.waitFor('message:post', (m) => m.message === 'a marker');
        const quits = bob.all('user : quit', () => true, since).sort((a, b) => (a.channel < b.channel ? -1 : 1));
        assertLike(quits, [one, two].sort().map((channel) => ({ username: ann.name, channel })));
        const after = await world.restJoin(dave, one);
        assert.ok(!after.onlineUsers.some(({ username }) => username === ann.name), 'who quit is off the list');
      });
    }

    for (const transport of ['polling', 'websocket']) {
      const title = `client ${version} over ${transport}`;

      scenario(`${title}: a second connection beside a living one gets name_taken and is disconnected`, async (world) => {
        const key = banter().key();
        const ann = await world.person('ann', { version, transport });
        const bob = await world.person('bob');
        await world.restJoin(ann, key);
        await world.restJoin(bob, key);
        const second = world.client({ version, transport, token: ann.token, name: ann.name }).start();
        assert.deepStrictEqual(await second.waitFor('name_taken', () => true, { deadline: 15_000 }), {});
        await second.waitForLife('disconnect');
        assert.deepStrictEqual(second.log.map(({ event }) => event), ['name_taken'], 'nothing else was told to it');
        await bob.post(key, 'still there?');
        await ann.waitFor('message:post', (m) => m.message === 'still there?');
        assert.deepStrictEqual(bob.all('user : quit'), [], 'nobody quit');
        assert.deepStrictEqual(ann.life.map(({ what }) => what), ['connect'], 'the first connection lives on');
      });

      scenario(`${title}: bad tokens end in connect_error, never in a bare disconnect`, async (world) => {
        const user = await banter().register();
        const now = Math.floor(Date.now() / 1000);
        const bad = {
          missing: undefined,
          empty: '',
          malformed: 'not.a.token',
          expired: sign({ name: user.name, iat: now - 100, exp: now - 1 }, SECRET),
          'wrongly signed': sign({ name: user.name, iat: now, exp: now + 100 }, 'another secret of sufficient length!!'),
          'alg none': sign({ name: user.name, iat: now, exp: now + 100 }, SECRET, 'none'),
          'without a name': sign({ iat: now, exp: now + 100 }, SECRET),
          'of nobody': sign({ name: 'nobodyatall', iat: now, exp: now + 100 }, SECRET),
        };
        for (const [what, token] of Object.entries(bad)) {
          const client = world.client({ version, transport, token }).start();
          const { detail } = await client.waitForLife('connect_error');
          if (version >= 3) {
            assert.ok(detail instanceof Error && detail.message.length > 0, `${what}: a text says why`);
            assert.doesNotMatch(detail.message, /^(xhr poll error|websocket error)$/, `${what}: a CONNECT_ERROR, not a transport error`);
          }
          assert.strictEqual(client.life[0].what, 'connect_error', `${what}: the first thing that happens`);
          assert.deepStrictEqual(client.log, [], `${what}: no event`);
        }
        const good = await world.connect({ version, transport, token: user.token });
        assert.strictEqual(good.lastLogin.resumed, false, 'none of them left anything behind');
      });
    }
  }
});

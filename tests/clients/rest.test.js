'use strict';
// The REST table, row by row: answers, errors and their texts, headers, limits.

const assert = require('node:assert');
const http = require('node:http');
const { suite } = require('./lib/suite.js');
const { assertLike } = require('./lib/like.js');
const { SECRET } = require('./lib/banter.js');
const { channelPath } = require('./lib/rest.js');
const { sign, claims, verify } = require('./lib/jwt.js');

const ORIGIN = 'http://chat.example.org';
const WEEK = 7 * 24 * 60 * 60;
const now = () => Math.floor(Date.now() / 1000);

/** A request as a page of another origin makes it; what every answer must have is checked here. */
async function ask(banter, method, path, options = {}) {
  const answer = await banter.api(method, path, { ...options, headers: { origin: ORIGIN, ...options.headers } });
  const what = `${method} ${path} → ${answer.status} ${answer.text.slice(0, 200)}`;
  assert.ok(['*', ORIGIN].includes(answer.headers['access-control-allow-origin']), `CORS on ${what}`);
  if (method !== 'HEAD' && answer.status !== 204) {
    assert.match(answer.headers['content-type'] ?? '', /^application\/json\b/, `JSON on ${what}`);
    assert.ok(answer.json !== undefined, `JSON that parses on ${what}`);
    assert.doesNotMatch(answer.text, /<\/?(html|body|pre|title)\b/i, `no HTML in ${what}`);
    assert.doesNotMatch(answer.text, /\bsrc\/|\.rs:\d|stack backtrace|panicked|sqlite|rusqlite|serde/i, `no innards in ${what}`);
  }
  return answer;
}

/** The same, and it must be an error with this status, and this text where one is given. */
async function refused(banter, status, method, path, options, text) {
  const answer = await ask(banter, method, path, options);
  const what = `${method} ${path} ${JSON.stringify(options?.body)?.slice(0, 120) ?? ''} → ${answer.text}`;
  assert.strictEqual(answer.status, status, what);
  assert.strictEqual(typeof answer.json.error, 'string', what);
  assert.ok(answer.json.error.length > 0, what);
  if (text !== undefined) assert.strictEqual(answer.json.error, text, what);
  return answer;
}

suite('REST', {}, (scenario, banter) => {
  const register = (body, options) => ['POST', '/auth/register', { body, ...options }];

  scenario('registering gives a token of one week that works, and expiresIn is its expiry in milliseconds', async () => {
    const before = now();
    const answer = await ask(banter(), ...register({ name: 'Alice1', password: 'sesame' }));
    assert.strictEqual(answer.status, 200, answer.text);
    const { token, expiresIn } = answer.json;
    assert.ok(verify(token, SECRET), 'HS256, signed with the configured secret');
    const { name, iat, exp } = claims(token);
    assert.strictEqual(name, 'Alice1');
    assert.ok(Number.isInteger(iat) && iat >= before && iat <= now(), `iat is now, in seconds: ${iat}`);
    assert.ok(exp - before >= WEEK && exp - before <= WEEK + 30, `one week on: ${exp - before} s`);
    assert.strictEqual(expiresIn, exp * 1000, 'expiresIn is exp in milliseconds');
    assert.strictEqual((await ask(banter(), 'GET', '/channels', { token })).status, 200);
  });

  scenario('a bad registration is refused in the documented order, with the texts the old client shows', async () => {
    await banter().api('POST', '/auth/register', { body: { name: 'Taken1', password: 'sesame' } });
    const missing = 'Missing parameter!';
    const reserved = 'That name is not allowed';
    const letters = 'Name must be numbers or letter a-z only';
    const cases = [
      // A missing, empty or non-string field is said first, whatever else is wrong.
      [{}, missing],
      [{ name: 'fine1' }, missing],
      [{ password: 'sesame' }, missing],
      [{ name: '', password: 'sesame' }, missing],
      [{ name: 'fine1', password: '' }, missing],
      [{ name: 'not fine!', password: '' }, missing],
      [{ name: null, password: 'sesame' }, missing],
      [{ name: 7, password: 'sesame' }, missing],
      [{ name: ['fine1'], password: 'sesame' }, missing],
      [{ name: 'fine1', password: 1234567 }, missing],
      [{ name: 'fine1', password: { length: 9 } }, missing],
      // Then the name, before the password.
      [{ name: 'no spaces', password: 'x' }, letters],
      [{ name: 'no_signs', password: 'sesame' }, letters],
      [{ name: 'jürgen', password: 'sesame' }, letters],
      [{ name: 'newline\n', password: 'sesame' }, letters],
      [{ name: '\nnewline', password: 'sesame' }, letters],
      [{ name: 'nul\0nul', password: 'sesame' }, letters],
      [{ name: 'ab', password: 'x' }, 'The name ab is too short. (min 3. characters)'],
      [{ name: 'x', password: 'sesame' }, 'The name x is too short. (min 3. characters)'],
      [{ name: 'a'.repeat(33), password: 'sesame' }, undefined],
      [{ name: 'System', password: 'x' }, reserved],
      [{ name: 'sYSTEM', password: 'sesame' }, reserved],
      [{ name: 'You', password: 'sesame' }, reserved],
      [{ name: 'yOU', password: 'sesame' }, reserved],
      // Then the password, before the question whether the name is free.
      [{ name: 'fine1', password: '12345' }, undefined],
      [{ name: 'fine1', password: 'äöüßé' }, undefined],
      [{ name: 'fine1', password: 'x'.repeat(1025) }, undefined],
      [{ name: 'fine1', password: 'ä'.repeat(513) }, undefined],
      [{ name: 'Taken1', password: '12345' }, undefined],
    ];
    for (const [body, text] of cases) {
      const answer = await refused(banter(), 400, ...register(body), text);
      if (typeof body.password === 'string' && body.password.length >= 5) {
        assert.ok(!answer.text.includes(body.password), 'the password is never repeated');
      }
    }
    for (const body of ['[]', '"text"', '5', 'null']) {
      await refused(banter(), 400, ...register(body, { headers: { 'content-type': 'application/json' } }));
    }
    await refused(banter(), 409, ...register({ name: 'Taken1', password: 'another' }), 'User with name already exists');
  });

  scenario('names and passwords at their limits are accepted and work', async () => {
    const cases = [
      { name: 'abc', password: 'sesame' },
      { name: 'Z'.repeat(32), password: 'sesame' },
      { name: '123', password: 'äöüßéñ' },
      { name: 'longpass1', password: 'x'.repeat(1024) },
      { name: 'longpass2', password: 'ä'.repeat(512) },
      { name: 'quoted', password: '"\\\u0001 😀' },
    ];
    for (const body of cases) {
      const registered = await ask(banter(), ...register(body));
      assert.strictEqual(registered.status, 200, `${body.name}: ${registered.text}`);
      const login = await ask(banter(), 'POST', '/auth/login', { body });
      assert.strictEqual(login.status, 200, `login ${body.name}: ${login.text}`);
    }
    await refused(banter(), 401, 'POST', '/auth/login', { body: { name: 'longpass1', password: 'x'.repeat(1023) } });
  });

  scenario('of several registrations of one name at once exactly one wins, and its password counts', async () => {
    const bodies = Array.from({ length: 6 }, (_, i) => ({ name: 'Racer', password: `password${i}` }));
    const answers = await Promise.all(bodies.map((body) => ask(banter(), ...register(body))));
    const statuses = answers.map(({ status }) => status).sort();
    assert.deepStrictEqual(statuses, [200, 409, 409, 409, 409, 409]);
    const winner = answers.findIndex(({ status }) => status === 200);
    assert.strictEqual((await ask(banter(), 'POST', '/auth/login', { body: bodies[winner] })).status, 200);
    const loser = bodies[(winner + 1) % bodies.length];
    assert.strictEqual((await ask(banter(), 'POST', '/auth/login', { body: loser })).status, 401);
  });

  scenario('login gives a token; a wrong password and an unknown name get one text, after the same work', async () => {
    const user = await banter().register();
    const answer = await ask(banter(), 'POST', '/auth/login', { body: { name: user.name, password: user.password } });
    assert.strictEqual(answer.status, 200, answer.text);
    assert.ok(verify(answer.json.token, SECRET));
    assert.strictEqual(answer.json.expiresIn, claims(answer.json.token).exp * 1000);

    const times = { wrong: [], unknown: [] };
    const texts = new Set();
    for (let i = 0; i < 5; i++) {
      for (const [kind, name] of [['wrong', user.name], ['unknown', `nobody${i}`]]) {
        const start = performance.now();
        const { text } = await refused(banter(), 401, 'POST', '/auth/login', { body: { name, password: 'not the password' } });
        times[kind].push(performance.now() - start);
        texts.add(text);
      }
    }
    assert.strictEqual(texts.size, 1, `one text: ${[...texts].join(' / ')}`);
    const median = (list) => [...list].sort((a, b) => a - b)[2];
    const ratio = median(times.unknown) / median(times.wrong);
    assert.ok(ratio > 1 / 3 && ratio < 3, `an unknown name takes ${ratio.toFixed(2)} times as long as a wrong password`);
    for (const body of [{}, { name: user.name }, { name: 5, password: 'sesame' }, { name: user.name, password: ['x'] }]) {
      const bad = await ask(banter(), 'POST', '/auth/login', { body });
      assert.ok([400, 401].includes(bad.status), `${JSON.stringify(body)}: ${bad.status}`);
    }
  });

  scenario('the three ways to send a token all work', async () => {
    const { token } = await banter().register();
    for (const authorization of [`Bearer: ${token}`, `Bearer ${token}`, token]) {
      const answer = await ask(banter(), 'GET', '/channels', { headers: { authorization } });
      assert.strictEqual(answer.status, 200, authorization.slice(0, 12));
    }
  });

  scenario('every bad token is refused with 401 on every route that needs one', async () => {
    const { name, token } = await banter().register();
    const [head, body, signature] = token.split('.');
    const good = { name, iat: now(), exp: now() + 100 };
    const { name: _, ...nameless } = good;
    const { exp: __, ...endless } = good;
    const bad = {
      missing: undefined,
      empty: '',
      'only the scheme': 'Bearer',
      'only the scheme, with the colon': 'Bearer: ',
      'another scheme': `Basic ${Buffer.from('a:b').toString('base64')}`,
      malformed: 'Bearer not.a.token',
      'two parts': `Bearer ${head}.${body}`,
      'cut signature': `Bearer ${token.slice(0, -3)}`,
      'no signature': `Bearer ${head}.${body}.`,
      'changed body': `Bearer ${head}.${Buffer.from(JSON.stringify({ ...good, name: 'System' })).toString('base64url')}.${signature}`,
      'wrong key': `Bearer ${sign(good, 'another secret of sufficient length!!')}`,
      'alg none': `Bearer ${sign(good, SECRET, 'none')}`,
      'alg none with a signature': `Bearer ${sign(good, SECRET, 'none')}${signature}`,
      HS512: `Bearer ${sign(good, SECRET, 'HS512')}`,
      'expired a second ago': `Bearer ${sign({ ...good, exp: now() - 1 }, SECRET)}`,
      'without exp': `Bearer ${sign(endless, SECRET)}`,
      'without a name': `Bearer ${sign(nameless, SECRET)}`,
      'name not a string': `Bearer ${sign({ ...good, name: 7 }, SECRET)}`,
      'of nobody': `Bearer ${sign({ ...good, name: 'NobodyAtAll' }, SECRET)}`,
    };
    const routes = [
      ['GET', '/channels'],
      ['POST', '/channels', { name: 'x' }],
      ['POST', '/channels/general/join'],
      ['GET', '/channels/general/messages?start=0&end=25'],
    ];
    for (const [what, authorization] of Object.entries(bad)) {
      for (const [method, path, payload] of routes) {
        const headers = authorization === undefined ? {} : { authorization };
        const start = performance.now();
        const answer = await ask(banter(), method, path, { headers, body: payload });
        assert.strictEqual(answer.status, 401, `${what}, ${method} ${path}: ${answer.text}`);
        assert.ok(performance.now() - start < 5_000, `${what}: at once`);
        if (what === 'missing') assert.strictEqual(answer.json.error, 'Token is missing');
      }
    }
    const sanity = await ask(banter(), 'GET', '/channels', { headers: { authorization: `Bearer ${sign(good, SECRET)}` } });
    assert.strictEqual(sanity.status, 200, 'a token made the same way, with nothing wrong in it, is taken');
  });

  scenario('channels: the three of old first, created ones behind them in order, with who is online', async (world) => {
    const user = await banter().register();
    const names = ['Zebra', 'Äpfel & Birnen', '日'.repeat(64), 'Zebra'];
    const keys = [];
    for (const name of names) {
      const answer = await ask(banter(), 'POST', '/channels', { token: user.token, body: { name } });
      assert.strictEqual(answer.status, 201, answer.text);
      const { key } = answer.json;
      assertLike(answer.json, { name, key, onlineUsers: 0, onlineCount: 0 });
      assert.match(key, /^[A-Za-z0-9_-]{43}$/, '32 bytes of base64url');
      keys.push(key);
    }
    assert.strictEqual(new Set(keys).size, keys.length, 'every channel has a key of its own');
    const list = async () => {
      const answer = await ask(banter(), 'GET', '/channels', { token: user.token });
      assert.strictEqual(answer.status, 200);
      return answer.json.channels;
    };
    const channels = await list();
    assert.deepStrictEqual(channels.slice(0, 3).map(({ name, key }) => [name, key]), [
      ['General', 'general'],
      ['Programming', 'programming'],
      ['Random', 'random'],
    ]);
    const mine = channels.filter(({ key }) => keys.includes(key));
    assertLike(mine, names.map((name, i) => ({ name, key: keys[i], onlineCount: 0 })));

    const ann = await world.person('ann');
    const bob = await world.person('bob');
    for (const client of [ann, bob]) await world.restJoin(client, keys[0]);
    await world.restJoin(ann, keys[0]);
    const count = async () => (await list()).find(({ key }) => key === keys[0]).onlineCount;
    assert.strictEqual(await count(), 2, 'joining twice is joining once');
    const since = ann.mark();
    bob.quit();
    await ann.waitFor('user : quit', (p) => p.username === bob.name, { since });
    assert.strictEqual(await count(), 1);
  });

  scenario('a channel without a proper name is refused', async () => {
    const { token } = await banter().register();
    await refused(banter(), 400, 'POST', '/channels', { token, body: {} }, 'Missing channel name!');
    await refused(banter(), 400, 'POST', '/channels', { token, body: { name: '' } }, 'Missing channel name!');
    for (const name of ['   ', '\n\t', null, 5, ['a'], {}, true, 'x'.repeat(65), '日'.repeat(65)]) {
      await refused(banter(), 400, 'POST', '/channels', { token, body: { name } });
    }
    const { json } = await ask(banter(), 'GET', '/channels', { token });
    assert.ok(json.channels.every(({ name }) => name.trim().length > 0 && name.length <= 64), 'none of them exists');
  });

  scenario('joining: any key of 1 to 128 characters, percent-decoded, with whatever body; others are refused', async (world) => {
    const ann = await world.person('ann');
    const bob = await world.person('bob');
    const keys = ['x', 'k'.repeat(128), '日'.repeat(128), 'räum ¿', 'a/b', 'a?b#c', 'per%cent', '%41', 'a+b c', '"quoted"', '..', 'emoji 😀'];
    for (const raw of keys) {
      // The same channel for every test run of this server, so take another key where one could clash.
      const key = raw.length < 100 && raw !== 'x' && raw !== '..' ? `${raw}${banter().key('')}` : raw;
      const body = await world.restJoin(ann, key);
      assert.strictEqual(body.key, key);
      assert.ok(Array.isArray(body.messages) && Array.isArray(body.onlineUsers), JSON.stringify(body).slice(0, 200));
      assert.ok(body.onlineUsers.some(({ username }) => username === ann.name), 'the caller is in the list');
      const joined = await ann.waitFor('user : joined', (p) => p.channel === key);
      assertLike(joined, { username: ann.name, channel: key });
      await world.restJoin(bob, key);
      await bob.post(key, `to ${key}`);
      const heard = await ann.waitFor('message:post', (m) => m.channel === key);
      assert.strictEqual(heard.message, `to ${key}`);
      const page = await ask(banter(), 'GET', channelPath(key, 'messages?start=0&end=1'), { token: ann.token });
      assert.strictEqual(JSON.parse(page.json.messages[0]).channel, key);
    }
    // Encoded more than it needs to be, it is the same channel.
    const encoded = await ask(banter(), 'POST', '/channels/gen%65r%61l/join', { token: ann.token });
    assert.strictEqual(encoded.json.key, 'general');
    const { token } = ann;
    for (const [type, body] of [['text/plain', 'hello'], ['application/json', '{broken'], ['application/x-www-form-urlencoded', 'a=b']]) {
      const answer = await ask(banter(), 'POST', '/channels/general/join', { token, body, headers: { 'content-type': type } });
      assert.strictEqual(answer.status, 200, `a body of type ${type} does not matter: ${answer.text}`);
    }
    for (const key of ['k'.repeat(129), '日'.repeat(129)]) {
      await refused(banter(), 400, 'POST', channelPath(key, 'join'), { token });
      await refused(banter(), 400, 'GET', channelPath(key, 'messages?start=0&end=25'), { token });
    }
    for (const raw of ['%FF', '%C3%28', 'a%80']) await refused(banter(), 400, 'POST', `/channels/${raw}/join`, { token });
  });

  scenario('joining answers the latest 25 messages, oldest first, and live events go on where they end', async (world) => {
    const key = banter().key();
    const ann = await world.person('ann');
    const bob = await world.person('bob');
    await world.restJoin(ann, key);
    for (let i = 1; i <= 30; i++) await ann.post(key, `message ${i}`);
    const { messages } = await world.restJoin(bob, key);
    assert.strictEqual(messages.length, 25);
    const parsed = messages.map((message) => {
      assert.strictEqual(typeof message, 'string', 'each element is a string of JSON');
      return JSON.parse(message);
    });
    assert.deepStrictEqual(parsed.map(({ message }) => message), Array.from({ length: 25 }, (_, i) => `message ${i + 6}`));
    for (const one of parsed) {
      for (const field of ['message', 'user', 'date', 'id', 'channel']) assert.ok(field in one, `${field} in ${JSON.stringify(one)}`);
      assert.match(one.date, /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$/);
      assert.ok(Math.abs(Date.parse(one.date) - Date.now()) < 120_000, 'the date is now, in UTC');
    }
    await ann.post(key, 'live');
    await bob.waitFor('message:post', (m) => m.message === 'live');
    const live = bob.all('message:post', (m) => m.channel === key).map(({ id }) => id);
    assert.deepStrictEqual(live, [parsed.at(-1).id + 1], 'no gap and no overlap');
  });

  scenario('history goes by position from the newest, and by id before and after', async (world) => {
    const key = banter().key();
    const ann = await world.person('ann');
    await world.restJoin(ann, key);
    const ids = [];
    for (let i = 0; i < 60; i++) ids.push((await ann.post(key, `${i}`)).id);
    const get = async (query) => {
      const answer = await ask(banter(), 'GET', channelPath(key, `messages?${query}`), { token: ann.token });
      assert.strictEqual(answer.status, 200, `${query}: ${answer.text}`);
      assert.ok(Array.isArray(answer.json.messages), answer.text.slice(0, 200));
      return answer.json.messages.map((m) => Number(JSON.parse(m).message));
    };
    const range = (from, to) => Array.from({ length: Math.max(0, to - from) }, (_, i) => from + i);
    assert.deepStrictEqual(await get('start=0&end=25'), range(35, 60));
    assert.deepStrictEqual(await get('start=25&end=50'), range(10, 35));
    assert.deepStrictEqual(await get('start=50&end=75'), range(0, 10), 'fewer than asked: the beginning');
    assert.deepStrictEqual(await get('start=60&end=85'), []);
    assert.deepStrictEqual(await get('start=1000&end=1025'), []);
    assert.deepStrictEqual(await get('start=0&end=1'), [59]);
    assert.deepStrictEqual(await get('end=5&start=3'), [55, 56], 'in either order');
    assert.deepStrictEqual(await get('start=7&end=7'), [], 'an empty range is empty');
    assert.deepStrictEqual(await get(`before=${ids[30]}&limit=10`), range(20, 30));
    assert.deepStrictEqual(await get(`before=${ids[4]}&limit=10`), range(0, 4));
    assert.deepStrictEqual(await get(`before=${ids[0]}&limit=10`), []);
    assert.deepStrictEqual(await get(`after=${ids[30]}&limit=10`), range(31, 41));
    assert.deepStrictEqual(await get(`after=${ids[55]}&limit=10`), range(56, 60));
    assert.deepStrictEqual(await get(`after=${ids[59]}&limit=10`), []);
    assert.deepStrictEqual(await get('after=0&limit=5'), range(0, 5));
    const empty = await ask(banter(), 'GET', channelPath(banter().key(), 'messages?start=0&end=25'), { token: ann.token });
    assertLike(empty.json, { messages: [] }, 'a channel nobody wrote to');
    for (const query of [
      '', 'start=0', 'end=25', 'start=&end=', 'start=-1&end=25', 'start=0&end=-1', 'start=0.5&end=25', 'start=0&end=2.5',
      'start=a&end=b', 'start=0&end=1e1', 'start=0x0&end=25', 'start=5&end=4', 'start=0&end=99999999999999999999999',
      'start=NaN&end=Infinity', 'before=-1&limit=5', 'before=x&limit=5', 'before=5&limit=-1', 'before=5&limit=1.5', 'before=1.5&limit=5',
      'after=x&limit=5', 'after=-1&limit=5', 'after=5&limit=x',
    ]) {
      await refused(banter(), 400, 'GET', channelPath(key, `messages?${query}`), { token: ann.token });
    }
  });

  scenario('history gives at most 200 messages a request', async (world) => {
    const key = banter().key();
    const ann = await world.person('ann');
    await world.restJoin(ann, key);
    const acks = await Promise.all(Array.from({ length: 210 }, (_, i) => ann.post(key, `${i}`)));
    const ids = acks.map(({ id }) => id);
    for (const query of ['start=0&end=200', `before=${ids.at(-1) + 1}&limit=200`, 'after=0&limit=200']) {
      const answer = await ask(banter(), 'GET', channelPath(key, `messages?${query}`), { token: ann.token });
      assert.strictEqual(answer.json.messages.length, 200, query);
    }
    for (const query of ['start=0&end=210', `before=${ids.at(-1) + 1}&limit=210`, 'after=0&limit=210']) {
      const answer = await ask(banter(), 'GET', channelPath(key, `messages?${query}`), { token: ann.token });
      assert.ok(answer.status === 400 || answer.json.messages.length <= 200, `${query}: ${answer.status}`);
    }
  });

  scenario('a join by REST without a living session answers the same; nobody hears it and nobody is joined', async (world) => {
    const key = banter().key();
    const ann = await world.person('ann');
    await world.restJoin(ann, key);
    await ann.post(key, 'first');
    const ghost = await banter().register('ghost');
    const answer = await ask(banter(), 'POST', channelPath(key, 'join'), { token: ghost.token });
    assert.strictEqual(answer.status, 200, answer.text);
    assert.strictEqual(answer.json.key, key);
    assert.deepStrictEqual(answer.json.messages.map((m) => JSON.parse(m).message), ['first']);
    assert.ok(answer.json.onlineUsers.some(({ username }) => username === ann.name));
    const bob = await world.person('bob');
    const { onlineUsers } = await world.restJoin(bob, key);
    assert.ok(!onlineUsers.some(({ username }) => username === ghost.name), 'it is not joined');
    await ann.waitFor('user : joined', (p) => p.username === bob.name);
    assert.deepStrictEqual(ann.all('user : joined', (p) => p.username === ghost.name), [], 'nobody heard it');
  });

  scenario('health says ok, which worker, and the version', async () => {
    const answer = await ask(banter(), 'GET', '/health');
    assert.strictEqual(answer.status, 200);
    assert.strictEqual(answer.json.status, 'ok');
    assert.ok(banter().workerNumbers().includes(Number(answer.json.worker)), `worker ${answer.json.worker}`);
    assert.match(answer.json.version, /^\d+\.\d+\.\d+/);
  });

  scenario('unknown routes are 404 and wrong methods 405, in JSON', async () => {
    const { token } = await banter().register();
    for (const [method, path] of [
      ['GET', '/nope'], ['POST', '/nope/nope'], ['GET', '/channels/general'], ['GET', '/auth'], ['GET', '/auth/nope'], ['POST', '/channels/general/join/x'],
      ['GET', '/..%2f..%2fetc%2fpasswd'], ['GET', '/channels//messages?start=0&end=5'],
    ]) {
      const answer = await refusedAny(method, path, { token });
      assert.ok(answer.status === 404 || (path.includes('//') && answer.status === 400), `${method} ${path}: ${answer.status}`);
    }
    for (const [method, path] of [
      ['GET', '/auth/login'], ['GET', '/auth/register'], ['PUT', '/auth/login'], ['DELETE', '/channels'], ['PATCH', '/channels'],
      ['GET', '/channels/general/join'], ['POST', '/channels/general/messages'], ['DELETE', '/channels/general/messages'], ['POST', '/health'],
    ]) {
      await refused(banter(), 405, method, path, { token });
    }
    async function refusedAny(method, path, options) {
      const answer = await ask(banter(), method, path, options);
      assert.strictEqual(typeof answer.json.error, 'string', answer.text);
      return answer;
    }
  });

  scenario('bodies: malformed JSON 400, too big 413, another type 415, none at all "Missing parameter!"', async () => {
    const body = JSON.stringify({ name: 'Bodies1', password: 'sesame' });
    const send = (status, raw, type, text) => {
      const headers = type === undefined ? {} : { 'content-type': type };
      return refused(banter(), status, 'POST', '/auth/register', { body: raw, headers }, text);
    };
    for (const raw of ['{', '{"name":"x"', 'name=x', '{"name":"x",}', '\u0000', '{"name":"\\ud800","password":"sesame"}']) {
      await send(400, raw, 'application/json');
    }
    await send(400, Buffer.from([0x7b, 0x22, 0xff, 0xfe, 0x22, 0x7d]), 'application/json');
    await send(400, '['.repeat(20_000), 'application/json');
    for (const type of ['text/plain', 'application/x-www-form-urlencoded', 'multipart/form-data; boundary=x', 'application/jsonx', 'text/json;application/json', undefined]) {
      await send(415, body, type);
    }
    await send(400, undefined, undefined, 'Missing parameter!');
    await send(400, undefined, 'application/json', 'Missing parameter!');
    await refused(banter(), 400, 'POST', '/auth/login', {}, 'Missing parameter!');
    const { token } = await banter().register();
    await refused(banter(), 400, 'POST', '/channels', { token });

    const big = JSON.stringify({ name: 'Bodies1', password: 'sesame', padding: 'x'.repeat(64 * 1024) });
    await send(413, big, 'application/json');
    await refused(banter(), 413, 'POST', '/auth/register', {
      body: big, headers: { 'content-type': 'application/json', 'transfer-encoding': 'chunked' },
    });
    const padded = JSON.stringify({ name: 'Bodies1', password: 'sesame', padding: '' });
    const full = padded.replace('""', `"${'x'.repeat(64 * 1024 - padded.length)}"`);
    assert.strictEqual(full.length, 64 * 1024);
    const answer = await ask(banter(), 'POST', '/auth/register', { body: full, headers: { 'content-type': 'application/json' } });
    assert.strictEqual(answer.status, 200, `64 KiB exactly are taken: ${answer.text}`);
    for (const [i, type] of ['application/json; charset=utf-8', 'application/json;charset=UTF-8', 'Application/JSON'].entries()) {
      const named = JSON.stringify({ name: `Charset${i}`, password: 'sesame' });
      const taken = await ask(banter(), 'POST', '/auth/register', { body: named, headers: { 'content-type': type } });
      assert.strictEqual(taken.status, 200, `${type}: ${taken.text}`);
    }
  });

  scenario('preflights allow authorization and content-type from any origin, on every route', async () => {
    for (const path of ['/auth/register', '/channels', '/channels/general/join', '/channels/x/messages?start=0&end=5', '/nope', '/socket.io/?EIO=4&transport=polling']) {
      const answer = await banter().api('OPTIONS', path, {
        headers: {
          origin: ORIGIN,
          'access-control-request-method': 'POST',
          'access-control-request-headers': 'authorization,content-type',
        },
      });
      assert.ok([200, 204].includes(answer.status), `OPTIONS ${path}: ${answer.status} ${answer.text}`);
      assert.ok(['*', ORIGIN].includes(answer.headers['access-control-allow-origin']), `OPTIONS ${path}`);
      // The wildcard does not cover authorization: it must be named.
      const headers = (answer.headers['access-control-allow-headers'] ?? '').toLowerCase().split(/\s*,\s*/);
      assert.ok(headers.includes('authorization') && headers.includes('content-type'), `OPTIONS ${path}: ${headers}`);
      assert.match(answer.headers['access-control-allow-methods'] ?? 'POST', /POST|\*/);
    }
  });

  scenario('on the Socket.IO path CORS echoes the origin and allows credentials, refusals included', async () => {
    const { token } = await banter().register();
    const cases = [
      [`/socket.io/?EIO=4&transport=polling`, 200],
      [`/socket.io/?EIO=3&transport=polling&token=${token}`, 200],
      ['/socket.io/?EIO=3&transport=polling&token=bad', undefined],
      ['/socket.io/?EIO=3&transport=polling', undefined],
      ['/socket.io/?EIO=4&transport=polling&sid=unknown', undefined],
      ['/socket.io/?EIO=9&transport=polling', undefined],
    ];
    for (const [path, status] of cases) {
      const answer = await banter().api('GET', path, { headers: { origin: ORIGIN } });
      if (status) assert.strictEqual(answer.status, status, `${path}: ${answer.text}`);
      else assert.ok(answer.status >= 400 && answer.status < 500, `${path}: ${answer.status}`);
      assert.strictEqual(answer.headers['access-control-allow-origin'], ORIGIN, path);
      assert.strictEqual(answer.headers['access-control-allow-credentials'], 'true', path);
    }
    const preflight = await banter().api('OPTIONS', '/socket.io/?EIO=4&transport=polling', {
      headers: { origin: ORIGIN, 'access-control-request-method': 'POST', 'access-control-request-headers': 'content-type' },
    });
    assert.strictEqual(preflight.headers['access-control-allow-origin'], ORIGIN);
    assert.strictEqual(preflight.headers['access-control-allow-credentials'], 'true');
  });

  scenario('several requests on one connection work, refused ones in between', async () => {
    const { token } = await banter().register();
    const agent = new http.Agent({ keepAlive: true, maxSockets: 1 });
    try {
      const sockets = new Set();
      agent.on('free', (socket) => sockets.add(socket));
      for (let i = 0; i < 10; i++) {
        const wrong = await ask(banter(), 'GET', '/channels', { agent });
        assert.strictEqual(wrong.status, 401);
        const right = await ask(banter(), 'GET', '/channels', { token, agent });
        assert.strictEqual(right.status, 200);
        const created = await ask(banter(), 'POST', '/channels', { token, agent, body: { name: `keep alive ${i}` } });
        assert.strictEqual(created.status, 201);
      }
      assert.strictEqual(sockets.size, 1, 'one connection served them all');
    } finally {
      agent.destroy();
    }
  });
});

suite('REST rate limits', { workers: 1, env: { BANTER_AUTH_RATE: '5' } }, (scenario, banter) => {
  const limited = (answer) => {
    assert.strictEqual(answer.status, 429, answer.text);
    assert.match(answer.headers['retry-after'] ?? '', /^[1-9]\d*$/, 'Retry-After in whole seconds');
    assert.strictEqual(typeof answer.json.error, 'string');
  };

  scenario('failed logins beyond the rate of an address get 429 with Retry-After; other addresses do not notice', async () => {
    const from = { localAddress: '127.0.7.1' };
    let last;
    for (let i = 0; i < 12; i++) {
      last = await ask(banter(), 'POST', '/auth/login', { ...from, body: { name: `nobody${i}`, password: 'wrong password' } });
      if (last.status === 429) break;
      assert.strictEqual(last.status, 401, `attempt ${i + 1}: ${last.text}`);
    }
    limited(last);
    const elsewhere = await ask(banter(), 'POST', '/auth/login', { localAddress: '127.0.7.2', body: { name: 'nobody', password: 'wrong password' } });
    assert.strictEqual(elsewhere.status, 401);
  });

  scenario('five failed logins a minute are allowed, and successful ones do not count', async () => {
    const from = { localAddress: '127.0.7.3' };
    const user = await banter().register('steady', { localAddress: '127.0.7.4' });
    for (let i = 0; i < 10; i++) {
      const answer = await ask(banter(), 'POST', '/auth/login', { ...from, body: { name: user.name, password: user.password } });
      assert.strictEqual(answer.status, 200, `successful login ${i + 1}: ${answer.text}`);
    }
    for (let i = 0; i < 5; i++) {
      const answer = await ask(banter(), 'POST', '/auth/login', { ...from, body: { name: `absent${i}`, password: 'wrong password' } });
      assert.strictEqual(answer.status, 401, `failed login ${i + 1}: ${answer.text}`);
    }
  });

  scenario('registrations beyond the rate of an address get 429 with Retry-After', async () => {
    const from = { localAddress: '127.0.7.5' };
    let last;
    let taken = 0;
    for (let i = 0; i < 12; i++) {
      last = await ask(banter(), 'POST', '/auth/register', { ...from, body: { name: `Mass${i}`, password: 'sesame' } });
      if (last.status === 429) break;
      assert.strictEqual(last.status, 200, last.text);
      taken += 1;
    }
    limited(last);
    assert.ok(taken >= 5, `${taken} registrations were allowed, 5 are a minute's`);
  });
});

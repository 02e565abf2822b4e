'use strict';
// The log: what must never be in it, for all that it says when someone looks for a fault.

const assert = require('node:assert');
const { suite } = require('./lib/suite.js');
const { SECRET } = require('./lib/banter.js');
const { VERSIONS } = require('./lib/client.js');
const { until } = require('./lib/wait.js');

suite('secrets', { workers: 2, env: { RUST_LOG: 'debug', BANTER_GRACE: '1' } }, (scenario, banter) => {
  scenario('neither keys of private channels, messages, tokens, passwords nor secrets of sessions are ever logged', async (world) => {
    const key = banter().key('a-private-channel-that-only-its-members-know');
    const message = 'for the members alone';
    const secrets = { 'the key': key, 'a message': message, 'what signs the tokens': SECRET };
    const keep = (what, value) => { secrets[`${what} ${Object.keys(secrets).length}`] = value; };

    const witness = await world.person('witness', { localAddress: await banter().addressOfWorker(1) });
    await witness.join(key);
    for (const version of VERSIONS) {
      for (const transport of ['polling', 'websocket']) {
        const user = await banter().register('spy');
        const again = await banter().api('POST', '/auth/login', { body: { name: user.name, password: user.password } });
        const ann = await world.connect({ version, transport, token: again.json.token, name: user.name, localAddress: await banter().addressOfWorker(0) });
        await world.restJoin(ann, key, { localAddress: witness.localAddress });
        await ann.join(key, 0);
        await ann.post(key, message, { nonce: 'a nonce' });
        await ann.emitAck('channel:typing', { channel: key });
        await ann.emitAck('user : status_changed', { channel: key, status: 'away' });
        const { session } = ann.lastLogin;
        await ann.destroyTransport();
        ann.session = session;
        ann.resume = { [key]: 1 };
        await ann.open();
        await ann.emitAck('user : left', { channel: key });
        await ann.emitAck('message:post', { channel: key, message });
        for (const rest of [`/channels/${key}/messages?start=0&end=5`, `/channels/${key}/nothing`]) await banter().api('GET', rest, { token: ann.token });
        keep('a password', user.password);
        keep('a token', user.token);
        keep('a token', again.json.token);
        keep('a session', session);
        keep('a session', ann.lastLogin.session);
        ann.quit();
      }
    }
    const wrong = 'a password that is wrong';
    keep('a password', wrong);
    await banter().api('POST', '/auth/login', { body: { name: witness.name, password: wrong } });
    const tampered = `${witness.token}x`;
    await banter().api('GET', '/channels', { token: tampered });
    keep('a token', witness.token);
    // What goes wrong says its part too.
    banter().kill9Master();
    await until('the room is open again', async () => {
      const ack = await witness.emitAck('channel:join', { channel: key, after: 0 });
      return ack.error === undefined;
    }, 20_000);
    banter().kill9Worker(0);
    await until('the master has noticed', () => /worker_left/.test(banter().logs()));

    const lines = banter().logs().split('\n');
    assert.ok(lines.some((line) => /DEBUG/.test(line)) && lines.some((line) => /logged_in/.test(line)), 'the log is on');
    for (const [what, secret] of Object.entries(secrets)) {
      assert.deepStrictEqual(lines.filter((line) => line.includes(secret)).slice(0, 3), [], what);
    }
  });
});

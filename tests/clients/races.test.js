'use strict';
// Things that happen at the same time: a session ends, is taken over or left while something else
// about it is still under way.

const assert = require('node:assert');
const http = require('node:http');
const { suite } = require('./lib/suite.js');
const { RawWebSocket } = require('./lib/raw.js');
const { VERSIONS } = require('./lib/client.js');
const { sleep, until, within } = require('./lib/wait.js');

/** A polling client of Engine.IO 4 or 3 by hand: what it was told, request by request. */
class Poller {
  constructor(banter, eio, token) {
    this.banter = banter;
    this.eio = eio;
    this.token = token;
    this.agent = new http.Agent({ keepAlive: true });
    this.path = `/socket.io/?EIO=${eio}&transport=polling`;
  }

  /** Opens a session and polls until `logged_in`. */
  async open() {
    const hello = await this.request('GET', this.eio === 3 ? `${this.path}&token=${this.token}` : this.path);
    assert.strictEqual(hello.status, 200, hello.text);
    const [, sid] = /"sid":"([^"]+)"/.exec(hello.text);
    this.path += `&sid=${sid}`;
    if (this.eio === 4) await this.request('POST', this.path, `40${JSON.stringify({ token: this.token })}`);
    let text = hello.text;
    await until('logged_in', async () => /logged_in/.test(text) || !(text = (await this.poll()).text), 10_000);
    [, this.session] = /"session":"([^"]+)"/.exec(text);
    return this;
  }

  poll() {
    return this.request('GET', this.path);
  }

  request(method, path, body) {
    const headers = body === undefined ? {} : { 'content-type': 'text/plain;charset=UTF-8' };
    return this.banter.api(method, path, { agent: this.agent, body, headers });
  }

  /** Its connections vanish, without a word. */
  vanish() {
    this.agent.destroy();
  }
}

suite('a worker dies under those who wait', { workers: 2, env: { BANTER_GRACE: '20' } }, (scenario, banter) => {
  /** Someone with a session on worker 0, in a channel, and a second connection to worker 1 that is not open yet. */
  async function twice(world) {
    const ann = await world.person('ann', { localAddress: await banter().addressOfWorker(0) });
    const key = banter().key();
    await ann.join(key);
    const again = world.client({ token: ann.token, name: ann.name, localAddress: await banter().addressOfWorker(1) });
    return { key, again };
  }

  /** Both workers are there again, for the next scenario. */
  const recovered = () => until('both workers serve', async () => {
    banter().addresses = undefined;
    return banter().workerNumbers().length === 2 && await banter().addressOfWorker(0).catch(() => false);
  }, 20_000);

  async function getsIt({ key, again }) {
    await again.when('logged_in or name_taken', () => again.log.length > 0, 15_000);
    assert.deepStrictEqual(again.log.map(({ event }) => event).slice(0, 1), ['logged_in'], 'not name_taken: the one that had the name is gone');
    assert.strictEqual(again.lastLogin.resumed, true);
    assert.deepStrictEqual(again.lastLogin.channels.map((channel) => channel.key), [key]);
    await again.post(key, 'here again');
  }

  scenario('a newcomer that is held while the worker of its session hangs and is given up gets the session', async (world) => {
    // A worker is given up five to six seconds after it hung, and a newcomer is held for three.
    const comers = [];
    for (const after of [3_300, 3_700, 4_100, 4_500]) comers.push({ after, ...await twice(world) });
    const worker = banter().workerPid(0);
    process.kill(worker, 'SIGSTOP');
    try {
      const start = performance.now();
      for (const comer of comers) {
        await sleep(comer.after - (performance.now() - start));
        comer.again.start();
      }
      await Promise.all(comers.map(getsIt));
    } finally {
      process.kill(worker, 'SIGKILL');
    }
    await recovered();
  });

  scenario('a newcomer that is held while the worker of its session is killed gets the session at once', async (world) => {
    const comer = await twice(world);
    comer.again.start();
    await comer.again.waitForLife('connect');
    assert.deepStrictEqual(comer.again.log, [], 'it is held');
    banter().kill9Worker(0);
    const start = performance.now();
    await getsIt(comer);
    assert.ok(performance.now() - start < 1_500, `after ${(performance.now() - start).toFixed(0)} ms`);
    await recovered();
  });
});

suite('at the same time', { workers: 1, env: { BANTER_GRACE: '15' } }, (scenario, banter) => {
  scenario('leaving a channel by the socket and joining it by REST at once: whoever is in the room is in its list, and nobody else', async (world) => {
    const ann = await world.person('ann');
    const bob = await world.person('bob', { version: 2 });
    const eve = await world.person('eve');
    const other = banter().key();
    // The events before it keep the session busy for a while: the join comes before, between or after.
    for (const busy of [0, 1, 3, 10, 30, 100, 300, 300]) {
      const key = banter().key();
      for (const client of [ann, bob, eve]) await world.restJoin(client, key);
      for (let i = 0; i < busy; i++) ann.emit('channel:join', { channel: other });
      const left = ann.emitAck('user : left', { channel: key });
      const joined = await banter().api('POST', `/channels/${key}/join`, { token: ann.token });
      // 503: she left while she joined.
      assert.ok([200, 503].includes(joined.status), joined.text);
      await left;

      const { onlineUsers } = await world.restJoin(bob, key);
      const listed = onlineUsers.some(({ username }) => username === ann.name);
      const { id } = await bob.post(key, 'who is here?');
      await eve.waitFor('message:post', (m) => m.channel === key && m.id === id);
      const ack = await ann.emitAck('message:post', { channel: key, message: 'am I?' });
      // Both sockets were served in the same turn, so what Ann is told came before the acknowledgement.
      const hears = ann.all('message:post', (m) => m.channel === key && m.id === id).length > 0;
      const what = `behind ${busy} events, listed: ${listed}`;
      assert.strictEqual(hears, listed, `${what}, hears: ${hears}`);
      assert.strictEqual(ack.error === undefined, listed, `${what}, posts: ${JSON.stringify(ack)}`);
    }
  });

  for (const eio of [3, 4]) {
    scenario(`the poll of a client (Engine.IO ${eio}) whose session is taken over ends in an HTTP error, so that the client comes back, never in a packet that tells it not to`, async (world) => {
      for (let round = 0; round < 12; round++) {
        const user = await banter().register('poller');
        const old = await new Poller(banter(), eio, user.token).open();
        const waiting = round % 2 ? old.poll() : undefined;
        await world.connect({ token: user.token, session: old.session });
        const answer = await within('the poll is answered', waiting ?? old.poll(), 5_000);
        assert.ok(answer.status >= 400, `round ${round}: ${answer.status} ${answer.text}`);
        assert.doesNotMatch(answer.text, /41/);
        assert.ok((await old.poll()).status >= 400, 'nor does it know the session later');
        old.vanish();
      }
    });
  }

  scenario('a connection that was upgraded before CONNECT is closed when its session is taken over', async (world) => {
    const { token } = await banter().register('upgraded');
    const agent = new http.Agent({ keepAlive: true, maxSockets: 1 });
    const hello = await banter().api('GET', '/socket.io/?EIO=4&transport=polling', { agent });
    const [, sid] = /"sid":"([^"]+)"/.exec(hello.text);
    const old = await RawWebSocket.open(banter().port, { EIO: 4, sid });
    await old.send('2probe');
    await old.waitFor(/^3probe$/);
    await old.send('5');
    await old.send(`40${JSON.stringify({ token })}`);
    const [, session] = /"session":"([^"]+)"/.exec(await old.waitFor(/logged_in/));
    await world.connect({ token, session });
    await old.waitForClose(3_000);
    assert.ok(!old.texts.some((text) => text.startsWith('41')), `${old.texts}`);
    agent.destroy();
  });

  for (const version of VERSIONS) {
    scenario(`client ${version}, upgraded from polling, loses its connection when its session is taken over`, async (world) => {
      const old = await world.person('old', { version, transport: 'upgrade' });
      await world.connect({ token: old.token, session: old.lastLogin.session });
      await old.waitForLife('disconnect', { deadline: 3_000 });
      assert.ok(!/server disconnect/.test(old.life.at(-1).detail), `as if it broke: ${old.life.at(-1).detail}`);
    });
  }

  scenario('a polling client that vanished without a word does not keep its name for the whole ping timeout', async (world) => {
    const vanish = async (eio, polling) => {
      const user = await banter().register('vanished');
      const old = await new Poller(banter(), eio, user.token).open();
      const poll = polling ? old.poll().catch(() => {}) : undefined;
      old.vanish();
      await poll;
      const start = performance.now();
      const next = await world.connect({ token: user.token });
      assert.strictEqual(next.lastLogin.resumed, true);
      assert.ok(performance.now() - start < 5_000, `it took ${(performance.now() - start).toFixed(0)} ms`);
    };
    // In the middle of a poll, and between two.
    await Promise.all([vanish(3, true), vanish(3, false), vanish(4, true), vanish(4, false)]);
  });

  scenario('a polling client that lives keeps its name, and is served on', async (world) => {
    await Promise.all(VERSIONS.map(async (version) => {
      const living = await world.person('living', { version, transport: 'polling' });
      const key = banter().key();
      await living.join(key);
      const second = world.client({ token: living.token }).start();
      await second.waitFor('name_taken');
      await living.post(key, 'still here');
      assert.deepStrictEqual(living.life.map(({ what }) => what), ['connect']);
    }));
  });
});

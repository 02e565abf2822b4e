'use strict';
// Settings read again while clients are connected: what they are allowed changes, and nothing else.

const assert = require('node:assert');
const fs = require('node:fs');
const os = require('node:os');
const path = require('node:path');
const { describe, test } = require('node:test');
const { World } = require('./lib/suite.js');
const { startBanter } = require('./lib/banter.js');
const { until } = require('./lib/wait.js');

describe('reloading', () => {
  test('rates, sizes and the grace period change under living connections', { timeout: 120_000 }, async () => {
    const home = fs.mkdtempSync(path.join(os.tmpdir(), 'banter-reload-'));
    const file = path.join(home, 'banter.conf');
    const write = (settings) => {
      fs.writeFileSync(`${file}.new`, settings.join('\n'));
      fs.renameSync(`${file}.new`, file);
    };
    write(['BANTER_GRACE=3600', 'BANTER_POST_RATE=1', 'BANTER_MAX_MESSAGE=100']);
    const banter = await startBanter({ workers: 1, args: ['--config', file], env: { BANTER_POST_RATE: undefined } });
    const world = new World(banter);
    const reload = async (settings) => {
      write(settings);
      const told = () => banter.logs().split('\n').filter((line) => line.includes('event="reloaded"')).length;
      const before = told();
      process.kill(banter.pid, 'SIGHUP');
      await until('all three have read it again', () => told() === before + 3);
    };
    try {
      const [ann, bob, eve] = [await world.person('ann'), await world.person('bob'), await world.person('eve')];
      const key = banter.key();
      for (const client of [ann, bob, eve]) await client.join(key);
      const posts = (client) => Promise.all(Array.from({ length: 8 }, (_, i) => client.emitAck('message:post', { channel: key, message: `post ${i}` })));
      const refused = (answers) => answers.filter(({ code }) => code === 'rate_limited').length;
      assert.ok(refused(await posts(ann)) >= 4, 'a burst of three');
      assert.ok((await bob.post(key, 'x'.repeat(90))).id);

      await reload(['BANTER_GRACE=3600', 'BANTER_POST_RATE=0', 'BANTER_MAX_MESSAGE=50']);
      assert.strictEqual(refused(await posts(ann)), 0);
      assert.strictEqual((await bob.emitAck('message:post', { channel: key, message: 'x'.repeat(90) })).code, 'too_large');

      // Who is lost now keeps the long grace period; who is lost later has the new one.
      await ann.destroyTransport();
      await until('it is known', () => banter.logs().split('\n').some((line) => line.includes('event="disconnected"') && line.includes(ann.name)));
      await reload(['BANTER_GRACE=1', 'BANTER_POST_RATE=1']);
      await eve.destroyTransport();
      await bob.waitFor('user : quit', ({ username }) => username === eve.name);
      assert.deepStrictEqual(bob.all('user : quit', ({ username }) => username === ann.name), []);
      assert.ok(refused(await posts(bob)) >= 4, 'the rate counts again');
      assert.deepStrictEqual(bob.life.map(({ what }) => what), ['connect'], 'nobody was disconnected');
      await banter.stop();
    } finally {
      world.close();
      await banter.remove();
      fs.rmSync(home, { recursive: true, force: true });
    }
  });
});

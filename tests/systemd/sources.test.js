'use strict';
// README.md's way from the sources to a chat, and on to Redis.

const assert = require('node:assert');
const fs = require('node:fs');
const { suite } = require('./lib/suite.js');
const { ROOT, BINARY, readme, type } = require('./lib/inputs.js');
const { REDIS_SOCKET } = require('./lib/deployment.js');
const { sh, systemctl, stateOf, mainPid, becomes, dropIn } = require('./lib/systemd.js');
const { until } = require('../clients/lib/wait.js');

/** Two people on two workers talk. */
async function chat(world) {
  const { banter } = world;
  await banter.serving();
  const [ann, bob] = await Promise.all([0, 1].map(async (worker) => (
    world.person('chatter', { localAddress: await banter.addressOfWorker(worker) })
  )));
  const key = banter.key();
  for (const client of [ann, bob]) await client.join(key);
  await ann.post(key, 'hear me');
  await bob.waitFor('message:post', (m) => m.message === 'hear me' && m.user === ann.name);
}

suite('from the sources', { bare: true }, (scenario) => {
  scenario('the lines of README.md bring up a chat with two workers', async (world) => {
    // `make install` would build a release.
    const printed = await type(readme('From the sources'), { cwd: ROOT, env: { MAKEFLAGS: `-- BIN=${BINARY}` } });
    assert.match(printed, /^ok: worker [01], version /m);
    assert.strictEqual(fs.readlinkSync(`/proc/${await mainPid('banter.service')}/exe`), '/usr/local/bin/banter');
    await chat(world);
    assert.ok(fs.existsSync('/var/lib/banter/banter.db'));
  });

  scenario('the lines of README.md move it to Redis', async (world) => {
    await type(readme('With Redis'));
    await chat(world);
    const keys = await until('Redis has the messages', async () => {
      const text = await sh('redis-cli', '-s', REDIS_SOCKET, '--raw', 'keys', '{banter}:*');
      return text !== '\n' && text;
    });
    assert.match(keys, /^\{banter\}:/m);
    assert.strictEqual(await stateOf('redis-server.service'), 'active');
  });

  scenario('another port, one worker more, and a start with the machine, as README.md says', async ({ banter }) => {
    await systemctl('stop', 'banter.target');
    dropIn('banter.socket', 'override', '[Socket]\nListenStream=\nListenStream=9000\n');
    await type(['systemctl daemon-reload', 'systemctl enable banter.target', 'systemctl enable --now banter-worker@2', 'systemctl stop banter.target']);
    await systemctl('start', 'multi-user.target');
    await becomes('banter.target', 'active');
    await assert.rejects(banter.api('GET', '/health'), { code: 'ECONNREFUSED' });
    banter.port = 9000;
    await banter.serving([0, 1, 2]);
    await systemctl('disable', '--now', 'banter-worker@2');
    await banter.serving([0, 1]);
  });
});

'use strict';
// The master restarts, dies and hangs, while clients come and others chat.

const assert = require('node:assert');
const { suite } = require('./lib/suite.js');
const { Knocker } = require('./lib/knocker.js');
const { systemctl, mainPid, replaced, journal, becomes } = require('./lib/systemd.js');
const { chatThrough } = require('../clients/lib/village.js');

const RESIDENTS = 6;
/** Connections between accept and hand-off at the instant of a SIGKILL. */
const HANDFUL = 10;

/** Residents chat and newcomers knock while `harm` is done; gives how the newcomers fared. */
async function meanwhile(world, harm) {
  let knocker;
  const { residents, posts } = await chatThrough(world, RESIDENTS, async () => {
    knocker = new Knocker(world.banter);
    await knocker.more(50);
    await harm();
    await knocker.more(100);
  });
  const outcomes = await knocker.stop();
  console.log(`    newcomers: ${JSON.stringify(outcomes)}; ${posts} posts`);
  return { outcomes, residents };
}

/** Those of a kind that had to connect more than once. */
const reconnected = (residents, predicate) => residents.filter(predicate).filter(({ connections }) => connections > 1).map(String);

suite('the master', { redis: true }, (scenario) => {
  scenario('a restart refuses and resets nobody, and disconnects nobody', async (world) => {
    await world.banter.serving();
    const { outcomes, residents } = await meanwhile(world, async () => {
      for (let i = 0; i < 3; i++) {
        const old = await mainPid('banter.service');
        await systemctl('restart', 'banter.service');
        await replaced('banter.service', old);
        await world.banter.serving();
      }
    });
    assert.deepStrictEqual(Object.keys(outcomes), ['200']);
    assert.deepStrictEqual(reconnected(residents, () => true), []);
  });

  scenario('its sudden death refuses nobody, and disconnects nobody who was handed over', async (world) => {
    const { outcomes, residents } = await meanwhile(world, async () => {
      for (let i = 0; i < 3; i++) {
        const old = await mainPid('banter.service');
        await systemctl('kill', '--signal=KILL', 'banter.service');
        await replaced('banter.service', old);
        await world.banter.serving();
      }
    });
    const { 200: served, ECONNRESET: reset = 0, ...others } = outcomes;
    assert.ok(served > 0);
    assert.deepStrictEqual(others, {});
    assert.ok(reset <= HANDFUL, `${reset} reset between accept and hand-off`);
    // A polling client's request may be among those that are reset.
    assert.deepStrictEqual(reconnected(residents, ({ transport }) => transport !== 'polling'), []);
    for (const unit of [0, 1].map((number) => world.banter.unit(number))) {
      assert.deepStrictEqual((await journal(`UNIT=${unit}`, 'JOB_TYPE=restart')).map(({ MESSAGE }) => MESSAGE), [], 'no worker went with it');
    }
  });

  scenario('hanging, it is killed by the watchdog and comes back', async (world) => {
    const { outcomes, residents } = await meanwhile(world, async () => {
      const old = await mainPid('banter.service');
      process.kill(old, 'SIGSTOP');
      await replaced('banter.service', old, 40_000);
      await world.banter.serving();
    });
    const timeouts = await journal('UNIT=banter.service', '--grep=Watchdog timeout');
    assert.strictEqual(timeouts.length, 1);
    const { 200: served, ECONNRESET: reset = 0, ...others } = outcomes;
    assert.ok(served > 0);
    assert.deepStrictEqual(others, {});
    assert.ok(reset <= HANDFUL, `${reset} reset between accept and hand-off`);
    assert.deepStrictEqual(reconnected(residents, ({ transport }) => transport !== 'polling'), []);
    await becomes('banter.service', 'active');
  });
});

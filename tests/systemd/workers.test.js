'use strict';
// Workers come and go, restart, die, hang, and run out of memory: their own clients reconnect and
// resume, and nobody else notices.

const assert = require('node:assert');
const { suite } = require('./lib/suite.js');
const { Knocker } = require('./lib/knocker.js');
const { systemctl, mainPid, replaced, journal, dropIn, becomes } = require('./lib/systemd.js');
const { RawWebSocket, frame, TEXT } = require('../clients/lib/raw.js');
const { chatThrough, assertNobodyQuit } = require('../clients/lib/village.js');
const { until } = require('../clients/lib/wait.js');

const RESIDENTS = 8;

/** Residents chat while `harm` is done; nothing is lost. Gives them. */
async function meanwhile(world, harm) {
  await world.banter.serving();
  const { residents, posts } = await chatThrough(world, RESIDENTS, harm);
  assertNobodyQuit(residents);
  console.log(`    ${posts} posts; connections: ${residents.map(({ connections }) => connections).join(' ')}`);
  return residents;
}

/** Those who live on a worker, by the addresses that the residents have (`settle` takes turns). */
const of = (residents, worker) => residents.filter((_, i) => i % 2 === worker);

suite('workers', { redis: true }, (scenario) => {
  scenario('one that is started joins and one that is stopped leaves at once; a polling client elsewhere chats on without a reconnect', async (world) => {
    const { banter } = world;
    // An address that is worker 7's once there is one.
    await systemctl('start', 'banter-worker@7');
    await banter.serving([0, 1, 7]);
    let address;
    for (let host = 1; address === undefined; host++) {
      if (await banter.workerOfAddress(`127.0.90.${host}`) === 7) address = `127.0.90.${host}`;
    }
    await systemctl('stop', 'banter-worker@7');
    await banter.serving([0, 1]);
    const home = await banter.workerOfAddress(address);
    const key = banter.key();
    const poller = await world.person('poller', { localAddress: address, transport: 'polling', version: 1 });
    const other = await world.person('other', { localAddress: await banter.addressOfWorker(1 - home) });
    for (const client of [poller, other]) await client.join(key);

    const talk = async (text) => {
      await other.post(key, text);
      await poller.waitFor('message:post', (m) => m.message === text);
      await poller.post(key, `${text}, indeed`);
      await other.waitFor('message:post', (m) => m.message === `${text}, indeed`);
    };
    await talk('two workers');
    await systemctl('start', 'banter-worker@7');
    await banter.serving([0, 1, 7]);
    await talk('three workers');
    assert.strictEqual(await banter.workerOfAddress(address), home, 'an address with a living session stays where it is');
    await systemctl('stop', 'banter-worker@7');
    await banter.serving([0, 1]);
    await talk('two workers again');
    for (const client of [poller, other]) {
      assert.strictEqual(client.connections, 1, `${client} never had to reconnect`);
      assert.deepStrictEqual(client.all('user : quit'), []);
    }
  });

  scenario('a restart of one drains it: its clients resume elsewhere, nothing is lost, newcomers are served', async (world) => {
    const { banter } = world;
    const knocker = new Knocker(banter, { pause: 20 });
    const residents = await meanwhile(world, async () => {
      const old = await mainPid(banter.unit(1));
      await systemctl('restart', 'banter-worker@1');
      await replaced(banter.unit(1), old);
      await banter.serving();
    });
    assert.deepStrictEqual(Object.keys(await knocker.stop()), ['200']);
    assert.deepStrictEqual(of(residents, 0).filter(({ connections }) => connections > 1).map(String), [], 'who was elsewhere did not notice');
    assert.deepStrictEqual(of(residents, 1).filter(({ connections }) => connections === 1).map(String), [], 'who was there came back');
  });

  scenario('a rolling restart of all loses nothing', async (world) => {
    const { banter } = world;
    const knocker = new Knocker(banter, { pause: 20 });
    await meanwhile(world, async () => {
      for (const number of banter.workers) {
        const old = await mainPid(banter.unit(number));
        await systemctl('restart', `banter-worker@${number}`);
        await replaced(banter.unit(number), old);
        await banter.serving();
      }
    });
    assert.deepStrictEqual(Object.keys(await knocker.stop()), ['200']);
  });

  scenario('the sudden death of each costs only its own clients a reconnect', async (world) => {
    const { banter } = world;
    for (const number of banter.workers) {
      const residents = await meanwhile(world, async () => {
        const old = await mainPid(banter.unit(number));
        await systemctl('kill', '--signal=KILL', banter.unit(number));
        await replaced(banter.unit(number), old);
        await banter.serving();
      });
      assert.deepStrictEqual(of(residents, 1 - number).filter(({ connections }) => connections > 1).map(String), []);
      for (const resident of residents) await resident.moveOut();
    }
  });

  scenario('hanging, each is killed by the watchdog; its clients resume', async (world) => {
    const { banter } = world;
    for (const number of banter.workers) {
      const residents = await meanwhile(world, async () => {
        const old = await mainPid(banter.unit(number));
        process.kill(old, 'SIGSTOP');
        await replaced(banter.unit(number), old, 40_000);
        await banter.serving();
      });
      const timeouts = await journal(`UNIT=${banter.unit(number)}`, '--grep=Watchdog timeout');
      assert.strictEqual(timeouts.length, 1);
      assert.deepStrictEqual(of(residents, 1 - number).filter(({ connections }) => connections > 1).map(String), []);
      for (const resident of residents) await resident.moveOut();
    }
  }, { timeout: 180_000 });

  scenario('one that runs out of memory is killed and comes back; only its own clients notice', async (world) => {
    const { banter } = world;
    dropIn(banter.unit(1), 'memory', '[Service]\nMemoryMax=64M\n');
    await systemctl('daemon-reload');
    await systemctl('restart', banter.unit(1));
    await banter.serving();
    const killed = async () => (await journal(`UNIT=${banter.unit(1)}`, 'EXIT_CODE=killed')).length;
    const before = await killed();
    const residents = await meanwhile(world, async () => {
      const old = await mainPid(banter.unit(1));
      // Messages of nearly the largest size that is taken, which never end.
      const hungry = [];
      const localAddress = await banter.addressOfWorker(1);
      const message = frame(TEXT, Buffer.alloc(990_000, '4')).subarray(0, -1);
      try {
        for (let i = 0; i < 150 && await mainPid(banter.unit(1)) === old; i++) {
          const socket = new RawWebSocket(banter.port, { EIO: 4 }, { localAddress });
          hungry.push(socket);
          await until('it is upgraded', () => socket.upgraded || socket.closed);
          socket.write(message);
        }
        await replaced(banter.unit(1), old, 30_000);
      } finally {
        for (const socket of hungry) socket.destroy();
      }
      await banter.serving();
    });
    assert.strictEqual(await killed(), before + 1, 'it was killed, once');
    assert.deepStrictEqual(of(residents, 0).filter(({ connections }) => connections > 1).map(String), []);
    await becomes(banter.unit(0), 'active');
  });
});

'use strict';
// From nothing: the first connection brings everything up. And stopping and starting all of it.

const assert = require('node:assert');
const fs = require('node:fs');
const net = require('node:net');
const { suite } = require('./lib/suite.js');
const { SECRET_FILE } = require('./lib/deployment.js');
const { systemctl, stateOf, becomes, journal, dropIn } = require('./lib/systemd.js');
const { twoPeopleChat } = require('../clients/lib/village.js');
const { until } = require('../clients/lib/wait.js');

const SERVICES = ['banter.service', 'banter-worker@0.service', 'banter-worker@1.service'];
const SOCKETS = ['banter.socket', 'banter-control.socket', 'banter-handoff.socket'];

/** How many processes of Banter there are on this machine. */
function processes() {
  return fs.readdirSync('/proc').filter((pid) => {
    if (!/^\d+$/.test(pid)) return false;
    try {
      return fs.readFileSync(`/proc/${pid}/comm`, 'utf8').trim() === 'banter';
    } catch {
      return false;
    }
  }).length;
}

/** How an attempt to connect ends: `connected`, or the error's code. */
function connect(host, port) {
  return new Promise((resolve) => {
    const socket = net.connect({ host, port });
    const end = (how) => { socket.destroy(); resolve(how); };
    socket.on('connect', () => end('connected'));
    socket.on('error', (error) => end(error.code));
  });
}

suite('cold start', { redis: true }, (scenario) => {
  scenario('nothing runs before the first connection, which starts master and workers and gets its answer', async ({ banter }) => {
    for (const unit of [...SERVICES, 'banter.target']) assert.strictEqual(await stateOf(unit), 'inactive', unit);
    assert.strictEqual(processes(), 0);
    const begun = performance.now();
    const answer = await banter.api('GET', '/health');
    const took = performance.now() - begun;
    assert.strictEqual(answer.status, 200, answer.text);
    console.log(`    from nothing to the first answer: ${took.toFixed(0)} ms (a debug build)`);
    for (const unit of SERVICES) await becomes(unit, 'active');
    assert.strictEqual(processes(), SERVICES.length);
    await becomes('banter.target', 'active');
    await banter.serving();
  });

  scenario('two people on two workers chat, in the cage, with Redis on a unix socket', async (world) => {
    await twoPeopleChat(world);
  });

  scenario('IPv4 and IPv6 reach it', async ({ banter }) => {
    assert.strictEqual(await connect('127.0.0.1', banter.port), 'connected');
    assert.strictEqual(await connect('::1', banter.port), 'connected');
  });

  scenario('stopping the target stops services and sockets: the next connection starts nothing; starting it brings all back', async (world) => {
    const { banter } = world;
    const ann = await world.person('ann');
    const begun = performance.now();
    await systemctl('stop', 'banter.target');
    for (const unit of [...SERVICES, ...SOCKETS]) await becomes(unit, 'inactive', 10_000);
    console.log(`    everything stopped in ${(performance.now() - begun).toFixed(0)} ms`);
    await ann.waitForLife('disconnect');
    for (const unit of SERVICES) {
      const killed = await journal(`UNIT=${unit}`, 'EXIT_CODE=killed');
      assert.deepStrictEqual(killed.map(({ MESSAGE }) => MESSAGE), [], `${unit} ended by itself`);
    }
    assert.strictEqual(await connect('127.0.0.1', banter.port), 'ECONNREFUSED');
    for (const unit of [...SERVICES, ...SOCKETS]) assert.strictEqual(await stateOf(unit), 'inactive', unit);
    assert.strictEqual(processes(), 0);

    await systemctl('start', 'banter.target');
    for (const unit of [...SERVICES, ...SOCKETS]) assert.strictEqual(await stateOf(unit), 'active', unit);
    await banter.serving();
    const again = await banter.api('POST', '/auth/login', { body: { name: ann.name, password: ann.user.password } });
    assert.strictEqual(again.status, 200, again.text);
  });

  scenario('a missing or weak secret is told in one line, with the way out; with a good one the waiting client is answered', async ({ banter }) => {
    await systemctl('stop', 'banter.target');
    for (const unit of [...SERVICES, ...SOCKETS]) await becomes(unit, 'inactive', 10_000);
    const told = async (pattern) => {
      for (const number of banter.workers) {
        await until(`the status of worker ${number} says ${pattern}`, async () => pattern.test(await banter.status(banter.unit(number))), 20_000);
        const lines = await journal(`_SYSTEMD_UNIT=${banter.unit(number)}`);
        assert.ok(lines.some(({ MESSAGE }) => pattern.test(MESSAGE)), 'the journal says so too');
      }
    };
    fs.rmSync(SECRET_FILE);
    await systemctl('start', 'banter.socket');
    const waiting = banter.api('GET', '/health', { deadline: 60_000 });
    await told(/^(banter: )?no JWT secret: .*make one with: \S+/);
    fs.writeFileSync(SECRET_FILE, 'shhhh\n', { mode: 0o600 });
    await told(/JWT secret .*make one with: \S+/);
    const shown = await journal('--unit=banter*');
    assert.ok(shown.every(({ MESSAGE }) => !/shhhh/.test(MESSAGE)), 'the weak secret is not shown');
    banter.makeSecret();
    assert.strictEqual((await waiting).status, 200);
    await banter.serving();
    // It was never started so often that systemd gave up.
    for (const unit of SOCKETS) assert.strictEqual(await stateOf(unit), 'active', unit);
  });

  scenario('a socket that is missing or has another name is told in one line', async ({ banter }) => {
    await systemctl('stop', 'banter.target');
    for (const unit of [...SERVICES, ...SOCKETS]) await becomes(unit, 'inactive', 10_000);
    dropIn('banter-control.socket', 'name', '[Socket]\nFileDescriptorName=something-else\n');
    await systemctl('daemon-reload');
    await systemctl('start', 'banter.socket');
    const waiting = banter.api('GET', '/health', { deadline: 60_000 });
    await until('the master says what is missing', async () => /no socket named "banter-control"/.test(await banter.status('banter.service')), 20_000);
    fs.rmSync('/etc/systemd/system/banter-control.socket.d', { recursive: true });
    await systemctl('daemon-reload');
    await systemctl('stop', 'banter-control.socket');
    assert.strictEqual((await waiting).status, 200);
    await banter.serving();
  });
});

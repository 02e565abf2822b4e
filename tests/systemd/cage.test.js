'use strict';
// What the services may do, and what they say of themselves.

const assert = require('node:assert');
const fs = require('node:fs');
const net = require('node:net');
const { suite } = require('./lib/suite.js');
const { SETTINGS_FILE } = require('./lib/deployment.js');
const { sh, run, systemctl, show, mainPid, journal, dropIn, becomes } = require('./lib/systemd.js');
const { until } = require('../clients/lib/wait.js');

const SERVICES = ['banter.service', 'banter-worker@0.service', 'banter-worker@1.service'];
const UNITS = [...SERVICES, 'banter.socket', 'banter-control.socket', 'banter-handoff.socket', 'banter.target'];
/** On the scale of systemd 252, from 0 to 10. */
const MAX_EXPOSURE = 0.6;

suite('the cage', { redis: true }, (scenario) => {
  scenario('systemd-analyze has nothing to say against the units', async () => {
    const { code, stdout, stderr } = await run('systemd-analyze', 'verify', ...UNITS);
    assert.deepStrictEqual({ code, stdout, stderr }, { code: 0, stdout: '', stderr: '' });
  });

  scenario('the exposure of each service is small', async ({ banter }) => {
    await systemctl('start', 'banter.target');
    await banter.serving();
    for (const unit of SERVICES) {
      const text = await sh('systemd-analyze', 'security', '--no-pager', unit);
      const exposure = Number(/Overall exposure level for \S+: ([\d.]+)/.exec(text)[1]);
      console.log(`    systemd-analyze security ${unit}: ${exposure}`);
      assert.ok(exposure <= MAX_EXPOSURE, `${unit}: ${exposure}\n${text}`);
    }
  });

  scenario('the processes have no network, no privileges, and a filter on what they may ask of the kernel', async () => {
    const own = fs.readlinkSync('/proc/self/ns/net');
    for (const unit of SERVICES) {
      const pid = await mainPid(unit);
      const status = fs.readFileSync(`/proc/${pid}/status`, 'utf8');
      const line = (name) => new RegExp(`^${name}:\\s+(.*)$`, 'm').exec(status)[1];
      assert.notStrictEqual(fs.readlinkSync(`/proc/${pid}/ns/net`), own, `${unit} has a network namespace of its own`);
      for (const set of ['CapPrm', 'CapEff', 'CapBnd', 'CapAmb']) assert.match(line(set), /^0+$/, `${unit}: ${set}`);
      assert.strictEqual(line('NoNewPrivs'), '1');
      assert.strictEqual(line('Seccomp'), '2');
      assert.notStrictEqual(line('Uid').split('\t')[0], '0');
    }
  });

  scenario('the journal can be searched by worker, user and event', async (world) => {
    const { banter } = world;
    const ann = await world.person('ann', { localAddress: await banter.addressOfWorker(1) });
    const bad = await banter.api('POST', '/auth/login', { body: { name: ann.name, password: 'a wrong one, surely' } });
    assert.strictEqual(bad.status, 401);
    const [login] = await until('the journal has the login', async () => {
      const found = await journal(`BANTER_USER=${ann.name}`, 'BANTER_EVENT=logged_in');
      return found.length > 0 && found;
    });
    assert.strictEqual(login.BANTER_WORKER, '1');
    assert.strictEqual(login._SYSTEMD_UNIT, 'banter-worker@1.service');
    assert.strictEqual(login.SYSLOG_IDENTIFIER, 'banter');
    assert.ok((await journal('BANTER_WORKER=1')).length > 0);
    const started = await journal('BANTER_EVENT=master_started');
    assert.ok(started.length > 0 && started.every((entry) => entry._SYSTEMD_UNIT === 'banter.service'));
    const all = await journal('SYSLOG_IDENTIFIER=banter');
    // An entry without a text is not shown by `journalctl`.
    assert.deepStrictEqual(all.filter(({ MESSAGE }) => !MESSAGE), []);
    const text = JSON.stringify(all);
    for (const secret of [fs.readFileSync('/etc/banter/jwt-secret', 'utf8').trim(), ann.token, ann.user.password, 'a wrong one, surely']) {
      assert.ok(!text.includes(secret), 'a secret in the journal');
    }
  });

  scenario('the status tells what goes on', async (world) => {
    const { banter } = world;
    await world.person('ann', { localAddress: await banter.addressOfWorker(0) });
    await until('the master counts workers and users', async () => /2 workers, .*1 user/.test(await banter.status('banter.service')));
    await until('the worker counts its users', async () => /1 user/.test(await banter.status('banter-worker@0.service')));
  });

  scenario('reloading applies limits and log level to master and workers, without a restart; a broken file changes nothing', async ({ banter }) => {
    const pids = await Promise.all(SERVICES.map(mainPid));
    const attempt = async (worker) => {
      const localAddress = await banter.addressOfWorker(worker);
      const codes = [];
      for (let i = 0; i < 4; i++) {
        const { status } = await banter.api('POST', '/auth/login', { localAddress, body: { name: `nobody${worker}`, password: 'wrong' } });
        codes.push(status);
      }
      return codes;
    };
    assert.deepStrictEqual(await attempt(0), [401, 401, 401, 401]);
    banter.configure({ BANTER_AUTH_RATE: 2 });
    await systemctl('reload', 'banter.service');
    for (const worker of [0, 1]) {
      await until(`worker ${worker} has the new limit`, async () => (await attempt(worker)).includes(429));
    }
    const workersFor = async () => {
      const workers = new Set();
      for (let host = 1; host <= 40; host++) {
        const { json } = await banter.api('GET', '/health', { headers: { 'x-forwarded-for': `192.0.2.${host}` } });
        workers.add(json.worker);
      }
      return workers.size;
    };
    assert.strictEqual(await workersFor(), 1, 'nobody is believed yet');
    banter.configure({ BANTER_AUTH_RATE: 2, BANTER_TRUST_PROXY: '127.0.0.1', RUST_LOG: 'debug' });
    await systemctl('reload', 'banter.service');
    await until('a proxy is believed', async () => await workersFor() === 2);
    await until('the master logs more', async () => (await journal('_SYSTEMD_UNIT=banter.service', 'PRIORITY=7')).length > 0);

    fs.writeFileSync(SETTINGS_FILE, 'BANTER_AUTH_RATE=many\n');
    await systemctl('reload', 'banter.service');
    for (const unit of SERVICES) {
      await until(`${unit} says what is wrong`, async () => (
        (await journal(`_SYSTEMD_UNIT=${unit}`)).some(({ MESSAGE }) => /banter\.conf, line 1: .*BANTER_AUTH_RATE/.test(MESSAGE))
      ));
    }
    assert.ok((await attempt(1)).includes(429), 'the old limit holds');
    assert.deepStrictEqual(await Promise.all(SERVICES.map(mainPid)), pids, 'nobody was restarted');
    banter.configure({});
    await systemctl('reload', 'banter.service');
    await until('the limit is off again', async () => !(await attempt(0)).includes(429));
  });

  scenario('beyond what its descriptors allow a worker refuses clearly', async (world) => {
    const { banter } = world;
    for (const number of banter.workers) dropIn(banter.unit(number), 'files', '[Service]\nLimitNOFILE=110\n');
    await systemctl('daemon-reload');
    await systemctl('restart', ...banter.workers.map((number) => banter.unit(number)));
    await banter.serving();
    const open = [];
    try {
      await until('somebody is refused', async () => {
        for (let i = 0; i < 10; i++) {
          const localAddress = `127.0.70.${1 + open.length % 250}`;
          open.push(net.connect({ host: '127.0.0.1', port: banter.port, localAddress }).on('error', () => {}));
        }
        const { status, headers, json } = await banter.api('GET', '/health', { localAddress: '127.0.71.1' });
        if (status !== 503) return false;
        assert.strictEqual(typeof json.error, 'string');
        assert.ok(Number(headers['retry-after']) > 0);
        return true;
      }, 30_000);
      console.log(`    refused with ${open.length} connections open`);
    } finally {
      for (const socket of open) socket.destroy();
    }
    await until('there is room again', async () => (await banter.api('GET', '/health', { localAddress: '127.0.71.1' })).status === 200);
    for (const unit of SERVICES) assert.strictEqual((await show(unit, 'NRestarts')).NRestarts, '0', `${unit} did not die of it`);
  });

  scenario('with the example beside the units, a Redis over TCP is reached', async ({ banter }) => {
    const example = fs.readFileSync('/usr/share/doc/banter/examples/redis-tcp.conf', 'utf8');
    for (const unit of ['banter.service', 'banter-worker@.service']) dropIn(unit, 'redis-tcp', example);
    await sh('redis-cli', '-s', '/run/redis/redis-server.sock', 'config', 'set', 'port', '6379');
    banter.configure({ REDIS_URL: 'redis://127.0.0.1:6379' });
    await systemctl('daemon-reload');
    await systemctl('restart', ...SERVICES);
    for (const unit of SERVICES) await becomes(unit, 'active');
    await banter.serving();
    const user = await banter.register('overtcp');
    assert.ok(user.token);
    const [entry] = (await journal('_SYSTEMD_UNIT=banter-worker@0.service', 'BANTER_ADDRESS=redis://127.0.0.1:6379')).slice(-1);
    assert.ok(entry, 'the worker says which Redis it uses');
  });
});

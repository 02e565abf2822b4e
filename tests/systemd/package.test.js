'use strict';
// The Debian package: what it holds, what installing, upgrading, removing and purging it do. The tests
// build upon each other.

const assert = require('node:assert');
const fs = require('node:fs');
const path = require('node:path');
const { suite } = require('./lib/suite.js');
const { ROOT, BINARY, firstPackage, readme, type } = require('./lib/inputs.js');
const { SECRET_FILE, SETTINGS_FILE } = require('./lib/deployment.js');
const { run, sh, systemctl, show, stateOf, mainPid, becomes } = require('./lib/systemd.js');
const { chatThrough, assertNobodyQuit, twoPeopleChat } = require('../clients/lib/village.js');

const SERVICES = ['banter.service', 'banter-worker@0.service', 'banter-worker@1.service'];
const SOCKETS = ['banter.socket', 'banter-control.socket', 'banter-handoff.socket'];
const UNITS = ['banter.target', ...SERVICES, ...SOCKETS];
const POLICY = '/usr/sbin/policy-rc.d';
const RESIDENTS = 6;

const read = (file) => fs.readFileSync(file, 'utf8');
const lines = (text) => text.split('\n').filter((line) => line !== '');

/** What there is below a directory: of each file mode and path. */
const listing = async (directory) => lines(await sh('find', directory, '-type', 'f', '-printf', '%m /%P\n')).sort();

/** Everything called like Banter, and every link that enables a unit. */
async function traces() {
  const named = await run('find', '/etc', '/usr', '/var/lib', '/run/banter', '-xdev', '-name', '*banter*', '-not', '-path', '/var/lib/dpkg/*');
  return [...lines(named.stdout), ...lines(await sh('find', '/etc/systemd/system', '-type', 'l'))].sort();
}

/** Which of the units run, or would by a connection. */
async function running() {
  const states = await Promise.all(UNITS.map(stateOf));
  return UNITS.filter((_, i) => states[i] !== 'inactive');
}

const failed = async () => lines(await systemctl('list-units', '--failed', '--plain', '--no-legend', 'banter*'));

/** The program that a unit's process runs: `…(deleted)` if it is not the one that is installed. */
const programOf = async (unit) => fs.readlinkSync(`/proc/${await mainPid(unit)}/exe`);

let made = 0;
/** A later package of the same content, but for what `change` does to the directory that it is made from. */
async function laterPackage(change = () => {}) {
  made += 1;
  const directory = `/var/tmp/later-${made}`;
  await sh('dpkg-deb', '--raw-extract', firstPackage(), directory);
  edit(path.join(directory, 'DEBIAN/control'), /^Version: .*$/m, (line) => `${line}+later${made}`);
  edit(path.join(directory, 'usr/lib/systemd/system/banter.service'), /^Description=.*$/m, (line) => `${line}, later ${made}`);
  change(directory);
  await sh('dpkg-deb', '--build', '-Znone', directory, `${directory}.deb`);
  return `${directory}.deb`;
}

function edit(file, pattern, replacement) {
  const text = read(file);
  assert.match(text, pattern);
  fs.writeFileSync(file, text.replace(pattern, replacement));
}

suite('the package', { bare: true }, (scenario) => {
  /** What was there before, the secret, and an account with its token. */
  const kept = {};
  const [install, ...bringUp] = readme('From a package');

  scenario('it holds what `make install` puts in place', async () => {
    await sh('make', '-s', '-C', ROOT, 'install', 'DESTDIR=/var/tmp/stage', 'PREFIX=/usr', `BIN=${BINARY}`);
    await sh('dpkg-deb', '--extract', firstPackage(), '/var/tmp/package');
    const licence = (line) => line.replace(/doc\/banter\/copyright$/, 'doc/banter/LICENSE');
    assert.deepStrictEqual((await listing('/var/tmp/package')).map(licence).sort(), await listing('/var/tmp/stage'));
    // Programs are stripped by different tools.
    const { stdout } = await run('diff', '--recursive', '--brief', '--exclude=bin', '--exclude=LICENSE', '--exclude=copyright', '/var/tmp/package', '/var/tmp/stage');
    assert.strictEqual(stdout, '');
    const dependencies = await sh('dpkg-deb', '--field', firstPackage(), 'Depends');
    assert.match(dependencies, /\blibc6 \(>= /);
    await sh('rm', '-r', '/var/tmp/stage', '/var/tmp/package');
  });

  scenario('installing it makes a user, directories and a secret; it enables and starts nothing', async ({ banter }) => {
    // Of the machine that these tests run on, where it is a container.
    fs.rmSync(POLICY, { force: true });
    kept.before = await traces();
    await type(install);
    assert.deepStrictEqual(await running(), []);
    for (const unit of ['banter.target', ...SOCKETS]) assert.strictEqual((await run('systemctl', 'is-enabled', unit)).stdout, 'disabled\n', unit);
    await assert.rejects(banter.api('GET', '/health'), { code: 'ECONNREFUSED' });
    assert.strictEqual(await sh('stat', '--format=%a %U %G', SECRET_FILE, SETTINGS_FILE, '/run/banter'), '600 root root\n640 root banter\n750 banter banter\n');
    kept.secret = read(SECRET_FILE);
    assert.strictEqual(Buffer.from(kept.secret, 'base64').length, 32);
    assert.deepStrictEqual(fs.readdirSync('/etc/banter').sort(), ['banter.conf', 'jwt-secret']);
  });

  scenario('the lines of README.md bring up a chat with two workers', async (world) => {
    const { banter } = world;
    assert.match(await type(bringUp), /^ok: worker [01], version /m);
    await banter.serving();
    for (const unit of UNITS) await becomes(unit, 'active');
    const [ann] = await twoPeopleChat(world);
    kept.ann = ann.user;
  });

  scenario('an upgrade while people chat loses nothing, and everything that runs is the new one', async (world) => {
    const { banter } = world;
    fs.appendFileSync(SETTINGS_FILE, 'BANTER_AUTH_RATE=0\nBANTER_POST_RATE=0\n');
    kept.settings = read(SETTINGS_FILE);
    await systemctl('restart', ...SERVICES);
    await banter.serving();
    let took;
    const { residents, posts } = await chatThrough(world, RESIDENTS, async () => {
      const old = await Promise.all(SERVICES.map(mainPid));
      const begun = performance.now();
      await sh('dpkg', '--install', await laterPackage());
      took = performance.now() - begun;
      // Not some time later: once dpkg is done, so is the upgrade.
      for (const [i, unit] of SERVICES.entries()) {
        assert.notStrictEqual(await mainPid(unit), old[i], `${unit} was restarted`);
        assert.strictEqual(await programOf(unit), '/usr/bin/banter', unit);
      }
      const { Description, NeedDaemonReload } = await show('banter.service', 'Description', 'NeedDaemonReload');
      assert.match(Description, /, later 1$/);
      assert.strictEqual(NeedDaemonReload, 'no');
      await banter.serving();
    });
    assertNobodyQuit(residents);
    console.log(`    the upgrade took ${took.toFixed(0)} ms, ${posts} posts; connections: ${residents.map(({ connections }) => connections).join(' ')}`);
    assert.strictEqual(read(SETTINGS_FILE), kept.settings, 'what the operator wrote');
    assert.strictEqual(read(SECRET_FILE), kept.secret);
  });

  scenario('a worker that was stopped stays so, also if it is enabled and the master runs', async ({ banter }) => {
    await systemctl('stop', 'banter-worker@1');
    await sh('dpkg', '--install', await laterPackage());
    assert.strictEqual(await stateOf('banter-worker@1.service'), 'inactive');
    for (const unit of ['banter.service', 'banter-worker@0.service']) assert.strictEqual(await programOf(unit), '/usr/bin/banter', unit);
    await systemctl('start', 'banter-worker@1');
    await banter.serving();
  });

  scenario('where the new version does not come up, workers after the first that fails stay with the old one', async ({ banter }) => {
    const broken = await laterPackage((directory) => {
      edit(path.join(directory, 'usr/lib/systemd/system/banter-worker@.service'), /^ExecStart=.*$/m, 'ExecStart=/bin/false');
    });
    const old = await mainPid('banter-worker@1.service');
    const { code, stderr } = await run('dpkg', '--install', broken);
    assert.strictEqual(code, 0);
    assert.match(stderr, /^banter: banter-worker@0.service did not come back \(journalctl -u banter-worker@0.service says why\)/m);
    assert.strictEqual(await mainPid('banter-worker@1.service'), old);
    await banter.serving([1]);
    await sh('dpkg', '--install', await laterPackage());
    await banter.serving();
    for (const unit of SERVICES) assert.strictEqual(await programOf(unit), '/usr/bin/banter', unit);
  });

  scenario('policy-rc.d is obeyed', async () => {
    const old = await Promise.all(SERVICES.map(mainPid));
    fs.writeFileSync(POLICY, '#!/bin/sh\nexit 101\n', { mode: 0o755 });
    try {
      await sh('dpkg', '--install', await laterPackage());
    } finally {
      fs.rmSync(POLICY);
    }
    assert.deepStrictEqual(await Promise.all(SERVICES.map(mainPid)), old);
  });

  scenario('an upgrade starts nothing where only the sockets are there, and where all is stopped', async () => {
    await systemctl('stop', ...SERVICES, 'banter.target');
    await systemctl('start', 'banter.socket');
    const sockets = await running();
    assert.ok(sockets.includes('banter.socket'));
    assert.deepStrictEqual(sockets.filter((unit) => !SOCKETS.includes(unit)), []);
    await sh('dpkg', '--install', await laterPackage());
    assert.deepStrictEqual(await running(), sockets);
    await systemctl('stop', 'banter.target');
    for (const unit of UNITS) await becomes(unit, 'inactive');
    await sh('dpkg', '--install', await laterPackage());
    assert.deepStrictEqual(await running(), []);
    assert.deepStrictEqual(await failed(), []);
  });

  scenario('removing it stops everything, and keeps settings, secret and data', async ({ banter }) => {
    await systemctl('start', 'banter.target');
    await banter.serving();
    await sh('dpkg', '--remove', 'banter');
    assert.deepStrictEqual(await running(), []);
    assert.deepStrictEqual(await failed(), []);
    await assert.rejects(banter.api('GET', '/health'), { code: 'ECONNREFUSED' });
    assert.ok(!fs.existsSync('/usr/bin/banter'));
    assert.strictEqual(read(SETTINGS_FILE), kept.settings);
    assert.strictEqual(read(SECRET_FILE), kept.secret);
    assert.ok(fs.existsSync('/var/lib/banter/banter.db'));
  });

  scenario('installing it again starts nothing, and brings back accounts, and the tokens of the old secret', async ({ banter }) => {
    await sh('dpkg', '--install', firstPackage());
    assert.deepStrictEqual(await running(), []);
    assert.strictEqual(read(SETTINGS_FILE), kept.settings);
    assert.strictEqual(read(SECRET_FILE), kept.secret);
    await systemctl('start', 'banter.target');
    await banter.serving();
    const { name, password, token } = kept.ann;
    assert.strictEqual((await banter.api('GET', '/channels', { token })).status, 200);
    assert.strictEqual((await banter.api('POST', '/auth/login', { body: { name, password } })).status, 200);
  });

  scenario('purging it leaves nothing but the user', async () => {
    await sh('dpkg', '--purge', 'banter');
    assert.deepStrictEqual(await traces(), kept.before);
    assert.deepStrictEqual(await running(), []);
    assert.deepStrictEqual(lines(await systemctl('list-units', '--all', '--plain', '--no-legend', 'banter*')), []);
    assert.ok(!fs.existsSync('/run/banter'));
    assert.strictEqual((await run('dpkg-query', '--show', 'banter')).code, 1);
    assert.match(await sh('getent', 'passwd', 'banter'), /^banter:/);
  });

  scenario('without a running systemd it can be installed, upgraded and purged', async () => {
    const later = await laterPackage();
    const steps = [
      'mount -t tmpfs tmpfs /run',
      `dpkg --install ${firstPackage()}`,
      `stat --format=%a:%U ${SECRET_FILE}`,
      `cp ${SECRET_FILE} /run/before`,
      `dpkg --install ${later}`,
      `cmp ${SECRET_FILE} /run/before`,
      'dpkg --purge banter',
    ];
    const { code, stdout, stderr } = await run('unshare', '--mount', 'sh', '-e', '-c', steps.join('\n'));
    assert.strictEqual(code, 0, stderr);
    assert.match(stdout, /^600:root$/m);
    assert.doesNotMatch(stderr, /banter:|systemctl|[Ff]ailed|has not been booted/);
    assert.deepStrictEqual(await traces(), kept.before);
  });

  scenario('a secret that is there is not touched, be it a link that leads nowhere now', async () => {
    fs.mkdirSync('/etc/banter');
    fs.symlinkSync('/mnt/secrets/banter', SECRET_FILE);
    await sh('dpkg', '--install', firstPackage());
    assert.strictEqual(fs.readlinkSync(SECRET_FILE), '/mnt/secrets/banter');
    assert.deepStrictEqual(fs.readdirSync('/etc/banter').sort(), ['banter.conf', 'jwt-secret']);
    await sh('dpkg', '--purge', 'banter');
    assert.deepStrictEqual(await traces(), kept.before);
  });
});

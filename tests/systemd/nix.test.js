'use strict';
// What the NixOS module renders (tests/nix/rendered, which `make nix-check` compares with the module):
// put where NixOS puts it, beside the packaged units, it does what the test for NixOS' virtual machine
// wants of it.

const assert = require('node:assert');
const { spawn } = require('node:child_process');
const { randomBytes } = require('node:crypto');
const fs = require('node:fs');
const path = require('node:path');
const { test, before, after } = require('node:test');
const { sh, run, systemctl, show, stateOf, mainPid, becomes, journal } = require('./lib/systemd.js');

const ROOT = path.resolve(__dirname, '../..');
const NIX = path.join(ROOT, 'tests/nix');
const RENDERED = path.join(NIX, 'rendered');
const SCRIPT = path.join(ROOT, 'nix/vm-test/script.py');
const PYTHON = 'python3';
const PACKAGED = '/usr/lib/systemd/system';
/** Complete configurations, each with the files of its /etc. */
const CONFIGURATIONS = '/srv/configurations';
const BOOTED = '/run/booted-system';

const names = fs.readdirSync(RENDERED).map((file) => path.basename(file, '.txt'));

/** A configuration's /etc, as NixOS has it: packaged and rendered units in one directory. */
async function build(name) {
  const etc = path.join(CONFIGURATIONS, name);
  const units = path.join(etc, 'systemd/system');
  fs.mkdirSync(units, { recursive: true });
  for (const unit of fs.readdirSync(PACKAGED).filter((unit) => unit.startsWith('banter'))) {
    fs.copyFileSync(path.join(PACKAGED, unit), path.join(units, unit));
  }
  fs.copyFileSync(path.join(NIX, 'redis-banter.service'), path.join(units, 'redis-banter.service'));
  const wants = path.join(units, 'multi-user.target.wants');
  await sh(PYTHON, path.join(NIX, 'tree.py'), path.join(RENDERED, `${name}.txt`), etc);
  const [script] = /\/nix\/store\/\S+-rollout\.sh/.exec(fs.readFileSync(path.join(units, 'banter-rollout.service'), 'utf8'));
  fs.mkdirSync(path.dirname(script), { recursive: true });
  fs.copyFileSync(path.join(ROOT, 'nix/rollout.sh'), script);
  fs.mkdirSync(wants, { recursive: true });
  fs.symlinkSync('../redis-banter.service', path.join(wants, 'redis-banter.service'));
}

/** What switches to it, at its place in NixOS. */
function installSwitch(name, place) {
  const file = path.join(BOOTED, place, 'bin/switch-to-configuration');
  fs.mkdirSync(path.dirname(file), { recursive: true });
  const command = `${PYTHON} ${path.join(NIX, 'switch.py')} ${path.join(CONFIGURATIONS, name)}`;
  fs.writeFileSync(file, `#!/bin/sh\n[ "$*" = test ] && exec ${command}\n`, { mode: 0o755 });
}

const switchTo = (name) => sh(PYTHON, path.join(NIX, 'switch.py'), path.join(CONFIGURATIONS, name));

const client = (port, ...args) => sh('env', `BANTER_PORT=${port}`, PYTHON, '/etc/banter-test/client.py', ...args);

before(async () => {
  for (const name of names) await build(name);
  for (const unit of fs.readdirSync(PACKAGED).filter((unit) => unit.startsWith('banter'))) {
    fs.rmSync(path.join(PACKAGED, unit));
  }
  installSwitch('two', '');
  for (const name of ['four', 'limited', 'traced']) installSwitch(name, path.join('specialisation', name));
  for (const place of ['systemd', 'sw']) {
    fs.mkdirSync(`/run/current-system/${place}`, { recursive: true });
    fs.symlinkSync('/usr/bin', `/run/current-system/${place}/bin`);
  }
  // As the options users.users and services.redis have it.
  await sh('systemd-sysusers');
  await sh('useradd', '--system', '--user-group', '--no-create-home', 'redis-banter');
  await sh('usermod', '--append', '--groups', 'redis-banter', 'banter');
  fs.mkdirSync('/etc/banter-test');
  fs.copyFileSync(path.join(ROOT, 'nix/vm-test/client.py'), '/etc/banter-test/client.py');
  // The lab's own units of /etc/systemd/system are kept.
  fs.cpSync(path.join(CONFIGURATIONS, 'two'), '/etc', { recursive: true, verbatimSymlinks: true });
  await sh('systemd-tmpfiles', '--create', '/etc/tmpfiles.d/00-nixos.conf');
  await systemctl('daemon-reload');
  await systemctl('start', 'sockets.target', 'multi-user.target');
}, { timeout: 60_000 });

after(() => systemctl('stop', 'banter.target'), { timeout: 30_000 });

/** A test; what Banter and systemd logged is shown where it fails. */
function scenario(name, body, timeout = 90_000) {
  test(name, { timeout }, async () => {
    try {
      await body();
    } catch (error) {
      const entries = await journal('--unit=banter*', '--lines=80');
      console.error(`--- the journal, after "${name}" failed:`);
      for (const entry of entries) console.error(`${entry.UNIT ?? entry._SYSTEMD_UNIT} ${entry.MESSAGE}`);
      throw error;
    }
  });
}

for (const name of names) {
  test(`systemd-analyze has nothing to say against the units of "${name}"`, async () => {
    const units = path.join(CONFIGURATIONS, name, 'systemd/system');
    const instances = fs.readdirSync(path.join(units, 'banter.target.wants'));
    const { code, stdout, stderr } = await run('env', `SYSTEMD_UNIT_PATH=${units}:`, 'systemd-analyze', 'verify', '--man=no',
      'banter.service', 'banter.target', 'banter.socket', 'banter-control.socket', 'banter-handoff.socket', ...instances);
    assert.deepStrictEqual({ code, stdout, stderr }, { code: 0, stdout: '', stderr: '' });
  });
}

scenario('drop-ins of all instances count', async () => {
  for (const number of [0, 1]) {
    const { DropInPaths } = await show(`banter-worker@${number}.service`, 'DropInPaths');
    assert.strictEqual(DropInPaths, `/etc/systemd/system/banter-worker@${number}.service.d/overrides.conf`);
  }
});

scenario('the script of the test for NixOS passes', async () => {
  const child = spawn(PYTHON, [path.join(NIX, 'driver.py'), SCRIPT], { stdio: ['ignore', 'pipe', 'pipe'] });
  let output = '';
  for (const stream of [child.stdout, child.stderr]) stream.on('data', (chunk) => { output += chunk; });
  const code = await new Promise((resolve, reject) => child.on('error', reject).on('close', resolve));
  console.log(output.replace(/^/gm, '    '));
  assert.strictEqual(code, 0, output);
  const subtests = fs.readFileSync(SCRIPT, 'utf8').match(/^with subtest\(/gm);
  assert.strictEqual((output.match(/^ok: /gm) ?? []).length, subtests.length, 'all of it ran');
}, 300_000);

scenario('a Redis by TCP, its password from a file: it is reached, and the password is nowhere else', async () => {
  const password = randomBytes(16).toString('hex');
  fs.mkdirSync('/run/keys/100%', { recursive: true, mode: 0o700 });
  const secrets = { '100%/jwt': randomBytes(32).toString('base64'), more: 'x', 'banter-redis': `REDIS_URL=redis://:${password}@127.0.0.1:6379\n` };
  for (const [name, text] of Object.entries(secrets)) fs.writeFileSync(path.join('/run/keys', name), text, { mode: 0o400 });
  await sh('systemd-run', '--quiet', '--unit=other-redis', 'redis-server', '--bind', '127.0.0.1', '--requirepass', password, '--save', '');
  await switchTo('remote-redis');
  await client(8000, 'serving', '0', '1');
  await client(8000, 'chat', '0', '1');
  const keys = await sh('env', `REDISCLI_AUTH=${password}`, 'redis-cli', '--scan', '--pattern', '{chat}:*');
  assert.notStrictEqual(keys, '', 'it was this Redis');
  for (const unit of ['banter.service', 'banter-worker@0.service']) {
    assert.ok(!(await systemctl('show', unit)).includes(password), unit);
  }
  assert.ok(!(await sh('systemctl', 'cat', 'banter*')).includes(password));
  assert.ok(!JSON.stringify(await journal('--unit=banter*')).includes(password));
  await assert.rejects(sh('runuser', '-u', 'banter', '--', 'cat', '/run/keys/banter-redis'));
  const [limit, environment] = await Promise.all(['MemoryMax', 'Environment'].map((name) => show('banter-worker@1.service', name)));
  assert.strictEqual(limit.MemoryMax, String(1 << 30));
  assert.match(environment.Environment, /SOME=100% of it/);
});

scenario('the store of its own, and another port', async () => {
  await switchTo('embedded');
  await client(9000, 'serving', '0');
  await client(9000, 'chat', '0', '0');
  await assert.rejects(client(8000, 'chat', '0', '0'), /Connection refused/);
  assert.ok(fs.existsSync('/var/lib/banter/banter.db'));
});

scenario('another port while nothing runs yet', async () => {
  await systemctl('stop', 'banter.target');
  for (const unit of ['banter.service', 'banter-worker@0.service', 'banter.socket', 'banter-control.socket', 'banter-handoff.socket']) {
    await becomes(unit, 'inactive');
  }
  await systemctl('start', 'sockets.target', 'banter-rollout.service');
  await switchTo('two');
  assert.strictEqual(await stateOf('banter.service'), 'inactive');
  await client(8000, 'serving', '0', '1');
});

scenario('a worker that does not come up again stops the rollout, and the others serve on', async () => {
  const old = await mainPid('banter-worker@1.service');
  const secret = fs.readFileSync('/var/lib/secrets/banter-jwt');
  fs.writeFileSync('/var/lib/secrets/banter-jwt', 'shhhh\n');
  await assert.rejects(switchTo('traced'), /banter-rollout\.service failed/);
  await client(8000, 'serving', '1');
  assert.strictEqual(await mainPid('banter-worker@1.service'), old);
  fs.writeFileSync('/var/lib/secrets/banter-jwt', secret);
  await systemctl('reload', 'banter-rollout.service');
  await client(8000, 'serving', '0', '1');
  assert.notStrictEqual(await mainPid('banter-worker@1.service'), old);
});

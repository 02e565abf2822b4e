'use strict';
// What the NixOS module renders (tests/nix/rendered, which `make nix-check` compares with the module):
// put where NixOS puts it, beside the packaged units, it does what the test for NixOS' virtual machine
// wants of it.

const assert = require('node:assert');
const { spawn } = require('node:child_process');
const fs = require('node:fs');
const path = require('node:path');
const { test, before, after } = require('node:test');
const { sh, run, systemctl, show, journal } = require('./lib/systemd.js');

const ROOT = path.resolve(__dirname, '../..');
const NIX = path.join(ROOT, 'tests/nix');
const RENDERED = path.join(NIX, 'rendered');
const PYTHON = '/usr/bin/python3';
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

before(async () => {
  for (const name of names) await build(name);
  for (const unit of fs.readdirSync(PACKAGED).filter((unit) => unit.startsWith('banter'))) {
    fs.rmSync(path.join(PACKAGED, unit));
  }
  installSwitch('two', '');
  for (const name of ['four', 'limited', 'traced']) installSwitch(name, path.join('specialisation', name));
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
  await systemctl('start', 'redis-banter.service', 'sockets.target');
}, { timeout: 60_000 });

after(() => systemctl('stop', 'banter.target'), { timeout: 30_000 });

for (const name of names) {
  test(`systemd-analyze has nothing to say against the units of "${name}"`, async () => {
    const units = path.join(CONFIGURATIONS, name, 'systemd/system');
    const instances = fs.readdirSync(path.join(units, 'banter.target.wants'));
    const { code, stdout, stderr } = await run('env', `SYSTEMD_UNIT_PATH=${units}:`, 'systemd-analyze', 'verify', '--man=no',
      'banter.service', 'banter.target', 'banter.socket', 'banter-control.socket', 'banter-handoff.socket', ...instances);
    assert.deepStrictEqual({ code, stdout, stderr }, { code: 0, stdout: '', stderr: '' });
  });
}

test('drop-ins of all instances count', async () => {
  for (const number of [0, 1]) {
    const { DropInPaths } = await show(`banter-worker@${number}.service`, 'DropInPaths');
    assert.strictEqual(DropInPaths, `/etc/systemd/system/banter-worker@${number}.service.d/overrides.conf`);
  }
});

test('the script of the test for NixOS passes', { timeout: 300_000 }, async () => {
  const child = spawn(PYTHON, [path.join(NIX, 'driver.py'), path.join(ROOT, 'nix/vm-test/script.py')], { stdio: ['ignore', 'pipe', 'pipe'] });
  let output = '';
  for (const stream of [child.stdout, child.stderr]) stream.on('data', (chunk) => { output += chunk; });
  const code = await new Promise((resolve, reject) => child.on('error', reject).on('close', resolve));
  if (code !== 0) {
    const lines = await journal('--unit=banter*', '--lines=60');
    output += `\n--- the journal\n${lines.map((entry) => `${entry.UNIT ?? entry._SYSTEMD_UNIT} ${entry.MESSAGE}`).join('\n')}`;
  }
  console.log(output.replace(/^/gm, '    '));
  assert.strictEqual(code, 0, output);
  assert.ok((output.match(/^ok: /gm) ?? []).length >= 12, 'all of it ran');
});

'use strict';
// The machine's systemd, by its own commands.

const { execFile } = require('node:child_process');
const fs = require('node:fs');
const path = require('node:path');
const { until } = require('../../clients/lib/wait.js');

/** Runs a command; gives `{code, stdout, stderr}`, whatever the code. */
function run(command, ...args) {
  return new Promise((resolve) => {
    execFile(command, args, { maxBuffer: 64 << 20, timeout: 120_000 }, (error, stdout, stderr) => {
      const code = error ? (typeof error.code === 'number' ? error.code : 1) : 0;
      resolve({ code, stdout, stderr });
    });
  });
}

/** Runs a command that must succeed; gives what it printed. */
async function sh(command, ...args) {
  const { code, stdout, stderr } = await run(command, ...args);
  if (code !== 0) throw new Error(`${[command, ...args].join(' ')}: exit code ${code}: ${stderr || stdout}`);
  return stdout;
}

const systemctl = (...args) => sh('systemctl', ...args);

/** Properties of a unit, as an object of strings. */
async function show(unit, ...properties) {
  const text = await systemctl('show', unit, ...properties.map((name) => `--property=${name}`));
  return Object.fromEntries(text.trimEnd().split('\n').map((line) => {
    const at = line.indexOf('=');
    return [line.slice(0, at), line.slice(at + 1)];
  }));
}

const stateOf = async (unit) => (await show(unit, 'ActiveState')).ActiveState;

async function mainPid(unit) {
  return Number((await show(unit, 'MainPID')).MainPID);
}

/** Waits until a unit is in this state: active, inactive, failed, … */
function becomes(unit, state, deadline = 15_000) {
  return until(`${unit} is ${state}`, async () => (await stateOf(unit)) === state, deadline);
}

/** Waits until a unit's main process is another one than `old`, and up. */
function replaced(unit, old, deadline = 30_000) {
  return until(`${unit} has another process than ${old}`, async () => {
    const { MainPID, ActiveState } = await show(unit, 'MainPID', 'ActiveState');
    return ActiveState === 'active' && Number(MainPID) !== old && Number(MainPID);
  }, deadline);
}

/** What the journal has, by its own match syntax (`BANTER_EVENT=…`, `_SYSTEMD_UNIT=…`): an array of entries. */
async function journal(...matches) {
  await run('journalctl', '--sync');
  const text = await sh('journalctl', '--output=json', '--no-pager', ...matches);
  return text.trim() === '' ? [] : text.trimEnd().split('\n').map((line) => JSON.parse(line));
}

/** Puts a drop-in beside a unit; `systemctl daemon-reload` is the caller's. */
function dropIn(unit, name, text) {
  const directory = `/etc/systemd/system/${unit}.d`;
  fs.mkdirSync(directory, { recursive: true });
  fs.writeFileSync(path.join(directory, `${name}.conf`), text);
}

module.exports = { run, sh, systemctl, show, stateOf, mainPid, becomes, replaced, journal, dropIn };

'use strict';
// Runs the suite: each file on a machine of its own with a real systemd, onto which Banter was put by
// `make install`, or which has only what to install it from; and sees that every file really ran.
//   node run.js [FILE…]     all *.test.js by default

const { spawn, execFileSync } = require('node:child_process');
const fs = require('node:fs');
const os = require('node:os');
const path = require('node:path');

const ROOT = path.resolve(__dirname, '../..');
const LAB = path.join(ROOT, 'tests/lab/lab');
/** Where the machines see the repository. */
const SHOWN = '/srv/banter-tests';
/** Files that install Banter themselves, from what is in `INPUTS` on their machines. */
const INSTALLERS = ['package.test.js', 'sources.test.js'];
const { INPUTS } = require('./lib/inputs.js');
/** A file's whole life in seconds, the machine's included. */
const TIMEOUT = 420;
/** Machines at once. */
const AT_ONCE = 2;

const binary = path.resolve(process.env.BANTER_BIN ?? path.join(ROOT, 'target/debug/banter'));
const files = process.argv.length > 2
  ? process.argv.slice(2).map((file) => path.resolve(file))
  : fs.readdirSync(__dirname).filter((name) => name.endsWith('.test.js')).sort().map((name) => path.join(__dirname, name));

const installs = (file) => INSTALLERS.includes(path.basename(file));

/** What every machine but those of `INSTALLERS` begins with. It becomes the machine's root directory. */
function makeStage(stage) {
  execFileSync('make', ['-s', '-C', ROOT, 'install', `DESTDIR=${stage}`, 'PREFIX=/usr', `BIN=${binary}`], { stdio: 'inherit' });
}

/** The binary, and a package made of it. */
function makeInputs(inputs) {
  fs.copyFileSync(binary, path.join(inputs, 'banter'));
  // cargo-deb takes the binary from where a release build puts it.
  const target = path.join(inputs, 'target');
  fs.mkdirSync(path.join(target, 'release'), { recursive: true });
  fs.linkSync(path.join(inputs, 'banter'), path.join(target, 'release/banter'));
  execFileSync('cargo', ['deb', '--quiet', '--locked', '--no-build', '--fast', '--output', inputs], {
    cwd: ROOT,
    env: { ...process.env, CARGO_TARGET_DIR: target },
    stdio: ['ignore', 'ignore', 'inherit'],
  });
  fs.rmSync(target, { recursive: true });
}

/** Runs one file. Gives how many of its tests passed; prints what it said once it is over. */
function runFile(file, { stage, inputs }) {
  const name = path.relative(ROOT, file);
  const args = [
    'run', '--limits', '--timeout', String(TIMEOUT), '--mount', `${ROOT}:${SHOWN}`,
    ...(installs(file) ? ['--mount', `${inputs}:${INPUTS}`] : ['--copy', `${stage}:/`]),
    '--', process.execPath, '--test', '--test-reporter=spec', path.join(SHOWN, name),
  ];
  return new Promise((resolve) => {
    // A process group of its own, so that the whole of it can be told to end.
    const child = spawn(LAB, args, { stdio: ['ignore', 'pipe', 'pipe'] });
    children.add(child);
    const chunks = [];
    for (const stream of [child.stdout, child.stderr]) stream.on('data', (chunk) => chunks.push(chunk));
    child.on('error', (error) => chunks.push(Buffer.from(`${error.message}\n`)));
    child.on('close', (code, signal) => {
      children.delete(child);
      const output = Buffer.concat(chunks).toString('utf8');
      process.stdout.write(`--- ${name}\n${output}`);
      const passed = Number(/^\S+ pass (\d+)$/m.exec(output)?.[1] ?? 0);
      if (code !== 0) console.error(`${name}: ended with ${signal ?? code}`);
      else if (passed === 0) console.error(`${name}: no test ran and passed`);
      resolve({ name, passed, ok: code === 0 && passed > 0 });
    });
  });
}

const children = new Set();
for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP']) {
  process.on(signal, () => {
    for (const child of children) child.kill('SIGTERM');
    process.exitCode = 1;
  });
}

async function main() {
  if (process.getuid() !== 0) throw new Error('booting systemd takes root: run this as root or with sudo');
  if (!fs.existsSync(binary)) throw new Error(`${binary} is missing: run \`cargo build\`, or set BANTER_BIN`);
  const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'banter-systemd-'));
  const given = { stage: path.join(scratch, 'stage'), inputs: path.join(scratch, 'inputs') };
  fs.chmodSync(scratch, 0o755);
  for (const directory of Object.values(given)) fs.mkdirSync(directory, { mode: 0o755 });
  const begun = performance.now();
  try {
    if (!files.every(installs)) makeStage(given.stage);
    if (files.some(installs)) makeInputs(given.inputs);
    const queue = [...files];
    const results = [];
    const lane = async () => {
      for (let file = queue.shift(); file; file = queue.shift()) results.push(await runFile(file, given));
    };
    await Promise.all(Array.from({ length: AT_ONCE }, lane));
    const passed = results.reduce((sum, one) => sum + one.passed, 0);
    const failed = results.filter(({ ok }) => !ok).map(({ name }) => name);
    console.log(`systemd: ${passed} tests passed in ${results.length} files, ${failed.length} files failed, ${((performance.now() - begun) / 1000).toFixed(0)} s`);
    if (failed.length > 0 || results.length === 0) throw new Error(`systemd: failed: ${failed.join(', ') || 'nothing ran'}`);
  } finally {
    fs.rmSync(scratch, { recursive: true, force: true });
  }
}

main().catch((error) => {
  console.error(error.message);
  process.exitCode = 1;
});

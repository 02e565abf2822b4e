'use strict';
// Runs the suite with node's own test runner, and sees that it really ran.
//   node run.js [FILE…]     all *.test.js by default

const { spawn } = require('node:child_process');
const fs = require('node:fs');
const path = require('node:path');
const { BINARY } = require('./lib/banter.js');

const files = process.argv.length > 2
  ? process.argv.slice(2)
  : fs.readdirSync(__dirname).filter((name) => name.endsWith('.test.js')).sort().map((name) => path.join(__dirname, name));
if (!fs.existsSync(BINARY)) {
  console.error(`${BINARY} is missing: run \`cargo build\`, or set BANTER_BIN`);
  process.exit(1);
}
// One file after the other: each starts servers of its own, and some measure.
const child = spawn(process.execPath, ['--test', '--test-concurrency=1', '--test-reporter=spec', ...files], { stdio: ['ignore', 'pipe', 'inherit'] });
let output = '';
child.stdout.on('data', (chunk) => {
  process.stdout.write(chunk);
  output = (output + chunk).slice(-1_000_000);
});
for (const signal of ['SIGINT', 'SIGTERM']) process.on(signal, () => child.kill(signal));
child.on('close', (code, signal) => {
  const passed = Number(/^\S+ pass (\d+)$/m.exec(output)?.[1] ?? 0);
  if (signal) console.error(`the test runner was ended by ${signal}`);
  else if (passed === 0) console.error('no client test ran and passed');
  process.exitCode = code || (signal || passed === 0 ? 1 : 0);
});

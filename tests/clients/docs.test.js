'use strict';
// docs/api.md does what it says: its commands and programs are run in order against one server, and print what is
// shown below them.

const assert = require('node:assert');
const { spawn } = require('node:child_process');
const fs = require('node:fs');
const os = require('node:os');
const path = require('node:path');
const { suite } = require('./lib/suite.js');

const PAGE = path.resolve(__dirname, '../../docs/api.md');
const DEADLINE = 30_000;
/** Stands in a shown output for what is different each time. */
const ANYTHING = '…';

/** The page's blocks, `{language, text, line}`; one that says what the one right before it prints is its `output`. */
function blocks(page) {
  const found = [];
  let end;
  for (const { 0: whole, 1: language, 2: text, index } of page.matchAll(/^```(\w+)\n([\s\S]*?)^```$/gm)) {
    const isOutput = ['json', 'text'].includes(language);
    if (isOutput) {
      assert.ok(found.length > 0 && /^\s*$/.test(page.slice(end, index)), `an output that belongs to nothing: ${text}`);
      found.at(-1).output = text;
    } else {
      assert.ok(['sh', 'js'].includes(language), `nobody would run a block of ${language}`);
      found.push({ language, text, line: page.slice(0, index).split('\n').length });
    }
    end = index + whole.length;
  }
  return found;
}

/** Runs a program; gives what it printed and what it wrote to descriptor 3. */
function run(command, args, options) {
  return new Promise((resolve, reject) => {
    const child = spawn(command, args, { ...options, stdio: ['ignore', 'pipe', 'pipe', 'pipe'], timeout: DEADLINE });
    const [printed, aside] = [[], []];
    child.stdout.on('data', (chunk) => printed.push(chunk));
    child.stderr.on('data', (chunk) => printed.push(chunk));
    child.stdio[3].on('data', (chunk) => aside.push(chunk));
    child.on('error', reject);
    child.on('close', (code, signal) => {
      const text = Buffer.concat(printed).toString();
      if (code === 0) resolve({ text, aside: Buffer.concat(aside).toString() });
      else reject(new Error(`${signal ? `did not end in ${DEADLINE} ms` : `ended with ${code}`}, after printing\n${text}`));
    });
  });
}

/** Whether a program printed what is shown. */
function assertPrinted(printed, shown) {
  const escape = (text) => text.replace(/[.*+?^${}()|[\]\\]/g, '\\$&');
  const pattern = new RegExp(`^${shown.trimEnd().split(ANYTHING).map(escape).join('[^\\n]+?')}$`);
  if (!pattern.test(printed.trimEnd())) assert.strictEqual(printed.trimEnd(), shown.trimEnd());
}

suite('docs/api.md', {}, (scenario, banter) => {
  scenario('its examples run, in order, and print what is shown', async () => {
    const examples = blocks(fs.readFileSync(PAGE, 'utf8'));
    const home = fs.mkdtempSync(path.join(os.tmpdir(), 'banter-docs-'));
    let env = { PATH: process.env.PATH, HOME: home, LANG: 'C.UTF-8', URL: banter().url };
    const versions = new Set();
    try {
      for (const { language, text, output, line } of examples) {
        try {
          let printed;
          if (language === 'sh') {
            // What one block sets is there in the next one, as in a reader's shell.
            const script = `set -aeu -o pipefail\n[ ! -e functions ] || . ./functions\n${text}\ndeclare -f >functions\nenv -0 >&3`;
            const done = await run('bash', ['-c', script], { cwd: home, env });
            printed = done.text;
            env = Object.fromEntries(done.aside.split('\0').filter(Boolean).map((pair) => {
              const at = pair.indexOf('=');
              return [pair.slice(0, at), pair.slice(at + 1)];
            }));
          } else {
            // The libraries that its first line names are there, the first one by its own name.
            const named = [...text.split('\n')[0].matchAll(/socket\.io-client (\d)/g)].map(([, version]) => version);
            assert.ok(named.length > 0, 'its first line says which socket.io-client it is for');
            const folder = fs.mkdtempSync(path.join(home, 'js-'));
            fs.mkdirSync(path.join(folder, 'node_modules'));
            named.forEach((version, i) => {
              versions.add(version);
              const name = i === 0 ? 'socket.io-client' : `socket.io-client-${version}`;
              fs.symlinkSync(path.join(__dirname, `node_modules/sio${version}`), path.join(folder, 'node_modules', name));
            });
            fs.writeFileSync(path.join(folder, 'example.js'), text);
            printed = (await run(process.execPath, ['example.js'], { cwd: folder, env })).text;
          }
          assertPrinted(printed, output ?? '');
        } catch (error) {
          throw new Error(`the example in line ${line} of docs/api.md: ${error.message}`, { cause: error });
        }
      }
    } finally {
      fs.rmSync(home, { recursive: true, force: true });
    }
    assert.deepStrictEqual([...versions].sort(), ['1', '2', '4']);
    assert.ok(examples.filter(({ language }) => language === 'sh').length >= 5, 'commands were run');
  });
});

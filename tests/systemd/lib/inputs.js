'use strict';
// What a machine without Banter gets, to install it from; and how README.md says to do that.

const fs = require('node:fs');
const path = require('node:path');
const { sh } = require('./systemd.js');

const ROOT = path.resolve(__dirname, '../../..');
/** Where the machine has the binary and the package. */
const INPUTS = '/srv/banter-inputs';
const BINARY = path.join(INPUTS, 'banter');

/** The package, from which the machine's later ones are made. */
function firstPackage() {
  const [name] = fs.readdirSync(INPUTS).filter((entry) => entry.endsWith('.deb'));
  return path.join(INPUTS, name);
}

/** The shell commands that README.md has below a heading. */
function readme(heading) {
  const text = fs.readFileSync(path.join(ROOT, 'README.md'), 'utf8');
  const section = text.split(/^#+ /m).find((part) => part.startsWith(`${heading}\n`));
  const blocks = [...(section ?? '').matchAll(/^```sh\n([^]*?)^```$/gm)].map(([, code]) => code);
  if (blocks.length === 0) throw new Error(`README.md has no commands below "${heading}"`);
  return blocks.join('').trimEnd().split('\n');
}

/** Has a shell run commands as somebody would who types them; `env` is added to its environment. Gives what they print. */
function type(lines, { cwd = INPUTS, env = {} } = {}) {
  const settings = Object.entries({ DEBIAN_FRONTEND: 'noninteractive', ...env }).map(([name, value]) => `${name}=${value}`);
  return sh('env', '-C', cwd, ...settings, 'sh', '-e', '-c', [lines].flat().join('\n'));
}

module.exports = { ROOT, INPUTS, BINARY, firstPackage, readme, type };

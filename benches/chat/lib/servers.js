'use strict';
// The two servers: started on free ports of the loopback interface, asked what they use, stopped
// whatever happens.

const { spawn } = require('node:child_process');
const fs = require('node:fs');
const net = require('node:net');
const os = require('node:os');
const path = require('node:path');
const { setTimeout: sleep } = require('node:timers/promises');
const { request } = require('./client.js');

const BINARY = process.env.BANTER_BIN ?? path.resolve(__dirname, '../../../target/release/banter');
const SECRET = 'a secret of the benchmark, long enough for both';
const START = 20_000;
const STOP = 10_000;
const TICKS_A_SECOND = 100; // USER_HZ of every Linux that Node.js runs on

const running = new Set();
process.on('exit', () => running.forEach((child) => child.kill('SIGKILL')));
for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP']) process.on(signal, () => process.exit(1));

const freePort = () => new Promise((resolve, reject) => {
  const server = net.createServer();
  server.on('error', reject);
  server.listen(0, '127.0.0.1', () => {
    const { port } = server.address();
    server.close(() => resolve(port));
  });
});

/** `parent` by process id. */
function parents() {
  const found = new Map();
  for (const name of fs.readdirSync('/proc')) {
    if (!/^\d+$/.test(name)) continue;
    try {
      found.set(Number(name), Number(stat(name)[1]));
    } catch {
      // It ended between the two reads.
    }
  }
  return found;
}

/** Fields of /proc/PID/stat from the third on: the second may hold anything. */
function stat(pid) {
  const text = fs.readFileSync(`/proc/${pid}/stat`, 'utf8');
  return text.slice(text.lastIndexOf(')') + 2).split(' ');
}

class Server {
  constructor(name, command, args, env) {
    Object.assign(this, { name, command, args, env });
  }

  async start() {
    this.port = await freePort();
    const { PATH, HOME, TMPDIR } = process.env;
    const env = { PATH, HOME, ...(TMPDIR && { TMPDIR }), ...this.env, PORT: String(this.port), JWT_SECRET: SECRET };
    this.child = spawn(this.command, this.args, { env, stdio: ['ignore', 'ignore', 'inherit'] });
    running.add(this.child);
    this.ended = new Promise((resolve) => this.child.on('close', resolve));
    this.child.on('error', () => {});
    const end = performance.now() + START;
    for (;;) {
      const answer = await request(this.port, 'GET', '/health').catch(() => undefined);
      if (answer?.status === 200) return;
      if (performance.now() > end || this.child.exitCode !== null) throw new Error(`${this.name} does not start`);
      await sleep(50);
    }
  }

  async stop() {
    if (!this.child) return;
    this.child.kill('SIGTERM');
    const gone = await Promise.race([this.ended.then(() => true), sleep(STOP, false, { ref: false })]);
    if (!gone) this.child.kill('SIGKILL');
    running.delete(this.child);
    this.child = undefined;
  }

  /** Its processes, children's children included. */
  processes() {
    const all = parents();
    const mine = new Set([this.child.pid]);
    for (let before = 0; before !== mine.size;) {
      before = mine.size;
      for (const [pid, parent] of all) if (mine.has(parent)) mine.add(pid);
    }
    return [...mine];
  }

  /** Seconds of processor time that it has used. */
  cpu() {
    const ticks = this.processes().map((pid) => {
      const fields = stat(pid);
      return Number(fields[11]) + Number(fields[12]);
    });
    return ticks.reduce((a, b) => a + b, 0) / TICKS_A_SECOND;
  }

  /** KiB of memory in use, all of its processes together. */
  async memory() {
    if (this.collects) {
      this.child.kill('SIGUSR2');
      await sleep(1_000);
    }
    const sizes = this.processes().map((pid) => {
      const status = fs.readFileSync(`/proc/${pid}/status`, 'utf8');
      return Number(/^VmRSS:\s+(\d+)/m.exec(status)?.[1] ?? 0);
    });
    return sizes.reduce((a, b) => a + b, 0);
  }
}

/** Banter with its limits off, else as it comes: one worker on two processors, the disk in use. */
function banter() {
  // The database not among temporary files, which may be in memory; the sockets there, for their
  // paths must be short.
  const state = fs.mkdtempSync(path.join(path.dirname(BINARY), 'bench-state-'));
  const runtime = fs.mkdtempSync(path.join(os.tmpdir(), 'banter-bench-'));
  process.on('exit', () => {
    for (const directory of [state, runtime]) fs.rmSync(directory, { recursive: true, force: true });
  });
  return new Server('Banter', BINARY, ['serve'], {
    BANTER_STATE_DIR: state,
    XDG_RUNTIME_DIR: runtime,
    BANTER_AUTH_RATE: '0',
    BANTER_POST_RATE: '0',
    RUST_LOG: 'error',
  });
}

/** The peer, see peer.js. */
function peer() {
  const server = new Server('peer', process.execPath, ['--expose-gc', path.resolve(__dirname, '../peer.js')], {});
  server.collects = true;
  return server;
}

module.exports = { banter, peer };

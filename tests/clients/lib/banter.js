'use strict';
// The fixture: the real binary, on a free port with a state directory (and a Redis) of its own, waited
// for by its health check and stopped by signal, whatever became of the test.
//
// Two variables of the environment say what tests run against that have no needs of their own:
//   BANTER_TEST_STORE    embedded (the default) or redis
//   BANTER_TEST_WORKERS  how many workers (1)

const { spawn } = require('node:child_process');
const fs = require('node:fs');
const os = require('node:os');
const path = require('node:path');
const assert = require('node:assert');
const { freePort } = require('./ports.js');
const { startRedis } = require('./redis.js');
const { Server } = require('./server.js');
const { until } = require('./wait.js');

const BINARY = process.env.BANTER_BIN
  ? path.resolve(process.env.BANTER_BIN)
  : path.resolve(__dirname, '../../../target/debug/banter');
const START_DEADLINE = 30_000;
const STOP_DEADLINE = 12_000;
/** The secret that servers of this suite sign with, unless a test says otherwise. */
const SECRET = 'a secret of the client tests, long enough';
/** The store of tests that leave it open. */
const STORE = process.env.BANTER_TEST_STORE ?? 'embedded';
if (!['embedded', 'redis'].includes(STORE)) throw new Error(`BANTER_TEST_STORE: ${STORE}; expected embedded or redis`);
/** The workers of tests that leave them open. */
const WORKERS = Number(process.env.BANTER_TEST_WORKERS ?? 1);

/** Running servers, so that none outlives this process. */
const running = new Set();
process.on('exit', () => running.forEach((banter) => banter.killEverything()));
for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP']) process.on(signal, () => process.exit(1));

/** Every process as `{pid, parent, args}`, zombies left out. */
function processes() {
  const found = [];
  for (const name of fs.readdirSync('/proc')) {
    if (!/^\d+$/.test(name)) continue;
    try {
      const stat = fs.readFileSync(`/proc/${name}/stat`, 'utf8');
      // The second field, in parentheses, may hold anything: go by the last parenthesis.
      const [state, parent] = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
      if (state === 'Z' || state === 'X') continue;
      const args = fs.readFileSync(`/proc/${name}/cmdline`, 'utf8').split('\0').slice(0, -1);
      found.push({ pid: Number(name), parent: Number(parent), args });
    } catch {
      // It ended between the two reads.
    }
  }
  return found;
}

class Banter extends Server {
  /**
   * `store`: embedded or redis. `redis`: a Redis of the caller's, instead of one that comes and goes
   * with the server; `redisUrl`: the way to it, if not the usual one. `workers`: how many.
   */
  constructor({ workers = WORKERS, store = STORE, redis, redisUrl, env = {}, args = [], stateDir } = {}) {
    super({ workers, store, redisUrl, env, args });
    this.redis = redis;
    this.ownsRedis = store === 'redis' && redis === undefined;
    this.home = fs.mkdtempSync(path.join(os.tmpdir(), 'banter-test-'));
    this.stateDir = stateDir ?? path.join(this.home, 'state');
  }

  async start() {
    if (!fs.existsSync(BINARY)) {
      throw new Error(`${BINARY} is missing: run \`cargo build\`, or set BANTER_BIN`);
    }
    fs.mkdirSync(this.stateDir, { recursive: true });
    if (this.ownsRedis) this.redis ??= await startRedis();
    // A free port may be taken by someone else before we get to it: then try another.
    for (let attempt = 1; ; attempt++) {
      try {
        await this.spawn(await freePort());
        return this;
      } catch (error) {
        this.killEverything();
        const taken = /in use|EADDRINUSE/i.test(this.logs());
        if (!taken || attempt === 3) throw error;
      }
    }
  }

  async spawn(port) {
    const env = {};
    for (const [key, value] of Object.entries(process.env)) {
      if (!/^(BANTER_|REDIS_|LISTEN_|NODE_TEST|XDG_|STATE_DIRECTORY|RUNTIME_DIRECTORY|CREDENTIALS_DIRECTORY|NOTIFY_SOCKET|WATCHDOG_|PORT$|WORKERS$|JWT_SECRET$|RUST_LOG$)/.test(key)) {
        env[key] = value;
      }
    }
    Object.assign(env, {
      PORT: String(port),
      WORKERS: String(this.options.workers),
      JWT_SECRET: SECRET,
      BANTER_STATE_DIR: this.stateDir,
      XDG_RUNTIME_DIR: this.home,
      XDG_DATA_HOME: this.home,
      RUST_LOG: process.env.BANTER_TEST_LOG ?? 'info',
      // Limits have tests of their own; elsewhere they would only be in the way.
      BANTER_AUTH_RATE: '0',
      BANTER_POST_RATE: '0',
      REDIS_URL: this.options.store === 'redis' ? this.options.redisUrl ?? this.redis.url : undefined,
      ...this.options.env,
    });
    for (const key of Object.keys(env)) if (env[key] === undefined) delete env[key];
    this.port = port;
    this.exit = undefined;
    const child = spawn(BINARY, ['serve', ...this.options.args], { env, stdio: ['ignore', 'pipe', 'pipe'] });
    this.child = child;
    this.pid = child.pid;
    running.add(this);
    for (const stream of [child.stdout, child.stderr]) {
      stream.setEncoding('utf8');
      stream.on('data', (text) => this.output.push(text));
    }
    child.on('error', (error) => {
      this.exit ??= { code: null, signal: null, error };
    });
    child.on('exit', (code, signal) => {
      this.exit = { code, signal };
    });
    await this.healthy(START_DEADLINE);
    await this.everybodyServes(START_DEADLINE);
  }

  /**
   * Waits until every worker serves: before that, an address goes to another worker than it will.
   */
  async everybodyServes(deadline) {
    const seen = new Set();
    let host = 0;
    await until('every worker serves', async () => {
      if (this.exit) throw new Error(`banter ended at start: ${JSON.stringify(this.exit)}\n${this.logs()}`);
      for (let i = 0; i < 20 && seen.size < Number(this.options.workers); i++) {
        host = (host % 250) + 1;
        seen.add(await this.workerOfAddress(`127.0.14.${host}`).catch(() => undefined));
        seen.delete(undefined);
      }
      return seen.size >= Number(this.options.workers);
    }, deadline);
  }

  /** Waits until the server (as seen from `localAddress`) says that it can serve. */
  async healthy(deadline = START_DEADLINE, localAddress = '127.0.0.1') {
    return until(
      'GET /health gives 200',
      async () => {
        if (this.exit) throw new Error(`banter ended at start: ${JSON.stringify(this.exit)}\n${this.logs()}`);
        try {
          const answer = await this.api('GET', '/health', { localAddress, deadline: 2_000 });
          return answer.status === 200 && answer.json;
        } catch {
          return false;
        }
      },
      deadline,
    );
  }

  /** Our own children by role: `master`, and workers by number. */
  roles() {
    const roles = { master: undefined, workers: new Map() };
    for (const { pid, parent, args } of processes()) {
      if (parent !== this.pid) continue;
      const worker = args.indexOf('worker');
      if (worker > 0 && /^\d+$/.test(args[worker + 1] ?? '')) roles.workers.set(Number(args[worker + 1]), pid);
      else if (args.includes('master')) roles.master = pid;
    }
    return roles;
  }

  masterPid() {
    const pid = this.roles().master;
    assert.ok(pid, 'the supervisor has no child with `master` on its command line');
    return pid;
  }

  workerPid(number) {
    const pid = this.roles().workers.get(number);
    assert.ok(pid, `the supervisor has no child with \`worker ${number}\` on its command line`);
    return pid;
  }

  workerNumbers() {
    return [...this.roles().workers.keys()].sort((a, b) => a - b);
  }

  /** Kills a worker as a crash would. Gives the pid it had. */
  kill9Worker(number) {
    const pid = this.workerPid(number);
    process.kill(pid, 'SIGKILL');
    return pid;
  }

  /** Kills the master as a crash would. Gives the pid it had. */
  kill9Master() {
    const pid = this.masterPid();
    process.kill(pid, 'SIGKILL');
    return pid;
  }

  killEverything() {
    const all = processes();
    const mine = new Set([this.pid]);
    for (let grown = true; grown; ) {
      grown = false;
      for (const { pid, parent } of all) {
        if (mine.has(parent) && !mine.has(pid)) {
          mine.add(pid);
          grown = true;
        }
      }
    }
    if (this.exit) mine.delete(this.pid);
    for (const pid of mine) {
      try {
        process.kill(pid, 'SIGKILL');
      } catch {
        // Gone already.
      }
    }
    running.delete(this);
  }

  /** SIGTERM, and everything must be gone with exit code 0 in time. */
  async terminate() {
    const children = processes().filter(({ parent }) => parent === this.pid);
    // The same pid and command line: nobody else's process that got the number since.
    const left = () => processes().filter((one) => children.some(({ pid, args }) => pid === one.pid && args.join() === one.args.join()));
    if (!this.exit) this.child.kill('SIGTERM');
    try {
      await until('banter ends after SIGTERM', () => this.exit, STOP_DEADLINE);
      assert.deepStrictEqual(this.exit, { code: 0, signal: null }, `how banter ended\n${this.logs().slice(-4_000)}`);
      await until('no child outlives the supervisor', () => left().length === 0, 2_000);
    } finally {
      for (const { pid } of left()) process.kill(pid, 'SIGKILL');
      this.killEverything();
    }
  }

  /** Stops the server and removes what it kept. Anything that panicked is a failure. */
  async stop() {
    try {
      await this.terminate();
    } finally {
      await this.remove();
    }
    assert.doesNotMatch(this.logs(), /panicked at/, 'a panic in the log');
  }

  async remove() {
    this.killEverything();
    fs.rmSync(this.home, { recursive: true, force: true });
    if (this.ownsRedis) await this.redis?.stop();
  }

  /** Stops and starts it again, same state directory, on a new port. */
  async restart() {
    await this.terminate();
    this.addresses = undefined;
    await this.start();
  }
}

/** A running server; the caller stops it. */
async function startBanter(options) {
  const banter = new Banter(options);
  try {
    return await banter.start();
  } catch (error) {
    await banter.remove();
    throw error;
  }
}

module.exports = { Banter, startBanter, SECRET, STORE, WORKERS, BINARY };

'use strict';
// docker-compose.yml from its first `up` to its `down`, with Socket.IO clients in containers of their own. Needs a
// Docker engine and Compose 1.29 or 2.
//   COMPOSE            the command; by default `docker compose` where there is one, else `docker-compose`
//   COMPOSE_OVERRIDE   one more Compose file, for what building takes on this machine

const { test } = require('node:test');
const assert = require('node:assert');
const { execFile, spawn, spawnSync } = require('node:child_process');
const { createInterface } = require('node:readline');
const fs = require('node:fs');
const os = require('node:os');
const path = require('node:path');
const { Client } = require('../clients/lib/client.js');
const { freePort } = require('../clients/lib/ports.js');
const { Server } = require('../clients/lib/server.js');
const { history } = require('../clients/lib/village.js');
const { until, within } = require('../clients/lib/wait.js');

const ROOT = path.resolve(__dirname, '../..');
const WORKERS = 2;
const BUILD_DEADLINE = 3_600_000;
const STOP_DEADLINE = 10_000;
const SECRET = 'a secret of the compose tests, long enough';

/** Nobody else's containers, networks, volumes and images begin like this. */
const PROJECT = `banter-test-${process.pid}-${Math.random().toString(36).slice(2, 8)}`;
const HOME = fs.mkdtempSync(path.join(os.tmpdir(), `${PROJECT}-`));
const ENV_FILE = path.join(HOME, 'env');
const COMPOSE = findCompose();
const FILES = ['docker-compose.yml', 'tests/compose/clients.yml'].map((file) => path.join(ROOT, file));
if (process.env.COMPOSE_OVERRIDE) FILES.push(path.resolve(process.env.COMPOSE_OVERRIDE));
/** What commands inherit: nothing that would be taken for a setting. */
const ENV = { CLIENT_IMAGE: `${PROJECT}-client` };
for (const [name, value] of Object.entries(process.env)) {
  if (!/^(BANTER_|REDIS_|COMPOSE_(?!DOCKER_CLI_BUILD$)|(PORT|WORKERS|JWT_SECRET|RUST_LOG)$)/.test(name)) ENV[name] = value;
}

function findCompose() {
  if (process.env.COMPOSE) return process.env.COMPOSE.split(' ');
  const hasPlugin = spawnSync('docker', ['compose', 'version']).status === 0;
  return hasPlugin ? ['docker', 'compose'] : ['docker-compose'];
}

// ---- commands

/** Runs a command to its end. Gives `{code, stdout, stderr}`, whatever the code. */
function attempt([program, ...args], timeout = 60_000) {
  return new Promise((resolve, reject) => {
    execFile(program, args, { env: ENV, timeout, maxBuffer: 64 << 20 }, (error, stdout, stderr) => {
      if (error && !Number.isInteger(error.code)) reject(error);
      else resolve({ code: error?.code ?? 0, stdout, stderr });
    });
  });
}

/** Runs a command, which must succeed. Gives what it wrote, without the last line break. */
async function run(command, timeout) {
  const { code, stdout, stderr } = await attempt(command, timeout);
  assert.strictEqual(code, 0, `${command.join(' ')}\n${stdout.slice(-4_000)}\n${stderr.slice(-4_000)}`);
  return stdout.trimEnd();
}

const docker = (...args) => run(['docker', ...args]);
const lines = (text) => text.split('\n').filter((line) => line !== '');

function composeCommand(args) {
  return [...COMPOSE, '-p', PROJECT, '--project-directory', ROOT, '--env-file', ENV_FILE, ...FILES.flatMap((file) => ['-f', file]), ...args];
}

const compose = (...args) => run(composeCommand(args), 180_000);

/** What .env would hold. */
function configure(settings) {
  fs.writeFileSync(ENV_FILE, Object.entries(settings).map(([name, value]) => `${name}=${value}\n`).join(''));
}

// ---- containers

/** A service's container, as `docker inspect` tells of it. */
async function inspect(service) {
  const labels = [`project=${PROJECT}`, `service=${service}`, 'oneoff=False'];
  const filters = labels.flatMap((label) => ['--filter', `label=com.docker.compose.${label}`]);
  const [id, ...others] = lines(await docker('ps', '-a', '-q', ...filters));
  assert.ok(id && others.length === 0, `${service} has one container`);
  return JSON.parse(await docker('inspect', id))[0];
}

/** Runs a shell script in a service's container, as its user. */
async function inside(service, script) {
  return docker('exec', (await inspect(service)).Id, 'sh', '-c', script);
}

async function healthy(deadline = 60_000) {
  for (const service of ['redis', 'banter']) {
    await until(`${service} is healthy`, async () => (await inspect(service)).State.Health?.Status === 'healthy', deadline);
  }
}

/** The processes in Banter's container, zombies too: `{pid, parent, args}`. */
async function processes() {
  const script = 'cd /proc; for p in [0-9]*; do [ -r $p/stat ] && echo "$p $(sed "s/.*) . //" $p/stat | cut -d" " -f1) $(tr "\\0" " " <$p/cmdline)"; done 2>/dev/null; true';
  return lines(await inside('banter', script)).map((line) => {
    const [pid, parent, ...args] = line.split(' ');
    return { pid: Number(pid), parent: Number(parent), args: args.join(' ').trim() };
  });
}

async function workerPid(number) {
  return (await processes()).find(({ args }) => args.endsWith(`banter worker ${number}`))?.pid;
}

/** The address of the host on the network that clients come by. */
const bridge = () => docker('network', 'inspect', '-f', '{{(index .IPAM.Config 0).Gateway}}', `${PROJECT}_default`);

/** Everything of this kind that is this project's. */
async function remains(kind) {
  const list = { container: ['ps', '-a'], network: ['network', 'ls'], volume: ['volume', 'ls'] }[kind];
  return lines(await docker(...list, '-q', '--filter', `name=${PROJECT}`));
}

/** Removes whatever there is, also when the process is being ended. The images' layers stay, for the next time. */
function cleanUp() {
  const read = (...args) => lines(spawnSync('docker', args, { env: ENV, encoding: 'utf8' }).stdout ?? '');
  const remove = (command, names) => names.length > 0 && spawnSync('docker', [...command, ...names], { env: ENV });
  const mine = ['--filter', `name=${PROJECT}`];
  remove(['rm', '-f', '-v'], read('ps', '-a', '-q', ...mine));
  remove(['network', 'rm'], read('network', 'ls', '-q', ...mine));
  remove(['volume', 'rm'], read('volume', 'ls', '-q', ...mine));
  const images = read('images', '--format', '{{.Repository}}:{{.Tag}}');
  remove(['rmi', '--no-prune'], images.filter((name) => name.startsWith(PROJECT)));
  fs.rmSync(HOME, { recursive: true, force: true });
}

for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP']) {
  process.on(signal, () => {
    cleanUp();
    process.exit(1);
  });
}

// ---- clients

/** `talker.js` in a container of its own on the network of the deployment. */
class Talker {
  constructor(version, { name, token }, channel) {
    this.container = `${PROJECT}-${name}`;
    const args = [
      'run', '--rm', '-i', '--init', '--name', this.container, '--network', `${PROJECT}_default`,
      '-v', `${ROOT}/tests:/tests:ro`, ENV.CLIENT_IMAGE,
      'node', '/tests/compose/talker.js', 'http://banter:8000', String(version), name, token, channel,
    ];
    this.child = spawn('docker', args, { env: ENV, stdio: ['pipe', 'pipe', 'pipe'] });
    this.complaints = '';
    this.child.stderr.on('data', (chunk) => (this.complaints += chunk));
    this.child.stdin.on('error', () => {});
    this.answers = createInterface({ input: this.child.stdout })[Symbol.asyncIterator]();
  }

  /** Has it do something; one at a time. */
  async ask(command, ...args) {
    this.child.stdin.write(`${JSON.stringify([command, ...args])}\n`);
    const what = `${this.container}: ${command}`;
    const { value: line, done } = await within(what, this.answers.next(), 60_000);
    if (done) throw new Error(`${what}: it ended: ${this.complaints}`);
    const { value, error } = JSON.parse(line);
    if (error !== undefined) throw new Error(`${what}: ${error}`);
    return value;
  }

  async leave() {
    this.child.stdin.end();
    await until(`${this.container} ends`, () => this.child.exitCode !== null);
  }
}

/** Waits until each talker has `more` acknowledged posts than now. */
async function everybodyTalksOn(talkers, more = 5) {
  await Promise.all(talkers.map(async (talker) => {
    const { said } = await talker.ask('count');
    await until(`${talker.container} is acknowledged again`, async () => (await talker.ask('count')).said >= said + more, 60_000);
  }));
}

// ---- the test

test('a deployment with docker-compose', { timeout: BUILD_DEADLINE + 900_000 }, async (t) => {
  let passing = true;
  /** A part of the story. After one that failed there is no point in the others. */
  const step = (name, part) => t.test(name, async (one) => {
    if (!passing) throw Object.assign(new Error(), { stack: 'not tried, because a step before it failed' });
    passing = false;
    await part(one);
    passing = true;
  });
  t.after(async () => {
    if (!passing) for (const service of ['banter', 'redis']) {
      const said = await attempt(composeCommand(['logs', '--tail=100', service])).catch((error) => ({ stdout: error.message }));
      console.error(said.stdout);
    }
    cleanUp();
  });

  const server = new Server({ workers: WORKERS });
  const settings = { JWT_SECRET: SECRET, WORKERS };
  const talkers = [];
  const channel = 'general';
  let texts = [];
  let owner;
  /** The whole channel: those texts that were acknowledged, and nothing else. */
  const everythingIsThere = async () => {
    const stored = await history(server, owner.token, channel);
    assert.deepStrictEqual(stored.map(({ id }) => id), stored.map((_, i) => 1 + i), 'ids without holes');
    assert.deepStrictEqual(stored.map(({ message }) => message).sort(), [...texts].sort());
    return stored;
  };

  await step('without a JWT_SECRET nothing is started, and it is said how to make one', async () => {
    configure({ WORKERS });
    const { code, stderr } = await attempt(composeCommand(['up', '-d']));
    assert.notStrictEqual(code, 0);
    assert.match(stderr, /JWT_SECRET.*to make one, once: .*head -c 32 \/dev\/urandom \| base64/s);
    assert.deepStrictEqual(await remains('container'), []);
  });

  await step('the images are built', async (one) => {
    const begun = performance.now();
    settings.PORT = server.port = await freePort();
    configure(settings);
    await run(composeCommand(['--profile', 'clients', 'build']), BUILD_DEADLINE);
    one.diagnostic(`built in ${((performance.now() - begun) / 1000).toFixed(1)} s`);
  });

  await step('everything comes up, and is healthy', async (one) => {
    const begun = performance.now();
    await compose('up', '-d');
    await healthy();
    one.diagnostic(`healthy after ${((performance.now() - begun) / 1000).toFixed(1)} s`);
    owner = await server.register('owner');
  });

  await step('the image holds no secret, no compiler and no root', async (one) => {
    const { Image } = await inspect('banter');
    const [{ Config, Size }] = JSON.parse(await docker('image', 'inspect', Image));
    one.diagnostic(`image: ${(Size / 1e6).toFixed(1)} MB`);
    assert.match(Config.User, /^[1-9]\d*:[1-9]\d*$/);
    assert.deepStrictEqual(Config.Env.map((line) => line.split('=')[0]).sort(), ['BANTER_STATE_DIR', 'PATH']);
    assert.deepStrictEqual(Object.keys(Config.ExposedPorts), ['8000/tcp']);
    assert.strictEqual(await inside('banter', 'command -v cargo cc || echo none'), 'none');
    const weak = await attempt(['docker', 'run', '--rm', '--name', `${PROJECT}-weak`, '-e', 'JWT_SECRET=secret', Image]);
    assert.strictEqual(weak.code, 78, weak.stderr);
    assert.match(weak.stderr, /JWT_SECRET: the JWT secret .*; make one with/);
  });

  await step('the containers are locked up', async () => {
    for (const service of ['banter', 'redis']) {
      const status = await inside(service, 'cat /proc/1/status');
      assert.match(status, /^CapBnd:\s+0+$/m, service);
      assert.match(status, /^NoNewPrivs:\s+1$/m, service);
      assert.doesNotMatch(status, /^Uid:.*\b0\b/m, service);
      assert.match(await inside(service, 'touch /banter-test 2>&1 || true'), /[Rr]ead-only file system/);
    }
    const redis = await inspect('redis');
    const bound = Object.values(redis.NetworkSettings.Ports).flat().filter(Boolean);
    assert.deepStrictEqual(bound, [], 'Redis is published nowhere');
    const networks = Object.keys(redis.NetworkSettings.Networks);
    assert.deepStrictEqual(networks, [`${PROJECT}_store`]);
    assert.strictEqual(await docker('network', 'inspect', '-f', '{{.Internal}}', ...networks), 'true');
    const policy = await inside('redis', 'redis-cli config get "append*" | tr "\\n" " "');
    assert.match(policy, /appendonly yes/);
    assert.match(policy, /appendfsync always/);
  });

  await step('process 1 takes in orphans', async () => {
    const script = [
      'orphan=$(sleep 1 >/dev/null 2>&1 & echo $!)',
      'cut -d" " -f4 /proc/$orphan/stat',
      'for i in $(seq 50); do [ -e /proc/$orphan ] || exit 0; sleep 0.1; done',
      'cat /proc/$orphan/stat',
    ];
    assert.strictEqual(await inside('banter', script.join('\n')), '1', 'its parent, and no trace of it afterwards');
  });

  await step('clients 1.x and 4.x talk to each other on two workers', async () => {
    // Which worker serves an address is for the hash to say: try until both have somebody.
    const workers = new Map();
    for (let i = 0; workers.size < WORKERS; i++) {
      assert.ok(i < 12, 'no twelve addresses are served by one worker');
      const talker = new Talker([1, 4][workers.size], await server.register('talker'), channel);
      const worker = await talker.ask('worker');
      // One that is not needed keeps its address until all are found, or the next would get it.
      talkers.push(talker);
      if (!workers.has(worker)) workers.set(worker, talker);
    }
    const chosen = [...workers.values()];
    await Promise.all(talkers.filter((one) => !chosen.includes(one)).map((one) => one.leave()));
    talkers.splice(0, talkers.length, ...chosen);
    await Promise.all(talkers.map((talker) => talker.ask('moveIn', channel)));
    await Promise.all(talkers.map((talker) => talker.ask('startTalking', 100)));
    await everybodyTalksOn(talkers);
  });

  await step('who comes by the published port of the host has the address of the bridge', async () => {
    const seen = new Set();
    for (let host = 2; host < 14; host++) seen.add(await server.workerOfAddress(`127.0.0.${host}`));
    assert.strictEqual(seen.size, 1, 'twelve addresses of the host, one worker');
    const { name } = await server.register('neighbour', { localAddress: '127.0.0.2' });
    const gateway = await bridge();
    const log = await compose('logs', '--no-color', 'banter');
    const line = log.split('\n').find((one) => one.includes('registered') && one.includes(name));
    assert.ok(line?.includes(gateway), `${line}\nnames ${gateway}`);
  });

  await step('a worker killed with SIGKILL is started again, and its clients come back', async () => {
    const talker = talkers[0];
    const [number, { connections }] = [await talker.ask('worker'), await talker.ask('count')];
    const pid = await workerPid(number);
    await inside('banter', `kill -KILL ${pid}`);
    await until('another process is this worker', async () => ![undefined, pid].includes(await workerPid(number)));
    await until('its client has come back', async () => (await talker.ask('count')).connections > connections, 30_000);
    await everybodyTalksOn(talkers);
  });

  await step('after a restart of Redis the talk goes on', async () => {
    await compose('restart', 'redis');
    await everybodyTalksOn(talkers);
    await healthy();
  });

  await step('after a restart of Banter its clients come back', async () => {
    const before = await Promise.all(talkers.map((talker) => talker.ask('count')));
    await compose('restart', 'banter');
    await everybodyTalksOn(talkers);
    const after = await Promise.all(talkers.map((talker) => talker.ask('count')));
    after.forEach(({ connections }, i) => assert.ok(connections > before[i].connections));
    await healthy();
  });

  await step('everything acknowledged is there, and everybody has heard all of it', async (one) => {
    texts = (await Promise.all(talkers.map((talker) => talker.ask('stopTalking')))).flat();
    const stored = await everythingIsThere();
    one.diagnostic(`${stored.length} messages`);
    for (const talker of talkers) {
      const { heard, posted, complaints } = await talker.ask('account', stored.length);
      assert.deepStrictEqual(complaints, []);
      for (const [id, text] of posted) assert.strictEqual(stored[id - 1].message, text);
      const own = new Set(posted.map(([id]) => id));
      assert.deepStrictEqual(
        heard.filter(({ id }) => !own.has(id)),
        stored.filter(({ id }) => !own.has(id)).map(({ id, message, user }) => ({ id, message, user })),
        `what ${talker.container} heard of others, once each, in order`,
      );
    }
  });

  await step('it stops within 10 s, with people connected, and everything ends with 0', async (one) => {
    const begun = performance.now();
    await compose('stop');
    const took = performance.now() - begun;
    one.diagnostic(`stopped in ${(took / 1000).toFixed(1)} s`);
    assert.ok(took < STOP_DEADLINE, `${took} ms`);
    for (const service of ['banter', 'redis']) {
      const { Status, ExitCode, OOMKilled } = (await inspect(service)).State;
      assert.deepStrictEqual({ Status, ExitCode, OOMKilled }, { Status: 'exited', ExitCode: 0, OOMKilled: false }, service);
    }
    await Promise.all(talkers.map((talker) => talker.leave()));
  });

  await step('what was backed up comes back into a new volume', async () => {
    const backup = path.join(HOME, 'backup.tar');
    const tar = (direction, flag) => {
      const command = composeCommand(['run', '--rm', '-T', 'redis', 'tar', '-C', '/data', flag, '.']);
      return run(['sh', '-c', `exec "$@" ${direction}"$0"`, backup, ...command]);
    };
    await tar('>', '-c');
    await compose('down', '-v');
    assert.deepStrictEqual(await remains('volume'), []);
    await tar('<', '-x');
    await compose('up', '-d');
    await healthy();
    await everythingIsThere();
  });

  await step('a password for Redis can be set afterwards, and all is still there', async () => {
    configure({ ...settings, REDIS_PASSWORD: 'CorrectHorse7' });
    await compose('up', '-d');
    await healthy();
    assert.match(await inside('redis', 'redis-cli ping 2>&1'), /NOAUTH/);
    await everythingIsThere();
    const client = new Client(server, { name: owner.name, token: owner.token });
    try {
      await client.open();
      await client.join(channel);
      assert.strictEqual((await client.post(channel, 'one more')).id, texts.length + 1);
    } finally {
      client.close();
    }
    texts.push('one more');
    await everythingIsThere();
  });

  await step('a proxy on the host that is trusted tells who comes by the published port', async () => {
    const workers = async () => {
      const seen = new Set();
      for (let host = 1; host < 13; host++) {
        const headers = { 'x-forwarded-for': `192.0.2.${host}` };
        const { status, json } = await server.api('GET', '/health', { headers });
        assert.strictEqual(status, 200);
        seen.add(json.worker);
      }
      return seen.size;
    };
    assert.strictEqual(await workers(), 1, 'not trusted');
    const BANTER_TRUST_PROXY = await bridge();
    configure({ ...settings, BANTER_TRUST_PROXY });
    await compose('up', '-d');
    await healthy();
    assert.strictEqual(await workers(), WORKERS, 'trusted');
  });

  await step('`down` leaves nothing but the volume, and with -v not even that', async () => {
    await compose('down');
    assert.deepStrictEqual([await remains('container'), await remains('network')], [[], []]);
    assert.strictEqual((await remains('volume')).length, 1);
    await compose('down', '-v');
    assert.deepStrictEqual(await remains('volume'), []);
  });
});

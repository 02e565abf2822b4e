'use strict';
// A real redis-server in a directory of its own, on a unix socket, and the means to harm it: kill it,
// freeze it, cut its connections or let them fall silent, take the end of its file away.

const { spawn } = require('node:child_process');
const fs = require('node:fs');
const net = require('node:net');
const os = require('node:os');
const path = require('node:path');
const { freePort } = require('./ports.js');
const { until, within } = require('./wait.js');

const START_DEADLINE = 20_000;
const COMMAND_DEADLINE = 5_000;

/** Running servers, so that none outlives this process. */
const running = new Set();
process.on('exit', () => running.forEach((redis) => redis.remove()));

/** An answer of Redis that is an error, or what its `command` is rejected with. */
class RedisError extends Error {}

/**
 * Reads one RESP2 value of `bytes` from `at` on: `{value, end}`, or undefined if it is not all there.
 * Strings are UTF-8; an error in an array is a value like others.
 */
function parse(bytes, at = 0) {
  const line = bytes.indexOf('\r\n', at);
  if (line < 0) return undefined;
  const head = bytes.toString('utf8', at + 1, line);
  let end = line + 2;
  switch (String.fromCharCode(bytes[at])) {
    case '+': return { value: head, end };
    case '-': return { value: new RedisError(head), end };
    case ':': return { value: Number(head), end };
    case '$': {
      const length = Number(head);
      if (length < 0) return { value: null, end };
      if (bytes.length < end + length + 2) return undefined;
      return { value: bytes.toString('utf8', end, end + length), end: end + length + 2 };
    }
    case '*': {
      const count = Number(head);
      if (count < 0) return { value: null, end };
      const value = [];
      while (value.length < count) {
        const one = parse(bytes, end);
        if (!one) return undefined;
        value.push(one.value);
        end = one.end;
      }
      return { value, end };
    }
    default: throw new Error(`not RESP: ${JSON.stringify(bytes.toString('latin1', at, at + 40))}`);
  }
}

/** One command on a connection of its own to a unix socket. */
function ask(socketPath, words, deadline) {
  const socket = net.connect(socketPath);
  const answer = new Promise((resolve, reject) => {
    let bytes = Buffer.alloc(0);
    socket.on('error', reject);
    socket.on('close', () => reject(new Error('Redis closed the connection')));
    socket.on('data', (chunk) => {
      bytes = Buffer.concat([bytes, chunk]);
      try {
        const reply = parse(bytes);
        if (reply?.value instanceof RedisError) reject(reply.value);
        else if (reply) resolve(reply.value);
      } catch (error) {
        reject(error);
      }
    });
    const parts = words.map((word) => Buffer.from(String(word)));
    socket.write(Buffer.concat([
      Buffer.from(`*${parts.length}\r\n`),
      ...parts.flatMap((part) => [Buffer.from(`$${part.length}\r\n`), part, Buffer.from('\r\n')]),
    ]));
  });
  return within(`Redis: ${words.join(' ')}`, answer, deadline).finally(() => socket.destroy());
}

class Redis {
  /** `appendfsync`: always, everysec or no. `tcp`: also listen on a port. `config`: more settings. */
  constructor({ appendfsync = 'everysec', tcp = false, config = {} } = {}) {
    this.options = { appendfsync, tcp, config };
    this.home = fs.mkdtempSync(path.join(os.tmpdir(), 'banter-redis-'));
    this.socketPath = path.join(this.home, 'redis.sock');
    this.output = [];
    running.add(this);
  }

  /** Starts it, also again after `kill9` or `end`, with the data that it had then. */
  async start() {
    const { appendfsync, tcp, config } = this.options;
    if (tcp) this.port ??= await freePort();
    const settings = {
      port: this.port ?? 0,
      bind: '127.0.0.1',
      unixsocket: this.socketPath,
      unixsocketperm: 700,
      dir: this.home,
      appendonly: 'yes',
      appendfsync,
      save: '',
      'maxmemory-policy': 'noeviction',
      ...config,
    };
    const args = Object.entries(settings).flatMap(([name, value]) => [`--${name}`, String(value)]);
    const child = spawn('redis-server', args, { stdio: ['ignore', 'pipe', 'pipe'] });
    this.child = child;
    this.ended = new Promise((resolve) => {
      child.on('error', (error) => resolve(error.message));
      child.on('exit', (code, signal) => resolve(signal ?? code));
    });
    let ended;
    this.ended.then((how) => { ended = String(how); });
    for (const stream of [child.stdout, child.stderr]) {
      stream.setEncoding('utf8');
      stream.on('data', (text) => this.output.push(text));
    }
    await until('redis-server answers', async () => {
      if (ended !== undefined) throw new Error(`redis-server ended at start (${ended}):\n${this.logs()}`);
      // Refused until it listens, an error while it loads its data.
      return ask(this.socketPath, ['PING'], 1_000).then((pong) => pong === 'PONG', () => false);
    }, START_DEADLINE);
    return this;
  }

  logs() {
    return this.output.join('').slice(-4_000);
  }

  /** What `REDIS_URL` leads to it. */
  get url() {
    return `unix:${this.socketPath}`;
  }

  get tcpUrl() {
    return `redis://127.0.0.1:${this.port}`;
  }

  /** Sends a command, given as words; gives the answer, or throws what Redis says against it. */
  command(...words) {
    return ask(this.socketPath, words, COMMAND_DEADLINE);
  }

  /** Ends it as a crash would, and waits until it is gone. */
  async kill9() {
    this.signal('SIGKILL');
    await within('redis-server ends', this.ended);
  }

  /** It stops in its tracks; its connections stay open. */
  freeze() {
    this.signal('SIGSTOP');
  }

  thaw() {
    this.signal('SIGCONT');
  }

  signal(signal) {
    this.child?.kill(signal);
  }

  /** Closes all connections of one kind: `normal` or `pubsub`. */
  closeConnections(kind) {
    return this.command('CLIENT', 'KILL', 'TYPE', kind, 'SKIPME', 'yes');
  }

  /** How many bytes it has appended. */
  appended() {
    return fs.statSync(this.appendFile()).size;
  }

  /** Takes the last `bytes` from its file, as a disk that lost its power would. It must not run. */
  truncateAof(bytes) {
    const file = this.appendFile();
    fs.truncateSync(file, Math.max(0, fs.statSync(file).size - bytes));
  }

  /** The file that it appends to: since Redis 7 the newest of several in a directory. */
  appendFile() {
    const single = path.join(this.home, 'appendonly.aof');
    if (fs.existsSync(single)) return single;
    const directory = path.join(this.home, 'appendonlydir');
    const number = (name) => Number(/\.(\d+)\.incr\.aof$/.exec(name)?.[1] ?? 0);
    const [newest] = fs.readdirSync(directory).filter(number).sort((a, b) => number(b) - number(a));
    return path.join(directory, newest);
  }

  /** Puts a proxy in front of it. */
  async proxy() {
    this.front ??= await new Proxy(this).listen();
    return this.front;
  }

  /** Ends it, and removes all that it kept. */
  async stop() {
    this.remove();
    if (this.child) await within('redis-server ends', this.ended);
  }

  remove() {
    running.delete(this);
    this.front?.close();
    this.signal('SIGKILL');
    fs.rmSync(this.home, { recursive: true, force: true });
  }
}

/** Stands between servers and Redis, and can harm the connections between them, not Redis. */
class Proxy {
  constructor(redis) {
    this.redis = redis;
    this.socketPath = path.join(redis.home, 'proxy.sock');
    this.pairs = new Set();
    this.server = net.createServer((client) => this.forward(client));
  }

  get url() {
    return `unix:${this.socketPath}`;
  }

  async listen() {
    await new Promise((resolve, reject) => {
      this.server.on('error', reject);
      this.server.listen(this.socketPath, resolve);
    });
    return this;
  }

  forward(client) {
    const pair = [client, net.connect(this.redis.socketPath)];
    pair.topics = '';
    this.pairs.add(pair);
    client.on('data', (chunk) => {
      if (chunk.includes('SUBSCRIBE')) pair.topics += chunk;
    });
    for (const [one, other] of [pair, [...pair].reverse()]) {
      one.on('data', (chunk) => {
        if (!pair.silent) other.write(chunk);
      });
      one.on('error', () => {});
      one.on('close', () => {
        this.pairs.delete(pair);
        other.destroy();
      });
    }
  }

  /** Closes all connections. New ones are let through. */
  cutOff() {
    for (const pair of this.pairs) for (const socket of pair) socket.destroy();
  }

  /**
   * All connections, or those that ever subscribed to `topic`, stay open, but nothing gets through any
   * more. New ones are let through. Gives how many these are.
   */
  blackhole(topic = '') {
    const hit = [...this.pairs].filter(({ topics }) => topics.includes(topic));
    for (const pair of hit) pair.silent = true;
    return hit.length;
  }

  close() {
    this.server.close();
    this.cutOff();
  }
}

/** A running Redis; the caller stops it. */
async function startRedis(options) {
  // A free port may be taken by someone else before Redis gets to it: then another one is tried.
  for (let attempt = 1; ; attempt++) {
    const redis = new Redis(options);
    try {
      return await redis.start();
    } catch (error) {
      redis.remove();
      if (!/in use/i.test(redis.logs()) || attempt === 3) throw error;
    }
  }
}

module.exports = { startRedis, RedisError };

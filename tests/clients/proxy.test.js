'use strict';
// Behind a proxy: whom the server takes for the client, and what nobody may make it believe.

const assert = require('node:assert');
const { spawnSync } = require('node:child_process');
const fs = require('node:fs');
const net = require('node:net');
const { suite, World } = require('./lib/suite.js');
const { BINARY } = require('./lib/banter.js');
const { descriptors } = require('./lib/raw.js');
const { request } = require('./lib/rest.js');
const { startProxy } = require('./lib/proxies.js');
const { sleep, until, within } = require('./lib/wait.js');

/** The proxy whose word counts here, and somebody whose does not. */
const PROXY = '127.0.7.1';
const STRANGER = '127.0.8.1';
/** What a trusted peer that says nothing is given, and some time for a slow machine. */
const SILENCE = 3_000;
const SLACK = 2_500;

/** A PROXY header of version 1. */
const v1 = (client, family = 'TCP4') => Buffer.from(`PROXY ${family} ${client} ${family === 'TCP4' ? '127.0.0.1' : '::1'} 40000 80\r\n`);

/** One of version 2, with these bytes as the rest. */
function rawV2(command, family, block) {
  const head = Buffer.from('0d0a0d0a000d0a515549540a00000000', 'hex');
  head[12] = command;
  head[13] = family;
  head.writeUInt16BE(block.length, 14);
  return Buffer.concat([head, block]);
}

/** One of version 2 for an IPv4 address; `tlvs` bytes of extensions. */
function v2(client, tlvs = 0) {
  const addresses = Buffer.from([...client.split('.').map(Number), 127, 0, 0, 1, 0x9c, 0x40, 0, 80]);
  const extension = Buffer.alloc(tlvs);
  if (tlvs) {
    extension[0] = 0x04;
    extension.writeUInt16BE(tlvs - 3, 1);
  }
  return rawV2(0x21, 0x11, Buffer.concat([addresses, extension]));
}

/** A request for /health with these header lines. */
const ask = (...lines) => Buffer.from(`GET /health HTTP/1.1\r\nHost: x\r\n${lines.map((line) => `${line}\r\n`).join('')}\r\n`);
const forwarded = (...addresses) => `X-Forwarded-For: ${addresses.join(', ')}`;

/** Names that nobody has, each given once: failed logins count against the name, too. */
const nobody = ((next) => () => `nobody${next++}`)(1);

/** A login that fails, whereupon the log names the client. */
const failLogin = (...lines) => {
  const body = JSON.stringify({ name: nobody(), password: 'a wrong password' });
  return Buffer.from(`POST /auth/login HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: ${body.length}\r\n${lines.map((line) => `${line}\r\n`).join('')}\r\n${body}`);
};

/** A connection of bytes, which reads answers with a Content-Length. */
class Connection {
  static async open(port, localAddress, bytes) {
    const connection = new Connection(port, localAddress);
    await within(`${localAddress} connects`, connection.connected);
    if (bytes) connection.write(bytes);
    return connection;
  }

  constructor(port, localAddress) {
    this.unread = '';
    this.closed = false;
    this.socket = net.connect({ host: '127.0.0.1', port, localAddress });
    this.socket.setNoDelay(true);
    this.connected = new Promise((resolve, reject) => {
      this.socket.on('connect', resolve);
      this.socket.on('error', reject);
    });
    this.connected.catch(() => {});
    this.socket.on('data', (chunk) => { this.unread += chunk.toString('latin1'); });
    this.socket.on('close', () => { this.closed = true; });
  }

  write(bytes) {
    this.socket.write(bytes);
    return this;
  }

  /** The next answer: `{status, headers, json}`. */
  answer(deadline = 10_000) {
    return until('an answer', () => {
      const end = this.unread.indexOf('\r\n\r\n');
      if (end >= 0) {
        const [line, ...lines] = this.unread.slice(0, end).split('\r\n');
        const headers = Object.fromEntries(lines.map((one) => [one.slice(0, one.indexOf(':')).toLowerCase(), one.slice(one.indexOf(':') + 1).trim()]));
        const body = this.unread.slice(end + 4, end + 4 + Number(headers['content-length']));
        if (body.length === Number(headers['content-length'])) {
          this.unread = this.unread.slice(end + 4 + body.length);
          return { status: Number(line.split(' ')[1]), headers, json: body && JSON.parse(body) };
        }
      }
      if (this.closed) throw new Error(`closed after ${JSON.stringify(this.unread)}`);
      return undefined;
    }, deadline);
  }

  /** Waits until the server has closed it; gives what nobody has read. */
  async end(deadline = 10_000) {
    await until('the server closes the connection', () => this.closed, deadline);
    return this.unread;
  }

  destroy() {
    this.socket.destroy();
  }
}

/** One exchange on a connection of its own. */
async function say(banter, localAddress, ...bytes) {
  const connection = await Connection.open(banter.port, localAddress, Buffer.concat(bytes));
  try {
    return await connection.answer();
  } finally {
    connection.destroy();
  }
}

/** The worker that answers. */
async function workerOf(banter, localAddress, ...bytes) {
  const { status, json } = await say(banter, localAddress, ...bytes);
  assert.strictEqual(status, 200);
  return Number(json.worker);
}

/** Waits for a failed login of this client in the log. */
const logged = (banter, client) => until(`the log names ${client}`, () => banter.logs().split('\n').some((line) => /login_failed/.test(line) && new RegExp(`client=${client.replaceAll('.', '\\.')}(\\s|$)`).test(line)));

/** Addresses of the documentation's networks, each given once. */
const unused = ((next) => () => `198.51.100.${next++}`)(1);

/** Seconds of processor time that a process has used. */
function processorTime(pid) {
  const stat = fs.readFileSync(`/proc/${pid}/stat`, 'utf8');
  const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
  return (Number(fields[11]) + Number(fields[12])) / 100;
}

const TRUST = { store: 'embedded', workers: 2, env: { BANTER_TRUST_PROXY: `${PROXY}, 10.0.0.0/8`, RUST_LOG: 'info,banter::master::peek=debug' } };

suite('what a trusted proxy says', TRUST, (scenario, banter) => {
  let clients;
  const twoClients = async () => {
    clients ??= [await banter().addressOfWorker(0), await banter().addressOfWorker(1)];
    return clients;
  };

  scenario('its client decides on the worker, however it names it', async () => {
    for (const [worker, client] of (await twoClients()).entries()) {
      const ways = {
        'version 1': [v1(client), ask()],
        'version 1, a mapped address': [v1(`::ffff:${client}`, 'TCP6'), ask()],
        'version 2': [v2(client), ask()],
        'version 2 with extensions': [v2(client, 3_000), ask()],
        'X-Forwarded-For': [ask(forwarded(client))],
        'X-Forwarded-For behind what the client made up': [ask(forwarded(clients[1 - worker], 'nonsense', client))],
        'X-Forwarded-For in two lines': [ask(forwarded(clients[1 - worker]), forwarded(client))],
        'X-Forwarded-For of two proxies': [ask(forwarded(clients[1 - worker], client, '10.1.2.3'))],
        'X-Forwarded-For with a port': [ask(forwarded(`${client}:4711`))],
        'X-Forwarded-For behind a proxy that a PROXY header names': [v2('10.1.2.3'), ask(forwarded(client))],
        'a PROXY header, whatever its client forwards': [v2(client), ask(forwarded(clients[1 - worker]))],
      };
      for (const [way, bytes] of Object.entries(ways)) {
        assert.strictEqual(await workerOf(banter(), PROXY, ...bytes), worker, way);
      }
    }
  });

  scenario('its client is the one in the log', async () => {
    const ways = { v1: (c) => [v1(c), failLogin()], v2: (c) => [v2(c), failLogin()], forwarded: (c) => [failLogin(forwarded('192.0.2.9', c))] };
    for (const [way, bytes] of Object.entries(ways)) {
      const client = unused();
      assert.strictEqual((await say(banter(), PROXY, ...bytes(client))).status, 401, way);
      await logged(banter(), client);
    }
    await say(banter(), PROXY, v1('2001:db8::7', 'TCP6'), failLogin());
    await logged(banter(), '2001:db8::7');
    assert.doesNotMatch(banter().logs(), /192\.0\.2\.9/, 'what the client made up');
  });

  scenario('where it speaks for itself or names nobody, it is the client', async () => {
    const home = await workerOf(banter(), PROXY, ask());
    for (const bytes of [
      [Buffer.from('PROXY UNKNOWN\r\n'), ask()],
      [rawV2(0x20, 0x00, Buffer.alloc(0)), ask()],
      [rawV2(0x20, 0x11, v2('192.0.2.1').subarray(16)), ask()],
      [rawV2(0x21, 0x31, Buffer.alloc(216)), ask()],
      [ask(forwarded('unknown'))],
      [ask('X-Forwarded-For:')],
    ]) {
      assert.strictEqual(await workerOf(banter(), PROXY, ...bytes), home, bytes.join(''));
    }
    await say(banter(), PROXY, failLogin(forwarded('192.0.2.8', 'garbage')));
    await logged(banter(), PROXY);
    assert.doesNotMatch(banter().logs(), /192\.0\.2\.8/, 'garbage ends the search');
  });

  scenario('bytes that come one by one say the same', async () => {
    const [, client] = await twoClients();
    for (const bytes of [Buffer.concat([v1(client), ask()]), Buffer.concat([v2(client), ask()]), ask(forwarded(client))]) {
      const connection = await Connection.open(banter().port, PROXY);
      for (const byte of bytes) {
        connection.write(Buffer.from([byte]));
        await new Promise(setImmediate);
      }
      const { status, json } = await connection.answer();
      connection.destroy();
      assert.deepStrictEqual({ status, worker: Number(json.worker) }, { status: 200, worker: 1 }, bytes.toString('latin1'));
    }
  });

  scenario('what follows its header is the client\'s to the last byte', async () => {
    const body = JSON.stringify({ name: nobody(), password: 'x'.repeat(60_000) });
    const post = Buffer.from(`POST /auth/login HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: ${body.length}\r\n\r\n${body}`);
    // A password too long: so it was read to its end.
    for (const header of [v1(unused()), v2(unused(), 500)]) {
      const { status } = await say(banter(), PROXY, header, post);
      assert.ok([400, 401].includes(status), `${status}`);
    }
    const twice = await say(banter(), PROXY, v2(unused()), v2(unused()), ask());
    assert.strictEqual(twice.status, 400, 'a second header is the client\'s own');
  });

  scenario('a header that is none ends the connection, and the log says why', async () => {
    for (const bytes of [
      Buffer.from('PROXY TCP4 1.2.3.4 nowhere 1 2\r\n'),
      Buffer.from(`PROXY UNKNOWN ${'x'.repeat(200)}`),
      rawV2(0x2f, 0x11, Buffer.alloc(12)),
      rawV2(0x21, 0x11, Buffer.alloc(3)),
      rawV2(0x21, 0x11, Buffer.alloc(5_000)),
    ]) {
      const seen = banter().logs().length;
      const connection = await Connection.open(banter().port, PROXY, bytes);
      assert.strictEqual(await connection.end(2_000), '', 'no answer');
      await until('a line in the log', () => /malformed_proxy_header.*127\.0\.7\.1/.test(banter().logs().slice(seen)));
    }
  });

  scenario('a header that is begun and not finished ends the connection in time, and costs no processor time meanwhile', async () => {
    const seen = banter().logs().length;
    const before = processorTime(banter().masterPid());
    const started = performance.now();
    const slow = [v1('192.0.2.1').subarray(0, 20), v2('192.0.2.1').subarray(0, 20)];
    const connections = await Promise.all(slow.map((bytes) => Connection.open(banter().port, PROXY, bytes)));
    for (const connection of connections) assert.strictEqual(await connection.end(SILENCE + SLACK), '');
    const took = performance.now() - started;
    assert.ok(took > SILENCE - 500, `after ${took} ms`);
    const used = processorTime(banter().masterPid()) - before;
    assert.ok(used < 0.5, `${used} s of processor time in ${took} ms`);
    assert.match(banter().logs().slice(seen), /not finished[^\n]*malformed_proxy_header/);
  });

  scenario('it may be silent: it is served as the client that it seems to be, and warned of if it names one after all', async () => {
    const home = await workerOf(banter(), PROXY, ask());
    const before = banter().logs().length;
    const [silent, partial, named] = await Promise.all([undefined, ask().subarray(0, 20), undefined].map((bytes) => Connection.open(banter().port, PROXY, bytes)));
    const begun = performance.now();
    assert.strictEqual((await say(banter(), STRANGER, ask())).status, 200);
    assert.strictEqual((await say(banter(), PROXY, v1(unused()), ask())).status, 200);
    assert.ok(performance.now() - begun < SILENCE / 2, 'others do not wait for it');
    await until('all three are given up', () => banter().logs().slice(before).match(/known_by=Silence/g)?.length >= 3, SILENCE + SLACK);
    assert.ok(performance.now() - begun > SILENCE - 500, 'not at once');
    silent.write(ask());
    partial.write(ask().subarray(20));
    for (const connection of [silent, partial]) {
      const { status, json } = await connection.answer();
      assert.deepStrictEqual({ status, worker: Number(json.worker) }, { status: 200, worker: home });
    }
    const seen = banter().logs().length;
    named.write(ask(forwarded('192.0.2.7')));
    assert.strictEqual((await named.answer()).status, 200);
    await until('a warning', () => /WARN.*late_client/.test(banter().logs().slice(seen)));
    for (const connection of [silent, partial, named]) connection.destroy();
  });

  scenario('a head of 30 kB is looked at to its end; one over 32 kB is refused', async () => {
    const [, client] = await twoClients();
    const cookies = (count) => Array.from({ length: count }, (_, i) => `Cookie: ${i}=${'c'.repeat(990)}`);
    assert.strictEqual(await workerOf(banter(), PROXY, ask(forwarded('192.0.2.6'), ...cookies(30), forwarded(client))), 1);
    const { status, json } = await say(banter(), PROXY, ask(forwarded('192.0.2.6'), ...cookies(34), forwarded(client)));
    assert.strictEqual(status, 431);
    assert.match(json.error, /headers/);
    const many = await say(banter(), PROXY, ask(...Array.from({ length: 200 }, (_, i) => `A${i}: b`), forwarded(client)));
    assert.strictEqual(many.status, 431, 'too many lines');
  });

  scenario('a connection whose client is only known by its request is closed after it: nobody else\'s request is taken for his', async () => {
    const [first, second] = await twoClients();
    for (const request of [ask(forwarded(first)), ask()]) {
      const connection = await Connection.open(banter().port, PROXY, Buffer.concat([request, ask(forwarded(second))]));
      const { status, headers } = await connection.answer();
      assert.strictEqual(status, 200);
      assert.strictEqual(headers.connection, 'close');
      assert.strictEqual(await connection.end(), '', 'only one answer');
    }
    const connection = await Connection.open(banter().port, PROXY, Buffer.concat([v2(second), ask()]));
    for (let i = 0; i < 3; i++) {
      const { headers, json } = await connection.answer();
      assert.notStrictEqual(headers.connection, 'close', 'a PROXY header is for the whole connection');
      assert.strictEqual(Number(json.worker), 1);
      connection.write(ask(forwarded(first)));
    }
    connection.destroy();
    const direct = await Connection.open(banter().port, STRANGER, ask());
    assert.notStrictEqual((await direct.answer()).headers.connection, 'close');
    direct.destroy();
  });

  scenario('nobody believes a stranger', async () => {
    const home = await workerOf(banter(), STRANGER, ask());
    const [first, second] = await twoClients();
    const other = home === 0 ? second : first;
    for (const lines of [[forwarded(other)], [forwarded(other, PROXY)], [`X-Real-IP: ${other}`], [`Forwarded: for=${other}`]]) {
      assert.strictEqual(await workerOf(banter(), STRANGER, ask(...lines)), home, lines.join());
    }
    for (const header of [v1(other), v2(other)]) {
      const { status } = await say(banter(), STRANGER, header, ask());
      assert.strictEqual(status, 400);
    }
    const lie = unused();
    await say(banter(), STRANGER, failLogin(forwarded(lie)));
    await logged(banter(), STRANGER);
    assert.ok(!banter().logs().includes(lie));
  });
});

suite('connections of a trusted proxy', TRUST, (scenario, banter) => {
  const open = (count, bytes) => Promise.all(Array.from({ length: count }, () => Connection.open(banter().port, PROXY, bytes)));
  const asFewDescriptorsAs = (before) => until(`the master has ${before} descriptors again`, () => descriptors(banter().masterPid()) <= before);

  scenario('a thousand that say nothing keep nobody waiting, neither strangers nor the proxy\'s other clients', async () => {
    const client = await banter().addressOfWorker(1);
    const before = descriptors(banter().masterPid());
    const silent = [];
    let slowest = 0;
    for (let batch = 0; batch < 10; batch++) {
      silent.push(...await open(100));
      for (const [from, bytes] of [[STRANGER, [ask()]], [PROXY, [v2(client), ask()]], [PROXY, [ask(forwarded(client))]]]) {
        const start = performance.now();
        assert.strictEqual((await say(banter(), from, ...bytes)).status, 200);
        slowest = Math.max(slowest, performance.now() - start);
      }
    }
    console.log(`    the slowest answer took ${slowest.toFixed(0)} ms`);
    assert.ok(slowest < SILENCE / 2, `an answer took ${slowest} ms`);
    silent.forEach((connection) => connection.destroy());
    await asFewDescriptorsAs(before);
  });

  scenario('those that break off in the middle of a header leave nothing behind', async () => {
    await say(banter(), PROXY, v2(unused()), ask());
    const before = descriptors(banter().masterPid());
    const beginnings = [undefined, Buffer.from('P'), v1('192.0.2.1').subarray(0, 20), v2('192.0.2.1').subarray(0, 14), v2('192.0.2.1'), ask().subarray(0, 30)];
    for (const bytes of beginnings) {
      for (const how of ['end', 'resetAndDestroy']) {
        for (const { socket } of await open(20, bytes)) {
          socket.on('error', () => {});
          socket[how]();
        }
      }
    }
    await asFewDescriptorsAs(before);
    assert.strictEqual((await say(banter(), PROXY, v2(unused()), ask())).status, 200);
  });

  scenario('those that end their side in the middle of a header are closed at once', async () => {
    const closing = await open(20, v1('192.0.2.1').subarray(0, 20));
    closing.forEach(({ socket }) => socket.end());
    for (const connection of closing) await connection.end(SILENCE - 1_000);
  });

  scenario('a master that stops hands over those that it looks at', async () => {
    const before = descriptors(banter().masterPid());
    const looked = await open(50);
    await until('the master has accepted them', () => descriptors(banter().masterPid()) >= before + looked.length);
    const stopped = banter().masterPid();
    process.kill(stopped, 'SIGTERM');
    await until('it has ended', () => banter().roles().master !== stopped);
    for (const connection of looked) {
      // Well or not, for want of a master: a worker answers.
      const { status } = await connection.write(ask()).answer();
      assert.ok([200, 503].includes(status), `${status}`);
      connection.destroy();
    }
    await until('another master serves', async () => (await say(banter(), PROXY, v2(unused()), ask())).status === 200);
  });

  scenario('the master may be killed while it looks at them', async () => {
    const client = await banter().addressOfWorker(1);
    const before = descriptors(banter().masterPid());
    const looked = [...await open(50, v1('192.0.2.1').subarray(0, 20)), ...await open(50)];
    looked.forEach(({ socket }) => socket.on('error', () => {}));
    await until('the master has accepted them', () => descriptors(banter().masterPid()) >= before + looked.length);
    const killed = banter().kill9Master();
    for (const connection of looked) await connection.end(SILENCE - 1_000);
    await until('another master', () => ![undefined, killed].includes(banter().roles().master));
    await until('the proxy\'s clients are served', async () => {
      const { status, json } = await say(banter(), PROXY, v2(client), ask());
      return status === 200 && Number(json.worker) === 1;
    });
  });
});

suite('limits behind a proxy', { ...TRUST, env: { BANTER_AUTH_RATE: '3', BANTER_MAX_PER_ADDRESS: '2' }, args: ['--trust-proxy', '192.0.2.0/24,10.0.0.0/8', '--trust-proxy', PROXY] }, (scenario, banter) => {
  scenario('one client\'s failed logins are held against nobody else', async () => {
    const [guilty, innocent] = [unused(), unused()];
    for (const bytes of [(client) => [v2(client), failLogin()], (client) => [failLogin(forwarded(client))]]) {
      const statuses = [];
      for (let i = 0; i < 4; i++) statuses.push((await say(banter(), PROXY, ...bytes(guilty))).status);
      assert.strictEqual(statuses.at(-1), 429, statuses.join());
      assert.strictEqual((await say(banter(), PROXY, ...bytes(innocent))).status, 401);
    }
    // By another name of his own making he is no other.
    assert.strictEqual((await say(banter(), PROXY, failLogin(forwarded(unused(), guilty)))).status, 429);
  });

  scenario('one client\'s connections are counted apart', async () => {
    const [greedy, modest] = [unused(), unused()];
    const kept = [];
    for (const [client, expected] of [[greedy, 200], [greedy, 200], [greedy, 429], [modest, 200]]) {
      const connection = await Connection.open(banter().port, PROXY, Buffer.concat([v2(client), ask()]));
      kept.push(connection);
      assert.strictEqual((await connection.answer()).status, expected);
    }
    kept.forEach((connection) => connection.destroy());
  });
});

suite('networks to trust', { store: 'embedded', workers: 1, env: { BANTER_TRUST_PROXY: '0.0.0.0/0' } }, (scenario, banter) => {
  scenario('everybody is a choice that is warned of', async () => {
    assert.match(banter().logs(), /WARN.*--trust-proxy 0\.0\.0\.0\/0/);
    const client = unused();
    await say(banter(), STRANGER, v1(client), failLogin());
    await logged(banter(), client);
  });

  scenario('a slip is told in a line', async () => {
    for (const [networks, line] of [['10.1.2.3/8', /10\.1\.2\.3\/8 is an address within 10\.0\.0\.0\/8/], ['10.0.0.0/8,proxy', /"proxy" is no network/]]) {
      const { status, stderr } = spawnSync(BINARY, ['serve', '--port', '0', '--trust-proxy', networks], { encoding: 'utf8', timeout: 10_000 });
      assert.strictEqual(status, 2);
      assert.match(stderr, line);
    }
  });
});

const PING_INTERVAL = 1;
const PING_TIMEOUT = 3;

for (const name of ['nginx', 'haproxy', 'caddy']) {
  // Exactly what docs/proxies tells people to do.
  suite(`behind ${name}`, { store: 'embedded', workers: 2, env: { BANTER_AUTH_RATE: '20', BANTER_PING_INTERVAL: `${PING_INTERVAL}`, BANTER_PING_TIMEOUT: `${PING_TIMEOUT}` }, args: ['--trust-proxy', '127.0.0.1'] }, (scenario, banter) => {
    const behind = (title, body, options) => scenario(title, async () => {
      const proxy = await startProxy(name, banter().port);
      // The same server by another way.
      const way = Object.assign(Object.create(banter()), { port: proxy.port });
      const world = new World(way);
      try {
        const clients = [await banter().addressOfWorker(0), await banter().addressOfWorker(1)];
        // HAProxy needs a moment to find that the server is well.
        await until('the proxy passes requests on', async () => (await way.api('GET', '/health', { localAddress: clients[0] })).status === 200);
        await body(world, clients);
      } catch (error) {
        console.error(`--- what ${name} logged:\n${proxy.logs()}\n---`);
        throw error;
      } finally {
        world.close();
        await proxy.stop();
      }
    }, options);

    behind('its clients go to their own workers, are known by their addresses, and chat over polling, WebSocket and the upgrade', async (world, clients) => {
      for (const [worker, localAddress] of clients.entries()) {
        assert.strictEqual(await world.banter.workerOfAddress(localAddress), worker);
        const lie = await world.banter.api('GET', '/health', { localAddress, headers: { 'x-forwarded-for': clients[1 - worker] } });
        assert.strictEqual(Number(lie.json.worker), worker, 'whatever they say they are');
      }
      const key = banter().key();
      const people = [];
      for (const version of [1, 4]) {
        for (const transport of ['polling', 'websocket', 'upgrade']) {
          for (const [worker, localAddress] of clients.entries()) {
            const user = await banter().register('proxied', { localAddress: STRANGER });
            const client = await world.connect({ version, transport, localAddress, token: user.token, name: user.name });
            await client.join(key, 0);
            await until(`the log says where ${client} is`, () => banter().logs().split('\n').some((line) => line.includes(user.name)
              && /logged_in/.test(line) && line.includes(`client=${localAddress}`) && new RegExp(`worker ${worker}\\b`).test(line)));
            people.push(client);
          }
        }
      }
      // Long enough for a silent connection to be given up, so heartbeats get through.
      await sleep(1_000 * (PING_INTERVAL + PING_TIMEOUT + 1));
      for (const [i, client] of people.entries()) await client.post(key, `from ${i}`);
      const texts = people.map((_, i) => `from ${i}`);
      for (const [i, client] of people.entries()) {
        await client.when('everything', () => client.texts(key).length >= people.length - 1);
        assert.deepStrictEqual(client.texts(key), texts.filter((_, from) => from !== i));
        assert.deepStrictEqual(client.life.map(({ what }) => what), ['connect']);
      }
    });

    behind('failed logins of one exhaust the limit of that one only', async (world, clients) => {
      const guilty = clients[0];
      // From the same worker, lest it be only its count that differs.
      const innocent = await banter().addressOfWorker(0);
      const login = (localAddress, headers) => world.banter.api('POST', '/auth/login', { localAddress, headers, body: { name: nobody(), password: 'a wrong password' } });
      await until('the limit', async () => (await login(guilty)).status === 429, 30_000);
      assert.strictEqual((await login(guilty, { 'x-forwarded-for': innocent })).status, 429, 'nor does a lie help');
      assert.strictEqual((await login(innocent)).status, 401);
      await logged(banter(), guilty);
      await logged(banter(), innocent);
    });

    behind('a packet of nearly 1 MB goes through, and its answer says so', async (world, [localAddress]) => {
      const user = await banter().register('large', { localAddress: STRANGER });
      for (const transport of ['polling', 'websocket']) {
        const client = await world.connect({ transport, localAddress, token: user.token, name: user.name });
        const ack = await client.emitAck('message:post', { channel: 'general', message: 'x'.repeat(990_000) });
        assert.match(JSON.stringify(ack), /too_long|too_large|bad_payload|16/, JSON.stringify(ack));
        client.quit();
        await client.when('it is gone', () => !client.socket.connected);
      }
    });
  });
}

suite('behind an nginx that is told to keep its connections', { store: 'embedded', workers: 2, args: ['--trust-proxy', '127.0.0.1'] }, (scenario, banter) => {
  scenario('no request is served as another client\'s, and none fails', async () => {
    const clients = [await banter().addressOfWorker(0), await banter().addressOfWorker(1)];
    const proxy = await startProxy('nginx', banter().port, [
      ['map $http_upgrade', 'upstream kept { server 127.0.0.1:8000; keepalive 8; }\nmap $http_upgrade'],
      ["''      close;", "''      '';"],
      ['proxy_pass http://127.0.0.1:8000;', 'proxy_pass http://kept;'],
    ]);
    try {
      for (let i = 0; i < 40; i++) {
        const answer = await request(proxy.port, 'GET', '/health', { localAddress: clients[i % 2] });
        assert.deepStrictEqual({ status: answer.status, worker: Number(answer.json?.worker) }, { status: 200, worker: i % 2 });
      }
    } finally {
      await proxy.stop();
    }
  });
});

'use strict';
// Bounds: what one client, address or user asks for stays bounded, and nobody else notices.

const assert = require('node:assert');
const net = require('node:net');
const { suite } = require('./lib/suite.js');
const { parseMessage } = require('./lib/client.js');
const { RawWebSocket, frame, closeFrame, TEXT, memory, growth, descriptors } = require('./lib/raw.js');
const { sleep, until, within } = require('./lib/wait.js');

const MB = 1024 * 1024;

/** A new channel with `count` messages of `size` bytes: its key, and the id of the last one. */
async function history(world, count, size) {
  const author = await world.person('author');
  const channel = world.banter.key('history');
  await author.join(channel);
  const text = 'y'.repeat(size);
  let last;
  for (let i = 0; i < count; i += 20) {
    const posted = await Promise.all(Array.from({ length: Math.min(20, count - i) }, () => author.post(channel, text)));
    last = posted.at(-1).id;
  }
  author.quit();
  return { channel, last };
}

suite('a worker that is full', { workers: 2, env: { BANTER_MAX_CONNECTIONS: '10' } }, (scenario, banter) => {
  const CAPACITY = 10;
  // What a worker takes beyond that from addresses with living sessions on it.
  const RESERVE = 32;

  /** Connections that ask once and stay. Gives the status of each, in the order of the answers. */
  function crowd(localAddress, count, sockets) {
    const request = 'GET /health HTTP/1.1\r\nHost: x\r\n\r\n';
    const answers = Array.from({ length: count }, () => new Promise((resolve, reject) => {
      const socket = net.connect({ host: '127.0.0.1', port: banter().port, localAddress });
      let text = '';
      socket.on('error', reject);
      socket.on('close', () => reject(new Error(`closed after ${JSON.stringify(text)}`)));
      socket.on('data', (chunk) => {
        text += chunk.toString('latin1');
        const head = /^HTTP\/1\.1 (\d{3}) [^]*?\r\n\r\n[^]*\}$/.exec(text);
        if (head) resolve({ status: Number(head[1]), worker: Number(JSON.parse(text.slice(text.indexOf('\r\n\r\n'))).worker) });
      });
      socket.write(request);
      sockets.push(socket);
    }));
    return within(`${count} answers to ${localAddress}`, Promise.all(answers), 8_000);
  }

  scenario('one address that fills its worker beyond cap and reserve keeps nobody else from being accepted', async (world) => {
    const [home, other] = [await banter().addressOfWorker(0), await banter().addressOfWorker(1)];
    await world.person('ann', { localAddress: home });
    await world.person('bob', { localAddress: other });
    const ask = (localAddress) => banter().api('GET', '/health', { localAddress, deadline: 3_000 });
    const sockets = [];
    try {
      // A worker may take one or two more: those that it acknowledged before it counted them.
      const surplus = 5;
      const filling = await crowd(home, CAPACITY + RESERVE - 1 + surplus, sockets);
      assert.deepStrictEqual(filling.filter(({ status }) => status !== 200), []);
      assert.ok(filling.some(({ worker }) => worker === 1), 'what its worker cannot take goes to another');
      assert.strictEqual(Number((await ask(other)).json.worker), 1, 'an address of the other worker');
      assert.strictEqual((await ask('127.0.9.9')).status, 200, 'any other address');

      const beyond = await crowd(home, 16, sockets);
      const refused = beyond.filter(({ status }) => status === 503).length;
      assert.ok(refused >= 16 - CAPACITY, `${refused} of 16 were refused where both workers are full`);
      assert.strictEqual(refused + beyond.filter(({ status }) => status === 200).length, 16);
      assert.strictEqual((await ask(other)).status, 200, 'the other worker has its reserve for those who are on it');
      const stranger = await ask('127.0.9.10');
      assert.strictEqual(stranger.status, 503, 'whoever cannot be taken is told so at once');
      assert.match(stranger.json.error, /full/);
    } finally {
      sockets.forEach((socket) => socket.destroy());
    }
    await until('strangers are served again', async () => (await ask('127.0.9.11')).status === 200);
  });
});

suite('what one client may ask for', { workers: 1, env: { BANTER_GRACE: '1' } }, (scenario, banter) => {
  scenario('events with names of half a megabyte are refused at once, also while the session waits for its name: none is kept', async (world) => {
    const { token, name } = await banter().register('namer');
    await world.connect({ token, name });
    const worker = banter().workerPid(0);
    const grown = growth(worker);
    // It is held, since the name is taken by a connection that lives; its events have to wait.
    const held = await RawWebSocket.open(banter().port, { EIO: 3, token });
    await held.waitFor(/^0\{/);
    const long = 'x'.repeat(500_000);
    const sent = 80;
    for (let i = 0; i < sent; i++) await held.send(`42${i}${JSON.stringify([long, {}])}`);
    await held.waitFor(new RegExp(`^43${sent - 1}\\[`));
    const answers = held.texts.filter((text) => /^43\d+\[/.test(text));
    assert.strictEqual(answers.length, sent);
    for (const answer of answers) {
      assert.match(answer, /"code":"bad_payload"/);
      assert.ok(answer.length < 300, `an answer of ${answer.length} bytes`);
    }
    assert.ok(grown() < 20 * MB, `the worker grew by ${(grown() / MB).toFixed(0)} MB for ${(sent * long.length / MB).toFixed(0)} MB of names`);
    held.destroy();
  });

  scenario('the answer to a join is bounded by bytes: the newest messages without a hole up to `last`, and `more` says that some are left out', async (world) => {
    const { channel, last } = await history(world, 200, 16_000);
    const reader = await world.person('reader');
    const answer = await reader.join(channel, 0);
    const bytes = JSON.stringify(answer).length;
    assert.ok(bytes <= 1.1 * MB, `${bytes} bytes`);
    assert.ok(bytes >= 0.8 * MB, `only ${bytes} bytes`);
    assert.strictEqual(answer.more, true);
    assert.strictEqual(answer.last, last);
    const ids = answer.messages.map((message) => parseMessage(message).id);
    assert.deepStrictEqual(ids, ids.map((_, i) => last - ids.length + 1 + i));
    const rest = await banter().api('GET', `/channels/${channel}/messages?before=${ids[0]}&limit=200`, { token: reader.token });
    assert.strictEqual(rest.json.messages.length, 200 - ids.length, 'the others can be read');
  });

  scenario('a client that asks for large histories again and again and reads nothing is closed: memory is bounded, others are served', async (world) => {
    const { channel } = await history(world, 200, 16_000);
    const bystander = await world.person('bystander');
    const elsewhere = banter().key();
    await bystander.join(elsewhere);
    const { token } = await banter().register('greedy');
    const worker = banter().workerPid(0);
    const grown = growth(worker);

    const greedy = await RawWebSocket.open(banter().port, { EIO: 3, token });
    await greedy.waitFor(/logged_in/);
    greedy.socket.pause();
    let slowest = 0;
    const end = performance.now() + 15_000;
    for (let asked = 0; !greedy.closed; asked++) {
      assert.ok(performance.now() < end, `after ${asked} joins it is still there; the worker has grown by ${(grown() / MB).toFixed(0)} MB`);
      greedy.send(`42${asked}${JSON.stringify(['channel:join', { channel, after: 0 }])}`);
      const start = performance.now();
      await bystander.post(elsewhere, 'hello?');
      slowest = Math.max(slowest, performance.now() - start);
    }
    assert.ok(grown() < 150 * MB, `the worker grew by ${(grown() / MB).toFixed(0)} MB`);
    assert.ok(slowest < 3_000, `a bystander waited ${slowest.toFixed(0)} ms`);
    assert.strictEqual(banter().workerPid(0), worker);
  });
});

suite('clients that leave while they come', { workers: 1 }, (scenario, banter) => {
  // How long the engine waits for a connected socket to say CONNECT, and keeps it meanwhile.
  const ENGINE_PATIENCE = 10_000;

  scenario('two thousand clients that connect and leave in one write leave neither sessions nor descriptors behind', async () => {
    const { token } = await banter().register('hasty');
    const worker = banter().workerPid(0);
    const before = descriptors(worker);
    const once = async () => {
      const hasty = await RawWebSocket.open(banter().port, { EIO: 4 });
      await hasty.write(Buffer.concat([frame(TEXT, `40${JSON.stringify({ token })}`), closeFrame()]));
      await hasty.waitForClose();
    };
    const thousand = async () => {
      for (let i = 0; i < 20; i++) await Promise.all(Array.from({ length: 50 }, once));
      await until('no socket is left', () => descriptors(worker) <= before, 10_000);
    };
    await thousand();
    await sleep(ENGINE_PATIENCE + 1_000);
    const half = memory(worker);
    await thousand();
    const cost = memory(worker) - half;
    assert.ok(cost < 10 * MB, `the second thousand cost ${(cost / MB).toFixed(1)} MB`);
  });
});

suite('what one user or address may do', { workers: 1, env: { BANTER_AUTH_RATE: '5', BANTER_POST_RATE: '2' } }, (scenario, banter) => {
  const login = (localAddress, name, password) => banter().api('POST', '/auth/login', { localAddress, body: { name, password } });
  const counts = (answers) => {
    const counted = {};
    for (const { status } of answers) counted[status] = (counted[status] ?? 0) + 1;
    return counted;
  };
  const limited = (answer) => {
    assert.strictEqual(answer.status, 429, answer.text);
    assert.match(answer.headers['retry-after'] ?? '', /^[1-9]\d*$/, 'Retry-After in whole seconds');
    assert.strictEqual(typeof answer.json.error, 'string');
  };

  for (const [what, nameOf] of [['of one name', () => 'someone'], ['of many names', (i) => `someone${i}`]]) {
    scenario(`a hundred wrong logins at once ${what} get no more guesses than one after the other`, async () => {
      const from = what === 'of one name' ? '127.0.21.1' : '127.0.21.2';
      const start = performance.now();
      const answers = await Promise.all(Array.from({ length: 100 }, (_, i) => login(from, nameOf(i), `wrong ${i} wrong`)));
      const regained = Math.floor((performance.now() - start) / 12_000);
      const { 401: wrong = 0, 429: refused = 0 } = counts(answers);
      assert.strictEqual(wrong + refused, 100, JSON.stringify(counts(answers)));
      assert.ok(wrong >= 1 && wrong <= 5 + regained, `${wrong} guesses were looked at`);
      limited(answers.find(({ status }) => status === 429));
    });
  }

  scenario('forty right logins at once from one address all succeed, and failed ones still count afterwards', async () => {
    const from = '127.0.21.3';
    const people = await Promise.all([4, 5, 6].map((host) => banter().register('staff', { localAddress: `127.0.21.${host}` })));
    const answers = await Promise.all(Array.from({ length: 40 }, (_, i) => {
      const { name, password } = people[i % people.length];
      return login(from, name, password);
    }));
    assert.deepStrictEqual(counts(answers), { 200: 40 });
    const wrong = [];
    for (let i = 0; i < 10; i++) wrong.push(await login(from, `absent${i}`, 'wrong password'));
    assert.ok(counts(wrong)[401] >= 5, JSON.stringify(counts(wrong)));
    limited(wrong.at(-1));
    limited(await login(from, people[0].name, people[0].password));
  });

  scenario('a user may create only so many channels at once, wherever they come from, and others are not affected', async () => {
    const [ann, bob] = [await banter().register('ann', { localAddress: '127.0.21.7' }), await banter().register('bob', { localAddress: '127.0.21.8' })];
    const create = (token, localAddress) => banter().api('POST', '/channels', { token, localAddress, body: { name: 'one of many' } });
    const answers = [];
    for (let i = 0; i < 10; i++) answers.push(await create(ann.token, `127.0.22.${i + 1}`));
    // Three times the post rate at once; a tenth of a channel more each second.
    assert.deepStrictEqual(answers.slice(0, 6).map(({ status }) => status), Array(6).fill(201));
    limited(answers.at(-1));
    assert.strictEqual((await create(bob.token, '127.0.22.1')).status, 201);
    const { json } = await banter().api('GET', '/channels', { token: ann.token });
    assert.strictEqual(json.channels.filter(({ name }) => name === 'one of many').length, answers.filter(({ status }) => status === 201).length + 1, 'what is refused is not created');
  });
});

suite('no limits', { workers: 1, env: { BANTER_POST_RATE: '0' } }, (scenario, banter) => {
  scenario('with a post rate of 0 a user may create any number of channels', async () => {
    const { token } = await banter().register('maker');
    const answers = [];
    for (let i = 0; i < 150; i += 50) {
      answers.push(...await Promise.all(Array.from({ length: 50 }, () => banter().api('POST', '/channels', { token, body: { name: 'many' } }))));
    }
    assert.deepStrictEqual(answers.filter(({ status }) => status !== 201), []);
  });
});

'use strict';
// Redis misbehaves, and processes die: nothing that was acknowledged is lost, nobody hears anything
// twice, everything comes back by itself. And what several servers on one Redis have to do with each
// other.

const assert = require('node:assert');
const { describe, test } = require('node:test');
const { World, otherStore } = require('./lib/suite.js');
const { Banter, startBanter } = require('./lib/banter.js');
const { parseMessage } = require('./lib/client.js');
const { Random } = require('./lib/random.js');
const { startRedis } = require('./lib/redis.js');
const { channelPath } = require('./lib/rest.js');
const { createChannels, history, settle, chatter, everythingHeard, audit } = require('./lib/village.js');
const { sleep, until } = require('./lib/wait.js');

/** Repeat a run with the seed that it printed: BANTER_TEST_SEED=… */
const SEED = Number(process.env.BANTER_TEST_SEED ?? Math.floor(Math.random() * 2 ** 32));
/** How long a client may wait to hear that it cannot be served now: the store waits up to 4 s for a
 * connection and 2 s for an answer. */
const PATIENCE = 6_500;

/** A Redis, a server on it through a proxy, and clients; all of it gone afterwards. */
async function onRedis({ appendfsync, tcp, ...options }, body) {
  const redis = await startRedis({ appendfsync, tcp });
  try {
    const proxy = await redis.proxy();
    const banter = await startBanter({ store: 'redis', redis, redisUrl: proxy.url, ...options });
    const world = new World(banter);
    try {
      await body({ redis, proxy, banter, world });
    } catch (error) {
      const lines = banter.logs().split('\n').slice(-150);
      console.error(`--- what banter logged:\n${lines.join('\n')}\n---`);
      await banter.remove();
      throw error;
    } finally {
      world.close();
    }
    await banter.stop();
  } finally {
    await redis.stop();
  }
}

/** Someone connected through this worker. */
async function personOn(world, worker, prefix, options = {}) {
  const localAddress = await world.banter.addressOfWorker(worker);
  return world.person(prefix, { localAddress, ...options });
}

/** The pub/sub topic of a channel. */
const topic = (channel, prefix = 'banter') => `{${prefix}}:topic:${Buffer.from(channel).toString('base64url')}`;

/** How many connections listen to a channel. */
async function listeners(redis, channel, prefix) {
  const [, count] = await redis.command('PUBSUB', 'NUMSUB', topic(channel, prefix));
  return count;
}

/** Waits until every worker lists exactly these people in all channels, and counts them so. */
async function onlineAsTheyAre(banter, token, channels, names, deadline) {
  const expected = [...names].sort();
  let seen;
  const agree = async () => {
    seen = [];
    for (const worker of banter.workerNumbers()) {
      const localAddress = await banter.addressOfWorker(worker);
      const list = await banter.api('GET', '/channels', { token, localAddress });
      for (const key of channels) {
        const { json } = await banter.api('POST', channelPath(key, 'join'), { token, localAddress });
        seen.push({
          worker,
          count: list.json.channels?.find((one) => one.key === key)?.onlineCount,
          names: json.onlineUsers?.map(({ username }) => username).sort(),
        });
      }
    }
    return seen.every((one) => one.count === expected.length && one.names?.join() === expected.join());
  };
  await until('every worker knows who is online', agree, deadline).catch((error) => {
    throw new Error(`${error.message}: expected ${JSON.stringify(expected)}, seen ${JSON.stringify(seen)}`);
  });
}

/** The processes of a server, and whether any was replaced that nobody has harmed. */
class Household {
  constructor(banter) {
    this.banter = banter;
    this.pids = this.now();
    /** Frozen for so long that it may have been replaced. */
    this.doubtful = new Set();
    this.replacements = [];
  }

  now() {
    const { master, workers } = this.banter.roles();
    return new Map([['master', master], ...[...workers].map(([number, pid]) => [`worker ${number}`, pid])]);
  }

  /** Those that run and are not being replaced. */
  get settled() {
    const now = this.now();
    return [...this.pids.keys()].filter((role) => this.pids.get(role) && now.get(role) === this.pids.get(role));
  }

  kill9(role) {
    const old = this.pids.get(role);
    process.kill(old, 'SIGKILL');
    this.pids.set(role, undefined);
    const replaced = until(`another process for the ${role}`, () => {
      const pid = this.now().get(role);
      if (pid === old) return false;
      this.pids.set(role, pid);
      return pid;
    }, 20_000);
    replaced.catch(() => {});
    this.replacements.push(replaced);
  }

  async freeze(role, duration) {
    const pid = this.pids.get(role);
    this.doubtful.add(role);
    process.kill(pid, 'SIGSTOP');
    await sleep(duration);
    try {
      process.kill(pid, 'SIGCONT');
    } catch {
      // Whoever supervises it has killed it.
    }
  }

  /** All are there, and the same as before but for those killed. */
  async check() {
    await Promise.all(this.replacements);
    const now = this.now();
    for (const [role, pid] of this.pids) {
      assert.ok(now.get(role), `the ${role} runs`);
      if (!this.doubtful.has(role)) assert.strictEqual(now.get(role), pid, `the ${role} was not replaced but where it was killed`);
    }
  }
}

const skip = otherStore('redis');

describe('faults', { skip }, () => {
  test('under random faults nothing acknowledged is lost, and everybody hears everything once and in order', { timeout: 360_000 }, async () => {
    const random = new Random(SEED);
    console.log(`    BANTER_TEST_SEED=${random.seed}`);
    await onRedis({ appendfsync: 'always', workers: 3, env: { BANTER_GRACE: '8' } }, async ({ redis, proxy, banter, world }) => {
      const founder = await banter.register('founder');
      const channels = await createChannels(banter, founder.token, 3);
      const residents = await settle(world, channels, 7);
      const vanishing = residents.pop();
      const household = new Household(banter);
      const talk = chatter(residents, channels, { pause: 150 });

      // One fault of Redis ends before the next begins; everything else may happen meanwhile.
      let redisFault = Promise.resolve();
      let frozen = Promise.resolve();
      const workers = () => household.settled.filter((role) => role !== 'master' && !household.doubtful.has(role));
      const freezeRedis = (duration) => async () => {
        redis.freeze();
        await sleep(duration);
        redis.thaw();
      };
      const ofRedis = {
        'Redis killed': async () => {
          await redis.kill9();
          await sleep(random.between(0, 1_500));
          await redis.start();
        },
        'Redis frozen for 3 s': freezeRedis(3_000),
        'Redis frozen for 10 s': freezeRedis(10_000),
        'connections that ask closed': () => redis.closeConnections('normal'),
        'connections that listen closed': () => redis.closeConnections('pubsub'),
        'all connections cut': () => proxy.cutOff(),
        'all connections silent': () => proxy.blackhole(),
        'memory full': async () => {
          await redis.command('CONFIG', 'SET', 'maxmemory', '1');
          await sleep(1_500);
          await redis.command('CONFIG', 'SET', 'maxmemory', '0');
        },
      };
      const ofProcesses = {
        'a worker killed': () => {
          const roles = workers();
          if (roles.length > 0) household.kill9(random.pick(roles));
        },
        'a worker frozen': () => {
          const roles = workers();
          if (roles.length > 0) frozen = household.freeze(random.pick(roles), 7_000);
        },
        'the master killed': () => {
          if (household.settled.includes('master')) household.kill9('master');
        },
        'clients cut off': () => {
          for (const resident of random.shuffle(residents).slice(0, random.between(1, 3))) {
            resident.breakOff({ reset: random.next() < 0.5 }).catch(() => {});
          }
        },
      };
      const times = {
        'Redis killed': 6, 'Redis frozen for 3 s': 2, 'Redis frozen for 10 s': 1, 'connections that ask closed': 3,
        'connections that listen closed': 3, 'all connections cut': 2, 'all connections silent': 3, 'memory full': 3,
        'a worker killed': 5, 'a worker frozen': 1, 'the master killed': 3, 'clients cut off': 7,
      };
      const faults = random.shuffle(Object.entries(times).flatMap(([name, count]) => Array(count).fill(name)));
      assert.ok(faults.length >= 30);
      const begun = performance.now();
      const report = (what) => console.log(`    ${((performance.now() - begun) / 1000).toFixed(1)} s: ${what} (${talk.count()} posts)`);
      for (const [n, name] of faults.entries()) {
        if (n === 10) await vanishing.vanish();
        if (ofRedis[name]) {
          await redisFault;
          // Now and then it may catch its breath, and has to.
          if (random.next() < 0.5) {
            const soFar = talk.count();
            await until(`posts go on before: ${name}`, () => talk.count() >= soFar + 5, 20_000);
          }
          report(name);
          redisFault = Promise.resolve(ofRedis[name]());
          // A failure is told when it is awaited.
          redisFault.catch(() => {});
        } else {
          report(name);
          ofProcesses[name]();
        }
        await sleep(random.between(150, 1_200));
      }
      await Promise.all([redisFault, frozen]);
      report(`${faults.length} faults are over`);

      // Everything comes back by itself, and goes on.
      await Promise.all(residents.map((resident) => resident.settled()));
      const soFar = talk.count();
      await until('posts go on', () => talk.count() >= soFar + 5 * residents.length, 30_000);
      const texts = await talk.stop();
      report('everybody is back');

      await audit(banter, founder.token, residents, texts);
      const codes = new Set(residents.flatMap(({ refusals }) => refusals.map(({ code }) => code)));
      for (const code of codes) assert.ok(['unavailable', 'not_joined'].includes(code), `a post was refused with ${code}`);
      report(`${talk.count()} posts, refusals ${[...codes].join(', ') || 'none'}, slowest answer ${Math.max(...residents.map(({ slowest }) => slowest)).toFixed(0)} ms`);

      await onlineAsTheyAre(banter, residents[0].token, channels, residents.map(({ name }) => name), 30_000);
      await household.check();
    });
  });

  test('while Redis is away posts are refused soon, nobody is disconnected, presence goes on; afterwards a repeated post is one message', { timeout: 180_000 }, async () => {
    await onRedis({ appendfsync: 'always', workers: 2 }, async ({ redis, proxy, banter, world }) => {
      const ann = await personOn(world, 0, 'ann', { version: 1, transport: 'polling' });
      const bob = await personOn(world, 1, 'bob', { version: 4 });
      const key = banter.key('räum');
      for (const client of [ann, bob]) await client.join(key);
      await ann.post(key, 'before');
      await bob.waitFor('message:post', (m) => m.message === 'before');

      const away = {
        'killed': { begin: () => redis.kill9(), end: () => redis.start() },
        'frozen': { begin: () => redis.freeze(), end: () => redis.thaw() },
        'out of memory': {
          begin: () => redis.command('CONFIG', 'SET', 'maxmemory', '1'),
          end: () => redis.command('CONFIG', 'SET', 'maxmemory', '0'),
          reads: true,
        },
      };
      const texts = ['before'];
      for (const [how, { begin, end, reads = false }] of Object.entries(away)) {
        await begin();
        try {
          const attempts = [ann, bob].map(async (client) => {
            const message = `${client.name} while Redis is ${how}`;
            const asked = performance.now();
            const answer = await client.emitAck('message:post', { channel: key, message, nonce: message }, 15_000);
            const took = performance.now() - asked;
            assert.strictEqual(answer.code, 'unavailable', `Redis is ${how}: ${JSON.stringify(answer)}`);
            assert.doesNotMatch(answer.error, /redis|OOM|maxmemory|connection/i, 'the store\'s own text');
            assert.ok(took < PATIENCE, `Redis is ${how}: refused after ${took.toFixed(0)} ms`);
            return { client, message };
          });
          const login = async () => {
            const asked = performance.now();
            const { status, json, text } = await banter.api('POST', '/auth/login', { body: { name: ann.name, password: ann.user.password } });
            assert.strictEqual(status, reads ? 200 : 503, text);
            if (!reads) assert.strictEqual(typeof json.error, 'string');
            assert.ok(performance.now() - asked < PATIENCE, 'REST is refused soon, too');
          };
          const status = async () => {
            const since = bob.mark();
            ann.emit('user : status_changed', { channel: key, status: 'away' });
            ann.emit('user : status_changed', { channel: key, status: 'online' });
            // Behind its post, for one client's events are handled in order.
            await bob.waitFor('user : status_changed', (p) => p.user === ann.name && p.status === 'online', { since, deadline: PATIENCE + 2_000 });
          };
          const [posts] = await Promise.all([Promise.all(attempts), login(), status()]);
          await end();
          for (const { client, message } of posts) {
            const other = client === ann ? bob : ann;
            await until(`a post is taken again after Redis was ${how}`, async () => {
              const answer = await client.emitAck('message:post', { channel: key, message, nonce: message });
              assert.ok(answer.id !== undefined || answer.code === 'unavailable', JSON.stringify(answer));
              return answer.id !== undefined;
            }, 15_000);
            texts.push(message);
            await other.waitFor('message:post', (m) => m.message === message);
          }
        } catch (error) {
          redis.thaw();
          throw error;
        }
      }
      const stored = await history(banter, ann.token, key);
      assert.deepStrictEqual(stored.map(({ message }) => message).sort(), [...texts].sort(), 'each is stored once');
      for (const [client, other] of [[ann, bob], [bob, ann]]) {
        const others = stored.filter(({ user }) => user === other.name);
        assert.deepStrictEqual(client.all('message:post'), others, `${client} heard the other's, once each, in order`);
        assert.deepStrictEqual(client.life.map(({ what }) => what), ['connect'], `${client} was never disconnected`);
      }
      proxy.cutOff();
    });
  });

  test('who comes to a worker that has not heard the latest yet, knowing it from another one, hears nothing twice and misses nothing', { timeout: 60_000 }, async () => {
    await onRedis({ workers: 2 }, async ({ proxy, banter, world }) => {
      const key = banter.key();
      const ann = await personOn(world, 0, 'ann');
      await ann.join(key);
      await ann.post(key, 'heard by all');
      const [bob, carl] = [await personOn(world, 1, 'bob'), await personOn(world, 1, 'carl')];
      const elsewhere = await banter.addressOfWorker(0);
      // Worker 0 believes for a while that it is listening.
      assert.strictEqual(proxy.blackhole(topic(key)), 1, 'the one connection that listens to this channel');
      for (const client of [bob, carl]) await client.join(key);
      const last = [await carl.post(key, 'missed by worker 0'), await bob.post(key, 'and this'), await carl.post(key, 'and that')].at(-1);
      await bob.waitFor('message:post', (m) => m.id === last.id);
      const moved = await world.connect({ token: bob.token, name: bob.name, session: bob.lastLogin.session, resume: { [key]: last.id }, localAddress: elsewhere });
      const next = await carl.post(key, 'from here on');
      await moved.waitFor('message:post', (m) => m.id === next.id);
      assert.deepStrictEqual(moved.texts(key), ['from here on']);
      assert.deepStrictEqual(moved.lastLogin.channels, [{ key, last: last.id }], 'the channel\'s last id, not the worker\'s');
      await ann.waitFor('message:post', (m) => m.id === next.id);
      assert.deepStrictEqual(ann.texts(key), ['missed by worker 0', 'and this', 'and that', 'from here on']);
    });
  });

  test('a Redis that comes back without its last records: no id stands for two texts, ids never go back, everything goes on', { timeout: 180_000 }, async () => {
    const random = new Random(SEED ^ 0x5eed);
    console.log(`    BANTER_TEST_SEED=${SEED}`);
    await onRedis({ appendfsync: 'everysec', workers: 3 }, async ({ redis, banter, world }) => {
      const founder = await banter.register('founder');
      const channels = await createChannels(banter, founder.token, 2);
      const residents = await settle(world, channels, 6);
      // What each id stood for, to whomever.
      const meaning = new Map(channels.map((channel) => [channel, new Map()]));
      const stand = (channel, id, text, who) => {
        const known = meaning.get(channel).get(id) ?? text;
        assert.strictEqual(text, known, `${who}: ${id} in ${channel} stands for two texts`);
        meaning.get(channel).set(id, text);
      };
      let forgotten = 0;
      for (let round = 0; round < 4; round++) {
        const label = `round ${round}, `;
        const before = redis.appended();
        const talk = chatter(residents, channels, { pause: 20, label });
        await until('they talk', () => talk.count() >= 60);
        await redis.kill9();
        // Some of this round's posts: never accounts or channels.
        const written = redis.appended() - before;
        const lost = random.between(Math.floor(written / 10), Math.floor(written / 2));
        redis.truncateAof(lost);
        if (round === 2) banter.kill9Worker(random.pick(banter.workerNumbers()));
        await redis.start();
        const soFar = talk.count();
        await until('posts go on', () => talk.count() >= soFar + 30, 30_000);
        await talk.stop();
        console.log(`    ${lost} of ${written} bytes lost`);
        await Promise.all(residents.map((resident) => resident.settled()));
        for (const channel of channels) {
          const stored = await history(banter, founder.token, channel);
          for (const { id, message } of stored) stand(channel, id, message, 'the history');
          const last = Math.max(...residents.map((resident) => Math.max(...resident.rooms.get(channel).posted.keys())));
          assert.strictEqual(stored.at(-1).id, last, 'what was posted last is there');
          await everythingHeard(residents, [channel], new Map([[channel, last]]));
          const ids = new Set(stored.map(({ id }) => id));
          for (const resident of residents) {
            const { heard, posted } = resident.rooms.get(channel);
            forgotten += [...posted.keys()].filter((id) => !ids.has(id)).length;
            for (const { id, message } of heard) stand(channel, id, message, resident);
            for (const [id, text] of posted) stand(channel, id, text, resident);
            const known = resident.ids(channel);
            assert.deepStrictEqual([...ids].filter((id) => !known.has(id)), [], `${resident} knows all that is stored`);
          }
        }
      }
      assert.deepStrictEqual(residents.flatMap(({ complaints }) => complaints), []);
      assert.ok(forgotten > 0, 'Redis did lose acknowledged messages');
    });
  });

  test('a worker that never heard of the ids that Redis lost does not give them out again, and who knows them misses nothing', { timeout: 60_000 }, async () => {
    // Unlike with `everysec`, what it has answered is in its file, which so can be cut to the byte.
    await onRedis({ appendfsync: 'no', workers: 2, env: { BANTER_POST_RATE: '0' } }, async ({ redis, banter, world }) => {
      const key = banter.key();
      const [ann, bob] = [await personOn(world, 0, 'ann'), await personOn(world, 0, 'bob')];
      const [dora, emil] = [await personOn(world, 1, 'dora'), await personOn(world, 1, 'emil')];
      for (const client of [ann, bob]) await client.join(key);
      const kept = await ann.post(key, 'kept');
      const before = redis.appended();
      const lost = await Promise.all(['lost 1', 'lost 2', 'lost 3'].map((text) => ann.post(key, text)));
      const after = lost.at(-1).id;
      await bob.waitFor('message:post', (m) => m.id === after);
      await redis.kill9();
      redis.truncateAof(redis.appended() - before);
      await redis.start();
      let joined;
      await until('it can join', async () => {
        joined = await dora.emitAck('channel:join', { channel: key, after });
        return joined.error === undefined;
      }, 15_000);
      assert.deepStrictEqual([joined.reset, joined.last, joined.messages.map(parseMessage)], [true, kept.id, await history(banter, ann.token, key)]);
      const posted = [await dora.post(key, 'new')];
      assert.ok(posted[0].id > after, `the id ${posted[0].id} is new to everybody: ${after} was given out`);
      assert.ok(Number.isSafeInteger(posted[0].id));
      await bob.waitFor('message:post', (m) => m.message === 'new');
      assert.deepStrictEqual(bob.texts(key), ['kept', 'lost 1', 'lost 2', 'lost 3', 'new']);

      // What lies between was never said: nobody waits for it, and positions do not count it.
      const texts = Array.from({ length: 199 }, (_, i) => `new ${i}`);
      for (const text of texts) posted.push(await dora.post(key, text));
      await bob.waitFor('message:post', (m) => m.id === posted.at(-1).id);
      assert.deepStrictEqual(bob.texts(key).slice(5), texts, 'in order');
      const back = await emil.emitAck('channel:join', { channel: key, after });
      assert.deepStrictEqual([back.reset, back.more, back.last], [undefined, undefined, posted.at(-1).id]);
      assert.deepStrictEqual(back.messages.map((m) => parseMessage(m).id), posted.map(({ id }) => id));
      const page = async (query) => {
        const { json } = await banter.api('GET', channelPath(key, `messages?${query}`), { token: emil.token });
        return json.messages.map((m) => parseMessage(m).id);
      };
      assert.deepStrictEqual(await page('start=199&end=250'), [kept.id, posted[0].id], 'the beginning is reached');
      assert.deepStrictEqual(await page('start=198&end=200'), [posted[0].id, posted[1].id]);
      assert.deepStrictEqual(await page(`before=${posted[1].id}&limit=2`), [kept.id, posted[0].id]);
      assert.deepStrictEqual(await page(`after=${kept.id}&limit=1`), [posted[0].id]);
    });
  });
});

describe('several on one Redis', { skip }, () => {
  test('a worker listens only to channels with members of its own, and for a while after they left', { timeout: 180_000 }, async () => {
    await onRedis({ workers: 2 }, async ({ redis, banter, world }) => {
      const [one, two] = [banter.key('only on one'), banter.key('soon empty ä')];
      const ann = await personOn(world, 0, 'ann');
      const amy = await personOn(world, 0, 'amy');
      const bob = await personOn(world, 1, 'bob');
      for (const client of [ann, amy]) await client.join(one);
      await world.restJoin(bob, two);
      assert.strictEqual(await listeners(redis, one), 1, 'two members on one worker are one subscription');
      assert.strictEqual(await listeners(redis, two), 1);
      const topics = await redis.command('PUBSUB', 'CHANNELS', '{banter}:topic:*');
      assert.deepStrictEqual(topics.sort(), [topic(one), topic(two)].sort(), 'nobody listens to anything else');
      // To look at a channel is not to be in it.
      await history(banter, bob.token, one);
      await ann.post(one, 'alone here');
      assert.strictEqual(await listeners(redis, one), 1);

      await bob.join(one);
      assert.strictEqual(await listeners(redis, one), 2);
      const { id } = await ann.post(one, 'no longer');
      await bob.waitFor('message:post', (m) => m.id === id);
      for (const channel of [one, two]) assert.deepStrictEqual(await bob.emitAck('user : left', { channel }), {});
      await until('the worker without members listens no more', async () => await listeners(redis, one) === 1 && await listeners(redis, two) === 0, 60_000);
      await ann.post(one, 'bob does not hear this');
      await amy.waitFor('message:post', (m) => m.message === 'bob does not hear this');
      await bob.join(one);
      assert.strictEqual(await listeners(redis, one), 2);
      const back = await ann.post(one, 'but this');
      await bob.waitFor('message:post', (m) => m.id === back.id);
      assert.deepStrictEqual(bob.texts(one), ['no longer', 'but this']);
    });
  });

  test('deployments with different prefixes share a Redis, one by a socket and one by TCP, and do not see each other', { timeout: 120_000 }, async () => {
    await onRedis({ tcp: true, workers: 1 }, async ({ redis, banter, world }) => {
      const neighbour = await startBanter({ store: 'redis', redis, redisUrl: redis.tcpUrl, workers: 1, env: { BANTER_REDIS_PREFIX: 'next:door' } });
      const there = new World(neighbour);
      try {
        const ann = await world.person('ann');
        const login = { body: { name: ann.name, password: ann.user.password } };
        assert.strictEqual((await neighbour.api('POST', '/auth/login', login)).status, 401, 'an account is known in its own deployment only');
        const same = await neighbour.api('POST', '/auth/register', { body: { name: ann.name, password: 'another one' } });
        assert.strictEqual(same.status, 200, 'a name is free in the other one');
        const bob = await there.connect({ name: ann.name, token: same.json.token });
        for (const client of [ann, bob]) await client.join('general');
        const [created] = await createChannels(banter, ann.token, 1);
        const list = await neighbour.api('GET', '/channels', { token: bob.token });
        assert.deepStrictEqual(list.json.channels.map(({ key, onlineCount }) => [key, onlineCount]), [['general', 1], ['programming', 0], ['random', 0]]);
        assert.ok(!list.json.channels.some(({ key }) => key === created));
        assert.deepStrictEqual([await listeners(redis, 'general'), await listeners(redis, 'general', 'next:door')], [1, 1]);

        for (let i = 1; i <= 3; i++) assert.strictEqual((await ann.post('general', `here ${i}`)).id, i);
        assert.strictEqual((await bob.post('general', 'there')).id, 1, 'each counts for itself');
        assert.deepStrictEqual((await history(banter, ann.token, 'general')).map(({ message }) => message), ['here 1', 'here 2', 'here 3']);
        assert.deepStrictEqual((await history(neighbour, bob.token, 'general')).map(({ message }) => message), ['there']);
        assert.deepStrictEqual([...ann.all('message:post'), ...bob.all('message:post')], [], 'nobody hears anything of the other');
        const keys = await redis.command('KEYS', '*');
        assert.deepStrictEqual(keys.filter((key) => !/^\{(banter|next:door)\}:/.test(key)), [], 'nothing is outside of the prefixes');
      } finally {
        there.close();
        await neighbour.stop();
      }
    });
  });

  test('a second deployment with the same prefix is refused in a line that names the first, which goes on', { timeout: 120_000 }, async () => {
    await onRedis({ workers: 1 }, async ({ redis, banter, world }) => {
      const ann = await world.person('ann');
      await ann.join('general');
      const refusedSoon = async () => {
        const second = new Banter({ store: 'redis', redis, workers: 1 });
        const begun = performance.now();
        try {
          await assert.rejects(second.start(), /banter ended at start/);
          const took = performance.now() - begun;
          assert.ok(took < 20_000, `it ended after ${took.toFixed(0)} ms`);
          assert.ok([1, 78].includes(second.exit.code), `exit code: ${JSON.stringify(second.exit)}`);
          const lines = second.logs().split('\n').filter((line) => /another master/i.test(line));
          assert.ok(lines.some((line) => line.includes(`process ${banter.masterPid()} `)), `a line that names process ${banter.masterPid()}:\n${second.logs()}`);
        } finally {
          await second.remove();
        }
      };
      const pid = banter.masterPid();
      await refusedSoon();
      assert.strictEqual(banter.masterPid(), pid, 'the first was not disturbed');
      assert.deepStrictEqual(ann.life.map(({ what }) => what), ['connect']);

      // The lease is the deployment's, not the process': its next master has it at once.
      banter.kill9Master();
      await until('another master', () => ![undefined, pid].includes(banter.roles().master));
      await banter.healthy(10_000);
      await world.person('bob');
      await refusedSoon();
      assert.deepStrictEqual(ann.life.map(({ what }) => what), ['connect']);

      // It is given back at the end.
      await banter.terminate();
      const begun = performance.now();
      const next = await startBanter({ store: 'redis', redis, workers: 1 });
      const took = performance.now() - begun;
      try {
        assert.ok(took < 8_000, `the next one starts without waiting for the lease to end: ${took.toFixed(0)} ms`);
        const login = await next.api('POST', '/auth/login', { body: { name: ann.name, password: ann.user.password } });
        assert.strictEqual(login.status, 200, login.text);
      } finally {
        await next.stop();
      }
    });
  });
});

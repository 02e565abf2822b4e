'use strict';
// Residents of a server that is about to be harmed, what they say meanwhile, and the audit afterwards.

const assert = require('node:assert');
const { VERSIONS, TRANSPORTS, parseMessage } = require('./client.js');
const { Resident } = require('./resident.js');
const { channelPath } = require('./rest.js');
const { sleep, until } = require('./wait.js');

/** New public channels, whose members `GET /channels` counts. */
async function createChannels(banter, token, count) {
  const keys = [];
  for (let i = 0; i < count; i++) {
    const { status, json, text } = await banter.api('POST', '/channels', { token, body: { name: `channel ${i}` } });
    assert.strictEqual(status, 201, text);
    keys.push(json.key);
  }
  return keys;
}

/** All messages of a channel, by REST. */
async function history(banter, token, channel) {
  const all = [];
  for (;;) {
    const after = all.at(-1)?.id ?? 0;
    const { status, json, text } = await banter.api('GET', channelPath(channel, `messages?after=${after}&limit=200`), { token });
    assert.strictEqual(status, 200, text);
    if (json.messages.length === 0) return all;
    all.push(...json.messages.map(parseMessage));
  }
}

/** Residents of every version, on different transports and addresses, who live in all `channels`. */
async function settle(world, channels, count) {
  const residents = [];
  for (let i = 0; i < count; i++) {
    const user = await world.banter.register('resident');
    const resident = new Resident(world.banter, {
      name: user.name,
      token: user.token,
      version: VERSIONS[i % VERSIONS.length],
      transport: TRANSPORTS[Math.floor(i / VERSIONS.length + i) % TRANSPORTS.length],
      // Each worker gets its share.
      localAddress: await world.banter.addressOfWorker(i % world.banter.options.workers),
    });
    world.clients.push(resident);
    residents.push(resident);
  }
  await Promise.all(residents.map((resident) => resident.moveIn(channels)));
  return residents;
}

/** Has everybody post to all channels in turn, until told to stop; `stop` gives the texts by channel. */
function chatter(residents, channels, { pause, label = '' }) {
  let going = true;
  const texts = new Map(channels.map((channel) => [channel, []]));
  const count = () => [...texts.values()].reduce((sum, list) => sum + list.length, 0);
  const all = residents.map(async (resident) => {
    for (let i = 0; going; i++) {
      const channel = channels[i % channels.length];
      const text = `${label}${resident.name} ${i} ä😀`;
      await resident.insist(channel, text);
      texts.get(channel).push(text);
      await sleep(pause);
    }
  });
  // A failure is told by `stop`, not as an unhandled rejection meanwhile.
  const done = Promise.all(all);
  done.catch(() => {});
  return {
    count,
    stop: async () => {
      going = false;
      await done;
      return texts;
    },
  };
}

/** Waits until all know what is in these channels, of which `last` tells the last ids. */
async function everythingHeard(residents, channels, last) {
  for (const resident of residents) {
    await resident.settled();
    for (const channel of channels) {
      const { posted } = resident.rooms.get(channel);
      await resident.when(`everything in ${channel}`, () => {
        const heard = resident.rooms.get(channel).last;
        return heard >= last.get(channel) || (posted.has(last.get(channel)) && resident.lastIds()[channel] >= last.get(channel));
      }, 20_000);
    }
  }
}

/**
 * Checks, once nobody posts any more, that every resident has heard every message of these channels once
 * and in order, and that just those are stored that were acknowledged: `texts`, by channel.
 */
async function audit(server, token, residents, texts) {
  const channels = [...texts.keys()];
  assert.deepStrictEqual(residents.flatMap(({ complaints }) => complaints), []);
  const stored = new Map();
  for (const channel of channels) stored.set(channel, await history(server, token, channel));
  const last = new Map(channels.map((channel) => [channel, stored.get(channel).at(-1).id]));
  await everythingHeard(residents, channels, last);
  for (const channel of channels) {
    const messages = stored.get(channel);
    assert.deepStrictEqual(messages.map(({ id }) => id), messages.map((_, i) => 1 + i), 'the history is dense');
    const expected = texts.get(channel);
    assert.deepStrictEqual(messages.map(({ message }) => message).sort(), [...expected].sort(), 'what was acknowledged is stored, once each, and nothing else');
    for (const resident of residents) {
      const { heard, posted } = resident.rooms.get(channel);
      const own = new Set(posted.keys());
      const others = messages.filter(({ id }) => !own.has(id));
      assert.deepStrictEqual(
        heard.filter(({ id }) => !own.has(id)),
        others.map(({ id, message, user }) => ({ id, message, user })),
        `${resident} heard in ${channel} what others posted, once each, in order`,
      );
      for (const [id, text] of posted) assert.strictEqual(messages[id - 1].message, text, `${resident}: what was acknowledged as ${id}`);
      // Its own it hears only if its connection broke before the acknowledgement.
      for (const { id, message } of heard) assert.strictEqual(message, messages[id - 1].message);
    }
  }
}

/**
 * `count` residents chat while `harm(residents)` is done; then everybody is back, posts go on, and nothing
 * was lost. Gives the residents, and how many posts there were.
 */
async function chatThrough(world, count, harm) {
  const { banter } = world;
  const founder = await banter.register('founder');
  const channels = await createChannels(banter, founder.token, 2);
  const residents = await settle(world, channels, count);
  const talk = chatter(residents, channels, { pause: 60 });
  await until('people talk', () => talk.count() >= count, 30_000);
  await harm(residents);
  await Promise.all(residents.map((resident) => resident.settled()));
  const soFar = talk.count();
  await until('posts go on', () => talk.count() >= soFar + 3 * count, 30_000);
  const texts = await talk.stop();
  await Promise.all(residents.map((resident) => resident.settled()));
  await audit(banter, founder.token, residents, texts);
  return { residents, posts: talk.count() };
}

/** Every session was resumed: nobody was told that somebody left. */
function assertNobodyQuit(residents) {
  for (const resident of residents) {
    assert.deepStrictEqual(resident.all('user : quit'), [], `${resident} was told of somebody's end`);
  }
}

/** Two people, on the workers 0 and 1, hear each other. Gives them. */
async function twoPeopleChat(world) {
  const { banter } = world;
  const [ann, bob] = await Promise.all([[0, 1, 'polling'], [1, 4, 'websocket']].map(async ([worker, version, transport]) => (
    world.person('chatter', { localAddress: await banter.addressOfWorker(worker), version, transport })
  )));
  const key = banter.key();
  for (const client of [ann, bob]) await client.join(key);
  await ann.post(key, 'from worker 0');
  await bob.waitFor('message:post', (m) => m.message === 'from worker 0' && m.user === ann.name);
  await bob.post(key, 'from worker 1');
  await ann.waitFor('message:post', (m) => m.message === 'from worker 1' && m.user === bob.name);
  return [ann, bob];
}

module.exports = { chatThrough, assertNobodyQuit, twoPeopleChat, createChannels, history, settle, chatter, everythingHeard, audit };

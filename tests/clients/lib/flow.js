'use strict';
// A steady flow of messages, and whether somebody got all of it.

const assert = require('node:assert');
const { sleep } = require('./wait.js');

/** The answer to a post, or undefined if its connection ended first. */
async function answer(client, payload) {
  const { connections } = client;
  let ack;
  client.socket.emit('message:post', payload, (given) => {
    ack = given;
    client.stir();
  });
  await client.when('an ack', () => ack || client.connections !== connections || !client.socket.connected, 7_000);
  return ack;
}

/** Posts one message after the other until told to stop, each until it is acknowledged. */
function keepPosting(client, key, prefix) {
  let going = true;
  const ids = [];
  const done = (async () => {
    for (let i = 0; going; i++) {
      const payload = { channel: key, message: `${prefix} ${i}`, nonce: `${prefix}-${i}` };
      const end = performance.now() + 60_000;
      for (;;) {
        if (performance.now() > end) throw new Error(`${client}: ${payload.message} was never acknowledged`);
        try {
          // Only the answer of this try may tell: the same nonce makes any try the same message.
          const ack = client.socket.connected && await answer(client, payload);
          if (ack && ack.id !== undefined) {
            client.knows(key, ack.id);
            ids.push(ack.id);
            break;
          }
        } catch {
          // The connection went away with the ack.
        }
        await sleep(50);
      }
      await sleep(5);
    }
    return ids;
  })();
  return { ids, stop: () => { going = false; return done; } };
}

/** Everything up to `last` once: what it heard and what it posted make one row without a hole. */
function assertComplete(client, key, first, last) {
  const known = [...client.known.get(key)].filter((id) => id >= first).sort((a, b) => a - b);
  assert.deepStrictEqual(known, Array.from({ length: last - first + 1 }, (_, i) => first + i), `${client} knows every message`);
  for (let connection = 1; connection <= client.connections; connection++) {
    const ids = client.log
      .filter((one) => one.event === 'message:post' && one.connection === connection && one.payload.channel === key)
      .map(({ payload }) => payload.id);
    for (let i = 1; i < ids.length; i++) assert.ok(ids[i] > ids[i - 1], `${client}: ${ids[i - 1]} then ${ids[i]}: in order, none twice`);
    const named = client.named[connection]?.[key];
    if (named !== undefined && ids.length) assert.ok(ids[0] > named, `${client}: named ${named}, got ${ids[0]} again`);
  }
}

module.exports = { keepPosting, assertComplete };

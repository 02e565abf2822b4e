'use strict';
// One server for the tests of a file (or of a part of it). Clients are closed after each test, the
// server after all; a test that fails shows what the server logged meanwhile.

const { test, before, after, describe } = require('node:test');
const { startBanter } = require('./banter.js');
const { Client } = require('./client.js');

const TEST_TIMEOUT = 120_000;

/** What a test gets: the server, and the means to make people and connections. */
class World {
  constructor(banter) {
    this.banter = banter;
    this.clients = [];
  }

  /** A client that is not connected yet. */
  client(options) {
    const client = new Client(this.banter, options);
    this.clients.push(client);
    return client;
  }

  /** A connected client that has `logged_in`. */
  async connect(options) {
    const client = this.client(options);
    await client.open();
    return client;
  }

  /** A new account, connected: the client, with `user` on it. */
  async person(prefix, options = {}) {
    const user = await this.banter.register(prefix);
    const client = await this.connect({ name: user.name, token: user.token, ...options });
    client.user = user;
    return client;
  }

  /** Joins by REST; the answer must be 200. */
  async restJoin(client, channel, options = {}) {
    const answer = await this.banter.api('POST', `/channels/${encodeURIComponent(channel)}/join`, {
      token: client.token,
      localAddress: client.localAddress,
      ...options,
    });
    if (answer.status !== 200) throw new Error(`join ${channel}: ${answer.status} ${answer.text}`);
    return answer.json;
  }

  close() {
    for (const client of this.clients) client.close();
  }
}

/**
 * A group of tests with one server. `define` gets `scenario(name, async (world) => …)`, and
 * `banter()` for what is the same in all of them.
 */
function suite(title, options, define) {
  describe(title, () => {
    let banter;
    before(async () => {
      banter = await startBanter(options);
    }, { timeout: 60_000 });
    after(() => banter?.stop(), { timeout: 30_000 });
    const scenario = (name, body, { timeout = TEST_TIMEOUT } = {}) => {
      test(name, { timeout }, async () => {
        const world = new World(banter);
        const logged = banter.output.length;
        try {
          await body(world);
        } catch (error) {
          const lines = banter.output.slice(logged).join('').split('\n').slice(-120);
          console.error(`--- what banter logged during "${name}":\n${lines.join('\n')}\n---`);
          throw error;
        } finally {
          world.close();
        }
      });
    };
    define(scenario, () => banter);
  });
}

module.exports = { suite, World };

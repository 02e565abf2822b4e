'use strict';
// One server for the tests of a file (or of a part of it). Clients are closed after each test, the
// server after all; a test that fails shows what the server logged meanwhile.

const { test, before, after, describe } = require('node:test');
const { startBanter, STORE, WORKERS } = require('./banter.js');
const { Client } = require('./client.js');

const TEST_TIMEOUT = 120_000;

/** What a test gets: the server, and the means to make people and connections. */
class World {
  constructor(banter, { spread = false } = {}) {
    this.banter = banter;
    this.spread = spread;
    this.clients = [];
  }

  /** A client that is not connected yet. */
  client(options) {
    // From an address of its own it may be on any worker, and on another than REST from 127.0.0.1.
    const localAddress = this.spread ? `127.0.64.${this.clients.length % 250 + 1}` : undefined;
    const client = new Client(this.banter, { localAddress, ...options });
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

/** Says why tests that need this store are left out of this run, if they are. */
const otherStore = (store) => store !== undefined && store !== STORE && `for BANTER_TEST_STORE=${store} only`;

/**
 * A group of tests with one server. `define` gets `scenario(name, async (world) => …)`, and
 * `banter()` for what is the same in all of them. With `store` among the options they are left out
 * of runs with another one. Without `workers` there are as many as the run says, and clients come from
 * different addresses if there are several.
 */
function suite(title, options, define) {
  const skip = otherStore(options.store);
  if (skip) {
    test(title, { skip });
    return;
  }
  const spread = options.workers === undefined && WORKERS > 1;
  describe(title, () => {
    let banter;
    before(async () => {
      banter = await startBanter(options);
    }, { timeout: 60_000 });
    after(() => banter?.stop(), { timeout: 30_000 });
    const scenario = (name, body, { timeout = TEST_TIMEOUT } = {}) => {
      test(name, { timeout }, async () => {
        const world = new World(banter, { spread });
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

module.exports = { suite, World, otherStore };

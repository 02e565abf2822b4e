'use strict';
// A server as its clients see it, however it was started.

const assert = require('node:assert');
const { request } = require('./rest.js');
const { until } = require('./wait.js');

class Server {
  /** `options.workers` says how many there are. `port` is set once it is known. */
  constructor(options) {
    this.options = options;
    /** What it logs. */
    this.output = [];
    this.names = 0;
  }

  get url() {
    return `http://127.0.0.1:${this.port}`;
  }

  logs() {
    return this.output.join('');
  }

  api(method, where, options) {
    return request(this.port, method, where, options);
  }

  /** Client addresses, by the worker that serves them: each is used once only. */
  async addressOfWorker(number) {
    if (!this.addresses) {
      // Until all workers serve, addresses go to those that do.
      this.addresses = { next: 2, spare: new Map() };
      const seen = new Set();
      for (let host = 2; host < 255 && seen.size < this.options.workers; host++) {
        await until(`127.0.16.${host} is served`, async () => {
          const worker = await this.workerOfAddress(`127.0.16.${host}`);
          return worker !== undefined && seen.add(worker);
        });
      }
    }
    const { spare } = this.addresses;
    for (;;) {
      const known = spare.get(number);
      if (known?.length) return known.shift();
      const host = this.addresses.next++;
      if (host > 4_000) throw new Error(`no address in 127.0.0.0/20 is served by worker ${number}`);
      const address = `127.0.${host >> 8}.${host & 255}`;
      const answer = await this.api('GET', '/health', { localAddress: address });
      assert.strictEqual(answer.status, 200, `GET /health from ${address}: ${answer.text}`);
      const worker = Number(answer.json.worker);
      spare.set(worker, [...(spare.get(worker) ?? []), address]);
    }
  }

  /** Which worker serves this address now. */
  async workerOfAddress(localAddress) {
    const answer = await this.api('GET', '/health', { localAddress });
    return answer.status === 200 ? Number(answer.json.worker) : undefined;
  }

  /** A new account: `{name, password, token}`. */
  async register(prefix = 'user', options = {}) {
    const name = `${prefix}${++this.names}x${Math.random().toString(36).slice(2, 8)}`;
    const password = `secret of ${name}`;
    const answer = await this.api('POST', '/auth/register', { body: { name, password }, ...options });
    assert.strictEqual(answer.status, 200, `register ${name}: ${answer.status} ${answer.text}`);
    return { name, password, token: answer.json.token };
  }

  /** A channel key that no other test uses. */
  key(prefix = 'room') {
    return `${prefix}-${++this.names}-${Math.random().toString(36).slice(2, 10)}`;
  }
}

module.exports = { Server };

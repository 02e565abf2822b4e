'use strict';
// New clients, one after the other, while something happens: who of them is not served?

const { request } = require('../../clients/lib/rest.js');
const { sleep, until } = require('../../clients/lib/wait.js');

/** How long one waits for its answer: longer than anything here takes to come back. */
const DEADLINE = 30_000;

class Knocker {
  /** Every `pause` ms a new connection, from many addresses in turn. */
  constructor(server, { pause = 8 } = {}) {
    this.server = server;
    this.pause = pause;
    /** By outcome (a status, or an error's code), how many. */
    this.outcomes = {};
    this.done = 0;
    this.going = true;
    this.running = this.run();
  }

  async run() {
    const knocks = [];
    for (let n = 0; this.going; n++) {
      knocks.push(this.knock(`127.0.${40 + (n >> 7) % 20}.${1 + n % 128}`));
      await sleep(this.pause);
    }
    await Promise.all(knocks);
  }

  async knock(localAddress) {
    let outcome;
    try {
      const { status } = await request(this.server.port, 'GET', '/health', { localAddress, deadline: DEADLINE });
      outcome = String(status);
    } catch (error) {
      outcome = error.code ?? error.message;
    }
    this.outcomes[outcome] = (this.outcomes[outcome] ?? 0) + 1;
    this.done += 1;
  }

  /** Waits until `count` more have had an answer. */
  more(count) {
    const goal = this.done + count;
    return until(`${count} more clients are answered`, () => this.done >= goal, 60_000);
  }

  /** Waits for those under way; gives `outcomes`. */
  async stop() {
    this.going = false;
    await this.running;
    return this.outcomes;
  }
}

module.exports = { Knocker };

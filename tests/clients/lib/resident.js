'use strict';
// A client as a good application writes it, for servers that misbehave: it comes back however often its
// connection breaks or is refused, names the last ids that it has, joins again where its session has
// ended, and repeats a post with the same nonce until it is acknowledged. It keeps account of all it is
// told, and complains of what no client should ever be told.

const { Client, parseMessage } = require('./client.js');
const { channelPath } = require('./rest.js');
const { sleep, until } = require('./wait.js');

const ATTEMPT_DEADLINE = 20_000;
/** How long it waits for the answer to a post before it tries again. */
const ANSWER_DEADLINE = 8_000;

class Resident extends Client {
  constructor(banter, options) {
    super(banter, { ...options, keepUp: true, reconnection: false });
    /**
     * Per channel: `heard`, the messages in order of arrival; `last`, up to where it has heard them;
     * `posted`, the texts of its own acknowledged posts by id.
     */
    this.rooms = new Map();
    /** What no client should be told. */
    this.complaints = [];
    /** Of each refused post: `{code, error}`. */
    this.refusals = [];
    /** The longest that an answer to a post took while the connection lived, in ms. */
    this.slowest = 0;
    this.admitted = false;
    this.living = false;
  }

  // ---- what it hears

  note(event, payload) {
    super.note(event, payload);
    if (event === 'message:post') this.hears(payload);
  }

  hears({ channel, id, message, user }) {
    const room = this.rooms.get(channel);
    if (!room) return this.complain(`hears of ${channel}, which it never joined`);
    if (!(id > room.last)) {
      const named = this.named[this.connections]?.[channel];
      this.complain(`${channel}: hears ${id} after ${room.last}, on connection ${this.connections}, for which it named ${named}`);
    }
    room.last = Math.max(room.last, id);
    room.heard.push({ id, message, user });
  }

  acknowledged(channel, id, message) {
    const { posted } = this.rooms.get(channel);
    const other = posted.get(id);
    if (other !== undefined && other !== message) this.complain(`${channel}: ${id} is the id of "${other}" and "${message}"`);
    for (const [known, text] of posted) {
      if (text === message && known !== id) this.complain(`${channel}: "${message}" has the ids ${known} and ${id}`);
    }
    posted.set(id, message);
  }

  complain(what) {
    this.complaints.push(`${this}: ${what}`);
  }

  /** The last id that it has, per channel: the last one heard, and its own ones right behind that. */
  lastIds() {
    return Object.fromEntries([...this.rooms].map(([channel, { last, posted }]) => {
      let id = last;
      while (posted.has(id + 1)) id += 1;
      return [channel, id];
    }));
  }

  /** The ids that it knows of in a channel, heard and posted. */
  ids(channel) {
    const { heard, posted } = this.rooms.get(channel);
    return new Set([...heard.map(({ id }) => id), ...posted.keys()]);
  }

  // ---- its connection

  /** Comes to live in these channels, until `moveOut` or `vanish`. Waits until it is in all of them. */
  async moveIn(channels) {
    for (const channel of channels) this.rooms.set(channel, { heard: [], last: 0, posted: new Map() });
    this.living = true;
    this.ended = this.live();
    await this.settled();
  }

  /** Waits until it is connected and in all its rooms. */
  settled(deadline = 30_000) {
    return this.when('in all its rooms', () => this.admitted && this.socket.connected, deadline);
  }

  async live() {
    while (this.living) {
      try {
        await this.enter();
        await this.rejoin();
        this.admitted = true;
        this.stir();
        await this.when('the end of the connection', () => !this.living || !this.socket.connected, 3_600_000);
        this.admitted = false;
        if (this.living) await sleep(20);
      } catch (error) {
        this.lastFailure = error;
        if (!this.living) return;
        await this.breakOff();
        await sleep(100);
      }
    }
  }

  /** One attempt: up to `logged_in`. */
  async enter() {
    const since = this.mark();
    const lifeSince = this.life.length;
    this.start();
    await this.when('logged_in', () => {
      if (this.log.slice(since).some(({ event }) => event === 'logged_in')) return true;
      const bad = this.life.slice(lifeSince).find(({ what }) => what !== 'connect');
      if (bad) throw new Error(`${bad.what}: ${bad.detail?.message ?? bad.detail}`);
      return false;
    }, ATTEMPT_DEADLINE);
  }

  /** Joins the rooms that its session does not have: all of them at first, or if it has ended. */
  async rejoin() {
    const mine = new Set(this.lastLogin.channels.map(({ key }) => key));
    for (const channel of this.rooms.keys()) if (!mine.has(channel)) await this.joinAgain(channel);
  }

  async joinAgain(channel) {
    await this.readUp(channel);
    // What is said now would be sent once there is another connection, which is too late.
    if (!this.socket.connected) throw new Error('the connection is gone');
    const after = this.lastIds()[channel];
    let answer;
    // It is dealt with where it arrives: what comes right behind it counts on it.
    this.socket.emit('channel:join', { channel, after }, (ack) => {
      answer = ack;
      if (ack.reset) this.complain(`${channel}: reset, after ${after}`);
      if (ack.more) this.complain(`${channel}: more than it can be told at once, after ${after}`);
      for (const message of ack.messages ?? []) this.hears(parseMessage(message));
      const room = this.rooms.get(channel);
      room.last = Math.max(room.last, ack.last ?? 0);
      this.stir();
    });
    await this.when(`the answer to joining ${channel}`, () => answer || !this.socket.connected, ANSWER_DEADLINE);
    if (answer?.error !== undefined || !answer) throw new Error(`join: ${JSON.stringify(answer)}`);
  }

  /** Reads by REST what it missed, since an answer to a join holds 200 messages at most. */
  async readUp(channel) {
    for (let full = this.rooms.get(channel).last > 0; full;) {
      const path = channelPath(channel, `messages?after=${this.lastIds()[channel]}&limit=200`);
      const { status, text, json } = await this.banter.api('GET', path, { token: this.token, localAddress: this.localAddress });
      if (status !== 200) throw new Error(`GET ${path}: ${status} ${text}`);
      for (const message of json.messages) this.hears(parseMessage(message));
      full = json.messages.length === 200;
    }
  }

  /** Breaks all its TCP connections, whatever state it is in. They can be opened again at once. */
  async breakOff({ reset = false } = {}) {
    this.line.cut({ reset });
    await until('the cut sockets are closed', () => this.line.open.size === 0, 5_000);
    await until('the client has noticed', () => !this.socket.connected, 5_000);
    // What it still tries to say in its last turns (a polling client posts a close packet) must not
    // get through either.
    for (let turn = 0; turn < 20; turn++) await new Promise(setImmediate);
    this.line.mend();
  }

  /** Goes without a word, and does not come back. */
  async vanish() {
    this.living = false;
    await this.breakOff();
    await this.ended;
  }

  /** Quits as an application does. */
  async moveOut() {
    this.living = false;
    this.quit();
    await this.ended;
  }

  close() {
    this.living = false;
    super.close();
    this.stir();
  }

  // ---- what it says

  /** Posts, and repeats that until it is acknowledged. Gives the id. */
  async insist(channel, message, deadline = 90_000) {
    const end = performance.now() + deadline;
    for (;;) {
      const answer = await this.tryToPost(channel, message);
      if (Number.isInteger(answer?.id)) return answer.id;
      if (answer) this.refusals.push(answer);
      if (performance.now() > end) {
        throw new Error(`${this}: "${message}" was never acknowledged; last answer ${JSON.stringify(answer)}; last failure: ${this.lastFailure?.message}`);
      }
      await sleep(answer ? 100 : 50);
    }
  }

  /** One attempt: the answer, or undefined if none came. */
  async tryToPost(channel, message) {
    if (!this.admitted || !this.socket.connected) return undefined;
    const asked = performance.now();
    const connection = this.connections;
    let answer;
    this.socket.emit('message:post', { channel, message, nonce: message }, (ack) => {
      answer = ack;
      this.slowest = Math.max(this.slowest, performance.now() - asked);
      if (Number.isInteger(ack?.id)) this.acknowledged(channel, ack.id, message);
      this.stir();
    });
    const over = () => answer || !this.socket.connected || this.connections !== connection;
    await this.when('an answer', over, ANSWER_DEADLINE).catch(() => {});
    return answer;
  }
}

module.exports = { Resident };

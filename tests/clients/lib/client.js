'use strict';
// One Socket.IO client of any version over any transport, behind one face. It keeps every event it
// ever got, in order, and can lose its connection as networks lose it: without a farewell.

const http = require('node:http');
const net = require('node:net');
const { within, until, sleep } = require('./wait.js');

const LIBRARIES = {
  1: require('sio1'),
  2: require('sio2'),
  3: require('sio3'),
  4: require('sio4'),
};
const VERSIONS = [1, 2, 3, 4];
const TRANSPORTS = ['polling', 'websocket', 'upgrade'];

/**
 * Binds every connection of one client, requests and WebSocket alike, to one local address, knows
 * their TCP sockets, and can cut the line: until mended, nothing gets through.
 */
class Line extends http.Agent {
  constructor(localAddress) {
    // As these libraries do in Node. Kept-alive connections would also trip over a bug of 4.x's XHR for
    // Node, which repeats a request on a reset connection but never sends it.
    super({ keepAlive: false });
    this.localAddress = localAddress;
    this.open = new Set();
    this.isCut = false;
  }

  createConnection({ host, port }) {
    const socket = net.connect({ host, port, localAddress: this.localAddress });
    socket.setNoDelay(true);
    if (this.isCut) socket.destroy(new Error('the line is cut'));
    this.open.add(socket);
    // An error on an idle socket is nobody's business here: its user sees the close.
    socket.on('error', () => {});
    socket.on('close', () => this.open.delete(socket));
    return socket;
  }

  cut({ reset = false } = {}) {
    this.isCut = true;
    for (const socket of this.open) {
      if (reset) socket.resetAndDestroy();
      else socket.destroy();
    }
  }

  mend() {
    this.isCut = false;
  }
}

class Client {
  /**
   * `version`: 1 to 4. `transport`: polling, websocket, or upgrade (from polling to WebSocket).
   * `session` and `resume` as docs/api.md says; each version passes them in its own way.
   * `reconnection: true` lets the library reconnect by itself; `keepUp: true` has it do so as a good
   * client: with its session and the last ids it knows.
   */
  constructor(banter, options = {}) {
    const { version = 4, transport = 'websocket', localAddress = '127.0.0.1' } = options;
    this.banter = banter;
    this.version = version;
    this.transport = transport;
    this.name = options.name;
    this.token = options.token;
    this.session = options.session;
    this.resume = options.resume;
    this.keepUp = options.keepUp ?? false;
    this.localAddress = localAddress;
    this.line = new Line(localAddress);
    /** Every event as `{event, payload, args, connection}`, in the order of arrival. */
    this.log = [];
    /** connect, connect_error, disconnect as `{what, detail, at}` (at: the log's length then). */
    this.life = [];
    this.connections = 0;
    /** By connection (counted from 1): the last ids that were named to the server, if any. */
    this.named = [];
    /** Per channel: ids known from events, acks and joins. */
    this.known = new Map();
    this.watchers = new Set();

    const transports = transport === 'upgrade' ? ['polling', 'websocket'] : [transport];
    const common = {
      path: '/socket.io',
      transports,
      upgrade: transport === 'upgrade',
      forceNew: true,
      autoConnect: false,
      agent: this.line,
      reconnection: options.reconnection ?? false,
      reconnectionDelay: 100,
      reconnectionDelayMax: 500,
      randomizationFactor: 0,
      timeout: 20_000,
      extraHeaders: options.headers,
    };
    if (version >= 3) common.auth = (send) => send(this.credentials());
    else common.query = this.query();
    const io = LIBRARIES[version];
    this.socket = (io.io ?? io)(banter.url, common);
    this.watch();
  }

  credentials() {
    const { token, session } = this;
    const resume = this.keepUp && this.connections > 0 ? this.lastIds() : this.resume;
    const all = { token, session, resume };
    for (const key of Object.keys(all)) if (all[key] === undefined) delete all[key];
    this.naming = resume;
    return all;
  }

  query() {
    const query = this.credentials();
    if (query.resume) query.resume = JSON.stringify(query.resume);
    return query;
  }

  watch() {
    const { socket } = this;
    const deliver = socket.onevent;
    socket.onevent = (packet) => {
      const [event, ...args] = packet.data;
      this.log.push({ event, payload: args[0], args, connection: this.connections });
      this.note(event, args[0]);
      deliver.call(socket, packet);
      this.stir();
    };
    const record = (what) => (detail) => {
      if (what === 'connect') {
        this.connections += 1;
        this.named[this.connections] = this.naming;
      }
      this.life.push({ what, detail, at: this.log.length });
      this.stir();
    };
    for (const what of ['connect', 'connect_error', 'disconnect']) socket.on(what, record(what));
    const again = () => {
      if (this.version < 3) socket.io.opts.query = this.query();
    };
    socket.io.on('reconnect_attempt', again);
    if (this.version < 3) socket.on('reconnect_attempt', again);
  }

  note(event, payload) {
    if (event === 'message:post') this.knows(payload.channel, payload.id);
    if (event === 'logged_in') {
      if (this.keepUp) this.session = payload.session;
      this.lastLogin = payload;
    }
  }

  knows(channel, id) {
    if (!Number.isInteger(id)) return;
    if (!this.known.has(channel)) this.known.set(channel, new Set());
    this.known.get(channel).add(id);
  }

  /** Where this client has everything from the first id it knows up to, per channel. */
  lastIds() {
    const last = {};
    for (const [channel, ids] of this.known) {
      let id = Math.min(...ids);
      while (ids.has(id + 1)) id += 1;
      last[channel] = id;
    }
    return last;
  }

  stir() {
    for (const watcher of [...this.watchers]) watcher();
  }

  /** Waits until `condition()` gives something truthy; looked at whenever anything arrives. */
  when(what, condition, deadline = 10_000) {
    let watcher;
    const promise = new Promise((resolve, reject) => {
      watcher = () => {
        try {
          const value = condition();
          if (value) resolve(value);
        } catch (error) {
          reject(error);
        }
      };
      this.watchers.add(watcher);
      watcher();
    });
    return within(`${this}: ${what}`, promise, deadline)
      .catch((error) => {
        error.message += `\n  life: ${JSON.stringify(this.life.slice(-6), replaceErrors)}\n  last events: ${JSON.stringify(this.log.slice(-8).map(({ event, payload }) => [event, payload])).slice(0, 2_000)}`;
        throw error;
      })
      .finally(() => this.watchers.delete(watcher));
  }

  toString() {
    return `client ${this.version}/${this.transport}${this.name ? ` of ${this.name}` : ''}`;
  }

  /** Where the log stands; pass it as `since` to leave out what came before. */
  mark() {
    return this.log.length;
  }

  /** The payloads of all events of this name (and condition), from `since` on. */
  all(event, predicate = () => true, since = 0) {
    return this.log
      .slice(since)
      .filter((one) => one.event === event && predicate(one.payload))
      .map((one) => one.payload);
  }

  /** The first payload, from `since` on, of such an event; waits for it. */
  waitFor(event, predicate = () => true, { deadline = 10_000, since = 0 } = {}) {
    return this.when(`event ${event}`, () => {
      const found = this.log.slice(since).find((one) => one.event === event && predicate(one.payload));
      return found && { value: found.payload };
    }, deadline).then(({ value }) => value);
  }

  /** Waits for a connect, connect_error or disconnect from index `since` of `life` on. */
  waitForLife(what, { deadline = 15_000, since = 0 } = {}) {
    return this.when(what, () => this.life.slice(since).find((one) => one.what === what), deadline);
  }

  /** The texts of the messages of a channel that came as events. */
  texts(channel, since = 0) {
    return this.all('message:post', (m) => m.channel === channel, since).map((m) => m.message);
  }

  /** Opens the connection and waits for `logged_in`, and for the upgrade where one is due. */
  async open({ deadline = 15_000 } = {}) {
    const since = this.mark();
    const lifeSince = this.life.length;
    if (this.version < 3) this.socket.io.opts.query = this.query();
    this.socket.connect();
    const outcome = await this.when('logged_in', () => {
      const login = this.log.slice(since).find((one) => one.event === 'logged_in');
      if (login) return { login };
      const bad = this.life.slice(lifeSince).find((one) => one.what !== 'connect');
      return bad && { bad };
    }, deadline);
    if (outcome.bad) {
      const { what, detail } = outcome.bad;
      const reason = detail?.message ?? detail;
      const got = this.log.slice(since).map((one) => one.event);
      throw new Error(`${this}: ${what} (${reason}) instead of logged_in; events: ${got.join(', ') || 'none'}`);
    }
    if (this.transport === 'upgrade') {
      await until(`${this} upgrades to WebSocket`, () => this.socket.io.engine.transport.name === 'websocket', 10_000);
    }
    return outcome.login.payload;
  }

  /** Opens it however often it is refused, until it is let in. */
  async reopen({ deadline = 20_000 } = {}) {
    const end = performance.now() + deadline;
    for (;;) {
      try {
        return await this.open();
      } catch (error) {
        if (performance.now() > end) throw error;
        await this.when('the refused connection ends', () => !this.socket.connected, 10_000);
        await sleep(100);
      }
    }
  }

  /** Starts connecting without waiting for anything. */
  start() {
    if (this.version < 3) this.socket.io.opts.query = this.query();
    this.socket.connect();
    return this;
  }

  /** Emits with an ack and waits for the answer. */
  emitAck(event, payload, deadline = 10_000) {
    const answer = new Promise((resolve) => {
      this.socket.emit(event, payload, (...args) => resolve(args[0]));
    });
    return within(`${this}: ack of ${event}`, answer, deadline);
  }

  /** Emits without asking for an ack. */
  emit(event, payload) {
    this.socket.emit(event, payload);
  }

  /** Posts and gives the ack, which must not be an error. */
  async post(channel, message, extra = {}) {
    const ack = await this.emitAck('message:post', { channel, message, ...extra });
    if (ack?.error !== undefined || ack?.id === undefined) {
      throw new Error(`${this}: post to ${channel} answered ${JSON.stringify(ack)}`);
    }
    this.knows(channel, ack.id);
    return ack;
  }

  /** Joins by `channel:join`; the answer must not be an error. */
  async join(channel, after) {
    const payload = after === undefined ? { channel } : { channel, after };
    const ack = await this.emitAck('channel:join', payload);
    if (!ack || ack.error !== undefined) throw new Error(`${this}: join ${channel} answered ${JSON.stringify(ack)}`);
    for (const message of ack.messages) this.knows(channel, parseMessage(message).id);
    return ack;
  }

  /** The transport's TCP sockets die without a close frame or packet. Waits until the client knows. */
  async destroyTransport({ reset = false } = {}) {
    const since = this.life.length;
    this.line.cut({ reset });
    await this.when('disconnect after the line was cut', () => this.life.slice(since).some((one) => one.what === 'disconnect'));
    // What the client still tries to say in its last turns (a polling client posts a close packet)
    // must not get through either.
    for (let turn = 0; turn < 20; turn++) await new Promise(setImmediate);
    await until('the cut sockets are closed', () => this.line.open.size === 0, 5_000);
    this.line.mend();
  }

  /** Reads nothing more from its TCP sockets, which stay open. */
  stopReading() {
    for (const socket of this.line.open) socket.pause();
  }

  /** Says goodbye as an application does. */
  quit() {
    this.socket.disconnect();
  }

  /** Ends for good, at the end of a test. */
  close() {
    this.socket.io.reconnection?.(false);
    this.socket.disconnect();
    setTimeout(() => {
      this.line.cut();
      this.line.destroy();
    }, 200).unref();
  }
}

const replaceErrors = (_, value) => (value instanceof Error ? String(value.message) : value);

/** A message of a `messages` list: a JSON string, as the old client expects. */
const parseMessage = (message) => (typeof message === 'string' ? JSON.parse(message) : message);

module.exports = { Client, VERSIONS, TRANSPORTS, parseMessage };

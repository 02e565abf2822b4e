/**
 * A small Socket.IO client: protocol 5 over Engine.IO 4, by WebSocket only.
 *
 * It knows nothing of Banter, keeps nothing for later, and does what a client must do:
 *
 * - framing: Engine.IO's packet types are the first digit (0 open, 2 ping, 3 pong, 4 message), Socket.IO's
 *   the second (0 connect, 1 disconnect, 2 event, 3 ack, 4 connect error);
 * - heartbeats: the server pings; without one in `pingInterval + pingTimeout` the connection counts as dead;
 * - acks, each with a time limit;
 * - reconnection, with pauses that grow and differ from client to client.
 *
 * What is emitted while it is not connected fails at once: what to keep and repeat is the caller's to
 * decide (session.js does).
 *
 *   const socket = new SocketIo('https://chat.example.org/socket.io/', { auth: () => ({ token }) });
 *   socket.on('message:post', ({ user, message }) => console.log(user, message));
 *   socket.onstate = ({ state }) => console.log(state);
 *   socket.open();
 *   const { id } = await socket.request('message:post', { channel: 'general', message: 'Hello' });
 */

/** The first pause before a new attempt, and the longest: milliseconds. */
const PAUSE = { first: 300, most: 10_000 };
/** How long an attempt to connect may take, until the server has let the client in: milliseconds. */
const CONNECT_TIMEOUT = 15_000;
/** How long an ack may take, unless the caller says otherwise: milliseconds. */
const ACK_TIMEOUT = 10_000;

const OPEN = '0';
const CLOSE = '1';
const PING = '2';
const MESSAGE = '4';
const CONNECT = '0';
const DISCONNECT = '1';
const EVENT = '2';
const ACK = '3';
const CONNECT_ERROR = '4';

/** Why a request got no answer. */
export class NoAnswer extends Error {
  constructor(message) {
    super(message);
    this.name = 'NoAnswer';
  }
}

export class SocketIo {
  /**
   * @param {string} url of the server's Socket.IO path, `http:` or `https:`.
   * @param {{auth?: () => object}} options `auth` gives what the client presents, each time it connects.
   */
  constructor(url, { auth = () => ({}) } = {}) {
    this.url = new URL(url);
    this.url.protocol = this.url.protocol.replace('http', 'ws');
    this.url.searchParams.set('EIO', '4');
    this.url.searchParams.set('transport', 'websocket');
    this.auth = auth;
    /** closed, connecting, connected, waiting (for the next attempt) or refused (with a reason). */
    this.state = 'closed';
    /** Told each change, as `{state, retryAt?, error?}`. */
    this.onstate = () => {};
    this.handlers = new Map();
    /** Requests that wait for an ack, by their number. */
    this.waiting = new Map();
    this.nextAck = 0;
    this.attempts = 0;
  }

  /** Has `handler` called with the payload of each such event. */
  on(event, handler) {
    this.handlers.set(event, handler);
    return this;
  }

  /** Connects, and keeps connecting until it is told to close. */
  open() {
    this.wanted = true;
    if (this.state === 'connecting' || this.state === 'connected') return;
    this.attempt();
  }

  /** Says goodbye and stays away: for the server the session ends. */
  close() {
    this.wanted = false;
    this.drop(true);
    this.enter('closed');
  }

  /** Tries again now, if it is waiting for the next attempt. */
  hurry() {
    if (this.state === 'waiting') this.attempt();
  }

  /**
   * To be called when the machine may have slept, or the network changed: a connection whose heartbeat
   * is overdue is given up at once, instead of when a delayed timer fires.
   */
  check() {
    if (this.state === 'connected' && Date.now() > this.pingDue) this.lose('no heartbeat');
    else this.hurry();
  }

  /** Sends an event without asking for an ack. Says whether it was sent. */
  emit(event, payload) {
    if (this.state !== 'connected') return false;
    this.send(MESSAGE + EVENT + JSON.stringify([event, payload]));
    return true;
  }

  /**
   * Sends an event and gives the ack's payload. Fails with `NoAnswer` if there is no connection, if it
   * breaks before the answer, or if none came in time: then nobody knows whether it was received.
   */
  request(event, payload, timeout = ACK_TIMEOUT) {
    if (this.state !== 'connected') return Promise.reject(new NoAnswer('not connected'));
    const id = this.nextAck++;
    return new Promise((resolve, reject) => {
      const timer = setTimeout(() => {
        this.waiting.delete(id);
        reject(new NoAnswer(`no answer to ${event} in ${timeout} ms`));
      }, timeout);
      this.waiting.set(id, { resolve, reject, timer });
      this.send(MESSAGE + EVENT + id + JSON.stringify([event, payload]));
    });
  }

  // What follows is not for callers.

  enter(state, more = {}) {
    this.state = state;
    this.onstate({ state, ...more });
  }

  attempt() {
    this.drop(false);
    clearTimeout(this.retryTimer);
    this.attempts += 1;
    this.enter('connecting');
    let websocket;
    try {
      websocket = new WebSocket(this.url);
    } catch (error) {
      this.enter('refused', { error: error.message });
      return;
    }
    this.websocket = websocket;
    this.connectTimer = setTimeout(() => this.lose('connecting takes too long'), CONNECT_TIMEOUT);
    // An older socket's last events must not be taken for this one's.
    const current = (handler) => (event) => {
      if (this.websocket === websocket) handler(event);
    };
    websocket.onmessage = current(({ data }) => {
      // Binary packets are none of ours.
      if (typeof data === 'string') this.receive(data);
    });
    websocket.onclose = current(() => this.lose('closed'));
  }

  send(packet) {
    this.websocket.send(packet);
  }

  receive(packet) {
    const rest = packet.slice(1);
    switch (packet[0]) {
      case OPEN: {
        const { pingInterval, pingTimeout } = JSON.parse(rest);
        this.patience = pingInterval + pingTimeout;
        this.expectPing();
        this.send(MESSAGE + CONNECT + JSON.stringify(this.auth()));
        break;
      }
      case PING:
        this.expectPing();
        this.send('3' + rest);
        break;
      case MESSAGE:
        this.message(rest);
        break;
      case CLOSE:
        this.lose('closed by the server');
        break;
      default:
        break;
    }
  }

  message(packet) {
    const rest = packet.slice(1);
    switch (packet[0]) {
      case CONNECT:
        clearTimeout(this.connectTimer);
        this.attempts = 0;
        this.enter('connected');
        break;
      case CONNECT_ERROR: {
        const { message } = JSON.parse(rest);
        this.drop(false);
        // Whether to try again depends on the reason, which is the caller's to judge.
        this.enter('refused', { error: message });
        break;
      }
      case DISCONNECT:
        this.drop(false);
        this.enter('refused', { error: 'disconnected by the server' });
        break;
      case EVENT: {
        const [event, payload] = JSON.parse(rest);
        this.handlers.get(event)?.(payload);
        break;
      }
      case ACK: {
        const start = rest.indexOf('[');
        const id = Number(rest.slice(0, start));
        const request = this.waiting.get(id);
        if (!request) break;
        this.waiting.delete(id);
        clearTimeout(request.timer);
        request.resolve(JSON.parse(rest.slice(start))[0]);
        break;
      }
      default:
        break;
    }
  }

  expectPing() {
    clearTimeout(this.pingTimer);
    this.pingDue = Date.now() + this.patience;
    this.pingTimer = setTimeout(() => this.lose('no heartbeat'), this.patience);
  }

  /** Lets go of the connection, with a farewell or without. */
  drop(farewell) {
    const { websocket } = this;
    this.websocket = undefined;
    clearTimeout(this.connectTimer);
    clearTimeout(this.pingTimer);
    clearTimeout(this.retryTimer);
    if (websocket) {
      if (farewell && websocket.readyState === WebSocket.OPEN) websocket.send(MESSAGE + DISCONNECT);
      websocket.close();
    }
    for (const { reject, timer } of this.waiting.values()) {
      clearTimeout(timer);
      reject(new NoAnswer('the connection broke'));
    }
    this.waiting.clear();
  }

  /** The connection is gone, or as good as: waits, and tries again. */
  lose(why) {
    this.drop(false);
    if (!this.wanted) return;
    const pause = Math.min(PAUSE.most, PAUSE.first * 2 ** Math.min(this.attempts, 10));
    // Between half of it and all of it, so that those who lost it together do not come back together.
    const wait = pause * (0.5 + Math.random() / 2);
    this.retryTimer = setTimeout(() => this.attempt(), wait);
    this.enter('waiting', { retryAt: Date.now() + wait, error: why });
  }
}

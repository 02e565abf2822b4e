/**
 * One person's session: logged in, kept alive over broken connections, with an outbox.
 *
 * What a good client of Banter does is all here, and nothing of the page:
 *
 * - It presents its `token`, the secret of its last connection (`session`: takes the session over at once,
 *   even while the server believes the old connection alive), and the last ids that it has (`resume`): so
 *   it gets what it missed, its own messages included, each once and in order.
 * - `seen` is per channel the id up to which it has everything. Events come in the order of ids, so one
 *   moves it to its own id. The ack of a post of ours may overtake events with lower ids: it moves `seen`
 *   only if nothing lies between.
 * - After each login it joins its channels again, after the last id: this brings what was missed if the
 *   session had ended meanwhile, and who is there now.
 * - A post gets a nonce and stays in the outbox until it is acknowledged. The server remembers nonces for ten
 *   minutes: within that time a post can be repeated without harm. An older one is first looked for in the
 *   channel's history, where messages carry their nonces.
 * - Posts to one channel are sent one after the other, so that their order holds.
 *
 * Events (see `on`): `state`, `joined`, `message`, `people`, `typing`, `outbox`.
 */

import { NoAnswer, SocketIo } from './socketio.js';
import { BASE, RequestFailed, history, listChannels } from './api.js';

/** Posts that wait, at most. */
const OUTBOX_MAX = 200;
/** Milliseconds after which the server may have forgotten a nonce (it keeps them for ten minutes). */
const NONCE_MEMORY = 9 * 60_000;
/** Pages of history that are searched for a post of which nobody knows whether it arrived. */
const SEARCH_PAGES = 5;
const PAGE = 200;
/** Pause before something is tried again that the server could not do: milliseconds. */
const PAUSE = 1_000;
/** Least time between two typing notices: milliseconds. */
const TYPING_EVERY = 3_000;

/** How long to wait before a request is repeated that cannot be carried out for the moment; undefined for any other answer. */
function pauseAfter(answer) {
  if (answer?.code === 'rate_limited') return answer.retryAfter ?? PAUSE;
  if (answer?.code === 'unavailable') return PAUSE * (0.5 + Math.random());
  return undefined;
}

const sleep = (time) => new Promise((resolve) => setTimeout(resolve, time));

/** A message as the rest of the client wants it, or undefined if it is none. */
export function readMessage(raw) {
  let message = raw;
  if (typeof raw === 'string') {
    try {
      message = JSON.parse(raw);
    } catch {
      return undefined;
    }
  }
  if (!Number.isSafeInteger(message?.id)) return undefined;
  const { id, user, nonce } = message;
  if (message.deleted === true) return { id, deleted: true, user: '', text: '', date: Date.parse(message.date) };
  if (typeof user !== 'string' || typeof message.message !== 'string') return undefined;
  return { id, user, nonce, text: message.message, date: Date.parse(message.date) };
}

const readAll = (list) => (Array.isArray(list) ? list : []).map(readMessage).filter(Boolean);

export class Session {
  /**
   * @param {{name: string, token: string, storage?: Storage}} options `storage` keeps the outbox over a
   *   reload of the page.
   */
  constructor({ name, token, storage }) {
    this.name = name;
    this.token = token;
    this.storage = storage;
    this.listeners = new Map();
    /** By key: `{seen, acked, joined, joining, posting}`. */
    this.places = new Map();
    this.status = 'online';
    this.typedAt = 0;
    /** starting, online, reconnecting, elsewhere (the name is in use), expired, or ended. */
    this.state = 'starting';
    /** Posts not acknowledged yet, oldest first: `{nonce, channel, text, at, after, triedAt, state, error}`. */
    this.outbox = this.restoreOutbox();
    this.socket = new SocketIo(new URL('socket.io/', BASE), { auth: () => this.credentials() })
      .on('logged_in', (hello) => this.loggedIn(hello))
      .on('name_taken', () => this.giveWay())
      .on('message:post', (message) => this.heard(message))
      .on('user : joined', ({ channel, username }) => this.tell('people', { channel, user: username, status: 'online' }))
      .on('user : left', ({ channel, user }) => this.tell('people', { channel, user }))
      .on('user : quit', ({ channel, username }) => this.tell('people', { channel, user: username }))
      .on('user : status_changed', ({ channel, user, status }) => this.tell('people', { channel, user, status }))
      .on('user : typing', ({ channel, username }) => this.tell('typing', { channel, user: username }));
    this.socket.onstate = (change) => this.connectionChanged(change);
  }

  on(event, listener) {
    this.listeners.set(event, listener);
    return this;
  }

  start() {
    this.socket.open();
  }

  /** Ends it for good, as logging out does. What is in the outbox stays in the storage. */
  stop() {
    this.enter('ended');
    this.socket.close();
  }

  /** Leaves the name to another window; `start` comes back. */
  giveWay() {
    this.secret = undefined;
    for (const place of this.places.values()) place.joined = false;
    this.socket.close();
    this.enter('elsewhere');
  }

  /** Joins a channel and stays in it over reconnections. Safe to repeat. */
  join(key) {
    const place = this.place(key);
    if (this.state === 'online') this.enterRoom(key, place);
  }

  /** Leaves a channel. */
  async leave(key) {
    this.places.delete(key);
    for (const entry of this.outbox.filter(({ channel }) => channel === key)) this.discard(entry);
    await this.socket.request('user : left', { channel: key }).catch(() => {});
  }

  /** Puts a post into the outbox; gives its entry. */
  post(channel, text) {
    if (this.outbox.length >= OUTBOX_MAX) throw new Error('Too many messages wait to be sent.');
    const nonce = [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, '0')).join('');
    // Half of a surrogate pair cannot be sent: it becomes what it would become on the way.
    const entry = { nonce, channel, text: wellFormed(text), at: Date.now(), state: 'queued' };
    this.outbox.push(entry);
    // What is written next is news again.
    this.typedAt = 0;
    this.outboxChanged(entry);
    this.sendPosts(channel);
    return entry;
  }

  /** Tries once more to send a post that was refused. */
  retry(entry) {
    entry.state = 'queued';
    entry.error = undefined;
    this.outboxChanged(entry);
    this.sendPosts(entry.channel);
  }

  /** Takes a post out of the outbox. */
  discard(entry) {
    this.outbox = this.outbox.filter((other) => other !== entry);
    entry.state = 'gone';
    this.outboxChanged(entry);
  }

  /** Says that something is being written; not more often than makes sense. */
  typing(channel) {
    const now = Date.now();
    if (now - this.typedAt < TYPING_EVERY || !this.places.get(channel)?.joined) return;
    if (this.socket.emit('channel:typing', { channel })) this.typedAt = now;
  }

  /** `online` or `away`, in all channels. */
  setStatus(status) {
    if (status === this.status) return;
    this.status = status;
    for (const [key, place] of this.places) if (place.joined) this.tellStatus(key);
  }

  // What follows is not for callers.

  tell(event, detail) {
    this.listeners.get(event)?.(detail);
  }

  enter(state, more = {}) {
    this.state = state;
    this.tell('state', { state, ...more });
  }

  place(key) {
    if (!this.places.has(key)) this.places.set(key, { seen: undefined, acked: new Set(), joined: false });
    return this.places.get(key);
  }

  credentials() {
    const resume = {};
    for (const [key, { seen }] of this.places) if (seen !== undefined) resume[key] = seen;
    return { token: this.token, session: this.secret, resume };
  }

  connectionChanged({ state, retryAt, error }) {
    if (state === 'connected' || state === 'closed' || this.state === 'ended') return;
    for (const place of this.places.values()) place.joined = false;
    if (state === 'refused') {
      if (this.state !== 'elsewhere') this.refused(error);
    } else if (this.state !== 'starting' || state === 'waiting') {
      this.enter('reconnecting', { retryAt, trying: state === 'connecting' });
    }
  }

  /** The server did not let us in: because of the token, or for the moment. */
  async refused() {
    this.enter('reconnecting', { retryAt: Date.now() + PAUSE });
    const accepted = await listChannels(this.token).catch((failure) => failure);
    if (accepted instanceof RequestFailed && accepted.status === 401) {
      this.socket.close();
      this.enter('expired');
      return;
    }
    await sleep(PAUSE * (1 + Math.random()));
    if (this.state === 'reconnecting') this.socket.open();
  }

  async loggedIn({ session, channels }) {
    this.secret = session;
    const resumed = new Map(channels.map(({ key, last }) => [key, last]));
    this.enter('online');
    // Left while there was no connection.
    for (const key of resumed.keys()) if (!this.places.has(key)) this.socket.emit('user : left', { channel: key });
    for (const [key, place] of this.places) this.enterRoom(key, place, resumed.get(key));
  }

  /** `upTo`: the id up to which the server repeats by itself what was missed. */
  async enterRoom(key, place, upTo) {
    if (place.joining) return;
    place.joining = true;
    try {
      // What lies beyond the server's last id was lost there: naming it makes the answer say `reset`.
      const after = upTo > place.seen ? upTo : place.seen;
      const answer = await this.insist(() => this.socket.request('channel:join', { channel: key, after }));
      if (this.places.get(key) !== place) return;
      if (answer.error) {
        this.tell('joined', { channel: key, error: answer.error });
        return;
      }
      const messages = readAll(answer.messages);
      const fresh = after === undefined || answer.reset === true;
      if (fresh) {
        place.seen = answer.last;
        place.acked.clear();
      }
      this.tell('joined', {
        channel: key,
        messages,
        people: answer.onlineUsers,
        last: answer.last,
        // Nothing that was known before joins on to these messages.
        apart: fresh || answer.more === true,
        reset: answer.reset === true,
      });
      this.settleOwn(messages);
      this.progress(place, answer.last);
      place.joined = true;
      const known = answer.onlineUsers?.find(({ username }) => username === this.name)?.status;
      if (known !== this.status) this.tellStatus(key);
      this.sendPosts(key);
    } catch (error) {
      // The connection broke: the next login joins again.
      if (!(error instanceof NoAnswer)) throw error;
    } finally {
      place.joining = false;
    }
  }

  tellStatus(channel) {
    const { status } = this;
    this.insist(() => this.socket.request('user : status_changed', { channel, status })).catch(() => {});
    this.tell('people', { channel, user: this.name, status });
  }

  /** Repeats a request that the server cannot carry out for the moment, as long as there is a connection. */
  async insist(request) {
    for (;;) {
      let answer;
      try {
        answer = await request();
      } catch (error) {
        if (!(error instanceof NoAnswer) || this.socket.state !== 'connected') throw error;
        continue;
      }
      const pause = pauseAfter(answer);
      if (pause === undefined) return answer ?? {};
      await sleep(pause);
    }
  }

  heard(raw) {
    const message = readMessage(raw);
    const place = this.places.get(raw?.channel);
    if (!message || !place) return;
    this.progress(place, message.id);
    this.tell('message', { channel: raw.channel, message });
    this.settleOwn([message]);
  }

  /** We have everything up to this id. */
  progress(place, id) {
    place.seen = Math.max(place.seen ?? 0, id);
    for (const acked of place.acked) if (acked <= place.seen) place.acked.delete(acked);
    while (place.acked.delete(place.seen + 1)) place.seen += 1;
  }

  // The outbox.

  async sendPosts(key) {
    const place = this.places.get(key);
    if (!place?.joined || place.posting) return;
    place.posting = true;
    try {
      for (;;) {
        const entry = this.outbox.find(({ channel, state }) => channel === key && state === 'queued');
        if (!entry || !place.joined) return;
        await this.sendPost(entry, place);
      }
    } catch (error) {
      if (!(error instanceof NoAnswer)) throw error;
      // Without a connection the next one goes on from here.
      if (this.socket.state === 'connected') setTimeout(() => this.sendPosts(key), PAUSE);
    } finally {
      place.posting = false;
    }
  }

  /** One attempt; the entry stays queued if it has to be made again. */
  async sendPost(entry, place) {
    if (entry.triedAt && Date.now() - entry.triedAt > NONCE_MEMORY && !(await this.isUnsent(entry))) return;
    entry.triedAt ??= Date.now();
    entry.after ??= place.seen;
    this.outboxChanged(entry);
    const { channel, text: message, nonce } = entry;
    const answer = await this.socket.request('message:post', { channel, message, nonce }) ?? {};
    if (!this.outbox.includes(entry)) return;
    const pause = pauseAfter(answer);
    if (pause !== undefined) {
      // Then all over again: the nonce may be too old by that time.
      await sleep(pause);
    } else if (answer.error === undefined) {
      this.settle(entry, { id: answer.id, date: Date.parse(answer.date) }, place);
    } else if (answer.code === 'not_joined') {
      place.joined = false;
      this.enterRoom(channel, place);
    } else if (answer.code === 'forbidden') {
      // Another connection has the session now, and this one is about to end.
      place.joined = false;
    } else {
      entry.state = 'failed';
      entry.error = answer.error;
      this.outboxChanged(entry);
    }
  }

  /** Looks for an old post in the history. */
  async isUnsent(entry) {
    let after = entry.after ?? 0;
    for (let page = 0; page < SEARCH_PAGES; page++) {
      let messages;
      try {
        messages = readAll(await history(this.token, entry.channel, { after, limit: PAGE }));
      } catch {
        throw new NoAnswer('the history cannot be read');
      }
      this.settleOwn(messages);
      if (!this.outbox.includes(entry)) return false;
      if (messages.length < PAGE) {
        entry.triedAt = undefined;
        return true;
      }
      after = messages.at(-1).id;
    }
    entry.state = 'failed';
    entry.error = 'It is not known whether this was sent.';
    entry.triedAt = undefined;
    this.outboxChanged(entry);
    return false;
  }

  /** Those of these messages that are ours and still in the outbox are sent. */
  settleOwn(messages) {
    for (const { user, nonce, id, date } of messages) {
      if (user !== this.name || !nonce) continue;
      const entry = this.outbox.find((one) => one.nonce === nonce);
      if (entry) this.settle(entry, { id, date }, this.places.get(entry.channel));
    }
  }

  settle(entry, { id, date }, place) {
    this.outbox = this.outbox.filter((other) => other !== entry);
    entry.state = 'sent';
    if (place && id > (place.seen ?? 0)) {
      place.acked.add(id);
      this.progress(place, place.seen ?? 0);
    }
    const { channel, text, nonce } = entry;
    this.tell('message', { channel, message: { id, user: this.name, nonce, text, date }, own: true });
    this.outboxChanged(entry);
  }

  outboxChanged(entry) {
    try {
      this.storage?.setItem(this.outboxName(), JSON.stringify(this.outbox));
    } catch {
      // Full, or forbidden: then it does not survive a reload.
    }
    this.tell('outbox', { channel: entry.channel, entry });
  }

  restoreOutbox() {
    try {
      return JSON.parse(this.storage?.getItem(this.outboxName()) ?? '[]');
    } catch {
      return [];
    }
  }

  outboxName() {
    return `banter.outbox.${this.name}`;
  }
}

const wellFormed = (text) => (text.toWellFormed ? text.toWellFormed() : new TextDecoder().decode(new TextEncoder().encode(text)));

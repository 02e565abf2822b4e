/** The page: connects the session with what is seen. */

import * as api from './api.js';
import { Channel } from './channel.js';
import { Composer } from './composer.js';
import { $, announce, avatar, element, fill } from './dom.js';
import { mentions } from './markdown.js';
import { notificationState, notify, showUnread, toggleNotifications } from './notify.js';
import { Memory, forgetLogin, keepLogin, setTheme, storedLogin, theme } from './preferences.js';
import { Session, readMessage } from './session.js';
import { describe, describeTyping, drawChannels, drawPeople, linkTo, readLink } from './sidebar.js';
import { Timeline } from './timeline.js';

/** A page of history. */
const PAGE = 100;
/** How often the public channels are asked for, while somebody looks: milliseconds. */
const LIST_EVERY = 60_000;
/** Who has looked elsewhere for so long is away: milliseconds. */
const AWAY_AFTER = 5 * 60_000;
/** How often it is tried to get the name from another window. */
const HANDOVERS = 8;

/** Windows of one browser: the newest gets the name that they share. */
const windows = 'BroadcastChannel' in window ? new BroadcastChannel('banter') : undefined;

const wide = matchMedia('(min-width: 1100px)');
const narrow = matchMedia('(max-width: 720px)');

let toastTimer;
function toast(text) {
  clearTimeout(toastTimer);
  $('toast').textContent = text;
  $('toast').hidden = false;
  toastTimer = setTimeout(() => ($('toast').hidden = true), 5_000);
}

// ---- Logging in -----------------------------------------------------------------------------------

let registering = false;

function setMode(toRegister) {
  registering = toRegister;
  $('welcome-title').textContent = toRegister ? 'Create an account' : 'Log in';
  $('login-button').textContent = toRegister ? 'Create account' : 'Log in';
  $('mode-text').textContent = toRegister ? 'Have an account?' : 'New here?';
  $('mode').textContent = toRegister ? 'Log in' : 'Create an account';
  $('password').autocomplete = toRegister ? 'new-password' : 'current-password';
  $('name-hint').hidden = $('password-hint').hidden = !toRegister;
  $('login-error').textContent = '';
}

/** What can be said without asking the server. */
function loginProblem(name, password) {
  if (!name) return ['name', 'Enter your name.'];
  if (!password) return ['password', 'Enter your password.'];
  if (!registering) return undefined;
  if (!/^[A-Za-z0-9]{3,32}$/.test(name)) return ['name', 'A name has 3 to 32 letters and digits: a–z, A–Z, 0–9.'];
  if (password.length < 6) return ['password', 'A password has 6 characters or more.'];
  return undefined;
}

async function logIn(event) {
  event.preventDefault();
  const [name, password] = [$('name').value.trim(), $('password').value];
  for (const id of ['name', 'password']) $(id).removeAttribute('aria-invalid');
  $('login-error').textContent = '';
  const problem = loginProblem(name, password);
  if (problem) {
    const [id, text] = problem;
    $('login-error').textContent = text;
    $(id).setAttribute('aria-invalid', 'true');
    $(id).focus();
    return;
  }
  $('login-button').disabled = true;
  try {
    const answer = await (registering ? api.register : api.login)(name, password);
    keepLogin(answer, $('stay').checked);
    $('password').value = '';
    enter({ token: answer.token, name: api.nameIn(answer.token) ?? name });
  } catch (error) {
    $('login-error').textContent = error.message;
    $('password').focus();
    $('password').select();
  } finally {
    $('login-button').disabled = false;
  }
}

function welcome(note) {
  $('chat').hidden = true;
  $('welcome').hidden = false;
  $('welcome-note').hidden = !note;
  $('welcome-note').textContent = note ?? '';
  showUnread(0);
  setMode(false);
  $('name').focus();
}

// ---- The chat -------------------------------------------------------------------------------------

/** The one who is logged in. */
let chat;

function enter(login) {
  $('welcome').hidden = true;
  $('chat').hidden = false;
  chat?.destroy();
  chat = new Chat(login);
  chat.start();
}

class Chat {
  constructor({ token, name }) {
    this.token = token;
    this.me = name;
    this.memory = new Memory(name);
    /** By key, in the order of the list. */
    this.channels = new Map();
    this.open = undefined;
    this.chosenStatus = 'online';
    this.looking = true;
    this.handovers = 0;
    this.abort = new AbortController();
    const { signal } = this.abort;
    this.session = new Session({ name, token, storage: sessionStorageOrNone() })
      .on('state', (state) => this.stateChanged(state))
      .on('joined', (answer) => this.joined(answer))
      .on('message', (event) => this.message(event))
      .on('people', (event) => this.people(event))
      .on('typing', (event) => this.types(event))
      .on('outbox', ({ channel, entry }) => this.outboxChanged(channel, entry));
    this.timeline = new Timeline({
      me: name,
      older: (channel) => this.readOlder(channel),
      atEnd: () => this.readAll(),
      retry: (entry) => this.session.retry(entry),
      edit: (entry) => {
        this.session.discard(entry);
        this.composer.restore(entry.text);
      },
      discard: (entry) => {
        this.session.discard(entry);
        this.composer.focus();
      },
    });
    this.composer = new Composer({ send: (text) => this.post(text), typing: () => this.session.typing(this.open.key), signal });
    this.listen(signal);
  }

  start() {
    fill($('me-avatar'), avatar(this.me));
    $('me-name').textContent = this.me;
    for (const one of this.memory.channels) this.add({ ...one, wanted: true });
    this.follow();
    for (const channel of this.channels.values()) if (channel.wanted) this.session.join(channel.key);
    this.session.start();
    this.drawStatus();
    this.readList();
    if (!narrow.matches) this.composer.focus();
  }

  destroy() {
    this.abort.abort();
    clearInterval(this.listTimer);
    clearInterval(this.connectionTimer);
    clearTimeout(this.awayTimer);
    clearTimeout(this.typingTimer);
    this.session.stop();
    this.timeline.destroy();
  }

  listen(signal) {
    const on = (target, event, listener) => target.addEventListener(event, listener, { signal });
    on(window, 'hashchange', () => this.follow());
    on(document, 'visibilitychange', () => this.lookingChanged());
    on(window, 'focus', () => this.lookingChanged());
    on(window, 'blur', () => this.lookingChanged());
    on(window, 'online', () => this.session.socket.check());
    on(window, 'pageshow', () => this.session.socket.check());
    on(window, 'storage', ({ key, newValue }) => {
      if (key === 'banter.theme') setTheme(newValue ?? 'auto');
      // Logged out in another tab: that was meant for this one, too.
      if (key === 'banter.login' && !storedLogin()) this.end();
    });
    if (windows) {
      on(windows, 'message', ({ data }) => {
        if (data?.release === this.me && ['online', 'reconnecting', 'starting'].includes(this.session.state)) this.session.giveWay();
      });
    }
    on($('share'), 'click', () => this.share());
    on($('leave'), 'click', () => this.askToLeave());
    on($('leave-confirm'), 'click', () => this.leave());
    on($('to-channels'), 'click', () => this.showPane('channels'));
    on($('to-people'), 'click', () => this.showPane($('chat').dataset.pane === 'people' ? 'chat' : 'people'));
    on($('from-people'), 'click', () => this.showPane('chat'));
    on($('sidebar'), 'click', (event) => {
      // The link may be the one that is open already: then nothing else would bring it up.
      if (event.target.closest('a')) this.showPane('chat');
    });
    on($('connection-action'), 'click', () => this.connectionAction());
    on($('new-channel'), 'click', () => this.askForNew());
    on($('new-form'), 'submit', (event) => this.createChannel(event));
    on($('join-key'), 'click', () => this.askForKey());
    on($('join-form'), 'submit', (event) => this.joinByKey(event));
    on($('share-copy'), 'click', () => copyLink());
    on($('me'), 'click', () => this.showSettings());
    on($('settings-dialog'), 'change', (event) => this.settingChanged(event.target));
    on($('log-out'), 'click', () => this.logOut());
    on(document, 'keydown', (event) => this.key(event));
    this.listTimer = setInterval(() => !document.hidden && this.readList(), LIST_EVERY);
  }

  // -- Channels

  add({ key, name, isPublic, wanted = false }) {
    let channel = this.channels.get(key);
    if (!channel) {
      channel = new Channel({ key, name: name ?? key, isPublic });
      channel.read = this.memory.marks[key];
      this.channels.set(key, channel);
    }
    channel.wanted ||= wanted;
    return channel;
  }

  /** Reads the list of public channels. */
  async readList() {
    let list;
    try {
      list = await api.listChannels(this.token);
    } catch {
      // There will be another time.
      return;
    }
    const known = this.channels;
    this.channels = new Map();
    for (const { key, name, onlineCount } of list) {
      const channel = known.get(key) ?? this.add({ key, name, isPublic: true });
      channel.isPublic = true;
      channel.name = name;
      if (!channel.joined) channel.onlineCount = onlineCount;
      this.channels.set(key, channel);
      if (channel.wanted) this.memory.remember(channel);
    }
    for (const [key, channel] of known) if (!this.channels.has(key)) this.channels.set(key, channel);
    this.draw();
  }

  /** Opens the channel that the address names; else the last one, else General. */
  follow() {
    const link = readLink(location.hash);
    const key = link?.key ?? this.memory.open ?? 'general';
    if (!link) history.replaceState(null, '', linkTo({ key, name: key }));
    const known = this.channels.get(key);
    const channel = this.add({ key, name: link?.name ?? nameOf(key), isPublic: key === 'general' });
    if (!known && link && [...key].length > 128) {
      channel.error = 'The link is not right: a key has at most 128 characters.';
    } else {
      this.wants(channel);
    }
    this.show(channel);
  }

  wants(channel) {
    if (channel.wanted && this.memory.channels.some(({ key }) => key === channel.key)) return;
    channel.wanted = true;
    channel.error = undefined;
    this.memory.remember(channel);
    this.session.join(channel.key);
  }

  show(channel) {
    if (this.open === channel) return;
    const before = this.open;
    this.open = channel;
    this.memory.open = channel.key;
    this.memory.save();
    this.timeline.show(channel, { unreadFrom: channel.unread > 0 && channel.read !== undefined ? channel.read + 1 : undefined });
    this.timeline.drawPending(this.session.outbox.filter((entry) => entry.channel === channel.key));
    this.composer.show(channel.key, channel.name);
    this.draw();
    if (before) {
      this.showPane('chat');
      announce(`${channel.name}, ${describe(channel)}`);
      if (!narrow.matches) this.composer.focus();
    }
  }

  joined({ channel: key, messages, people, last, apart, reset, error }) {
    const channel = this.channels.get(key) ?? this.add({ key, isPublic: false, wanted: true });
    if (error) {
      channel.error = error;
      if (channel === this.open) this.timeline.drawBeginning();
      this.draw();
      return;
    }
    channel.joined = true;
    channel.error = undefined;
    channel.setPeople(people);
    if (reset) channel.read = Math.min(channel.read ?? last, last);
    // Never opened in this browser before: what is there is not news.
    if (channel.read === undefined) channel.read = last;
    if (apart) {
      channel.replace(messages);
      // Fewer than a join gives: there are no others.
      channel.complete = messages.length === 0 || messages[0].id === 1;
      // Counted, for ids may have been left out; if not all of them are here, there is at least one more.
      const fresh = messages.filter(({ id }) => id > channel.read).length;
      const all = fresh < messages.length || channel.complete;
      channel.unread = fresh + (!all && last > channel.read ? 1 : 0);
      if (channel === this.open) {
        this.timeline.show(channel, { unreadFrom: channel.unread > 0 ? channel.read + 1 : undefined });
      }
    } else {
      for (const message of messages) this.message({ channel: key, message });
    }
    if (channel === this.open) this.timeline.drawBeginning();
    this.readAll();
    this.draw();
  }

  message({ channel: key, message, own = message.user === this.me }) {
    const channel = this.channels.get(key);
    if (!channel) return;
    const index = channel.add(message);
    if (index < 0) return;
    channel.typing.delete(message.user);
    if (own) channel.read = Math.max(channel.read ?? 0, message.id);
    else if (message.id > (channel.read ?? 0)) this.unread(channel, message);
    if (channel === this.open) {
      this.timeline.added(index, own);
      this.readAll();
      this.drawTyping();
    }
    // Not under the eyes of somebody who reads what is old.
    const trimmed = channel !== this.open || this.timeline.stuck ? channel.trim() : 0;
    if (trimmed > 0 && channel === this.open) this.timeline.trimmed(trimmed);
    this.draw();
  }

  unread(channel, message) {
    channel.unread += 1;
    const mentioned = mentions(message.text, this.me);
    channel.mentioned ||= mentioned;
    if (this.isLooking() && channel === this.open) return;
    if (this.isLooking() && !mentioned) return;
    notify({
      title: `${message.user} in ${channel.name}`,
      text: message.text,
      tag: channel.key,
      open: () => {
        location.hash = linkTo(channel);
      },
    });
  }

  /** What is open, in view, and at its end has been read. */
  readAll() {
    const channel = this.open;
    if (!channel?.joined || !this.isLooking() || !this.timeline.stuck) return;
    if (channel.unread === 0 && channel.read === channel.last) return;
    channel.unread = 0;
    channel.mentioned = false;
    if (channel.items.length) channel.read = channel.last;
    this.memory.mark(channel.key, channel.read ?? 0);
    this.draw();
  }

  async readOlder(channel) {
    const before = channel.items[0]?.id;
    if (before === undefined) {
      channel.complete = true;
      return;
    }
    try {
      const read = await api.history(this.token, channel.key, { before, limit: PAGE });
      // What was read belongs to another beginning if that has changed meanwhile.
      if (channel.items[0]?.id !== before) return;
      const messages = read.map(readMessage).filter(Boolean);
      if (read.length < PAGE) channel.complete = true;
      const count = channel.prepend(messages);
      channel.loading = undefined;
      if (channel === this.open) this.timeline.prepended(count);
    } catch (error) {
      if (channel === this.open) toast(`Older messages could not be read. ${error.message}`);
      // Not at once again: scrolling asks anew.
      await new Promise((resolve) => setTimeout(resolve, 2_000));
    }
  }

  people({ channel: key, user, status }) {
    const channel = this.channels.get(key);
    if (!channel) return;
    channel.setPerson(user, status);
    if (channel === this.open) this.drawTyping();
    this.draw();
  }

  types({ channel: key, user }) {
    const channel = this.channels.get(key);
    if (!channel || user === this.me) return;
    channel.types(user);
    if (channel === this.open) this.drawTyping();
  }

  // -- Posting

  post(text) {
    try {
      this.session.post(this.open.key, text);
    } catch (error) {
      toast(error.message);
      return false;
    }
    this.timeline.toEnd();
    return true;
  }

  outboxChanged(key, entry) {
    if (entry.state === 'failed') announce(`Not sent: ${entry.error}`);
    if (key === this.open?.key) this.timeline.drawPending(this.session.outbox.filter(({ channel }) => channel === key));
    this.drawConnection();
  }

  // -- The connection

  stateChanged(state) {
    this.connection = state;
    if (state.state === 'expired') {
      forgetLogin();
      this.destroy();
      chat = undefined;
      welcome(`Your login has expired. ${this.session.outbox.length ? 'Log in again: what you wrote is kept, and sent then.' : 'Log in again.'}`);
      return;
    }
    if (state.state === 'online') {
      this.handovers = 0;
      this.readList();
    }
    if (state.state === 'elsewhere' && this.handovers > 0) {
      // Another window of this browser is asked to give way; it may take a moment.
      this.handovers -= 1;
      setTimeout(() => this.session.state === 'elsewhere' && this.session.start(), 500);
    }
    if (['reconnecting', 'elsewhere'].includes(state.state)) {
      for (const channel of this.channels.values()) channel.typing.clear();
      this.drawTyping();
    }
    this.drawConnection();
  }

  drawConnection() {
    const { state, retryAt, trying } = this.connection ?? {};
    clearInterval(this.connectionTimer);
    const waiting = this.session.outbox.length;
    const kept = waiting === 0 ? '' : waiting === 1 ? ' Your message is kept, and sent then.' : ` Your ${waiting} messages are kept, and sent then.`;
    let text = '';
    let action = '';
    if (state === 'reconnecting') {
      text = `Connection lost – reconnecting…${kept}`;
      if (!navigator.onLine) text = `You are offline. Reconnecting when the network is back.${kept}`;
      else if (!trying && retryAt - Date.now() > 2_000) action = 'Try now';
    } else if (state === 'elsewhere') {
      text = this.handovers > 0 ? 'Moving over from the other window…' : 'You are connected in another window or on another device.';
      if (this.handovers === 0) action = 'Use it here';
    }
    const box = $('connection');
    box.hidden = text === '';
    box.dataset.state = state ?? '';
    if ($('connection-text').textContent !== text) $('connection-text').textContent = text;
    $('connection-action').hidden = action === '';
    $('connection-action').textContent = action;
    $('chat').dataset.connection = state ?? 'starting';
  }

  connectionAction() {
    if (this.session.state === 'elsewhere') {
      this.handovers = HANDOVERS;
      windows?.postMessage({ release: this.me });
      this.session.start();
      this.drawConnection();
    } else {
      this.session.socket.hurry();
    }
    this.composer.focus();
  }

  // -- Looking, and being away

  isLooking() {
    return !document.hidden && document.hasFocus();
  }

  lookingChanged() {
    const looking = this.isLooking();
    clearTimeout(this.awayTimer);
    if (looking) {
      this.session.socket.check();
      this.setStatus(this.chosenStatus);
      this.readAll();
    } else {
      this.awayTimer = setTimeout(() => this.setStatus('away'), AWAY_AFTER);
    }
  }

  setStatus(status) {
    this.session.setStatus(status);
    this.drawStatus();
  }

  drawStatus() {
    $('me-status').textContent = this.session.status === 'away' ? 'Away' : 'Here';
    $('me').classList.toggle('away', this.session.status === 'away');
  }

  // -- Drawing

  /** Draws the sides, once for whatever has changed in this turn. */
  draw() {
    if (this.drawing || this.abort.signal.aborted) return;
    this.drawing = true;
    // Not by animation frames: there are none while the page is hidden, but the title must change.
    setTimeout(() => {
      this.drawing = false;
      if (!this.abort.signal.aborted) this.drawNow();
    }, 16);
  }

  drawNow() {
    const { open } = this;
    const channels = [...this.channels.values()];
    drawChannels(channels, open);
    drawPeople(open, this.me);
    const unread = channels.reduce((sum, channel) => sum + (channel.wanted ? channel.unread : 0), 0);
    showUnread(unread, open?.name);
    const elsewhere = unread - (open?.unread ?? 0);
    $('elsewhere-unread').hidden = elsewhere <= 0;
    $('elsewhere-unread').textContent = elsewhere > 99 ? '99+' : String(elsewhere);
    $('to-channels').ariaLabel = elsewhere > 0 ? `Show channels, ${elsewhere} unread elsewhere` : 'Show channels';
    fill($('room-name'), element('bdi', {}, open.name));
    $('room-note').textContent = describe(open);
    $('leave').hidden = channels.filter((channel) => channel.wanted).length < 2;
    $('message').placeholder = `Message ${open.name}`;
  }

  drawTyping() {
    clearTimeout(this.typingTimer);
    const names = this.open?.typists() ?? [];
    $('typing').textContent = describeTyping(names);
    if (names.length) this.typingTimer = setTimeout(() => this.drawTyping(), 1_000);
  }

  /** Which part a narrow window shows. */
  showPane(pane) {
    const before = $('chat').dataset.pane;
    $('chat').dataset.pane = pane;
    $('to-people').ariaExpanded = String(pane === 'people');
    if (pane === before) return;
    if (pane === 'chat') {
      this.timeline.scrolled();
      if (before === 'people' && !wide.matches) $('to-people').focus();
      else if (narrow.matches) $('room-name').focus();
    } else if (pane === 'channels') {
      ($('yours').querySelector('[aria-current]') ?? $('sidebar').querySelector('a'))?.focus();
    } else {
      $('from-people').focus();
    }
  }

  key(event) {
    if (event.altKey && !event.ctrlKey && (event.key === 'ArrowUp' || event.key === 'ArrowDown')) {
      event.preventDefault();
      const yours = [...this.channels.values()].filter((channel) => channel.wanted);
      const step = event.key === 'ArrowUp' ? -1 : 1;
      const next = yours[(yours.indexOf(this.open) + step + yours.length) % yours.length];
      if (next) location.hash = linkTo(next);
    } else if (event.key === 'Escape' && !event.defaultPrevented && !document.querySelector('dialog[open]') && $('chat').dataset.pane === 'people') {
      this.showPane('chat');
    }
  }

  // -- Dialogs

  askForNew() {
    $('new-form').reset();
    $('new-error').textContent = '';
    $('new-dialog').showModal();
    $('new-name').focus();
  }

  async createChannel(event) {
    event.preventDefault();
    const name = $('new-name').value.trim();
    if (!name) {
      $('new-error').textContent = 'Give the channel a name.';
      $('new-name').focus();
      return;
    }
    const isPublic = new FormData($('new-form')).get('kind') === 'public';
    if (this.creating) return;
    this.creating = true;
    try {
      const { key } = isPublic ? await api.createChannel(this.token, name) : { key: newKey() };
      const channel = this.add({ key, name, isPublic });
      $('new-dialog').close();
      location.hash = linkTo(channel);
    } catch (error) {
      $('new-error').textContent = error.message;
    } finally {
      this.creating = false;
    }
  }

  askForKey() {
    $('join-form').reset();
    $('join-error').textContent = '';
    $('join-dialog').showModal();
    $('join-value').focus();
  }

  joinByKey(event) {
    event.preventDefault();
    const value = $('join-value').value.trim();
    const at = value.indexOf('#/c/');
    const link = at >= 0 ? readLink(value.slice(at)) : { key: value };
    if (!link?.key || [...link.key].length > 128) {
      $('join-error').textContent = link?.key ? 'A key has at most 128 characters.' : 'Enter a key, or the link that you were given.';
      $('join-value').focus();
      return;
    }
    const channel = this.add({ key: link.key, name: $('join-name').value.trim() || link.name || nameOf(link.key), isPublic: false });
    $('join-dialog').close();
    location.hash = linkTo(channel);
  }

  share() {
    const { open } = this;
    $('share-text').textContent = open.isPublic
      ? `It leads everybody with an account here to ${open.name}.`
      : `Whoever has this link and an account here can read and write in ${open.name}. Give it only to people who may.`;
    $('share-link').value = new URL(linkTo(open), api.BASE).href;
    $('share-copy').textContent = 'Copy';
    $('share-dialog').showModal();
    $('share-link').select();
    $('share-link').scrollLeft = 0;
  }

  askToLeave() {
    const { open } = this;
    $('leave-text').textContent = open.isPublic
      ? `${open.name} stays in the list, and you can come back.`
      : `To come back to ${open.name} you will need its link: it is forgotten here.`;
    $('leave-dialog').showModal();
  }

  leave() {
    $('leave-dialog').close();
    const channel = this.open;
    this.session.leave(channel.key);
    this.memory.forget(channel.key);
    channel.wanted = channel.joined = false;
    channel.people.clear();
    channel.items = [];
    channel.read = undefined;
    channel.unread = 0;
    if (!channel.isPublic) this.channels.delete(channel.key);
    // The button is there only where there is another one.
    const next = [...this.channels.values()].find((one) => one.wanted);
    location.hash = linkTo(next);
    toast(`You have left ${channel.name}.`);
  }

  showSettings() {
    const dialog = $('settings-dialog');
    dialog.querySelector(`[name=status][value=${this.chosenStatus}]`).checked = true;
    dialog.querySelector(`[name=theme][value=${theme()}]`).checked = true;
    drawNotifications();
    dialog.showModal();
  }

  async settingChanged({ name, value, id, checked }) {
    if (name === 'theme') setTheme(value);
    if (name === 'status') {
      this.chosenStatus = value;
      this.setStatus(value);
    }
    if (id === 'notifications') {
      await toggleNotifications(checked);
      drawNotifications();
    }
  }

  logOut() {
    const waiting = this.session.outbox.length;
    if (waiting > 0 && !this.warned) {
      this.warned = true;
      toast(`${waiting === 1 ? 'A message has' : `${waiting} messages have`} not been sent yet. Log out again to drop ${waiting === 1 ? 'it' : 'them'}.`);
      return;
    }
    for (const entry of [...this.session.outbox]) this.session.discard(entry);
    $('settings-dialog').close();
    forgetLogin();
    this.end();
  }

  end() {
    this.destroy();
    chat = undefined;
    history.replaceState(null, '', location.pathname);
    welcome();
  }
}

function drawNotifications() {
  const state = notificationState();
  $('notifications').checked = state === 'on';
  $('notifications').disabled = state === 'unavailable' || state === 'blocked';
  $('notifications-text').textContent = {
    unavailable: 'Browsers allow this over HTTPS only.',
    blocked: 'They are blocked in the settings of your browser.',
    on: 'While you look elsewhere.',
    off: 'While you look elsewhere. Your browser will ask.',
  }[state];
}

async function copyLink() {
  const input = $('share-link');
  input.select();
  try {
    await navigator.clipboard.writeText(input.value);
  } catch {
    // Without HTTPS there is only the old way.
    if (!document.execCommand('copy')) return;
  }
  $('share-copy').textContent = 'Copied';
  announce('The link is copied');
}

/** A key that nobody can guess: 32 random bytes, base64url. */
function newKey() {
  const bytes = crypto.getRandomValues(new Uint8Array(32));
  return btoa(String.fromCharCode(...bytes)).replaceAll('+', '-').replaceAll('/', '_').replaceAll('=', '');
}

/** What a channel is called of which only the key is known. */
const nameOf = (key) => ({ general: 'General', programming: 'Programming', random: 'Random' })[key] ?? (key.length > 24 ? `Private ${key.slice(0, 6)}…` : key);

function sessionStorageOrNone() {
  try {
    return window.sessionStorage;
  } catch {
    return undefined;
  }
}

// ---- Start ----------------------------------------------------------------------------------------

$('login').addEventListener('submit', logIn);
$('mode').addEventListener('click', () => {
  setMode(!registering);
  $('name').focus();
});
for (const dialog of document.querySelectorAll('dialog')) {
  dialog.addEventListener('click', (event) => {
    if (event.target === dialog || event.target.closest('[data-close]')) dialog.close();
  });
}

const login = storedLogin();
if (login) enter(login);
else welcome();

/** What this browser remembers. Storage may be forbidden or full: then it is remembered until the page closes. */

import { nameIn } from './api.js';

const memory = new Map();

function read(storage, name) {
  try {
    const text = window[storage].getItem(name);
    return text === null ? undefined : JSON.parse(text);
  } catch {
    return memory.get(name);
  }
}

function write(storage, name, value) {
  memory.set(name, value);
  try {
    if (value === undefined) window[storage].removeItem(name);
    else window[storage].setItem(name, JSON.stringify(value));
  } catch {
    // As said above.
  }
}

const LOGIN = 'banter.login';

/** The login that is kept: `{token, expires, name}`, or undefined. */
export function storedLogin() {
  const login = read('sessionStorage', LOGIN) ?? read('localStorage', LOGIN);
  if (!login?.token || !(login.expires > Date.now())) return undefined;
  const name = nameIn(login.token);
  return name && { ...login, name };
}

/** Keeps a login: for this tab, or until it expires. */
export function keepLogin({ token, expiresIn }, stay) {
  forgetLogin();
  write(stay ? 'localStorage' : 'sessionStorage', LOGIN, { token, expires: expiresIn });
}

export function forgetLogin() {
  write('sessionStorage', LOGIN, undefined);
  write('localStorage', LOGIN, undefined);
}

/** What is remembered of each person: the channels joined, what was read, the last channel open. */
export class Memory {
  constructor(name) {
    this.name = `banter.person.${name}`;
    const { channels = [], read: marks = {}, open } = read('localStorage', this.name) ?? {};
    /** `[{key, name, isPublic}]` */
    this.channels = channels;
    /** Last read id by key. */
    this.marks = marks;
    this.open = open;
  }

  save() {
    const { channels, marks, open } = this;
    write('localStorage', this.name, { channels, read: marks, open });
  }

  remember(channel) {
    this.forget(channel.key, false);
    const { key, name, isPublic } = channel;
    this.channels.push({ key, name, isPublic });
    this.save();
  }

  forget(key, marks = true) {
    this.channels = this.channels.filter((one) => one.key !== key);
    if (marks) delete this.marks[key];
    this.save();
  }

  mark(key, id) {
    if (this.marks[key] === id) return;
    this.marks[key] = id;
    this.save();
  }
}

/** auto, light or dark. */
export const theme = () => document.documentElement.dataset.theme ?? 'auto';

export function setTheme(name) {
  if (name === 'auto') delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  try {
    if (name === 'auto') localStorage.removeItem('banter.theme');
    else localStorage.setItem('banter.theme', name);
  } catch {
    // As said above.
  }
}

/** Whether notifications are wanted; the browser's permission is another matter. */
export const wantsNotifications = () => read('localStorage', 'banter.notify') === true;
export const setNotifications = (wanted) => write('localStorage', 'banter.notify', wanted);

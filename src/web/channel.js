/** What is known of one channel: messages, people, who types, what is unread. No view. */

/** A typing notice holds so long: milliseconds. */
const TYPING = 5_000;
/** Messages that are kept; older ones are read again when somebody scrolls back to them. */
const KEPT = 20_000;

export class Channel {
  constructor({ key, name, isPublic }) {
    this.key = key;
    this.name = name;
    this.isPublic = isPublic;
    this.joined = false;
    /** Oldest first, by id. */
    this.items = [];
    /** Whether the first item is the channel's first message. */
    this.complete = false;
    /** Status by name. */
    this.people = new Map();
    /** When each name's notice ends. */
    this.typing = new Map();
    this.onlineCount = undefined;
    /** The id up to which it was read, and how many have come since. */
    this.read = undefined;
    this.unread = 0;
    this.mentioned = false;
    this.error = undefined;
  }

  get last() {
    return this.items.at(-1)?.id ?? 0;
  }

  /** Where an id is, or would be. */
  indexOf(id) {
    let low = 0;
    let high = this.items.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.items[middle].id < id) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  /** Adds one message; gives its index, or -1 if it was there. */
  add(message) {
    const index = this.indexOf(message.id);
    if (this.items[index]?.id === message.id) return -1;
    this.items.splice(index, 0, message);
    return index;
  }

  /** Begins anew with these messages: nothing older joins on to them. */
  replace(messages) {
    this.items = [...messages].sort((a, b) => a.id - b.id);
    this.complete = false;
  }

  /** Puts older messages before the others; gives how many were new. */
  prepend(messages) {
    const first = this.items[0]?.id ?? Infinity;
    const older = messages.filter(({ id }) => id < first);
    this.items = older.concat(this.items);
    return older.length;
  }

  /** Lets go of the oldest if there are too many; gives how many. */
  trim(keep = KEPT) {
    const surplus = this.items.length - keep;
    // Not one by one: a quarter at once.
    if (surplus < keep / 4) return 0;
    this.items.splice(0, surplus);
    this.complete = false;
    return surplus;
  }

  setPeople(list) {
    this.people = new Map((list ?? []).map(({ username, status }) => [username, status]));
    this.onlineCount = this.people.size;
  }

  /** Somebody came, went (no status), or changed. */
  setPerson(user, status) {
    if (status) this.people.set(user, status);
    else {
      this.people.delete(user);
      this.typing.delete(user);
    }
    this.onlineCount = this.people.size;
  }

  types(user) {
    this.typing.set(user, Date.now() + TYPING);
  }

  /** Who types now. */
  typists() {
    const now = Date.now();
    for (const [user, end] of this.typing) if (end <= now) this.typing.delete(user);
    return [...this.typing.keys()];
  }
}

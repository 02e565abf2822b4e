/**
 * The messages of the open channel.
 *
 * Only a window of them is in the document, however many are loaded: it grows at the end that is scrolled to
 * and shrinks at the other. Whatever is added or removed above, the message that somebody is reading keeps its
 * place on the screen; who is at the end stays there.
 */

import { $, announce, avatar, element, fill } from './dom.js';
import { mentions, render } from './markdown.js';

/** Messages in the document at most, and how many are added at once. */
const WINDOW = 200;
const STEP = 50;
/** How near to an end of the window more is added: pixels. */
const NEAR = 1_500;
/** Within this distance from the end somebody is at the end: pixels. */
const AT_END = 60;
/** Messages of one person within this time stand under one name: milliseconds. */
const TOGETHER = 5 * 60_000;
/** From so many characters or lines on a message is folded. */
const LONG = { characters: 3_000, lines: 40 };
/** Characters of a message that are read out. */
const SPOKEN = 300;

const timeFormat = new Intl.DateTimeFormat(undefined, { hour: '2-digit', minute: '2-digit' });
const dayFormat = new Intl.DateTimeFormat(undefined, { weekday: 'long', day: 'numeric', month: 'long' });
const yearFormat = new Intl.DateTimeFormat(undefined, { day: 'numeric', month: 'long', year: 'numeric' });
const fullFormat = new Intl.DateTimeFormat(undefined, { dateStyle: 'full', timeStyle: 'medium' });

const dayOf = (date) => new Date(date).toDateString();

function dayName(date) {
  const today = new Date();
  const yesterday = new Date(today.getFullYear(), today.getMonth(), today.getDate() - 1);
  if (dayOf(date) === today.toDateString()) return 'Today';
  if (dayOf(date) === yesterday.toDateString()) return 'Yesterday';
  return (new Date(date).getFullYear() === today.getFullYear() ? dayFormat : yearFormat).format(date);
}

export class Timeline {
  /**
   * `older(channel)` is asked for more history, and puts it in by `prepended`; `atEnd()` is told when somebody
   * has come to the end; `retry`, `edit` and `discard` act on posts that were not sent.
   */
  constructor({ me, older, atEnd, retry, edit, discard }) {
    Object.assign(this, { me, older, atEnd, retry, edit, discard });
    this.scroller = $('timeline');
    this.list = $('messages');
    this.pending = $('pending');
    this.channel = undefined;
    /** What is in the document: items from `from` up to `to`. */
    this.from = 0;
    this.to = 0;
    /** Whether the end is in view, and must stay so. */
    this.stuck = true;
    this.below = 0;
    this.unfolded = new Set();
    this.abort = new AbortController();
    const { signal } = this.abort;
    let waiting = false;
    this.scroller.addEventListener('scroll', () => {
      if (waiting) return;
      waiting = true;
      requestAnimationFrame(() => {
        waiting = false;
        this.scrolled();
      });
    }, { passive: true, signal });
    $('to-end').addEventListener('click', () => {
      this.toEnd();
      this.scroller.focus();
    }, { signal });
    // When the box changes its size (a keyboard comes up, the window turns), the end stays in view.
    this.resizer = new ResizeObserver(() => this.stuck && this.scrollToEnd());
    this.resizer.observe(this.scroller);
  }

  destroy() {
    this.abort.abort();
    this.resizer.disconnect();
    fill(this.list);
    fill(this.pending);
  }

  /** Opens a channel: at the first unread message if there are any, else at the end. */
  show(channel, { unreadFrom } = {}) {
    this.channel = channel;
    this.unfolded.clear();
    this.unreadFrom = unreadFrom;
    this.below = 0;
    this.refresh();
    const divider = this.list.querySelector('.unread-line');
    if (divider && this.scroller.scrollHeight > this.scroller.clientHeight) {
      this.scroller.scrollTop += divider.getBoundingClientRect().top - this.scroller.getBoundingClientRect().top - 80;
      this.stuck = this.isAtEnd();
    }
    this.scrolled();
  }

  /** Draws the end of the channel anew. */
  refresh() {
    const { items } = this.channel;
    this.to = items.length;
    this.from = this.startOf(Math.max(0, this.to - STEP * 2));
    fill(this.list, ...this.nodes(this.from, this.to));
    this.drawBeginning();
    this.drawPending();
    this.scrollToEnd();
  }

  /** A message has come (or an own one was stored), and stands at this index of the items. */
  added(index, own) {
    const { items } = this.channel;
    const wasAtTail = this.to === items.length - 1;
    if (index < this.from) {
      this.from += 1;
      this.to += 1;
      return;
    }
    if (index > this.to || (index === this.to && !wasAtTail)) {
      this.countBelow(items[index], own);
      return;
    }
    this.anchored(() => {
      this.to += 1;
      this.list.insertBefore(this.node(index), this.list.children[index - this.from] ?? null);
      if (index + 1 < this.to) this.redraw(index + 1);
    });
    this.countBelow(items[index], own);
    if (items.length === 1) this.drawBeginning();
    if (this.stuck) {
      this.scrollToEnd();
      this.shrinkTop();
    }
  }

  /** So many older messages were put before the others. */
  prepended(count) {
    this.from += count;
    this.to += count;
    this.anchored(() => {
      // What was the first has a neighbour now, and may go under its name.
      if (this.from < this.to) this.redraw(this.from);
      this.drawBeginning();
    });
    this.growUp();
    this.scrolled();
  }

  /** The oldest items were let go. */
  trimmed(count) {
    this.from -= count;
    this.to -= count;
    if (this.from < 0) this.refresh();
  }

  /** The outbox has changed. */
  drawPending(entries = this.entries ?? []) {
    this.entries = entries;
    // An own message moves from here to the list in two steps: whoever is at the end must not see that.
    fill(this.pending, ...entries.map((entry) => this.pendingNode(entry)));
    this.pending.hidden = entries.length === 0;
    if (this.stuck) this.scrollToEnd();
  }

  /** Goes to the newest message. */
  toEnd() {
    if (this.to < this.channel.items.length) this.refresh();
    else this.scrollToEnd();
    this.scrolled();
  }

  // What follows is not for callers.

  isAtEnd() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroller;
    return this.to === this.channel.items.length && scrollHeight - scrollTop - clientHeight < AT_END;
  }

  scrollToEnd() {
    this.stuck = true;
    this.scroller.scrollTop = this.scroller.scrollHeight;
  }

  scrolled() {
    if (!this.channel) return;
    this.stuck = this.isAtEnd();
    const { scrollTop, scrollHeight, clientHeight } = this.scroller;
    if (scrollTop < NEAR) this.growUp();
    if (scrollHeight - scrollTop - clientHeight < NEAR) this.growDown();
    if (this.stuck) {
      this.below = 0;
      this.atEnd();
    }
    this.drawToEnd();
  }

  growUp() {
    const { channel } = this;
    if (this.from > 0) {
      const from = this.startOf(Math.max(0, this.from - STEP));
      this.anchored(() => {
        this.list.prepend(...this.nodes(from, this.from));
        this.from = from;
        while (this.to - this.from > WINDOW && !this.stuck) {
          this.list.lastElementChild.remove();
          this.to -= 1;
        }
        this.drawBeginning();
      });
    }
    if (this.from < STEP && !channel.complete && !channel.loading && channel.joined) {
      channel.loading = this.older(channel).finally(() => {
        channel.loading = undefined;
        if (this.channel === channel) this.drawBeginning();
      });
      this.drawBeginning();
    }
  }

  growDown() {
    const { length } = this.channel.items;
    if (this.to >= length) return;
    const to = Math.min(length, this.to + STEP);
    this.list.append(...this.nodes(this.to, to));
    this.to = to;
    this.shrinkTop();
  }

  shrinkTop() {
    if (this.to - this.from <= WINDOW) return;
    this.anchored(() => {
      const from = this.startOf(this.to - WINDOW);
      while (this.from < from) {
        this.list.firstElementChild.remove();
        this.from += 1;
      }
    });
  }

  /** Changes the document, and keeps in its place what is being read. */
  anchored(change) {
    const top = this.scroller.getBoundingClientRect().top;
    let anchor;
    // Found by halving, for the list is long.
    const { children } = this.list;
    let low = 0;
    let high = children.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (children[middle].getBoundingClientRect().bottom <= top) low = middle + 1;
      else high = middle;
    }
    anchor = children[low];
    const id = anchor?.dataset.id;
    const before = anchor?.lastElementChild.getBoundingClientRect().bottom;
    change();
    // It may have been drawn anew.
    if (anchor && !anchor.isConnected) anchor = this.list.querySelector(`[data-id="${id}"]`);
    if (!anchor) return;
    const shift = anchor.lastElementChild.getBoundingClientRect().bottom - before;
    if (shift) this.scroller.scrollTop += shift;
  }

  countBelow(message, own) {
    if (own) return;
    const spoken = message.text.length > SPOKEN ? `${message.text.slice(0, SPOKEN)}…` : message.text;
    announce(`${message.user}: ${spoken}`);
    if (!this.stuck) this.below += 1;
    this.drawToEnd();
  }

  drawToEnd() {
    $('to-end').hidden = this.stuck;
    $('to-end-text').textContent = this.below > 0 ? `${this.below} new ${this.below === 1 ? 'message' : 'messages'}` : 'Latest messages';
    $('to-end').classList.toggle('has-new', this.below > 0);
  }

  drawBeginning() {
    const { channel } = this;
    const node = $('beginning');
    if (channel.error) {
      fill(node, element('p', { className: 'error' }, channel.error));
    } else if (this.from > 0 || !channel.joined || (!channel.complete && channel.items.length > 0)) {
      const text = !channel.joined && !channel.items.length ? 'Opening…' : 'Reading older messages…';
      fill(node, element('p', { className: 'hint loading' }, text));
    } else if (channel.complete || !channel.items.length) {
      const empty = channel.items.length === 0;
      const where = element('bdi', {}, channel.name);
      fill(
        node,
        empty && element('p', { className: 'beginning-mark', ariaHidden: 'true' }, '👋'),
        element('h2', {}, ...(empty ? ['Nobody has said anything in ', where, ' yet'] : ['This is where ', where, ' begins'])),
        empty && element('p', {}, 'Say hello, and whoever comes later will find it here.'),
      );
    } else {
      fill(node);
    }
  }

  /** The window begins with a message that has its author's name, if one is near. */
  startOf(index) {
    for (let back = 0; back < 20 && index - back > 0; back++) if (this.isHead(index - back)) return index - back;
    return index;
  }

  /** Whether a message has a head of its own: its author's name and the time. */
  isHead(index) {
    const { items } = this.channel;
    const [one, other] = [items[index - 1], items[index]];
    return (
      !one ||
      one.user !== other.user ||
      one.deleted ||
      other.deleted ||
      other.date - one.date > TOGETHER ||
      dayOf(one.date) !== dayOf(other.date) ||
      this.isFirstUnread(index)
    );
  }

  /** Whether the first unread message stands here. */
  isFirstUnread(index) {
    const { items } = this.channel;
    return this.unreadFrom !== undefined && index > 0 && items[index].id >= this.unreadFrom && items[index - 1].id < this.unreadFrom;
  }

  nodes(from, to) {
    const nodes = [];
    for (let index = from; index < to; index++) nodes.push(this.node(index));
    return nodes;
  }

  redraw(index) {
    this.list.children[index - this.from]?.replaceWith(this.node(index));
  }

  node(index) {
    const { items } = this.channel;
    const message = items[index];
    const previous = items[index - 1];
    const unread = this.isFirstUnread(index);
    const head = this.isHead(index);
    const item = element('li', { className: `message${head ? ' head' : ''}${message.user === this.me ? ' own' : ''}` });
    item.dataset.id = message.id;
    if (Number.isFinite(message.date) && (!previous || dayOf(previous.date) !== dayOf(message.date))) {
      item.append(element('p', { className: 'day' }, element('span', {}, dayName(message.date))));
    }
    if (unread) item.append(element('p', { className: 'unread-line' }, element('span', {}, 'New')));
    if (message.deleted) {
      item.classList.add('deleted');
      item.append(element('div', { className: 'body' }, element('p', {}, 'This message was deleted')));
      return item;
    }
    if (mentions(message.text, this.me) && message.user !== this.me) item.classList.add('mentions-me');
    item.append(this.headNode(message, head), this.body(message));
    return item;
  }

  headNode({ user, date }, head) {
    const time = Number.isFinite(date)
      ? element('time', { dateTime: new Date(date).toISOString(), title: fullFormat.format(date) }, timeFormat.format(date))
      : undefined;
    // Without a head of its own a message still says whose it is, to those who hear it.
    const name = element('span', { className: head ? 'author' : 'hidden' }, user);
    return element('div', { className: 'message-head' }, head && avatar(user), name, ' ', time);
  }

  body({ id, text }) {
    const content = element('div', { className: 'body' });
    content.append(render(text, this.me));
    // Marks and characters without width alone would be an empty line.
    if (!/[^\s\p{Cf}\p{Mn}\p{Cc}]/u.test(content.textContent)) fill(content, element('p', { className: 'blank' }, '(nothing visible)'));
    const letters = content.textContent.trim();
    if (letters.length <= 16 && /^(\p{Extended_Pictographic}[\u{1f3fb}-\u{1f3ff}\ufe0f\u200d]*\s*){1,4}$/u.test(letters)) content.classList.add('jumbo');
    const long = text.length > LONG.characters || text.split('\n', LONG.lines + 1).length > LONG.lines;
    if (!long) return content;
    return this.folded(id, content);
  }

  folded(id, content) {
    const key = id ?? content;
    const button = element('button', { type: 'button', className: 'text unfold' });
    const box = element('div', { className: 'foldable' }, content, button);
    const draw = () => {
      const open = this.unfolded.has(key);
      content.classList.toggle('folded', !open);
      button.textContent = open ? 'Show less' : 'Show all of it';
      button.ariaExpanded = String(open);
    };
    button.onclick = () => {
      if (!this.unfolded.delete(key)) this.unfolded.add(key);
      this.anchored(draw);
    };
    draw();
    return box;
  }

  pendingNode(entry) {
    const failed = entry.state === 'failed';
    const item = element('li', { className: `message head own waiting${failed ? ' failed' : ''}` });
    const note = element('span', { className: 'note' }, failed ? 'Not sent' : 'Sending…');
    item.append(element('div', { className: 'message-head' }, avatar(this.me), element('span', { className: 'author' }, this.me), ' ', note), this.body(entry));
    if (failed) {
      const act = (label, action) => {
        const button = element('button', { type: 'button', className: 'text' }, label);
        button.onclick = () => action(entry);
        return button;
      };
      item.append(
        element('div', { className: 'failure' }, element('p', { role: 'alert' }, entry.error ?? ''), act('Try again', this.retry), act('Edit', this.edit), act('Discard', this.discard)),
      );
    }
    return item;
  }
}

/** The box that messages are written in, and the emoji picker. */

import { $, element, fill } from './dom.js';
import { EMOJI, EMOJI_BY_NAME } from './emoji.js';

/** The share of the window that the box grows to, as CSS says too. */
const GROWN = 0.4;
/** Emoji of a row in the picker. */
const COLUMNS = 8;

export class Composer {
  /** `send(text)` takes a message; `typing()` hears that something is being written. */
  constructor({ send, typing, signal }) {
    this.send = send;
    this.typing = typing;
    this.box = $('message');
    /** What was begun, by channel. */
    this.drafts = new Map();
    const { box } = this;
    $('composer').addEventListener('submit', (event) => {
      event.preventDefault();
      this.submit();
    }, { signal });
    box.addEventListener('keydown', (event) => this.key(event), { signal });
    box.addEventListener('input', (event) => {
      this.grow();
      if (event.inputType === 'insertText' && event.data === ':') this.completeEmoji();
      if (box.value.trim()) this.typing();
    }, { signal });
    this.picker = new Picker((sign) => this.insert(sign), signal);
  }

  /** Shows a channel's draft. */
  show(key, name) {
    if (this.channel !== undefined) this.drafts.set(this.channel, this.box.value);
    this.channel = key;
    this.box.value = this.drafts.get(key) ?? '';
    this.box.placeholder = `Message ${name}`;
    this.picker.close();
    this.grow();
  }

  /** Puts a text back into the box, before what is there. */
  restore(text) {
    this.box.value = this.box.value ? `${text}\n${this.box.value}` : text;
    this.grow();
    this.box.focus();
  }

  focus() {
    this.box.focus({ preventScroll: true });
  }

  submit() {
    const text = this.box.value.replace(/\s+$/, '');
    if (!text.trim()) return;
    if (!this.send(text)) return;
    this.box.value = '';
    this.grow();
    this.box.focus();
  }

  key(event) {
    // While a word is being composed (Chinese, Japanese …) Enter belongs to that.
    if (event.isComposing || event.keyCode === 229) return;
    if (event.key === 'Enter' && !event.shiftKey && !event.altKey) {
      event.preventDefault();
      this.submit();
    } else if ((event.ctrlKey || event.metaKey) && !event.altKey && (event.key === 'b' || event.key === 'i')) {
      event.preventDefault();
      this.mark(event.key === 'b' ? '**' : '*');
    }
  }

  /** Puts a mark around what is selected. */
  mark(mark) {
    const { box } = this;
    const { selectionStart: start, selectionEnd: end } = box;
    box.setRangeText(mark + box.value.slice(start, end) + mark, start, end, 'end');
    if (start === end) box.selectionStart = box.selectionEnd = start + mark.length;
  }

  insert(text) {
    const { box } = this;
    box.setRangeText(text, box.selectionStart, box.selectionEnd, 'end');
    this.grow();
    box.focus();
  }

  /** `:name:` becomes its sign as soon as its second colon is written. */
  completeEmoji() {
    const { box } = this;
    const end = box.selectionStart;
    const found = /(^|\s):([a-z0-9_+-]{2,30}):$/.exec(box.value.slice(Math.max(0, end - 40), end));
    const sign = found && EMOJI_BY_NAME.get(found[2]);
    if (sign) box.setRangeText(sign, end - found[2].length - 2, end, 'end');
  }

  grow() {
    const { box } = this;
    box.style.height = 'auto';
    box.style.height = `${Math.min(box.scrollHeight + 2, window.innerHeight * GROWN)}px`;
  }
}

class Picker {
  constructor(pick, signal) {
    this.pick = pick;
    this.button = $('emoji-button');
    this.panel = $('emoji');
    this.search = $('emoji-search');
    this.grid = $('emoji-grid');
    this.button.addEventListener('click', () => (this.panel.hidden ? this.open() : this.close(true)), { signal });
    this.search.addEventListener('input', () => this.draw(), { signal });
    this.panel.addEventListener('keydown', (event) => this.key(event), { signal });
    this.grid.addEventListener('click', (event) => {
      const sign = event.target.closest('button')?.dataset.sign;
      if (sign) this.choose(sign);
    }, { signal });
    document.addEventListener('pointerdown', (event) => {
      if (!this.panel.hidden && !this.panel.contains(event.target) && !this.button.contains(event.target)) this.close();
    }, { signal });
    // The Tab key leaves it.
    this.panel.addEventListener('focusout', (event) => {
      if (event.relatedTarget && !this.panel.contains(event.relatedTarget) && event.relatedTarget !== this.button) this.close();
    }, { signal });
  }

  open() {
    this.panel.hidden = false;
    this.button.ariaExpanded = 'true';
    this.search.value = '';
    this.draw();
    this.search.focus();
  }

  close(back = false) {
    if (this.panel.hidden) return;
    this.panel.hidden = true;
    this.button.ariaExpanded = 'false';
    if (back) this.button.focus();
  }

  choose(sign) {
    this.close();
    this.pick(sign);
  }

  draw() {
    const wanted = this.search.value.trim().toLowerCase().replaceAll(':', '');
    const groups = EMOJI.map(({ group, emoji }) => ({
      group,
      emoji: emoji.filter(({ names }) => names.some((name) => name.includes(wanted))),
    })).filter(({ emoji }) => emoji.length);
    const button = ({ sign, names }) => {
      const one = element('button', { type: 'button', tabIndex: -1, title: `:${names[0]}:`, ariaLabel: names[0].replaceAll('_', ' ') }, sign);
      one.dataset.sign = sign;
      return one;
    };
    fill(
      this.grid,
      ...(groups.length
        ? groups.flatMap(({ group, emoji }) => [
            element('h3', {}, group),
            element('div', { role: 'group', ariaLabel: group, className: 'emoji-row' }, ...emoji.map(button)),
          ])
        : [element('p', { className: 'hint' }, 'No emoji has such a name.')]),
    );
    const first = this.grid.querySelector('button');
    if (first) first.tabIndex = 0;
  }

  key(event) {
    const buttons = [...this.grid.querySelectorAll('button')];
    const at = buttons.indexOf(document.activeElement);
    const go = (index) => {
      event.preventDefault();
      if (index < 0) this.search.focus();
      else buttons[Math.min(index, buttons.length - 1)]?.focus();
    };
    switch (event.key) {
      case 'Escape':
        event.preventDefault();
        this.close(true);
        break;
      case 'Enter':
        if (at < 0) {
          event.preventDefault();
          if (buttons[0]) this.choose(buttons[0].dataset.sign);
        }
        break;
      case 'ArrowDown':
        go(at < 0 ? 0 : at + COLUMNS);
        break;
      case 'ArrowUp':
        if (at >= 0) go(at - COLUMNS);
        break;
      case 'ArrowRight':
        if (at >= 0) go(at + 1);
        break;
      case 'ArrowLeft':
        if (at >= 0) go(at - 1);
        break;
      default:
        break;
    }
  }
}

/**
 * A small subset of Markdown, as DOM nodes: bold, italic, struck, code, links, quotes, lists, code blocks.
 *
 * Messages are written by strangers. Text only ever becomes text nodes, and elements come from the list below:
 * there is no way to any other, nor to an attribute but a link's. Every step looks at each character a
 * bounded number of times, so that no message can keep the page busy.
 */

import { element } from './dom.js';
import { EMOJI_BY_NAME } from './emoji.js';

/** Longer texts are shown as they are: characters. */
const MARKDOWN_MAX = 40_000;
/** The longest text and address of a link: characters. */
const LABEL_MAX = 500;
const ADDRESS_MAX = 2_000;
/** Quotes within quotes, at most. */
const DEPTH_MAX = 4;

const PROTOCOLS = new Set(['http:', 'https:', 'mailto:']);
const TAGS = { '**': 'strong', '*': 'em', _: 'em', '~~': 's' };

/** The message as nodes, in a fragment. `me`: who is highlighted when mentioned. */
export function render(text, me) {
  const fragment = document.createDocumentFragment();
  if (text.length > MARKDOWN_MAX) fragment.append(element('p', { dir: 'auto' }, text));
  else blocks(text.replaceAll('\r\n', '\n').split('\n'), fragment, me, 0);
  return fragment;
}

/** Whether `@name` occurs in a text. */
export function mentions(text, name) {
  const at = text.toLowerCase().indexOf(`@${name.toLowerCase()}`);
  return at >= 0 && new RegExp(`(^|[^A-Za-z0-9])@${name}(?![A-Za-z0-9])`, 'i').test(text);
}

function blocks(lines, parent, me, depth) {
  let plain = [];
  let fences = true;
  const flush = () => {
    if (plain.length) parent.append(inline(plain.join('\n'), element('p', { dir: 'auto' }), me));
    plain = [];
  };
  for (let at = 0; at < lines.length; ) {
    const line = lines[at];
    if (fences && line.startsWith('```')) {
      const oneLine = line.length > 6 && line.endsWith('```');
      let end = at + 1;
      while (!oneLine && end < lines.length && lines[end].trimEnd() !== '```') end += 1;
      if (oneLine || end < lines.length) {
        flush();
        const content = oneLine ? line.slice(3, -3) : lines.slice(at + 1, end).join('\n');
        parent.append(element('pre', { tabIndex: 0 }, element('code', {}, content)));
        at = oneLine ? at + 1 : end + 1;
        continue;
      }
      // Without its end it is text, and there is none for any later one either.
      fences = false;
    }
    if (line.startsWith('>') && depth < DEPTH_MAX) {
      flush();
      const quoted = take(lines, at, /^> ?/);
      const quote = element('blockquote');
      blocks(quoted, quote, me, depth + 1);
      parent.append(quote);
      at += quoted.length;
      continue;
    }
    const [pattern, tag] = /^[-*+] \S/.test(line) ? [/^[-*+] /, 'ul'] : /^\d{1,9}[.)] \S/.test(line) ? [/^\d{1,9}[.)] /, 'ol'] : [];
    if (tag) {
      flush();
      const items = take(lines, at, pattern);
      const list = element(tag, {}, ...items.map((item) => inline(item, element('li', { dir: 'auto' }), me)));
      if (tag === 'ol') list.start = parseInt(line, 10);
      parent.append(list);
      at += items.length;
      continue;
    }
    if (line.trim() === '') flush();
    else plain.push(line);
    at += 1;
  }
  flush();
}

/** The lines from `at` on that begin with the pattern, without it. */
function take(lines, at, pattern) {
  const taken = [];
  while (at < lines.length && pattern.test(lines[at])) taken.push(lines[at++].replace(pattern, ''));
  return taken;
}

/**
 * Emphasis is a stack of frames, one for each mark that is open. A mark that occurs again closes its frame;
 * frames above it that were never closed turn back into text.
 */
function inline(text, root, me) {
  const stack = [{ mark: '', nodes: [] }];
  let words = '';
  const top = () => stack.at(-1);
  const flushWords = () => {
    if (words) top().nodes.push(words);
    words = '';
  };
  const add = (node) => {
    flushWords();
    top().nodes.push(node);
  };
  /** Lengths of code marks that have no end in the rest of the text. */
  const endless = new Set();
  const unfold = () => {
    const { mark, nodes } = stack.pop();
    top().nodes.push(mark);
    for (const node of nodes) top().nodes.push(node);
  };
  for (let at = 0; at < text.length; ) {
    const character = text[at];
    const before = at > 0 ? text[at - 1] : ' ';
    if (character === '\\' && /[\\`*_~[\]>#-]/.test(text[at + 1] ?? '')) {
      words += text[at + 1];
      at += 2;
    } else if (character === '`') {
      const ticks = run(text, at, '`');
      const end = endless.has(ticks) ? -1 : endOfCode(text, at + ticks, ticks);
      if (end < 0) {
        endless.add(ticks);
        words += text.slice(at, at + ticks);
        at += ticks;
      } else {
        const content = text.slice(at + ticks, end);
        add(element('code', {}, content.length > 2 ? content.replace(/^ (.*) $/s, '$1') : content));
        at = end + ticks;
      }
    } else if (character === '[') {
      const link = readLink(text, at);
      if (link) {
        add(anchor(link.url, link.label));
        at = link.end;
      } else {
        words += character;
        at += 1;
      }
    } else if (character === '*' || character === '_' || character === '~') {
      const mark = markAt(text, at);
      if (!mark) {
        words += character;
        at += 1;
        continue;
      }
      const next = text[at + mark.length] ?? ' ';
      const open = stack.findIndex((frame) => frame.mark === mark);
      const inWord = mark === '_' && isWord(before) && isWord(next);
      if (open > 0 && !/\s/.test(before) && !inWord) {
        flushWords();
        while (stack.length - 1 > open) unfold();
        const { nodes } = stack.pop();
        if (nodes.length) top().nodes.push(element(TAGS[mark], {}, ...nodes));
        else top().nodes.push(mark + mark);
      } else if (open < 0 && !/\s/.test(next) && !inWord) {
        flushWords();
        stack.push({ mark, nodes: [] });
      } else {
        words += mark;
      }
      at += mark.length;
    } else if ((character === 'h' || character === 'm') && !isWord(before) && ADDRESS.test(text.slice(at, at + 8))) {
      const address = readAddress(text, at);
      if (address) {
        add(anchor(address.url, address.text));
        at += address.text.length;
      } else {
        words += character;
        at += 1;
      }
    } else if (character === ':' || character === '@') {
      const special = (character === ':' ? EMOJI : MENTION).exec(text.slice(at, at + 40));
      const emoji = character === ':' && special && EMOJI_BY_NAME.get(special[1]);
      if (emoji) {
        words += emoji;
        at += special[0].length;
      } else if (character === '@' && special && !isWord(before)) {
        const mine = special[1].toLowerCase() === me?.toLowerCase();
        add(element('span', { className: mine ? 'mention mine' : 'mention' }, special[0]));
        at += special[0].length;
      } else {
        words += character;
        at += 1;
      }
    } else {
      words += character;
      at += 1;
    }
  }
  flushWords();
  while (stack.length > 1) unfold();
  root.append(...merged(stack[0].nodes));
  return root;
}

const ADDRESS = /^(https?:\/\/|mailto:)/i;
const EMOJI = /^:([a-z0-9_+-]{2,30}):/;
const MENTION = /^@([A-Za-z0-9]{3,32})(?![A-Za-z0-9])/;
const isWord = (character) => /[\p{L}\p{N}]/u.test(character);

/** Neighbouring pieces of text as one, so that the page does not drown in nodes. */
function merged(nodes) {
  const result = [];
  for (const node of nodes) {
    if (typeof node === 'string' && typeof result.at(-1) === 'string') result.push(result.pop() + node);
    else result.push(node);
  }
  return result;
}

function run(text, at, character) {
  let end = at;
  while (text[end] === character) end += 1;
  return end - at;
}

function endOfCode(text, from, ticks) {
  for (let at = text.indexOf('`', from); at >= 0; ) {
    const length = run(text, at, '`');
    if (length === ticks) return at;
    at = text.indexOf('`', at + length);
  }
  return -1;
}

function markAt(text, at) {
  const two = text.slice(at, at + 2);
  if (two === '**' || two === '~~') return two;
  return text[at] === '~' ? undefined : text[at];
}

/** `[label](address)` */
function readLink(text, at) {
  const labelEnd = text.slice(at, at + LABEL_MAX).indexOf('](');
  if (labelEnd < 2) return undefined;
  const from = at + labelEnd + 2;
  const addressEnd = text.slice(from, from + ADDRESS_MAX).search(/[)\s]/);
  if (addressEnd < 1 || text[from + addressEnd] !== ')') return undefined;
  const label = text.slice(at + 1, at + labelEnd);
  const url = safeUrl(text.slice(from, from + addressEnd));
  // A text that looks like an address must not lead to another one.
  const honest = !/^\s*(https?:|www\.)/i.test(label) || safeUrl(label) === url;
  return url && { label: honest ? label : url, url, end: from + addressEnd + 1 };
}

/** An address that stands in the text as it is. What ends a sentence does not belong to it. */
function readAddress(text, at) {
  let found = /^[^\s<>"`]+/.exec(text.slice(at, at + ADDRESS_MAX))?.[0] ?? '';
  let surplus = found.split(')').length - found.split('(').length;
  for (;;) {
    const last = found.at(-1) ?? '';
    if (last === ')' && surplus > 0) surplus -= 1;
    else if (!/[.,;:!?'*_~\]]/.test(last)) break;
    found = found.slice(0, -1);
  }
  const url = safeUrl(found);
  return url && { text: found, url };
}

/** An address that may be followed, or undefined: never one that runs something. */
function safeUrl(address) {
  if (!ADDRESS.test(address)) return undefined;
  try {
    const url = new URL(address);
    const empty = url.protocol === 'mailto:' ? !url.pathname : !url.hostname;
    // What looks like the host before an @ is a name only, put there to deceive.
    const deceives = url.username !== '' || url.password !== '';
    return PROTOCOLS.has(url.protocol) && !empty && !deceives ? url.href : undefined;
  } catch {
    return undefined;
  }
}

function anchor(url, label) {
  return element(
    'a',
    // The address shows where a link with another text leads.
    { href: url, title: url, target: '_blank', rel: 'noopener noreferrer nofollow', referrerPolicy: 'no-referrer' },
    label,
  );
}

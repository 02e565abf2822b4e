/** Small helpers to make DOM nodes. Text always stays text: nothing here, or anywhere, parses HTML. */

export const $ = (id) => document.getElementById(id);

/** An element with properties, attributes (if there is no such property) and children. */
export function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined) continue;
    if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  fill(node, ...children);
  return node;
}

/** Puts nodes in the place of what is in there. What is undefined or false is left out. */
export function fill(node, ...children) {
  node.replaceChildren(...children.filter((child) => child !== undefined && child !== false));
}

/** One of the icons in index.html. */
export function icon(name) {
  const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg');
  svg.setAttribute('class', 'icon');
  svg.setAttribute('aria-hidden', 'true');
  const use = document.createElementNS('http://www.w3.org/2000/svg', 'use');
  use.setAttribute('href', `#icon-${name}`);
  svg.append(use);
  return svg;
}

/** A round picture of somebody: the first letters, on a colour that is always the same. */
export function avatar(name) {
  let hash = 0;
  for (const character of name) hash = (hash * 31 + character.codePointAt(0)) >>> 0;
  const node = element('span', { className: 'avatar', ariaHidden: 'true' }, name.slice(0, 2));
  node.style.setProperty('--hue', String(hash % 360));
  return node;
}

const announcer = () => $('announcer');
let announcements = 0;

/** Has a screen reader say something, when it has time. */
export function announce(text) {
  const line = element('p', {}, text);
  announcer().append(line);
  // The newest few only: who is behind does not want it all.
  while (announcer().children.length > 5) announcer().firstChild.remove();
  const mine = ++announcements;
  setTimeout(() => {
    if (mine === announcements) announcer().replaceChildren();
  }, 10_000);
}

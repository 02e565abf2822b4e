/** The lists at the sides: channels, and who is in the open one. */

import { $, avatar, element, fill, icon } from './dom.js';

/** People shown in the list. */
const PEOPLE_MAX = 500;

/** Where a channel is found: in the fragment, which browsers send to nobody. */
export function linkTo({ key, name, isPublic }) {
  const path = `#/c/${encodeURIComponent(key)}`;
  return isPublic || name === key ? path : `${path}/${encodeURIComponent(name)}`;
}

/** What a link names: `{key, name}`, or undefined. */
export function readLink(hash) {
  const [, key, name] = /^#\/c\/([^/]+)(?:\/([^/]+))?$/.exec(hash) ?? [];
  try {
    return key && { key: decodeURIComponent(key), name: name && decodeURIComponent(name) };
  } catch {
    return undefined;
  }
}

/** Draws the lists of channels. */
export function drawChannels(channels, open) {
  const yours = channels.filter((channel) => channel.wanted);
  const more = channels.filter((channel) => !channel.wanted && channel.isPublic);
  update($('yours'), yours, open);
  update($('more'), more, open);
  $('more-title').hidden = $('more').hidden = more.length === 0;
}

/** Draws only what is different, so that the focus stays where it is. */
function update(list, channels, open) {
  const known = new Map([...list.children].map((item) => [item.dataset.key, item]));
  channels.forEach((channel, index) => {
    const state = JSON.stringify([channel.name, channel.unread, channel.mentioned, channel === open, channel.onlineCount, channel.wanted]);
    let item = known.get(channel.key);
    known.delete(channel.key);
    if (!item) {
      item = element('li', {}, element('a'));
      item.dataset.key = channel.key;
    }
    if (item.dataset.state !== state) {
      item.dataset.state = state;
      draw(item.firstElementChild, channel, open);
    }
    if (list.children[index] !== item) list.insertBefore(item, list.children[index] ?? null);
  });
  for (const item of known.values()) item.remove();
}

function draw(link, channel, open) {
  link.href = linkTo(channel);
  link.className = channel.unread > 0 ? 'channel unread' : 'channel';
  if (channel === open) link.setAttribute('aria-current', 'page');
  else link.removeAttribute('aria-current');
  const { unread, onlineCount, mentioned } = channel;
  let note;
  if (unread > 0) {
    note = element('span', { className: mentioned ? 'badge mine' : 'badge' }, unread > 99 ? '99+' : String(unread), element('span', { className: 'hidden' }, mentioned ? ' unread, you were mentioned' : ' unread'));
  } else if (!channel.wanted && onlineCount > 0) {
    note = element('span', { className: 'count' }, String(onlineCount), element('span', { className: 'hidden' }, ' here'));
  }
  fill(link, icon(channel.isPublic ? 'hash' : 'lock'), element('bdi', { className: 'channel-name' }, channel.name), ...(note ? [' ', note] : []));
}

/** Draws who is in a channel. */
export function drawPeople(channel, me) {
  const people = [...(channel?.people ?? [])].sort(([a, s], [b, t]) => (s === t ? a.localeCompare(b) : s === 'away' ? 1 : -1));
  const state = JSON.stringify([me, people.length, people.slice(0, PEOPLE_MAX)]);
  if ($('people').dataset.state === state) return;
  $('people').dataset.state = state;
  $('people-title').textContent = people.length ? `Here now – ${people.length}` : 'Here now';
  fill(
    $('people'),
    ...people.slice(0, PEOPLE_MAX).map(([name, status]) => {
      const picture = element('span', { className: `presence ${status}` }, avatar(name));
      const label = element('span', { className: 'person-name' }, name);
      return element('li', { className: `person ${status}` }, picture, label, ...(name === me ? [' ', element('span', { className: 'hint' }, 'you')] : []), ...(status === 'away' ? [' ', element('span', { className: 'hint' }, 'away')] : []));
    }),
    ...(people.length > PEOPLE_MAX ? [element('li', { className: 'hint' }, `and ${people.length - PEOPLE_MAX} more`)] : []),
  );
}

/** One line about a channel. */
export function describe(channel) {
  if (!channel.joined) return channel.error ? '' : 'Opening…';
  const all = channel.people.size;
  const away = [...channel.people.values()].filter((status) => status === 'away').length;
  const here = all === 1 ? 'Only you are here' : `${all} here`;
  const kind = channel.isPublic ? '' : 'Private – ';
  return `${kind}${here}${away > 0 && all > 1 ? `, ${away} away` : ''}`;
}

/** Who types, in words. */
export function describeTyping(names) {
  if (names.length === 0) return '';
  if (names.length === 1) return `${names[0]} is typing…`;
  if (names.length === 2) return `${names[0]} and ${names[1]} are typing…`;
  return 'Several people are typing…';
}

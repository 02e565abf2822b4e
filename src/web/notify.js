/** Tells somebody who looks elsewhere: the title, the icon, and notifications of the desktop. */

import { setNotifications, wantsNotifications } from './preferences.js';

const ICON = document.querySelector('link[rel="icon"]');
const PLAIN = ICON.href;
const UNREAD = PLAIN.replace('favicon.svg', 'favicon-unread.svg');
/** Characters of a message in a notification. */
const EXCERPT = 200;

/** Shows how much is unread, and where one is. */
export function showUnread(count, where) {
  document.title = `${count > 0 ? `(${count > 99 ? '99+' : count}) ` : ''}${where ? `${where} – ` : ''}Banter`;
  const href = count > 0 ? UNREAD : PLAIN;
  if (ICON.href !== href) ICON.href = href;
}

/** unavailable (browsers allow it over HTTPS only), blocked, on or off. */
export function notificationState() {
  if (!window.isSecureContext || !('Notification' in window)) return 'unavailable';
  if (Notification.permission === 'denied') return 'blocked';
  return Notification.permission === 'granted' && wantsNotifications() ? 'on' : 'off';
}

/** Turns them on or off; to be called upon a person's gesture, for the browser may ask. */
export async function toggleNotifications(wanted) {
  if (wanted && notificationState() !== 'unavailable') await Notification.requestPermission();
  setNotifications(wanted);
  return notificationState();
}

/** One notification for each channel: a newer one takes the place of the last. */
export function notify({ title, text, tag, open }) {
  if (notificationState() !== 'on') return;
  try {
    const body = text.length > EXCERPT ? `${text.slice(0, EXCERPT)}…` : text;
    const notification = new Notification(title, { body, tag, icon: PLAIN });
    notification.onclick = () => {
      window.focus();
      notification.close();
      open();
    };
  } catch {
    // Some phones have the constructor and refuse it.
  }
}

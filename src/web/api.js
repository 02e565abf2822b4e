/** Banter's REST side, as far as a client needs it. */

/** Where the server is: the folder of the page, whatever path a proxy has put it under. */
export const BASE = new URL('.', location.href.split(/[?#]/)[0]);

/** How long a request may take: milliseconds. */
const TIMEOUT = 20_000;

/** A request that failed: `status` is 0 if there was no answer at all. */
export class RequestFailed extends Error {
  constructor(message, status = 0) {
    super(message);
    this.name = 'RequestFailed';
    this.status = status;
  }
}

/** Makes a request. `path` is relative to the page's folder. */
export async function request(method, path, { token, body } = {}) {
  const headers = {};
  if (token) headers.authorization = `Bearer ${token}`;
  if (body) headers['content-type'] = 'application/json';
  let response;
  let answer;
  try {
    response = await fetch(new URL(path, BASE), {
      method,
      headers,
      body: body && JSON.stringify(body),
      credentials: 'omit',
      cache: 'no-store',
      signal: AbortSignal.timeout(TIMEOUT),
    });
    answer = await response.json();
  } catch {
    throw new RequestFailed('The server cannot be reached. Try again in a moment.', response?.ok === false ? response.status : 0);
  }
  if (!response.ok) throw new RequestFailed(answer.error ?? `The server answered ${response.status}.`, response.status);
  return answer;
}

/** Both give `{token, expiresIn}`: when it expires, in milliseconds since 1970. */
export const register = (name, password) => request('POST', 'auth/register', { body: { name, password } });
export const login = (name, password) => request('POST', 'auth/login', { body: { name, password } });

/** The public channels: `[{name, key, onlineCount}]`. */
export const listChannels = async (token) => (await request('GET', 'channels', { token })).channels;

/** Makes a public channel: `{name, key}`. */
export const createChannel = (token, name) => request('POST', 'channels', { token, body: { name } });

/** Messages around an id, oldest first; each is a string of JSON. `where` is `{before, limit}` or `{after, limit}`. */
export const history = async (token, key, where) =>
  (await request('GET', `channels/${encodeURIComponent(key)}/messages?${new URLSearchParams(where)}`, { token })).messages;

/** Whose token it is. (It is not checked here: that is the server's business.) */
export function nameIn(token) {
  try {
    const part = token.split('.')[1].replaceAll('-', '+').replaceAll('_', '/');
    return JSON.parse(atob(part)).name;
  } catch {
    return undefined;
  }
}

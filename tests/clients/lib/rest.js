'use strict';
// REST over node:http, from a local address of one's choice: which worker answers depends on it.

const http = require('node:http');

/**
 * One request. `body` that is neither string nor Buffer is sent as JSON; `token` as a Bearer token;
 * `headers` win over both. Gives `{status, headers, text, json}`, json undefined if it is none.
 */
function request(port, method, path, options = {}) {
  const { token, body, host = '127.0.0.1', localAddress = '127.0.0.1', agent = false, deadline = 30_000 } = options;
  const headers = { ...options.headers };
  const has = (name) => Object.keys(headers).some((key) => key.toLowerCase() === name);
  let payload;
  if (body !== undefined) {
    const raw = typeof body === 'string' || Buffer.isBuffer(body);
    payload = Buffer.from(raw ? body : JSON.stringify(body));
    if (!has('content-type') && !raw) headers['content-type'] = 'application/json';
    if (!has('transfer-encoding')) headers['content-length'] = payload.length;
  }
  if (token !== undefined && !has('authorization')) headers.authorization = `Bearer ${token}`;
  return new Promise((resolve, reject) => {
    const req = http.request(
      { host, port, method, path, headers, localAddress, agent, timeout: deadline },
      (res) => {
        const chunks = [];
        res.on('data', (chunk) => chunks.push(chunk));
        res.on('error', reject);
        res.on('end', () => {
          const text = Buffer.concat(chunks).toString('utf8');
          let json;
          try {
            json = JSON.parse(text);
          } catch {
            json = undefined;
          }
          resolve({ status: res.statusCode, headers: res.headers, text, json });
        });
      },
    );
    req.on('timeout', () => req.destroy(new Error(`${method} ${path}: no answer in ${deadline} ms`)));
    req.on('error', reject);
    req.end(payload);
  });
}

/** The path of a channel's resource, with its key percent-encoded. */
const channelPath = (key, rest) => `/channels/${encodeURIComponent(key)}/${rest}`;

module.exports = { request, channelPath };

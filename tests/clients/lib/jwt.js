'use strict';
// Tokens of our own, good and bad, to see which ones the server takes.

const crypto = require('node:crypto');

const part = (value) => Buffer.from(JSON.stringify(value)).toString('base64url');

/** A token with these claims; `alg` may be HS256, HS512 or none. */
function sign(claims, secret, alg = 'HS256') {
  const body = `${part({ alg, typ: 'JWT' })}.${part(claims)}`;
  if (alg === 'none') return `${body}.`;
  const hash = alg === 'HS512' ? 'sha512' : 'sha256';
  return `${body}.${crypto.createHmac(hash, secret).update(body).digest('base64url')}`;
}

/** The claims of a token, unverified. */
const claims = (token) => JSON.parse(Buffer.from(token.split('.')[1], 'base64url'));

/** Whether the token is signed with HS256 and this secret. */
function verify(token, secret) {
  const [head, body, signature] = token.split('.');
  const { alg } = JSON.parse(Buffer.from(head, 'base64url'));
  const expected = crypto.createHmac('sha256', secret).update(`${head}.${body}`).digest('base64url');
  return alg === 'HS256' && signature === expected;
}

module.exports = { sign, claims, verify };

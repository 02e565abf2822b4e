'use strict';
// The page that people chat on, as it is served: what browsers keep and ask for again, and what they are told
// that it may do. What it does is tested in tests/browser.

const assert = require('node:assert');
const http = require('node:http');
const zlib = require('node:zlib');
const { suite } = require('./lib/suite.js');

suite('the page', {}, (scenario, banter) => {
  /** A request whose body is kept as it came. */
  const ask = (path, { method = 'GET', headers = {} } = {}) => new Promise((resolve, reject) => {
    const request = http.request({ host: '127.0.0.1', port: banter().port, method, path, headers, agent: false }, (response) => {
      const chunks = [];
      response.on('data', (chunk) => chunks.push(chunk));
      response.on('end', () => resolve({ status: response.statusCode, headers: response.headers, body: Buffer.concat(chunks) }));
    });
    request.on('error', reject);
    request.end();
  });
  /** The paths of what the page is made of. */
  const files = async () => {
    const { body } = await ask('/');
    return [...new Set([...body.toString().matchAll(/(?:src|href)="(web\/[^"]+)"/g)].map(([, path]) => `/${path}`))];
  };

  scenario('GET / is HTML that names only files of its own, each of which is there with its type', async () => {
    const page = await ask('/');
    assert.strictEqual(page.status, 200);
    assert.strictEqual(page.headers['content-type'], 'text/html; charset=utf-8');
    assert.match(page.body.toString(), /^<!doctype html>/i);
    const text = page.body.toString();
    for (const [, address] of text.matchAll(/(?:src|href|action)="([^"]*)"/g)) assert.match(address, /^(web\/|#)/, 'of this server');
    // What the policy forbids must not be needed.
    assert.doesNotMatch(text, /<script(?![^>]*\bsrc=)|<style|\sstyle=|\son[a-z]+=/i);
    const types = { js: 'text/javascript; charset=utf-8', css: 'text/css; charset=utf-8', svg: 'image/svg+xml' };
    const named = await files();
    assert.ok(named.length > 10, `${named}`);
    for (const path of named) {
      const file = await ask(path);
      assert.strictEqual(file.status, 200, path);
      assert.strictEqual(file.headers['content-type'], types[path.split('.').at(-1)], path);
      assert.strictEqual(file.headers['x-content-type-options'], 'nosniff', path);
      assert.doesNotMatch(file.body.toString().replaceAll('http://www.w3.org/', '').replaceAll('https://chat.example.org/', ''), /https?:\/\/[a-z]/, `${path} names no other server`);
    }
  });

  scenario('the policy lets the page load and ask its own server only, and nobody frame it', async () => {
    for (const path of ['/', ...(await files())]) {
      const { headers } = await ask(path);
      const policy = Object.fromEntries(headers['content-security-policy'].split(';').map((part) => {
        const [name, ...values] = part.trim().split(/\s+/);
        return [name, values.join(' ')];
      }));
      assert.deepStrictEqual(policy, {
        'default-src': "'none'",
        'script-src': "'self'",
        'style-src': "'self'",
        'connect-src': "'self'",
        'img-src': "'self' data:",
        'base-uri': "'none'",
        'form-action': "'none'",
        'frame-ancestors': "'none'",
        'require-trusted-types-for': "'script'",
        'trusted-types': "'none'",
      });
      assert.strictEqual(headers['referrer-policy'], 'no-referrer');
      assert.strictEqual(headers['x-content-type-options'], 'nosniff');
      assert.strictEqual(headers['cross-origin-opener-policy'], 'same-origin');
    }
  });

  scenario('it is compressed for those that ask for it, and what one has already is not sent again', async () => {
    for (const path of ['/', ...(await files())]) {
      const plain = await ask(path);
      const zipped = await ask(path, { headers: { 'accept-encoding': 'br, gzip;q=0.8' } });
      assert.strictEqual(plain.headers['content-encoding'], undefined);
      assert.strictEqual(zipped.headers['content-encoding'], 'gzip');
      assert.deepStrictEqual(zlib.gunzipSync(zipped.body), plain.body, path);
      assert.ok(zipped.body.length < plain.body.length || plain.body.length < 1_000, `${path}: ${zipped.body.length} of ${plain.body.length} bytes`);
      for (const { headers } of [plain, zipped]) assert.strictEqual(headers.vary, 'accept-encoding');
      assert.match(plain.headers.etag, /^"[^"]+"$/, 'a strong tag');
      assert.notStrictEqual(plain.headers.etag, zipped.headers.etag, 'other bytes, another tag');
      for (const [answer, encoding] of [[plain, 'identity'], [zipped, 'gzip']]) {
        for (const tags of [answer.headers.etag, `"x", W/${answer.headers.etag}`, '*']) {
          const again = await ask(path, { headers: { 'accept-encoding': encoding, 'if-none-match': tags } });
          assert.strictEqual(again.status, 304, `${path} ${tags}`);
          assert.strictEqual(again.body.length, 0);
          assert.strictEqual(again.headers.etag, answer.headers.etag);
          assert.strictEqual(again.headers['cache-control'], answer.headers['cache-control']);
          assert.ok(again.headers['content-security-policy']);
        }
        const other = await ask(path, { headers: { 'accept-encoding': encoding, 'if-none-match': '"other"' } });
        assert.strictEqual(other.status, 200);
      }
      const never = await ask(path, { headers: { 'accept-encoding': 'gzip;q=0, *;q=0' } });
      assert.strictEqual(never.headers['content-encoding'], undefined);
    }
  });

  scenario('the page is asked for anew each time, its files are kept for good, but not under the name of another version', async () => {
    assert.strictEqual((await ask('/')).headers['cache-control'], 'no-cache');
    const [first] = await files();
    const file = await ask(first);
    assert.match(file.headers['cache-control'], /immutable/);
    const old = await ask(first.replace(/^\/web\/[^/]+/, '/web/another-version'));
    assert.strictEqual(old.status, 200, 'a page of before an update finds its files');
    assert.strictEqual(old.headers['cache-control'], 'no-cache');
    assert.deepStrictEqual(old.body, file.body);
  });

  scenario('HEAD is answered as GET without the body, other methods and paths as everywhere', async () => {
    const [first] = await files();
    for (const path of ['/', first]) {
      const get = await ask(path);
      const head = await ask(path, { method: 'HEAD' });
      assert.strictEqual(head.status, 200);
      assert.strictEqual(head.body.length, 0);
      for (const name of ['content-type', 'content-length', 'etag', 'cache-control', 'content-security-policy']) assert.strictEqual(head.headers[name], get.headers[name], name);
      assert.strictEqual(Number(head.headers['content-length']), get.body.length);
      const post = await banter().api('POST', path, { body: {} });
      assert.strictEqual(post.status, 405);
      assert.strictEqual(typeof post.json.error, 'string');
    }
    for (const path of ['/index.html', '/web', '/web/', '/web/x', '/web/x/nothing.js', '/web/x/index.html', '/web/x/..%2f..%2fCargo.toml', '/web/x/%00', '/favicon.ico', '//']) {
      const missing = await banter().api('GET', path);
      assert.strictEqual(missing.status, 404, path);
      assert.strictEqual(typeof missing.json?.error, 'string', `${path}: ${missing.text}`);
      assert.strictEqual(missing.headers['access-control-allow-origin'], '*');
    }
  });
});

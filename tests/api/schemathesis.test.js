'use strict';
// REST against its own description: schemathesis makes requests out of docs/openapi.json, right ones and
// wrong ones, and holds every answer against it.

const assert = require('node:assert');
const { spawn } = require('node:child_process');
const fs = require('node:fs');
const os = require('node:os');
const path = require('node:path');
const { suite } = require('../clients/lib/suite.js');

const DOCUMENT = path.resolve(__dirname, '../../docs/openapi.json');
const CONFIG = path.join(__dirname, 'schemathesis.toml');
const PROGRAM = process.env.SCHEMATHESIS ?? path.resolve(__dirname, '../../target/schemathesis/bin/schemathesis');
/** The same requests each time. */
const SEED = '20';
/** Requests made at random for each operation, beside those that go through the limits one by one. */
const EXAMPLES = '60';
/** A run with fewer requests has left something out. */
const LEAST = 500;

const operations = Object.values(JSON.parse(fs.readFileSync(DOCUMENT, 'utf8')).paths).flatMap((item) => Object.keys(item));

suite('the OpenAPI document', { workers: 1 }, (scenario, banter) => {
  scenario('is what the server says of itself, to the byte', async () => {
    const served = await banter().api('GET', '/openapi.json');
    assert.strictEqual(served.status, 200);
    assert.strictEqual(served.headers['content-type'], 'application/json');
    assert.strictEqual(served.headers['access-control-allow-origin'], '*');
    assert.strictEqual(served.headers['cache-control'], 'no-cache');
    assert.strictEqual(served.text, fs.readFileSync(DOCUMENT, 'utf8'));
    const again = await banter().api('GET', '/openapi.json', { headers: { 'if-none-match': served.headers.etag } });
    assert.strictEqual(again.status, 304);
    assert.strictEqual(again.text, '');
  });

  scenario('holds for every answer to what schemathesis asks', async (world) => {
    assert.ok(fs.existsSync(PROGRAM), `${PROGRAM} is missing: run \`make install-schemathesis\``);
    // With a living session, so that joins are joins, up to the one that is one too many.
    const person = await world.person('schema');
    const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'banter-schemathesis-'));
    try {
      const child = spawn(PROGRAM, [
        '--config-file', CONFIG,
        'run', DOCUMENT,
        '--url', banter().url,
        '--header', `Authorization: Bearer ${person.token}`,
        '--seed', SEED,
        '--max-examples', EXAMPLES,
        '--generation-database', 'none',
        '--continue-on-failure',
        '--warnings', 'off',
        '--no-color',
      ], { cwd: folder, stdio: ['ignore', 'pipe', 'pipe'] });
      let output = '';
      for (const stream of [child.stdout, child.stderr]) stream.setEncoding('utf8').on('data', (text) => { output += text; });
      const code = await new Promise((resolve, reject) => child.on('error', reject).on('close', resolve));
      assert.strictEqual(code, 0, output);
      const [, selected, all] = /Selected: (\d+)\/(\d+)/.exec(output) ?? assert.fail(output);
      const tested = /Tested: (\d+)/.exec(output)?.[1];
      for (const count of [selected, all, tested]) assert.strictEqual(Number(count), operations.length, `every operation is tested\n${output}`);
      const cases = Number(/(\d+) generated/.exec(output)?.[1] ?? 0);
      assert.ok(cases >= LEAST, `${cases} requests are too few\n${output}`);
      console.log(`schemathesis: ${cases} requests, ${tested} operations`);
    } finally {
      fs.rmSync(folder, { recursive: true, force: true });
    }
    assert.strictEqual((await banter().api('GET', '/health')).status, 200, 'the server is well afterwards');
  });
});

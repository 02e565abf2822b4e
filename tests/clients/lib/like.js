'use strict';

const assert = require('node:assert');

/** What of `actual` the expectation speaks of: fields beyond it are left out, list lengths stay. */
function spokenOf(actual, expected) {
  if (Array.isArray(expected) && Array.isArray(actual)) {
    return actual.map((one, i) => (i < expected.length ? spokenOf(one, expected[i]) : one));
  }
  if (expected !== null && actual !== null && typeof expected === 'object' && typeof actual === 'object') {
    const fields = Object.keys(expected).filter((key) => key in actual);
    return Object.fromEntries(fields.map((key) => [key, spokenOf(actual[key], expected[key])]));
  }
  return actual;
}

/** Deep equality in which the server's objects may have more fields, as the API allows. */
function assertLike(actual, expected, message) {
  assert.deepStrictEqual(spokenOf(actual, expected), expected, message);
}

module.exports = { assertLike };

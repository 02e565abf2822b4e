'use strict';
// Waiting for conditions. Everything has a deadline, and says what it waited for.

const { setTimeout: sleep } = require('node:timers/promises');

/** Polls `condition` (may be async) until it gives something truthy, which is returned. */
async function until(what, condition, deadline = 10_000) {
  const end = performance.now() + deadline;
  for (;;) {
    const value = await condition();
    if (value) return value;
    if (performance.now() > end) throw new Error(`${what}: not so after ${deadline} ms`);
    await sleep(20);
  }
}

/** The promise's result, or an error that names what did not come in time. */
function within(what, promise, deadline = 10_000) {
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`${what}: nothing after ${deadline} ms`)), deadline);
  });
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}

module.exports = { sleep, until, within };

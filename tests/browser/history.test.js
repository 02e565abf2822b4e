'use strict';
// A long history, scrolled through to its beginning.

const assert = require('node:assert');
const { suite } = require('./lib/browser.js');

const MESSAGES = 10_000;
/** What the document may hold of them. */
const IN_DOCUMENT = 350;

suite('history', {}, (scenario, banter) => {
  scenario('10,000 messages are scrolled through without a hole, a jump or a stutter, and back to the end', async ({ person, world }) => {
    const key = banter().key();
    const writers = await Promise.all(['ann', 'bob', 'cid', 'dot'].map((name) => world.person(name)));
    for (const writer of writers) await writer.join(key);
    const text = (i) => `${i} ${'lorem ipsum dolor sit amet '.repeat((i * 7) % 5)}${i % 13 === 0 ? '\n- with\n- a list' : ''}${i % 29 === 0 ? '\n```\nand code\n```' : ''}`;
    for (let i = 0; i < MESSAGES; i += 400) {
      await Promise.all(Array.from({ length: 400 }, (_, j) => writers[Math.floor((i + j) / 3) % 4].post(key, text(i + j))));
    }
    for (const writer of writers) writer.quit();
    const eve = await person('eve');
    await eve.register();
    const opened = Date.now();
    await eve.visit(`#/c/${key}`);
    await eve.online();
    await eve.$(`#messages [data-id="${MESSAGES}"]`).waitFor();
    const shown = Date.now() - opened;
    const seen = await eve.page.evaluate(async () => {
      const scroller = document.getElementById('timeline');
      const list = document.getElementById('messages');
      const frame = () => new Promise((resolve) => requestAnimationFrame(resolve));
      const found = { ids: [], frames: [], jumps: [], most: 0 };
      let last = performance.now();
      /** The places of what is in view, by id. */
      const places = () => {
        const box = scroller.getBoundingClientRect();
        const inView = new Map();
        const { children } = list;
        let low = 0;
        let high = children.length;
        while (low < high) {
          const middle = (low + high) >> 1;
          if (children[middle].getBoundingClientRect().bottom < box.top) low = middle + 1;
          else high = middle;
        }
        for (let i = low; i < children.length; i++) {
          const { top, bottom } = children[i].lastElementChild.getBoundingClientRect();
          if (top > box.bottom) break;
          inView.set(Number(children[i].dataset.id), bottom);
        }
        return inView;
      };
      const ids = new Set(places().keys());
      for (let turn = 0; turn < 20_000 && !ids.has(1); turn++) {
        const before = places();
        const from = scroller.scrollTop;
        scroller.scrollTop = from - 500;
        const moved = from - scroller.scrollTop;
        await frame();
        const now = performance.now();
        found.frames.push(now - last);
        last = now;
        // What the page does in this frame comes after us.
        await new Promise((resolve) => setTimeout(resolve));
        const after = places();
        // Whatever was added above, what was in view has moved by as much as was scrolled.
        for (const [id, bottom] of before) {
          if (after.has(id) && Math.abs(after.get(id) - bottom - moved) > 2) found.jumps.push([id, after.get(id) - bottom - moved]);
        }
        for (const id of after.keys()) ids.add(id);
        found.most = Math.max(found.most, list.children.length);
        if (moved === 0) await new Promise((resolve) => setTimeout(resolve, 10));
      }
      found.ids = [...ids].sort((a, b) => a - b);
      return found;
    });
    assert.deepStrictEqual(seen.jumps, [], 'what is read keeps its place');
    assert.deepStrictEqual(seen.ids, Array.from({ length: MESSAGES }, (_, i) => i + 1), 'each message was in view');
    assert.ok(seen.most <= IN_DOCUMENT, `${seen.most} messages in the document`);
    const frames = seen.frames.sort((a, b) => a - b);
    const at = (share) => frames[Math.floor(frames.length * share)];
    console.log(`10,000 messages: shown after ${shown} ms; ${frames.length} steps, a frame took ${at(0.5).toFixed(1)} ms (median), ${at(0.95).toFixed(1)} ms (95 %), ${at(0.999).toFixed(1)} ms (most but one in a thousand); at most ${seen.most} in the document`);
    await eve.$('#beginning').filter({ hasText: 'begins' }).waitFor();
    // A message that comes now does not disturb who reads old ones.
    const fay = await world.person('fay');
    await fay.join(key);
    const scroll = () => eve.page.evaluate(() => document.getElementById('timeline').scrollTop);
    const before = await scroll();
    await fay.post(key, 'news');
    await eve.$('#to-end').filter({ hasText: '1 new message' }).waitFor();
    assert.strictEqual(await scroll(), before);
    await eve.$('#to-end').click();
    const news = await eve.sees('news');
    assert.ok(await news.isVisible());
    // All the way from the beginning down works as well.
    await eve.page.evaluate(async () => {
      const scroller = document.getElementById('timeline');
      for (let turn = 0; turn < 40; turn++) {
        scroller.scrollTop -= 2_000;
        await new Promise((resolve) => setTimeout(resolve, 20));
      }
    });
    const down = await eve.page.evaluate(async () => {
      const scroller = document.getElementById('timeline');
      const list = document.getElementById('messages');
      const ids = new Set();
      for (let turn = 0; turn < 1_000; turn++) {
        for (const item of list.children) ids.add(Number(item.dataset.id));
        scroller.scrollTop += 900;
        await new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)));
        if (document.getElementById('to-end').hidden) break;
      }
      const all = [...ids].sort((a, b) => a - b);
      return { holes: all.filter((id, i) => i > 0 && id !== all[i - 1] + 1), last: all.at(-1) };
    });
    assert.deepStrictEqual(down, { holes: [], last: MESSAGES + 1 });
  });

  scenario('a deleted message leaves its place, and nothing else of it', async ({ person, world }) => {
    const [gus, node] = [await person('gus'), await world.person('node')];
    const key = banter().key();
    await node.join(key);
    for (let i = 1; i <= 40; i++) await node.post(key, `message ${i}`);
    // No client can delete yet; the way in which it is told is laid down.
    await gus.page.route('**/messages?**', async (route) => {
      const response = await route.fetch();
      const { messages } = await response.json();
      const json = messages.map((message) => (JSON.parse(message).id === 5 ? '{"id":5,"deleted":true}' : message));
      await route.fulfill({ response, json: { messages: json } });
    });
    await gus.register();
    await gus.visit(`#/c/${key}`);
    await gus.online();
    await gus.page.evaluate(() => { document.getElementById('timeline').scrollTop = 0; });
    await gus.$('[data-id="5"]').waitFor();
    assert.match(await gus.$('[data-id="5"]').innerText(), /This message was deleted/);
    assert.match(await gus.$('[data-id="6"]').innerText(), new RegExp(`${node.name}[^]*message 6`), 'the next one has its author above it');
    await gus.$('#beginning').filter({ hasText: 'begins' }).waitFor();
  });
});

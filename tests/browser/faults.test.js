'use strict';
// Connections that break, workers and servers that die: the page says so, loses nothing, sends once.

const assert = require('node:assert');
const fs = require('node:fs');
const { suite } = require('./lib/browser.js');
const { sign } = require('../clients/lib/jwt.js');
const { SECRET } = require('../clients/lib/banter.js');

/** What a page cannot but complain of while its server is away. */
const AWAY = [/WebSocket connection to .* failed/, /net::ERR_/];

suite('when things break', { env: { BANTER_GRACE: '5' } }, (scenario, banter) => {
  /** The whole of a channel, as the server has it. */
  const stored = async (key) => {
    const { token } = await banter().register('reader');
    const all = [];
    for (let after = 0; ; ) {
      const { json } = await banter().api('GET', `/channels/${key}/messages?after=${after}&limit=200`, { token });
      all.push(...json.messages.map((message) => JSON.parse(message)));
      if (json.messages.length < 200) return all;
      after = all.at(-1).id;
    }
  };
  const pending = (who) => who.$('#pending > .message').count();
  const talk = async (who, from, to) => {
    for (let i = from; i < to; i++) await who.say(`${who.name} ${i}`);
  };
  /** Both show the same, which is what is stored: each message once, in order. */
  const agree = async (key, people, count) => {
    for (const one of people) {
      await one.until((wanted) => document.querySelectorAll('#messages > .message').length === wanted && document.querySelectorAll('#pending > .message').length === 0, count);
    }
    const messages = await stored(key);
    assert.deepStrictEqual(messages.map(({ id }) => id), Array.from({ length: count }, (_, i) => i + 1));
    for (const one of people) assert.deepStrictEqual(await one.texts(), messages.map(({ message }) => message), one.name);
    for (const one of people) {
      const own = messages.filter(({ user }) => user === one.name).map(({ message }) => message);
      assert.deepStrictEqual(own, Array.from({ length: own.length }, (_, i) => `${one.name} ${i}`), `${one.name}'s in the order written`);
    }
  };

  scenario('a worker is killed, a line is cut, and the server restarted, while two people talk', async ({ person }) => {
    const [ann, bob] = [await person('ann', { on: 0 }), await person('bob', { on: 1 })];
    for (const one of [ann, bob]) {
      one.expected.push(...AWAY);
      await one.register();
    }
    await talk(ann, 0, 3);
    await talk(bob, 0, 3);
    await agree('general', [ann, bob], 6);

    const [first] = banter().workerNumbers();
    banter().kill9Worker(first);
    await talk(ann, 3, 6);
    await talk(bob, 3, 6);
    await agree('general', [ann, bob], 12);
    await ann.online();

    ann.proxy.cut();
    await ann.$('#chat[data-connection="reconnecting"]').waitFor();
    await talk(ann, 6, 9);
    assert.strictEqual(await pending(ann), 3, 'what is written meanwhile is shown as not sent yet');
    assert.match(await ann.$('#connection-text').textContent(), /reconnecting….*3 messages are kept/);
    assert.strictEqual(await ann.$('#connection-text').getAttribute('role'), 'status');
    await talk(bob, 6, 9);
    ann.proxy.mend();
    await agree('general', [ann, bob], 18);
    await ann.$('#connection').waitFor({ state: 'hidden' });

    const restarted = banter().restart();
    for (const one of [ann, bob]) await one.$('#chat[data-connection="reconnecting"]').waitFor();
    await talk(ann, 9, 11);
    await talk(bob, 9, 11);
    await restarted;
    await agree('general', [ann, bob], 22);
    for (const one of [ann, bob]) await one.until(() => document.querySelectorAll('#people .person').length === 2);
  });

  scenario('a post whose ack is lost is not sent twice', async ({ person, world }) => {
    const [cid, node] = [await person('cid'), await world.person('node')];
    cid.expected.push(...AWAY);
    await cid.register();
    const key = banter().key();
    await node.join(key);
    await cid.visit(`#/c/${key}`);
    await cid.online();
    cid.proxy.isMute = true;
    await cid.say('cid 0');
    await node.waitFor('message:post', ({ message }) => message === 'cid 0');
    assert.strictEqual(await pending(cid), 1);
    cid.proxy.cut();
    await cid.$('#chat[data-connection="reconnecting"]').waitFor();
    cid.proxy.mend();
    await cid.say('cid 1');
    await agree(key, [cid], 2);
  });

  scenario('what was not sent survives a reload, and is sent then', async ({ person }) => {
    const dot = await person('dot');
    dot.expected.push(...AWAY);
    await dot.register();
    const key = banter().key();
    await dot.visit(`#/c/${key}`);
    await dot.online();
    dot.proxy.cut();
    await dot.$('#chat[data-connection="reconnecting"]').waitFor();
    await talk(dot, 0, 2);
    dot.proxy.mend();
    dot.proxy.withoutSockets = true;
    await dot.page.reload();
    await dot.until(() => document.querySelectorAll('#pending > .message').length === 2);
    dot.proxy.mend();
    await agree(key, [dot], 2);
  });

  scenario('after a long absence the newest is there, and what was missed joins on without a hole', async ({ person, world }) => {
    const [eve, node] = [await person('eve'), await world.person('node')];
    eve.expected.push(...AWAY);
    await eve.register();
    const key = banter().key();
    await node.join(key);
    await eve.visit(`#/c/${key}`);
    await eve.online();
    await node.post(key, 'before');
    await eve.sees('before');
    eve.proxy.cut();
    await node.waitFor('user : quit', ({ username }) => username === 'eve', { deadline: 20_000 });
    await Promise.all(Array.from({ length: 260 }, (_, i) => node.post(key, `missed ${i}`)));
    eve.proxy.mend();
    await eve.sees('missed 259');
    const seen = await eve.page.evaluate(async () => {
      const ids = new Set();
      const scroller = document.getElementById('timeline');
      for (let turn = 0; turn < 600 && !ids.has(1); turn++) {
        for (const item of document.querySelectorAll('#messages > .message')) ids.add(Number(item.dataset.id));
        scroller.scrollTop -= 400;
        await new Promise((resolve) => setTimeout(resolve, 25));
      }
      return [...ids].sort((a, b) => a - b);
    });
    assert.deepStrictEqual(seen, Array.from({ length: 261 }, (_, i) => i + 1));
  });

  scenario('a server that was put back to an older state: what it has is shown, and one goes on from there', async ({ person }) => {
    const ira = await person('ira');
    ira.expected.push(...AWAY);
    await ira.register();
    const key = banter().key();
    await ira.visit(`#/c/${key}`);
    await ira.online();
    const copy = `${banter().stateDir}.copy`;
    const restart = async (before) => {
      await banter().terminate();
      before();
      banter().addresses = undefined;
      await banter().start();
      await ira.online();
    };
    await talk(ira, 0, 2);
    await agree(key, [ira], 2);
    await restart(() => fs.cpSync(banter().stateDir, copy, { recursive: true }));
    await ira.say('lost 1');
    await ira.say('lost 2');
    await ira.sees('lost 2');
    await restart(() => {
      fs.rmSync(banter().stateDir, { recursive: true });
      fs.renameSync(copy, banter().stateDir);
    });
    await ira.until(() => document.querySelectorAll('#messages > .message').length === 2);
    await talk(ira, 2, 4);
    await agree(key, [ira], 4);
  });

  scenario('a server that is too busy or refuses a message: it is tried again, or given back with the reason', async ({ person }) => {
    const fay = await person('fay');
    await fay.register();
    await fay.say('x'.repeat(20_000));
    await fay.$('.failed').waitFor();
    assert.match(await fay.$('.failed .failure p').textContent(), /20000 bytes, at most 16384/);
    await fay.$('.failed').getByText('Edit').click();
    assert.strictEqual((await fay.$('#message').inputValue()).length, 20_000);
    assert.strictEqual(await pending(fay), 0);
    await fay.$('#message').fill('shorter');
    await fay.page.keyboard.press('Enter');
    await fay.sees('shorter');
  });

  scenario('a login that is not valid any more leads to the form, with the reason', async ({ person }) => {
    const gil = await person('gil');
    gil.expected.push(/status of 401/);
    const now = Math.floor(Date.now() / 1000);
    const token = sign({ name: 'nobody', iat: now, exp: now + 1000 }, SECRET);
    await gil.context.addInitScript((login) => sessionStorage.setItem('banter.login', JSON.stringify(login)), { token, expires: Date.now() + 1e6 });
    await gil.visit();
    await gil.$('#welcome-note').filter({ hasText: 'expired' }).waitFor();
    assert.strictEqual(await gil.page.evaluate(() => sessionStorage.getItem('banter.login')), null);
  });
});

suite('limits', { env: { BANTER_POST_RATE: '5' } }, (scenario) => {
  scenario('who writes faster than the server allows loses nothing, nor the order', async ({ person }) => {
    const hal = await person('hal');
    await hal.register();
    await hal.page.evaluate(() => {
      const box = document.getElementById('message');
      for (let i = 0; i < 25; i++) {
        box.value = `hal ${i}`;
        document.getElementById('composer').requestSubmit();
      }
    });
    await hal.until(() => document.querySelectorAll('#messages > .message').length === 25 && document.querySelectorAll('#pending > .message').length === 0);
    assert.deepStrictEqual(await hal.texts(), Array.from({ length: 25 }, (_, i) => `hal ${i}`));
  });
});

'use strict';
// How the page looks and whether everybody can use it: pictures for people to look at (in target/browser), the
// rules of axe-core, and the keyboard alone.

const assert = require('node:assert');
const fs = require('node:fs');
const { suite } = require('./lib/browser.js');

const AXE = fs.readFileSync(require.resolve('axe-core/axe.min.js'), 'utf8');

const LEVELS = ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa', 'best-practice'];

/** Nothing may be found on the page as it is. */
async function assertAccessible(who, where, rules) {
  // While something fades in, its colours are others.
  await who.page.evaluate(() => Promise.all(document.getAnimations().filter(({ effect }) => effect.getTiming().iterations !== Infinity).map(({ finished }) => finished)));
  await who.page.evaluate(AXE);
  const { violations, passes } = await who.page.evaluate((runOnly) => window.axe.run({ runOnly }), rules);
  assert.ok(passes.length >= (rules === LEVELS ? 15 : 1), `axe looked at ${where}`);
  const found = violations.flatMap(({ id, impact, help, nodes }) => nodes.map(({ target, any }) => `${impact} ${id} (${help}): ${target} ${any.map(({ message }) => message).join(' ')}`));
  assert.deepStrictEqual(found, [], `what axe finds ${where}`);
}

const CONVERSATION = [
  [0, 'Morning! The **new build** is on the test machine: https://example.org/builds/142'],
  [0, 'Before lunch, please:\n- log in with an old account\n- open a channel with *long* history\n- pull the plug'],
  [1, '> pull the plug\n\nMy favourite kind of test 😄'],
  [1, 'It took **two seconds** to come back, and nothing was lost. This is what the log says:\n```\nworker 1  INFO  logged_in  user="ben"  resumed=true\n```'],
  [0, 'That is what I hoped for. @ben, can you try it on your phone as well?'],
  [1, 'On it. `make test` is green here, too.'],
  [0, '🎉'],
];

const WINDOWS = {
  phone: { viewport: { width: 390, height: 844 }, deviceScaleFactor: 2, isMobile: true, hasTouch: true },
  wide: { viewport: { width: 1280, height: 800 } },
};

suite('looks', {}, (scenario, banter) => {
  for (const [size, window] of Object.entries(WINDOWS)) {
    scenario(`${size}: pictures in light and dark, and nothing that axe finds fault with`, async ({ person, world }) => {
      const names = [`Ada${size}`, `Ben${size}`];
      const ada = await person(names[0], { ...window, colorScheme: 'light', reducedMotion: 'reduce' });
      const view = async (what) => {
        await ada.picture(`${size}-light-${what}`);
        await assertAccessible(ada, `${size}, light, ${what}`, LEVELS);
        await ada.page.emulateMedia({ colorScheme: 'dark' });
        await ada.picture(`${size}-dark-${what}`);
        // Only the colours are others.
        await assertAccessible(ada, `${size}, dark, ${what}`, ['color-contrast']);
        await ada.page.emulateMedia({ colorScheme: 'light' });
      };
      ada.expected.push(/status of 401/, /WebSocket connection to .* failed/, /net::ERR_/);
      await ada.visit();
      await view('login');
      await ada.$('#mode').click();
      await ada.$('#name').fill('x');
      await ada.$('#password').fill('y');
      await ada.$('#login-button').click();
      await view('register-error');
      await ada.enter();
      const { json } = await banter().api('POST', '/channels', { token: (await banter().register()).token, body: { name: `Releases ${size}` } });
      await ada.visit(`#/c/${json.key}/Releases`);
      await ada.page.reload();
      await ada.online();
      await view('empty');
      const ben = await world.client({ name: names[1], token: (await banter().api('POST', '/auth/register', { body: { name: names[1], password: 'correct horse' } })).json.token });
      await ben.open();
      await ben.join(json.key);
      await ben.join('random');
      for (const [who, text] of CONVERSATION) {
        if (who === 0) {
          await ada.say(text.replace('@ben', `@${names[1]}`));
          await ada.until(() => document.querySelectorAll('#pending > .message').length === 0);
        } else {
          await ben.post(json.key, text);
        }
      }
      await ada.until((count) => document.querySelectorAll('#messages > .message').length === count, CONVERSATION.length);
      await ben.post(json.key, `Looks good on mine, @${names[0]}`);
      await ben.emitAck('user : status_changed', { channel: json.key, status: 'away' });
      ben.emit('channel:typing', { channel: json.key });
      await ada.until(() => document.getElementById('typing').textContent !== '');
      await view('chat');
      if (size === 'phone') {
        await ada.$('#to-channels').click();
        await view('channels');
        await ada.page.keyboard.press('Escape');
        await ada.$('.channel[aria-current]').click();
        await ada.$('#to-people').click();
        await view('people');
        await ada.$('#from-people').click();
      }
      const dialog = async (what, open) => {
        await open();
        await view(what);
        await ada.page.keyboard.press('Escape');
      };
      await dialog('share', () => ada.$('#share').click());
      await dialog('leave', () => ada.$('#leave').click());
      await dialog('emoji', () => ada.$('#emoji-button').click());
      if (size === 'phone') await ada.$('#to-channels').click();
      await dialog('settings', () => ada.$('#me').click());
      await dialog('new-channel', () => ada.$('#new-channel').click());
      await dialog('join', () => ada.$('#join-key').click());
      if (size === 'phone') await ada.$('.channel[aria-current]').click();
      ada.proxy.cut();
      await ada.$('#connection').waitFor();
      await ada.say('This waits until the connection is back.');
      await ada.$('#pending > .message').waitFor();
      await view('reconnecting');
      ada.proxy.mend();
      await ada.sees('This waits');
      await ada.say('y'.repeat(17_000));
      await ada.$('.failed').waitFor();
      await view('failed');
      // The switch wins over the system.
      const ground = () => ada.page.evaluate(() => getComputedStyle(document.body).backgroundColor);
      const before = await ground();
      if (size === 'phone') await ada.$('#to-channels').click();
      await ada.$('#me').click();
      await ada.$('#settings-dialog').getByLabel('Dark').check();
      assert.notStrictEqual(await ground(), before);
      await ada.page.reload();
      await ada.online();
      assert.notStrictEqual(await ground(), before, 'and is remembered');
      // Nothing moves for who does not want it.
      assert.strictEqual(await ada.page.evaluate(() => document.getAnimations().length), 0);
      // Nothing is wider than the window, and at twice the size of text neither.
      const surplus = () => ada.page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
      assert.ok(await surplus() <= 0);
      await ada.page.evaluate(() => { document.documentElement.style.zoom = '2'; });
      assert.ok(await surplus() <= 0);
    });
  }

  scenario('with the keyboard alone: register, talk, make a channel, go back, log out; the focus is always seen', async ({ person }) => {
    const eve = await person('eve');
    const { keyboard } = eve.page;
    const focus = () => eve.page.evaluate(() => {
      const { activeElement: node } = document;
      const style = getComputedStyle(node);
      const box = node.closest('form.composer') ?? node;
      const visible = style.outlineStyle !== 'none' || getComputedStyle(box).boxShadow !== 'none' || node.matches('h1') || getComputedStyle(node.nextElementSibling ?? node).outlineStyle !== 'none';
      return { id: node.id || node.dataset.key || node.textContent.trim(), visible };
    });
    const visited = [];
    /** Presses Tab until this has the focus. */
    const tabTo = async (wanted, back = false) => {
      for (let i = 0; i < 40; i++) {
        const { id, visible } = await focus();
        visited.push(id);
        assert.ok(visible, `the focus is seen on ${id}`);
        if (id === wanted) return;
        await keyboard.press(back ? 'Shift+Tab' : 'Tab');
      }
      assert.fail(`${wanted} is not reached by Tab: ${visited.slice(-40)}`);
    };
    await eve.visit();
    await tabTo('mode');
    await keyboard.press('Enter');
    assert.strictEqual((await focus()).id, 'name');
    await keyboard.type('eve');
    await keyboard.press('Tab');
    await keyboard.type('correct horse');
    await keyboard.press('Enter');
    await eve.online();
    assert.strictEqual((await focus()).id, 'message', 'one can write at once');
    await keyboard.type('First');
    await keyboard.press('Shift+Enter');
    await keyboard.type('**second**');
    await keyboard.press('Enter');
    await eve.sees('second');
    // Around the page: every control, in an order that makes sense, and out again.
    await tabTo('Skip to the message box', true);
    const order = [];
    for (let i = 0; i < 30; i++) {
      const { id, visible } = await focus();
      assert.ok(visible, `the focus is seen on ${id}`);
      order.push(id);
      if (id === 'send') break;
      await keyboard.press('Tab');
    }
    assert.deepStrictEqual(order.filter((id) => !id.startsWith('Releases')), ['Skip to the message box', 'General', 'Programming', 'Random', 'new-channel', 'join-key', 'me', 'share', 'timeline', 'message', 'emoji-button', 'send']);
    // The first leads past all of it.
    await tabTo('Skip to the message box', true);
    await keyboard.press('Enter');
    assert.strictEqual((await focus()).id, 'message');
    assert.strictEqual(await eve.$('#room-name').textContent(), 'General', 'and stays in the channel');
    // A dialog keeps the focus, and gives it back.
    await tabTo('new-channel', true);
    await keyboard.press('Enter');
    assert.strictEqual((await focus()).id, 'new-name');
    for (let i = 0; i < 8; i++) {
      await keyboard.press('Tab');
      assert.ok(await eve.page.evaluate(() => document.activeElement === document.body || document.getElementById('new-dialog').contains(document.activeElement)), 'the focus stays in the dialog');
    }
    await keyboard.press('Escape');
    assert.strictEqual((await focus()).id, 'new-channel');
    await keyboard.press('Enter');
    await keyboard.type('By keyboard');
    await keyboard.press('Enter');
    await eve.until(() => document.getElementById('room-name').textContent === 'By keyboard' && /here/.test(document.getElementById('room-note').textContent));
    assert.strictEqual((await focus()).id, 'message');
    await keyboard.press('Alt+ArrowUp');
    await eve.until(() => document.getElementById('room-name').textContent === 'General');
    // The emoji by arrows.
    await tabTo('emoji-button');
    await keyboard.press('Enter');
    assert.strictEqual((await focus()).id, 'emoji-search');
    for (const key of ['ArrowDown', 'ArrowRight', 'ArrowDown', 'ArrowLeft', 'Enter']) await keyboard.press(key);
    assert.match(await eve.$('#message').inputValue(), /\p{Extended_Pictographic}/u);
    assert.strictEqual((await focus()).id, 'message');
    // What comes is read out, but not what one reads oneself; history is not.
    const live = await eve.page.evaluate(() => [document.getElementById('announcer').ariaLive, document.getElementById('timeline').ariaLive]);
    assert.deepStrictEqual(live, ['polite', 'off']);
    await tabTo('me', true);
    await keyboard.press('Enter');
    await tabTo('log-out');
    await keyboard.press('Enter');
    await eve.$('#welcome').waitFor();
    assert.strictEqual((await focus()).id, 'name');
  });

  scenario('what is said is read out once, with who said it', async ({ person, world }) => {
    const [fay, node] = [await person('fay'), await world.person('node')];
    await fay.register();
    await node.join('general');
    await fay.page.evaluate(() => {
      window.heard = [];
      new MutationObserver((changes) => changes.forEach(({ addedNodes }) => addedNodes.forEach((added) => window.heard.push(added.textContent)))).observe(document.getElementById('announcer'), { childList: true });
    });
    await node.post('general', 'hello *there*');
    await fay.say('my own');
    await fay.sees('my own');
    await fay.sees('hello there');
    assert.deepStrictEqual(await fay.page.evaluate(() => window.heard), [`${node.name}: hello *there*`]);
  });
});

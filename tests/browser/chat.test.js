'use strict';
// Two people through the whole of the page, on two workers.

const assert = require('node:assert');
const { suite } = require('./lib/browser.js');

suite('the page', {}, (scenario, banter) => {
  scenario('one registers, is corrected on the way, stays logged in over a reload, and logs out', async ({ person }) => {
    const ann = await person('ann');
    ann.expected.push(/status of 40[019]/);
    await ann.visit();
    assert.strictEqual(await ann.page.evaluate(() => document.activeElement.id), 'name', 'the first field has the focus');
    // Not an account yet.
    await ann.$('#name').fill('ann');
    await ann.$('#password').fill('wrong horse');
    await ann.$('#login-button').click();
    await ann.until(() => document.getElementById('login-error').textContent.length > 0);
    assert.strictEqual(await ann.$('#chat').isVisible(), false);
    // What can be said without the server is said at once, at its field.
    await ann.$('#mode').click();
    await ann.$('#name').fill('an n');
    await ann.$('#login-button').click();
    assert.match(await ann.$('#login-error').textContent(), /3 to 32 letters and digits/);
    assert.strictEqual(await ann.$('#name').getAttribute('aria-invalid'), 'true');
    await ann.$('#name').fill('ann');
    await ann.$('#password').fill('short');
    await ann.$('#login-button').click();
    assert.match(await ann.$('#login-error').textContent(), /6 characters/);
    await ann.enter({ stay: true });
    assert.strictEqual(await ann.$('#room-name').textContent(), 'General');
    assert.match(await ann.$('#beginning').textContent(), /Nobody has said anything in General yet/);
    await ann.page.reload();
    await ann.online();
    // In another tab as well: it was to stay.
    assert.ok(await ann.page.evaluate(() => localStorage.getItem('banter.login')?.includes('token')));
    await ann.$('#me').click();
    await ann.$('#log-out').click();
    await ann.$('#welcome').waitFor();
    await ann.page.reload();
    await ann.$('#welcome').waitFor();
    assert.strictEqual(await ann.page.evaluate(() => [...Object.values(localStorage), ...Object.values(sessionStorage)].some((value) => value.includes('token'))), false, 'no token is left');
    // Without "stay" it is this tab's alone.
    await ann.logIn();
    assert.strictEqual(await ann.page.evaluate(() => localStorage.getItem('banter.login')), null);
    // The name is taken by now.
    const other = await person('ann', { on: 1 });
    other.expected.push(/status of 409/);
    await other.visit();
    await other.$('#mode').click();
    await other.$('#name').fill('ann');
    await other.$('#password').fill('another horse');
    await other.$('#login-button').click();
    await other.until(() => /exists/.test(document.getElementById('login-error').textContent));
  });

  scenario('two people on two workers talk, with Markdown and emoji, and see each other', async ({ person }) => {
    const [cid, dot] = [await person('cid', { on: 0 }), await person('dot', { on: 1 })];
    await cid.register();
    await dot.register();
    const people = (who) => who.page.evaluate(() => [...document.querySelectorAll('#people .person')].map((one) => one.innerText.replace(/\s+/g, ' ')));
    await cid.until(() => document.querySelectorAll('#people .person').length === 2);
    assert.deepStrictEqual((await people(cid)).map((line) => line.replace(/^../, '').trim()), ['cid you', 'dot']);
    await cid.say('Hello **bold** *italic* `code` ~~gone~~ https://example.org/a_b_c?d=(e).');
    const hello = await dot.sees('Hello');
    assert.deepStrictEqual(
      await hello.locator('.body').evaluate((body) => [...body.querySelectorAll('strong, em, code, s, a')].map((node) => [node.localName, node.textContent])),
      [['strong', 'bold'], ['em', 'italic'], ['code', 'code'], ['s', 'gone'], ['a', 'https://example.org/a_b_c?d=(e)']],
    );
    assert.strictEqual(await hello.locator('a').getAttribute('rel'), 'noopener noreferrer nofollow');
    await dot.say('> quoted\n> twice\nand\n- one\n- two\n```\nlet x = "<b>";\n```');
    const quoted = await cid.sees('quoted');
    assert.deepStrictEqual(
      await quoted.locator('.body').evaluate((body) => [...body.children].map((node) => [node.localName, node.textContent])),
      [['blockquote', 'quoted\ntwice'], ['p', 'and'], ['ul', 'onetwo'], ['pre', 'let x = "<b>";']],
    );
    // Emoji: by its name as it is written, and from the picker with the keyboard.
    await dot.$('#message').pressSequentially('well :tada:');
    assert.strictEqual(await dot.$('#message').inputValue(), 'well 🎉');
    await cid.until(() => document.getElementById('typing').textContent === 'dot is typing…');
    await dot.$('#message').press('Enter');
    await cid.sees('well 🎉');
    await cid.until(() => document.getElementById('typing').textContent === '');
    await cid.$('#emoji-button').click();
    await cid.$('#emoji-search').fill('rocket');
    await cid.page.keyboard.press('Enter');
    await cid.page.keyboard.press('Enter');
    await dot.sees('🚀');
    assert.strictEqual(await dot.$('#messages .jumbo').count(), 1, 'emoji alone are large');
    // Away, by choice.
    await dot.$('#me').click();
    await dot.$('#settings-dialog').getByLabel('Away').check();
    await dot.$('#settings-dialog').getByText('Done').click();
    await cid.until(() => document.querySelector('#people .person.away .person-name')?.textContent === 'dot');
    assert.match(await cid.$('#room-note').textContent(), /2 here, 1 away/);
    // Whoever comes later sees it too.
    await cid.page.reload();
    await cid.online();
    await cid.until(() => document.querySelector('#people .person.away .person-name')?.textContent === 'dot');
    // Gone.
    await dot.check();
    await dot.context.close();
    await cid.until(() => document.querySelectorAll('#people .person').length === 1);
    dot.check = async () => {};
  });

  scenario('channels: made, shared by a link, joined by a key, left', async ({ person }) => {
    const [eve, fay] = [await person('eve', { on: 0 }), await person('fay', { on: 1 })];
    await eve.register();
    await fay.register();
    await eve.$('#new-channel').click();
    await eve.$('#new-form button.primary').click();
    assert.match(await eve.$('#new-error').textContent(), /name/);
    await eve.$('#new-name').fill('Gardening <b>');
    await eve.$('#new-form button.primary').click();
    await eve.until(() => document.getElementById('room-name').textContent === 'Gardening <b>' && /here/.test(document.getElementById('room-note').textContent));
    await fay.page.reload();
    await fay.online();
    await fay.open('Gardening <b>');
    await fay.say('Tomatoes?');
    await eve.sees('Tomatoes?');
    // A private one is listed nowhere; its link is the way in.
    await eve.$('#new-channel').click();
    await eve.$('#new-name').fill('Secret plans');
    await eve.$('#new-form').getByText('Who has the link').click();
    await eve.$('#new-form button.primary').click();
    await eve.until(() => document.getElementById('room-name').textContent === 'Secret plans' && /Private/.test(document.getElementById('room-note').textContent));
    await eve.say('Nobody knows');
    await eve.sees('Nobody knows');
    await eve.$('#share').click();
    const link = await eve.$('#share-link').inputValue();
    await eve.page.keyboard.press('Escape');
    const key = /#\/c\/([A-Za-z0-9_-]{43})\//.exec(link)?.[1];
    assert.ok(key, `a key of 32 bytes in ${link}`);
    const { json } = await banter().api('GET', '/channels', { token: (await banter().register('gil')).token });
    assert.ok(!json.channels.some((channel) => channel.key === key), 'not in the list');
    // The fragment goes to no server, not even to this one, nor along with a link that is followed.
    assert.ok(new URL(link).pathname === '/' && new URL(link).search === '');
    await fay.visit(new URL(link).hash);
    await fay.online();
    await fay.sees('Nobody knows');
    assert.strictEqual(await fay.$('#room-name').textContent(), 'Secret plans');
    await fay.say('I do');
    await eve.sees('I do');
    // By the key alone.
    const hal = await person('hal', { on: 1 });
    await hal.register();
    await hal.$('#join-key').click();
    await hal.$('#join-value').fill(key);
    await hal.$('#join-name').fill('Plans');
    await hal.page.keyboard.press('Enter');
    await hal.sees('I do');
    assert.strictEqual(await hal.$('#room-name').textContent(), 'Plans');
    // Left: no more of it, and nobody sees one there.
    await eve.until(() => document.querySelectorAll('#people .person').length === 3);
    await hal.$('#leave').click();
    await hal.$('#leave-confirm').click();
    await hal.until(() => document.getElementById('room-name').textContent === 'General');
    assert.strictEqual(await hal.$('.channel').filter({ hasText: 'Plans' }).count(), 0);
    await eve.until(() => document.querySelectorAll('#people .person').length === 2);
    await hal.page.reload();
    await hal.online();
    assert.strictEqual(await hal.$('.channel').filter({ hasText: 'Plans' }).count(), 0);
  });

  scenario('what is unread is marked: in the list, in the title, in the timeline, and by notifications that one asked for', async ({ person }) => {
    const [ivy, joe] = [await person('ivy', { on: 0 }), await person('joe', { on: 1 })];
    await ivy.context.grantPermissions(['notifications'], { origin: new URL(ivy.proxy.url).origin });
    await ivy.register();
    await joe.register();
    await ivy.open('Random');
    for (let i = 0; i < 40; i++) await joe.say(`Number ${i}`);
    await joe.sees('Number 39');
    await ivy.until(() => document.title === '(40) Random – Banter');
    const general = ivy.$('.channel').filter({ hasText: 'General' });
    assert.match(await general.innerText(), /40/);
    assert.match(await ivy.$('link[rel="icon"]').getAttribute('href'), /favicon-unread/);
    await ivy.open('General');
    // The first unread message is in view, with a line above it.
    await ivy.until(() => document.title === 'General – Banter' || document.querySelector('.unread-line'));
    const at = await ivy.$('.unread-line').evaluate((line) => [line.parentElement.innerText, line.getBoundingClientRect().top]);
    assert.match(at[0], /Number 0/);
    assert.ok(at[1] > 0 && at[1] < 700, `in view: ${at[1]}`);
    await ivy.$('#to-end').click();
    await ivy.until(() => document.title === 'General – Banter');
    // Looking elsewhere: the title counts, and nothing pops up that nobody asked for.
    await ivy.look(false);
    await joe.say('Are you there?');
    await ivy.until(() => document.title === '(1) General – Banter');
    assert.deepStrictEqual(await ivy.page.evaluate(() => [window.watched.asked, window.watched.notifications]), [0, []]);
    await ivy.look(true);
    await ivy.until(() => document.title === 'General – Banter');
    await ivy.$('#me').click();
    await ivy.$('#notifications').check();
    await ivy.until(() => window.watched.asked === 1);
    await ivy.$('#settings-dialog').getByText('Done').click();
    await ivy.look(false);
    await joe.say('And now, @ivy?');
    await ivy.until(() => window.watched.notifications.length === 1);
    const [shown] = await ivy.page.evaluate(() => window.watched.notifications);
    assert.strictEqual(shown.title, 'joe in General');
    assert.strictEqual(shown.body, 'And now, @ivy?');
    await ivy.look(true);
    assert.strictEqual(await ivy.$('.mentions-me').count(), 1, 'a mention stands out');
    // A reload forgets nothing of what was read.
    await ivy.page.reload();
    await ivy.online();
    assert.strictEqual(await ivy.page.title(), 'General – Banter');
  });

  scenario('a second window of the same person can take over, and the first one back', async ({ person }) => {
    const kim = await person('kim');
    await kim.register({ stay: true });
    const second = await kim.context.newPage();
    await second.goto(kim.proxy.url);
    await second.locator('#connection-text').filter({ hasText: 'connected in another window' }).waitFor();
    await second.locator('#connection-action').click();
    await second.locator('#chat[data-connection="online"]').waitFor();
    await kim.$('#chat[data-connection="elsewhere"]').waitFor();
    await second.locator('#message').fill('from the second');
    await second.locator('#message').press('Enter');
    await kim.$('#connection-action').click();
    await kim.online();
    await kim.sees('from the second');
    await second.locator('#chat[data-connection="elsewhere"]').waitFor();
    // Logging out is meant for all of them.
    await kim.$('#me').click();
    await kim.$('#log-out').click();
    await second.locator('#welcome').waitFor();
  });

  scenario('what was begun in one channel waits there', async ({ person }) => {
    const lea = await person('lea');
    await lea.register();
    await lea.$('#message').fill('half a thought');
    await lea.open('Random');
    assert.strictEqual(await lea.$('#message').inputValue(), '');
    await lea.open('General');
    assert.strictEqual(await lea.$('#message').inputValue(), 'half a thought');
  });
});

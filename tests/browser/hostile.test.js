'use strict';
// Messages and names by which somebody tries to do what they must not.

const assert = require('node:assert');
const { suite } = require('./lib/browser.js');

/** Raw messages, as any client can post them. */
const MESSAGES = [
  '<script>window.pwned = 1</script>',
  '<img src=x onerror="window.pwned = 2"><svg onload="window.pwned = 3">',
  '<iframe srcdoc="<script>parent.pwned = 4</script>"></iframe>',
  '<style>* { display: none }</style><base href="https://evil.example/"><meta http-equiv=refresh content="0;url=https://evil.example/">',
  '"><a href="javascript:window.pwned = 5">x</a>',
  '[click](javascript:window.pwned=6) [click](JaVaScRiPt:window.pwned=7) [x](data:text/html,<script>8</script>)',
  '[click](java\tscript:window.pwned=9) [click](vbscript:x) [click](file:///etc/passwd) [click](//evil.example)',
  'javascript:window.pwned=10 data:text/html,hello blob:https://x/y',
  '[https://bank.example](https://evil.example/)',
  '![image](https://evil.example/pixel.png)',
  'https://user:password@evil.example/ http:// https://[::1 http://%zz mailto: mailto:a@b.example',
  '\u202e\u202dreversed \u2066 isolated \u200fmarks',
  'שלום עולם, how are you? مرحبا',
  '\u200b\u200c\u200d\ufeff\u2060',
  `Z${'\u0310\u0311\u0312\u0313\u0340\u0356'.repeat(300)}algo`,
  'x'.repeat(16_000),
  '﷽'.repeat(200),
  Array(2_000).fill('line').join('\n'),
  'null\u0000byte \u001b[31mescape\u0007',
  '```\n</code></pre><script>window.pwned = 11</script>\n```',
  '`<script>window.pwned = 12</script>`',
  '> > > > > > > > deep',
  '**unclosed *and `nested ~~things',
  '__proto__ constructor hasOwnProperty :__proto__: :constructor:',
  '@__proto__ @toString',
];

/** Texts of which a careless parser makes much work. */
const SLOW = [
  '*'.repeat(16_000),
  '_a'.repeat(8_000),
  '**a *b '.repeat(2_000),
  '['.repeat(16_000),
  '[a]('.repeat(4_000),
  '[](https://a'.repeat(1_300),
  '`'.repeat(16_000),
  Array.from({ length: 170 }, (_, i) => '`'.repeat(i)).join(' '),
  '> '.repeat(8_000),
  '>\n'.repeat(8_000),
  '```\n'.repeat(4_000),
  '- \n'.repeat(5_000),
  `https://a/${')'.repeat(16_000)}`,
  'https://a('.repeat(1_600),
  ':a'.repeat(8_000),
  '@abc'.repeat(4_000),
  '\n'.repeat(16_000) + 'x',
  '\\*'.repeat(8_000),
  'http'.repeat(4_000),
];

suite('hostile messages', {}, (scenario, banter) => {
  scenario('are text: nothing runs, loads, leads astray or breaks the page', async ({ person, world }) => {
    const node = await world.person('node');
    const mallory = await world.person('mallory');
    const key = banter().key();
    await node.join(key);
    for (const message of MESSAGES) await node.post(key, message);
    const ann = await person('ann', { viewport: { width: 390, height: 844 } });
    let dialogs = 0;
    ann.page.on('dialog', (dialog) => {
      dialogs += 1;
      dialog.dismiss();
    });
    await ann.register();
    await ann.visit(`#/c/${key}`);
    await ann.online();
    await ann.sees('toString');
    // The rest come while it is open.
    await mallory.join(key);
    for (const message of MESSAGES) await mallory.post(key, message);
    await ann.until((count) => document.querySelectorAll('#messages > .message').length === count, 2 * MESSAGES.length);
    for (const open of await ann.$('.unfold').all()) await open.click();
    await ann.page.waitForTimeout(200);
    const found = await ann.page.evaluate(() => {
      const allowed = new Set('P STRONG EM S CODE PRE A BLOCKQUOTE UL OL LI SPAN'.split(' '));
      const inside = [...document.querySelectorAll('#messages .body *')];
      const scroller = document.getElementById('timeline');
      const items = [...document.querySelectorAll('#messages > .message')];
      return {
        pwned: window.pwned,
        elements: inside.map((node) => node.nodeName).filter((name) => !allowed.has(name)),
        attributes: [...new Set(inside.flatMap((node) => [...node.attributes].map(({ name }) => name)))].sort(),
        links: [...new Set([...document.querySelectorAll('#messages a')].map((a) => `${a.textContent} → ${a.href} ${a.title === a.href} ${a.rel}`))].sort(),
        wide: scroller.scrollWidth - scroller.clientWidth,
        page: document.documentElement.scrollWidth - innerWidth,
        // What a message draws stays within it, however its marks are piled up.
        clipped: items.every((item) => getComputedStyle(item.querySelector('.body')).overflowX !== 'visible'),
        blank: items.filter((item) => item.querySelector('.blank')).length,
        proto: document.getElementById('messages').textContent.includes(':__proto__: :constructor:'),
        address: location.href,
      };
    });
    assert.strictEqual(found.pwned, undefined);
    assert.strictEqual(dialogs, 0);
    assert.deepStrictEqual(found.elements, []);
    assert.deepStrictEqual(found.attributes, ['class', 'dir', 'href', 'referrerpolicy', 'rel', 'tabindex', 'target', 'title']);
    const links = [
      'https://evil.example/ → https://evil.example/',
      'https://x/y → https://x/y',
      'image → https://evil.example/pixel.png',
      'mailto:a@b.example → mailto:a@b.example',
    ];
    assert.deepStrictEqual(found.links, links.map((link) => `${link} true noopener noreferrer nofollow`), 'links lead where they say, to nothing but web pages and mail');
    assert.ok(found.wide <= 0 && found.page <= 0, `nothing is wider than the window: ${found.wide} ${found.page}`);
    assert.ok(found.clipped);
    assert.strictEqual(found.blank, 2, 'a message without anything visible says so');
    assert.ok(found.proto);
    assert.ok(found.address.startsWith(ann.proxy.url));
    await ann.picture('hostile');
  });

  scenario('half a surrogate pair, typed, is sent as what it becomes', async ({ person }) => {
    const bob = await person('bob');
    await bob.register();
    await bob.page.evaluate(() => {
      document.getElementById('message').value = 'half \ud83d and \udc00';
      document.getElementById('composer').requestSubmit();
    });
    await bob.sees('half \ufffd and \ufffd');
    assert.strictEqual(await bob.$('#pending > .message').count(), 0);
  });

  scenario('names of channels and links are text too', async ({ person }) => {
    const cid = await person('cid');
    await cid.register();
    const { token } = await banter().register('evil');
    const name = '<img src=x onerror=pwned=1>\u202e"\'';
    await banter().api('POST', '/channels', { token, body: { name } });
    await cid.page.reload();
    await cid.online();
    await cid.$('.channel').filter({ hasText: '<img' }).click();
    await cid.until((wanted) => document.getElementById('room-name').textContent === wanted, name);
    for (const hash of ['#/c/%ff', '#/c/', '#/c/a/b/c', '#/c/<script>', `#/c/${'k'.repeat(129)}`, '#/c/__proto__', '#/c/%3Cimg%20src%3Dx%3E/%3Cscript%3E']) {
      await cid.visit(hash);
      await cid.page.reload();
      await cid.$('#chat[data-connection="online"]').waitFor();
    }
    await cid.visit(`#/c/${'k'.repeat(129)}`);
    await cid.page.reload();
    await cid.$('#beginning .error').filter({ hasText: '128 characters' }).waitFor();
    assert.strictEqual(await cid.page.evaluate(() => window.pwned), undefined);
  });

  scenario('Markdown: what is one and what is none, and no text takes long', async ({ person }) => {
    const dot = await person('dot');
    await dot.visit();
    const folder = (await dot.$('script[type=module]').getAttribute('src')).replace('app.js', '');
    const results = await dot.page.evaluate(async ([at, slow]) => {
      const { render } = await import(new URL(`${at}markdown.js`, location.href));
      const html = (text) => {
        const box = document.createElement('div');
        box.append(render(text, 'dot'));
        for (const link of box.querySelectorAll('a')) for (const { name } of [...link.attributes]) if (name !== 'href') link.removeAttribute(name);
        for (const node of box.querySelectorAll('[dir], [tabindex]')) {
          node.removeAttribute('dir');
          node.removeAttribute('tabindex');
        }
        return box.innerHTML;
      };
      const took = slow.map((text) => {
        const start = performance.now();
        render(text, 'dot');
        return [text.slice(0, 12), Math.round(performance.now() - start)];
      });
      const texts = [
        'a *b* _c_ **d** ~~e~~', 'snake_case_name and 2*3*4', '**a *b* c**', '**a *b** c*', '* not a list', '`a *b*`', '``a ` b``',
        '[t](https://a.example/x_(y)', '(see https://a.example/b).', 'https://a.example/b*', '\\*a\\*', 'a\nb', 'a\n\nb', '1. x\n2. y', '3) z',
        '> a\n> - b', '```js\na\n```', '```a```', '```\nopen', '@dot @dotty', ':smile: :nope: `:smile:`', '',
      ];
      return { took, rendered: texts.map((text) => [text, html(text)]) };
    }, [folder, SLOW]);
    for (const [text, time] of results.took) assert.ok(time < 1_000, `${text}… took ${time} ms`);
    const wanted = {
      'a *b* _c_ **d** ~~e~~': '<p>a <em>b</em> <em>c</em> <strong>d</strong> <s>e</s></p>',
      'snake_case_name and 2*3*4': '<p>snake_case_name and 2<em>3</em>4</p>',
      '**a *b* c**': '<p><strong>a <em>b</em> c</strong></p>',
      '**a *b** c*': '<p><strong>a *b</strong> c*</p>',
      '* not a list': '<ul><li>not a list</li></ul>',
      '`a *b*`': '<p><code>a *b*</code></p>',
      '``a ` b``': '<p><code>a ` b</code></p>',
      '[t](https://a.example/x_(y)': '<p><a href="https://a.example/x_(y">t</a></p>',
      '(see https://a.example/b).': '<p>(see <a href="https://a.example/b">https://a.example/b</a>).</p>',
      'https://a.example/b*': '<p><a href="https://a.example/b">https://a.example/b</a>*</p>',
      '\\*a\\*': '<p>*a*</p>',
      'a\nb': '<p>a\nb</p>',
      'a\n\nb': '<p>a</p><p>b</p>',
      '1. x\n2. y': '<ol start="1"><li>x</li><li>y</li></ol>',
      '3) z': '<ol start="3"><li>z</li></ol>',
      '> a\n> - b': '<blockquote><p>a</p><ul><li>b</li></ul></blockquote>',
      '```js\na\n```': '<pre><code>a</code></pre>',
      '```a```': '<pre><code>a</code></pre>',
      '```\nopen': '<p>```\nopen</p>',
      '@dot @dotty': '<p><span class="mention mine">@dot</span> <span class="mention">@dotty</span></p>',
      ':smile: :nope: `:smile:`': '<p>😄 :nope: <code>:smile:</code></p>',
      '': '',
    };
    for (const [text, html] of results.rendered) assert.strictEqual(html, wanted[text], text);
  });
});

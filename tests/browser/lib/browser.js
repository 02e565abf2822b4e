'use strict';
// A real browser, headless, and people who sit before it. What a page must never do is watched for in every
// test: errors, violations of its Content-Security-Policy, requests to anybody but its own server.

const assert = require('node:assert');
const fs = require('node:fs');
const path = require('node:path');
const { after } = require('node:test');
const { chromium } = require('playwright-core');
const { suite: clientSuite } = require('../../clients/lib/suite.js');
const { Proxy } = require('./proxy.js');

const CHROMIUM = process.env.CHROMIUM ?? '/usr/bin/chromium';
const ARGS = [
  '--headless', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
  '--disable-component-update', '--disable-sync', '--lang=en-GB',
  // As root, as in a container, there is no sandbox.
  ...(process.getuid() === 0 ? ['--no-sandbox'] : []),
];
/** How long a page may take over anything: the machine may be busy. Milliseconds. */
const PATIENCE = 20_000;
/** Pictures of the page are left here. */
const PICTURES = path.resolve(__dirname, '../../../target/browser');

/** What runs in a page before its own scripts. */
function watchPage() {
  window.watched = { violations: [], notifications: [], asked: 0 };
  document.addEventListener('securitypolicyviolation', (event) => {
    window.watched.violations.push(`${event.violatedDirective}: ${event.blockedURI} ${event.sample}`);
  });
  // Notifications cannot be seen in a browser without a desktop.
  const { Notification: Real } = window;
  if (Real) {
    window.Notification = class {
      constructor(title, options) {
        window.watched.notifications.push({ title, ...options });
      }

      close() {}

      static get permission() {
        return Real.permission;
      }

      static requestPermission() {
        window.watched.asked += 1;
        return Real.requestPermission();
      }
    };
  }
  // Whether somebody looks at the window, which the browser always says of a headless one.
  let looking = true;
  Object.defineProperty(Document.prototype, 'hidden', { get: () => !looking });
  Document.prototype.hasFocus = () => looking;
  window.look = (now) => {
    looking = now;
    document.dispatchEvent(new Event('visibilitychange'));
  };
}

/** Somebody at a window of their own, connected by a way of their own. */
class Person {
  constructor({ name, context, page, proxy }) {
    Object.assign(this, { name, context, page, proxy });
    this.password = `secret of ${name}`;
    this.errors = [];
    /** Patterns of errors that belong to the test, such as a server that is away. */
    this.expected = [];
    page.setDefaultTimeout(PATIENCE);
    page.on('pageerror', (error) => this.errors.push(`uncaught: ${error.stack}`));
    page.on('console', (message) => {
      if (['error', 'warning'].includes(message.type())) this.errors.push(`${message.type()}: ${message.text()} (${message.location().url})`);
    });
    page.on('request', (request) => {
      const url = new URL(request.url());
      const own = url.origin === new URL(proxy.url).origin || url.protocol === 'data:' || url.protocol === 'blob:';
      if (!own) this.errors.push(`a request to ${url.href}`);
    });
  }

  $(selector) {
    return this.page.locator(selector);
  }

  async visit(hash = '') {
    await this.page.goto(this.proxy.url + hash);
  }

  /** Makes an account by the page, and waits until it is connected. */
  async register({ stay = false } = {}) {
    await this.visit();
    await this.$('#mode').click();
    await this.enter({ stay });
  }

  async logIn({ stay = false } = {}) {
    await this.visit();
    await this.enter({ stay });
  }

  async enter({ stay = false } = {}) {
    await this.$('#name').fill(this.name);
    await this.$('#password').fill(this.password);
    if (stay) await this.$('#stay').check();
    await this.$('#login-button').click();
    await this.online();
  }

  async online() {
    await this.$('#chat[data-connection="online"]').waitFor();
    await this.page.waitForFunction(() => !/Opening/.test(document.getElementById('room-note').textContent));
  }

  async say(text) {
    await this.$('#message').fill(text);
    await this.$('#message').press('Enter');
  }

  /** Waits for a message with this text (as it is shown), stored and in the list. */
  async sees(text) {
    const message = this.$('#messages > .message').filter({ hasText: text });
    await message.first().waitFor();
    return message;
  }

  /** The texts in the list, as they are shown. */
  texts() {
    return this.page.evaluate(() => [...document.querySelectorAll('#messages .body')].map((body) => body.innerText));
  }

  async open(channel) {
    await this.$('.channel').filter({ hasText: channel }).click();
    await this.page.waitForFunction((name) => document.getElementById('room-name').textContent === name && !/Opening/.test(document.getElementById('room-note').textContent), channel);
  }

  /** Waits until this is so in the page. */
  until(condition, argument) {
    return this.page.waitForFunction(condition, argument, { timeout: PATIENCE });
  }

  look(now) {
    return this.page.evaluate((looking) => window.look(looking), now);
  }

  picture(file) {
    fs.mkdirSync(PICTURES, { recursive: true });
    return this.page.screenshot({ path: path.join(PICTURES, `${file}.png`), animations: 'disabled' });
  }

  async check() {
    const { violations } = await this.page.evaluate(() => window.watched);
    assert.deepStrictEqual(violations, [], `${this.name}: violations of the policy`);
    const unexpected = this.errors.filter((error) => !this.expected.some((pattern) => pattern.test(error)));
    assert.deepStrictEqual(unexpected, [], `${this.name}: errors of the page`);
  }
}

/**
 * A group of tests with one server of two workers. A scenario gets the usual world, and `person(name, …)`: somebody
 * at a window, on the worker of the number `on` (0 or 1).
 */
function suite(title, options, define) {
  if (!fs.existsSync(CHROMIUM)) throw new Error(`${CHROMIUM} is missing: run \`make install-browser-deps\`, or set CHROMIUM`);
  clientSuite(title, { workers: 2, ...options }, (scenario, banter) => {
    let browser;
    after(() => browser?.close());
    const tested = (name, body, more) => scenario(name, async (world) => {
      browser ??= await chromium.launch({ executablePath: CHROMIUM, args: ARGS });
      const people = [];
      const person = async (who, { on = 0, ...window } = {}) => {
        const address = await banter().addressOfWorker(banter().workerNumbers()[on]);
        const proxy = await new Proxy(() => banter().port, address).start();
        const context = await browser.newContext({ viewport: { width: 1280, height: 800 }, locale: 'en-GB', ...window });
        await context.addInitScript(watchPage);
        const page = await context.newPage();
        people.push(new Person({ name: who, context, page, proxy }));
        return people.at(-1);
      };
      try {
        await body({ world, person, browser });
        for (const one of people) await one.check();
      } catch (error) {
        for (const one of people) {
          await one.picture(`failed-${one.name}`).catch(() => {});
          if (one.errors.length) console.error(`--- errors of ${one.name}'s page:\n${one.errors.join('\n')}`);
        }
        throw error;
      } finally {
        for (const { context, proxy } of people) {
          await context.close();
          await proxy.stop();
        }
      }
    }, more);
    define(tested, banter);
  });
}

module.exports = { suite, Person, PICTURES, PATIENCE };

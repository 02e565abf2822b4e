'use strict';
// Banter as an operator deploys it, from what `make install` has put onto this machine. The steps are
// those of README.md.

const fs = require('node:fs');
const { randomBytes } = require('node:crypto');
const { Server } = require('../../clients/lib/server.js');
const { until } = require('../../clients/lib/wait.js');
const { sh, systemctl, show, journal } = require('./systemd.js');

const PORT = 8000;
const SECRET_FILE = '/etc/banter/jwt-secret';
const SETTINGS_FILE = '/etc/banter/banter.conf';
const REDIS_SOCKET = '/run/redis/redis-server.sock';

class Deployment extends Server {
  /** `workers`: their numbers. `redis`: Debian's redis-server, on a unix socket. `settings`: for banter.conf. */
  constructor({ workers = [0, 1], redis = false, secret = true, settings = {} } = {}) {
    super({ workers: workers.length });
    Object.assign(this, { workers, redis, secret, settings, port: PORT });
  }

  /** Up to the sockets; nothing of Banter runs then. */
  async install() {
    await sh('systemd-sysusers');
    await sh('systemd-tmpfiles', '--create', 'banter.conf');
    if (this.secret) this.makeSecret();
    if (this.redis) await this.installRedis();
    this.configure(this.settings);
    await systemctl('daemon-reload');
    await systemctl('enable', ...this.workers.map((number) => `banter-worker@${number}`));
    await systemctl('enable', '--now', 'banter.socket');
  }

  makeSecret() {
    fs.writeFileSync(SECRET_FILE, randomBytes(32).toString('base64'), { mode: 0o600 });
  }

  async installRedis() {
    fs.appendFileSync('/etc/redis/redis.conf', `\nport 0\nunixsocket ${REDIS_SOCKET}\nunixsocketperm 770\nappendonly yes\nappendfsync always\n`);
    await sh('usermod', '--append', '--groups', 'redis', 'banter');
    await systemctl('start', 'redis-server');
  }

  /** Writes the settings; limits that tests are not about are off. */
  configure(settings) {
    const all = {
      BANTER_AUTH_RATE: 0,
      BANTER_POST_RATE: 0,
      ...(this.redis ? { REDIS_URL: `unix:${REDIS_SOCKET}` } : {}),
      ...settings,
    };
    fs.writeFileSync(SETTINGS_FILE, Object.entries(all).map(([name, value]) => `${name}=${value}\n`).join(''));
  }

  unit(number) {
    return `banter-worker@${number}.service`;
  }

  /** Waits until these workers, and no others, serve. */
  async serving(workers = this.workers, deadline = 30_000) {
    const expected = [...workers].sort().join();
    let seen;
    await until(`workers ${expected} serve`, async () => {
      seen = new Set();
      for (let host = 1; host <= 40; host++) {
        seen.add(await this.workerOfAddress(`127.0.14.${host}`).catch(() => undefined));
      }
      return [...seen].sort().join() === expected;
    }, deadline).catch((error) => {
      throw new Error(`${error.message}: ${[...seen]} do`);
    });
  }

  async status(unit) {
    return (await show(unit, 'StatusText')).StatusText;
  }

  /** What Banter and systemd logged of these units. */
  async tail(lines = 120) {
    const entries = await journal('--unit=banter*', `--lines=${lines}`);
    return entries.map((entry) => {
      const fields = Object.entries(entry).filter(([name]) => /^BANTER_/.test(name)).map(([name, value]) => `${name.slice(7)}=${value}`);
      const time = new Date(Number(entry.__REALTIME_TIMESTAMP) / 1000).toISOString().slice(11, 23);
      return `${time} ${entry.UNIT ?? entry._SYSTEMD_UNIT} ${entry.MESSAGE} ${fields.join(' ')}`;
    }).join('\n');
  }
}

module.exports = { Deployment, SECRET_FILE, SETTINGS_FILE, REDIS_SOCKET };

'use strict';
// Real proxies in front of a server, with the configurations that docs/proxies recommends: only
// addresses, ports and paths are put in.

const { spawn } = require('node:child_process');
const fs = require('node:fs');
const net = require('node:net');
const os = require('node:os');
const path = require('node:path');
const { freePort } = require('./ports.js');
const { until } = require('./wait.js');

const DOCS = path.resolve(__dirname, '../../../docs/proxies');
/** Programs of administrators are not on everybody's PATH. */
const PATH = `${process.env.PATH}:/usr/local/sbin:/usr/sbin:/sbin`;

const running = new Set();
process.on('exit', () => running.forEach((child) => child.kill('SIGKILL')));

/** A documented file with `[what it says, what it is to say]` put in; each must be there. */
function documented(file, replacements) {
  let text = fs.readFileSync(path.join(DOCS, file), 'utf8');
  for (const [from, to] of replacements) {
    if (!text.includes(from)) throw new Error(`docs/proxies/${file} does not say ${JSON.stringify(from)}`);
    text = text.replaceAll(from, to);
  }
  return text;
}

/** By name: the files that it needs in a directory of its own, and how it is started there. */
const PROXIES = {
  nginx: (home, port, banter, replacements) => ({
    files: {
      'banter.conf': documented('nginx.conf', [['listen 80;', `listen 127.0.0.1:${port};`], ['listen [::]:80;', ''], ...replacements, ['127.0.0.1:8000', `127.0.0.1:${banter}`]]),
      // What the distribution's own nginx.conf has around it.
      'nginx.conf': `
        daemon off; worker_processes 1; error_log stderr; pid ${home}/pid;
        ${process.getuid() === 0 ? 'user root;' : ''}
        events { worker_connections 1024; }
        http {
          access_log off;
          ${['client_body', 'proxy', 'fastcgi', 'uwsgi', 'scgi'].map((name) => `${name}_temp_path ${home}/${name};`).join(' ')}
          include ${home}/banter.conf;
        }`,
    },
    args: ['-e', 'stderr', '-p', home, '-c', path.join(home, 'nginx.conf')],
  }),
  haproxy: (home, port, banter) => ({
    files: {
      'haproxy.cfg': documented('haproxy.cfg', [['bind :80\n', `bind 127.0.0.1:${port}\n`], ['127.0.0.1:8000', `127.0.0.1:${banter}`]]),
    },
    args: ['-db', '-f', path.join(home, 'haproxy.cfg')],
  }),
  caddy: (home, port, banter) => ({
    files: {
      Caddyfile: `{\n\tadmin off\n\tdefault_bind 127.0.0.1\n}\n${documented('Caddyfile', [['\nchat.example.org {', `\nhttp://:${port} {`], ['127.0.0.1:8000', `127.0.0.1:${banter}`]])}`,
    },
    args: ['run', '--adapter', 'caddyfile', '--config', path.join(home, 'Caddyfile')],
  }),
};

/** Whether somebody listens on this port of 127.0.0.1. */
function listens(port) {
  return new Promise((resolve) => {
    const socket = net.connect(port, '127.0.0.1');
    socket.on('connect', () => { socket.destroy(); resolve(true); });
    socket.on('error', () => resolve(false));
  });
}

/**
 * Starts one in front of a server's port: `{port, logs(), stop()}`. `replacements` as for `documented`, to get
 * something wrong on purpose (nginx only).
 */
async function startProxy(name, banterPort, replacements = []) {
  for (let attempt = 1; ; attempt++) {
    const home = fs.mkdtempSync(path.join(os.tmpdir(), `banter-${name}-`));
    const port = await freePort();
    const { files, args } = PROXIES[name](home, port, banterPort, replacements);
    for (const [file, text] of Object.entries(files)) fs.writeFileSync(path.join(home, file), text);
    const child = spawn(name, args, { env: { ...process.env, PATH, HOME: home, XDG_DATA_HOME: home, XDG_CONFIG_HOME: home }, stdio: ['ignore', 'pipe', 'pipe'] });
    running.add(child);
    let output = '';
    let ended;
    const end = new Promise((resolve) => {
      const note = (how) => { ended ??= how; running.delete(child); resolve(); };
      child.on('error', (error) => note(error.code === 'ENOENT' ? 'it is not installed: run `make install-proxies`' : error.message));
      child.on('exit', (code, signal) => note(`exit ${code ?? signal}`));
    });
    for (const stream of [child.stdout, child.stderr]) stream.on('data', (chunk) => { output += chunk; });
    const stop = async () => {
      if (ended === undefined) {
        child.kill('SIGTERM');
        const impatient = setTimeout(() => child.kill('SIGKILL'), 5_000);
        await end;
        clearTimeout(impatient);
      }
      fs.rmSync(home, { recursive: true, force: true });
    };
    try {
      await until(`${name} listens on port ${port}`, () => {
        if (ended) throw new Error(`${name}: ${ended}\n${output}`);
        return listens(port);
      });
      return { port, logs: () => output, stop };
    } catch (error) {
      await stop();
      // A free port may be taken by someone else before the proxy gets to it.
      if (attempt === 3 || !/in use|bind/i.test(error.message)) throw error;
    }
  }
}

module.exports = { startProxy };

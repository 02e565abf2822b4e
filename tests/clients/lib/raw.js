'use strict';
// A WebSocket of our own, for what no library would do: to say things at the wrong time or in one
// write, to read nothing. And what a process holds, as the kernel counts it.

const crypto = require('node:crypto');
const fs = require('node:fs');
const net = require('node:net');
const { until, within } = require('./wait.js');

const TEXT = 1;
const CLOSE = 8;

/** A client's frame of RFC 6455, with a mask of zeros. */
function frame(opcode, payload) {
  const body = Buffer.from(payload);
  const mask = Buffer.alloc(4);
  let head;
  if (body.length < 126) {
    head = Buffer.from([0x80 | opcode, 0x80 | body.length]);
  } else if (body.length < 65_536) {
    head = Buffer.from([0x80 | opcode, 0x80 | 126, 0, 0]);
    head.writeUInt16BE(body.length, 2);
  } else {
    head = Buffer.alloc(10);
    head[0] = 0x80 | opcode;
    head[1] = 0x80 | 127;
    head.writeBigUInt64BE(BigInt(body.length), 2);
  }
  return Buffer.concat([head, mask, body]);
}

/** A close frame of one who leaves by choice. */
const closeFrame = () => frame(CLOSE, Buffer.from([1_000 >> 8, 1_000 & 255]));

class RawWebSocket {
  /** `query` goes to the handshake: `{ EIO: 4, token, sid }`. */
  constructor(port, query, { localAddress = '127.0.0.1' } = {}) {
    /** The texts that came, pings included. */
    this.texts = [];
    this.closed = false;
    this.upgraded = false;
    this.unread = Buffer.alloc(0);
    this.socket = net.connect({ host: '127.0.0.1', port, localAddress });
    this.socket.on('error', () => {});
    this.socket.on('close', () => { this.closed = true; });
    this.socket.on('data', (chunk) => this.read(chunk));
    const search = new URLSearchParams({ ...query, transport: 'websocket' });
    this.socket.write(`GET /socket.io/?${search} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n`
      + `Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: ${crypto.randomBytes(16).toString('base64')}\r\n\r\n`);
  }

  /** One whose handshake was accepted. */
  static async open(port, query, options) {
    const socket = new RawWebSocket(port, query, options);
    await until('101 Switching Protocols', () => {
      if (socket.closed) throw new Error(`the handshake was refused: ${socket.unread.toString('latin1')}`);
      return socket.upgraded;
    });
    return socket;
  }

  read(chunk) {
    this.unread = Buffer.concat([this.unread, chunk]);
    if (!this.upgraded) {
      const end = this.unread.indexOf('\r\n\r\n');
      if (end < 0 || !this.unread.toString('latin1', 0, 13).startsWith('HTTP/1.1 101 ')) return;
      this.upgraded = true;
      this.unread = this.unread.subarray(end + 4);
    }
    for (;;) {
      if (this.unread.length < 2) return;
      let length = this.unread[1];
      let start = 2;
      if (length === 126) start = 4;
      if (length === 127) start = 10;
      if (this.unread.length < start) return;
      if (length === 126) length = this.unread.readUInt16BE(2);
      if (length === 127) length = Number(this.unread.readBigUInt64BE(2));
      if (this.unread.length < start + length) return;
      if ((this.unread[0] & 15) === TEXT) this.texts.push(this.unread.toString('utf8', start, start + length));
      this.unread = this.unread.subarray(start + length);
    }
  }

  /** Sends a text; resolves once the kernel has taken it (at once where the socket is gone). */
  send(text) {
    return this.write(frame(TEXT, text));
  }

  write(bytes) {
    return new Promise((resolve) => {
      if (this.closed) resolve();
      else this.socket.write(bytes, () => resolve());
    });
  }

  /** The first text that `matches` (a RegExp); waits for it. */
  waitFor(matches, deadline = 10_000) {
    return until(`${matches}`, () => this.texts.find((text) => matches.test(text)), deadline).catch((error) => {
      throw new Error(`${error.message}; closed: ${this.closed}, got ${JSON.stringify(this.texts.map((text) => text.slice(0, 200)).slice(-10))}`);
    });
  }

  waitForClose(deadline = 10_000) {
    return within('the server closes the WebSocket', new Promise((resolve) => {
      if (this.closed) resolve();
      else this.socket.once('close', resolve);
    }), deadline);
  }

  destroy() {
    this.socket.destroy();
  }
}

/** One line of /proc/PID/status in bytes. */
function status(pid, line) {
  const [, kilobytes] = new RegExp(`^${line}:\\s+(\\d+) kB$`, 'm').exec(fs.readFileSync(`/proc/${pid}/status`, 'utf8'));
  return Number(kilobytes) * 1024;
}

/** The bytes of memory that a process has now. */
const memory = (pid) => status(pid, 'VmRSS');

/** From here on: a function that gives by how many bytes a process has grown at most. */
function growth(pid) {
  fs.writeFileSync(`/proc/${pid}/clear_refs`, '5');
  const before = status(pid, 'VmHWM');
  return () => status(pid, 'VmHWM') - before;
}

/** How many files and sockets a process has open. */
const descriptors = (pid) => fs.readdirSync(`/proc/${pid}/fd`).length;

module.exports = { RawWebSocket, frame, closeFrame, TEXT, memory, growth, descriptors };

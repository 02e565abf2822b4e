'use strict';
// Clients that cost next to nothing, so that what is measured is the server: Socket.IO 4 over a bare
// WebSocket. Events are told by their first bytes and counted; only acks are parsed.

const http = require('node:http');
const net = require('node:net');

const DEADLINE = 30_000;
const agent = new http.Agent({ keepAlive: true });

/** One request with a JSON body; gives `{status, json}`. */
function request(port, method, path, body) {
  const payload = body === undefined ? undefined : JSON.stringify(body);
  const headers = payload === undefined
    ? {}
    : { 'content-type': 'application/json', 'content-length': Buffer.byteLength(payload) };
  return new Promise((resolve, reject) => {
    const req = http.request({ host: '127.0.0.1', port, method, path, headers, agent, timeout: DEADLINE }, (res) => {
      const chunks = [];
      res.on('data', (chunk) => chunks.push(chunk));
      res.on('error', reject);
      res.on('end', () => {
        try {
          resolve({ status: res.statusCode, json: JSON.parse(Buffer.concat(chunks)) });
        } catch (error) {
          reject(error);
        }
      });
    });
    req.on('timeout', () => req.destroy(new Error(`${method} ${path}: no answer`)));
    req.on('error', reject);
    req.end(payload);
  });
}

class Client {
  constructor(port, token) {
    Object.assign(this, { port, token });
    /** Messages of others that came in. */
    this.deliveries = 0;
    this.buffer = Buffer.alloc(0);
    this.upgraded = false;
    this.acks = new Map();
    this.nextAck = 0;
  }

  /** Connects; done when the server says `logged_in`. */
  open() {
    return new Promise((resolve, reject) => {
      const fail = (why) => {
        this.socket.destroy();
        reject(new Error(why));
      };
      const timer = setTimeout(() => fail('no logged_in in time'), DEADLINE);
      this.loggedIn = () => {
        clearTimeout(timer);
        resolve(this);
      };
      this.failed = fail;
      this.socket = net.connect(this.port, '127.0.0.1');
      this.socket.setNoDelay(true);
      this.socket.on('error', (error) => this.lost(String(error)));
      this.socket.on('close', () => this.lost('the connection was closed'));
      this.socket.on('data', (chunk) => this.received(chunk));
      this.socket.write(
        'GET /socket.io/?EIO=4&transport=websocket HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\n'
        + 'Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n',
      );
    });
  }

  /** Emits an event; gives what it is acknowledged with. */
  emit(event, data) {
    const id = this.nextAck++;
    return new Promise((resolve, reject) => {
      this.acks.set(id, { resolve, reject });
      this.send(`42${id}${JSON.stringify([event, data])}`);
    });
  }

  close() {
    this.closing = true;
    this.socket.destroy();
  }

  lost(why) {
    if (this.closing) return;
    this.failed?.(why);
    for (const { reject } of this.acks.values()) reject(new Error(why));
    this.acks.clear();
  }

  send(text) {
    const length = Buffer.byteLength(text);
    // Masked with zeros, which changes nothing.
    const head = length < 126 ? 6 : 8;
    const frame = Buffer.alloc(head + length);
    frame[0] = 0x81;
    if (head === 6) {
      frame[1] = 0x80 | length;
    } else {
      frame[1] = 0x80 | 126;
      frame.writeUInt16BE(length, 2);
    }
    frame.write(text, head);
    this.socket.write(frame);
  }

  received(chunk) {
    const data = this.buffer.length ? Buffer.concat([this.buffer, chunk]) : chunk;
    let at = 0;
    if (!this.upgraded) {
      const end = data.indexOf('\r\n\r\n');
      if (end < 0) {
        this.buffer = data;
        return;
      }
      if (!data.subarray(0, 12).equals(Buffer.from('HTTP/1.1 101'))) {
        this.failed(`no WebSocket: ${data.subarray(0, end)}`);
        return;
      }
      this.upgraded = true;
      at = end + 4;
    }
    while (data.length - at >= 2) {
      let length = data[at + 1] & 0x7f;
      let head = 2;
      if (length === 126) {
        if (data.length - at < 4) break;
        length = data.readUInt16BE(at + 2);
        head = 4;
      } else if (length === 127) {
        if (data.length - at < 10) break;
        length = Number(data.readBigUInt64BE(at + 2));
        head = 10;
      }
      if (data.length - at < head + length) break;
      if ((data[at] & 0x0f) === 1) this.packet(data, at + head, at + head + length);
      at += head + length;
    }
    this.buffer = data.subarray(at);
  }

  packet(data, start, end) {
    const [type, kind] = [data[start], data[start + 1]];
    if (type === 0x30 /* 0, open */) {
      this.send(`40${JSON.stringify({ token: this.token })}`);
    } else if (type === 0x32 /* 2, ping */) {
      this.send('3');
    } else if (type === 0x34 && kind === 0x32 /* 42["…, event */) {
      // Their names differ in the first letter, as far as they matter.
      if (data[start + 4] === 0x6d /* m */) this.deliveries += 1;
      else if (data[start + 4] === 0x6c /* l */) this.loggedIn();
    } else if (type === 0x34 && kind === 0x33 /* 43, ack */) {
      const text = data.toString('utf8', start + 2, end);
      const json = text.indexOf('[');
      const id = Number(text.slice(0, json));
      const { resolve, reject } = this.acks.get(id);
      this.acks.delete(id);
      const [answer] = JSON.parse(text.slice(json));
      if (answer.error) reject(new Error(answer.error));
      else resolve(answer);
    } else if (type === 0x34 && kind === 0x34 /* 44, refused */) {
      this.failed(data.toString('utf8', start, end));
    }
  }
}

module.exports = { Client, request };

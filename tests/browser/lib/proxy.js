'use strict';
// A loopback TCP proxy. A browser cannot choose the address that it connects from, and the server chooses
// the worker by that: the proxy chooses instead. It also loses connections as networks do.

const net = require('node:net');

class Proxy {
  /** `port()`: where the server is at this moment. `localAddress`: where connections come from. */
  constructor(port, localAddress) {
    this.port = port;
    this.localAddress = localAddress;
    this.pairs = new Set();
    this.isCut = false;
    /** Pages and requests get through, connections for Socket.IO do not. */
    this.withoutSockets = false;
    /** What the server says is lost on the way, while what clients say arrives. */
    this.isMute = false;
    this.server = net.createServer((client) => this.accept(client));
  }

  async start() {
    await new Promise((resolve, reject) => {
      this.server.once('error', reject);
      this.server.listen(0, '127.0.0.1', resolve);
    });
    this.url = `http://127.0.0.1:${this.server.address().port}/`;
    return this;
  }

  accept(client) {
    if (this.isCut) {
      client.destroy();
      return;
    }
    const server = net.connect({ host: '127.0.0.1', port: this.port(), localAddress: this.localAddress });
    const pair = [client, server];
    this.pairs.add(pair);
    const end = () => {
      this.pairs.delete(pair);
      client.destroy();
      server.destroy();
    };
    for (const one of pair) {
      one.setNoDelay(true);
      one.on('error', () => {});
      one.on('close', end);
    }
    client.on('data', (data) => {
      if (this.withoutSockets && data.subarray(0, 15).toString() === 'GET /socket.io/') end();
      else server.write(data);
    });
    server.on('data', (data) => this.isMute || client.write(data));
    client.on('end', () => server.end());
    server.on('end', () => client.end());
  }

  /** Nothing gets through any more, and what is open breaks. */
  cut() {
    this.isCut = true;
    // Towards the server first, with a reset: a farewell of the browser must not get there.
    for (const [client, server] of this.pairs) {
      server.resetAndDestroy();
      client.destroy();
    }
  }

  mend() {
    this.isCut = this.withoutSockets = this.isMute = false;
  }

  stop() {
    this.cut();
    return new Promise((resolve) => this.server.close(resolve));
  }
}

module.exports = { Proxy };

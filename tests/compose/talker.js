'use strict';
// A resident (tests/clients/lib/resident.js) in a process of its own, most of the time in a container of its
// own. Lines on stdin tell it what to do, each `[command, …arguments]` in JSON, and each is answered by
// one on stdout, `{value}` or `{error}`. Ends with stdin.
//   node talker.js URL VERSION NAME TOKEN CHANNEL

const { createInterface } = require('node:readline');
const { Resident } = require('../clients/lib/resident.js');
const { request } = require('../clients/lib/rest.js');
const { sleep } = require('../clients/lib/wait.js');

const [url, version, name, token, channel] = process.argv.slice(2);
/** Whatever address the container has. */
const localAddress = '0.0.0.0';
const { hostname: host, port } = new URL(url);
const server = { url, api: (method, where, options) => request(port, method, where, { ...options, host }) };
const resident = new Resident(server, { version: Number(version), transport: 'upgrade', name, token, localAddress });

/** Texts of the acknowledged posts. */
const said = [];
let isTalking = false;
/** Ends, or fails, after `isTalking` has become false. */
let talk;

async function say(pause) {
  for (let i = 0; isTalking; i++) {
    const text = `${name} ${i} ä😀`;
    await resident.insist(channel, text);
    said.push(text);
    await sleep(pause);
  }
}

const commands = {
  /** The worker that serves this address. */
  async worker() {
    const { status, text, json } = await server.api('GET', '/health', { localAddress, deadline: 5_000 });
    if (status !== 200) throw new Error(`GET /health: ${status} ${text}`);
    return json.worker;
  },
  moveIn: () => resident.moveIn([channel]),
  /** Posts for ever, with so many ms between an answer and the next post. */
  startTalking(pause) {
    isTalking = true;
    talk = say(pause);
    // `stopTalking` tells of a failure.
    talk.catch(() => {});
  },
  /** How many posts were acknowledged, and how often it has connected. */
  count: () => ({ said: said.length, connections: resident.connections }),
  /** The texts of all acknowledged posts. */
  async stopTalking() {
    isTalking = false;
    await talk;
    return said;
  },
  /** Waits until it knows of so many messages. Gives what it heard, posted, and has to complain of. */
  async account(messages) {
    await resident.settled();
    await resident.when(`${messages} messages`, () => resident.ids(channel).size >= messages, 20_000);
    const { heard, posted } = resident.rooms.get(channel);
    return { heard, posted: [...posted], complaints: resident.complaints };
  },
};

async function main() {
  for await (const line of createInterface({ input: process.stdin })) {
    const [command, ...args] = JSON.parse(line);
    let answer;
    try {
      answer = { value: await commands[command](...args) };
    } catch (error) {
      answer = { error: error.message };
    }
    process.stdout.write(`${JSON.stringify(answer)}\n`);
  }
  process.exit();
}

main();

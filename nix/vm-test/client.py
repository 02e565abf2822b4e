"""A client of Banter for the test in script.py, with nothing but Python's own library.

    client.py serving N...    waits until these workers, and no others, serve
    client.py chat N M        two people, on workers N and M, talk to each other
    client.py limited         fails to log in until told to slow down
    client.py knock FILE      connects again and again until SIGTERM; then writes outcomes into FILE

BANTER_PORT is the port, 8000 by default.
"""

import itertools
import json
import os
import secrets
import signal
import sys
import time
from http.client import HTTPConnection, HTTPException

HOST, PORT = "127.0.0.1", int(os.environ.get("BANTER_PORT", "8000"))
# Seconds until something that must happen has happened.
DEADLINE = 60
# Engine.IO's packets of one answer stand between these.
SEPARATOR = "\x1e"


def request(method, path, body=None, headers=None, address="127.0.0.1", timeout=DEADLINE):
    """One request on a connection of its own, from a local address; gives status and text."""
    connection = HTTPConnection(HOST, PORT, timeout=timeout, source_address=(address, 0))
    try:
        connection.request(method, path, body, {"connection": "close", **(headers or {})})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def post(path, body, **more):
    headers = {"content-type": "application/json"}
    return request("POST", path, json.dumps(body), headers, **more)


def worker_of(address):
    """The worker that serves this client address, or None."""
    status, text = request("GET", "/health", address=address)
    return int(json.loads(text)["worker"]) if status == 200 else None


def address_of(worker):
    for host in range(1, 250):
        address = f"127.0.20.{host}"
        if worker_of(address) == worker:
            return address
    raise SystemExit(f"no address is served by worker {worker}")


class Person:
    """An account with a Socket.IO session over polling."""

    def __init__(self, worker):
        self.address = address_of(worker)
        self.name = "p" + secrets.token_hex(8)
        status, text = post("/auth/register", {"name": self.name, "password": secrets.token_hex(8)})
        assert status == 200, f"register: {status} {text}"
        self.path = "/socket.io/?EIO=4&transport=polling"
        self.events = []
        self.acks = itertools.count()
        (opened,) = self.poll()
        self.path += "&sid=" + json.loads(opened[1:])["sid"]
        self.send("40" + json.dumps({"token": json.loads(text)["token"]}))
        self.wait_for(lambda packet: packet.startswith('42["logged_in"'))

    def poll(self):
        status, text = request("GET", self.path, address=self.address)
        assert status == 200, f"{self.name} polls: {status} {text}"
        return text.split(SEPARATOR)

    def send(self, packet):
        headers = {"content-type": "text/plain;charset=UTF-8"}
        status, text = request("POST", self.path, packet.encode(), headers, self.address)
        assert status == 200, f"{self.name} sends {packet}: {status} {text}"

    def wait_for(self, wanted):
        deadline = time.monotonic() + DEADLINE
        while not any(wanted(packet) for packet in self.events):
            assert time.monotonic() < deadline, f"{self.name} got only {self.events}"
            for packet in self.poll():
                if packet == "2":
                    self.send("3")
                else:
                    self.events.append(packet)

    def emit(self, event, payload):
        """Sends an event and waits for its ack, which must not be an error."""
        number = next(self.acks)
        self.send(f"42{number}" + json.dumps([event, payload]))
        self.wait_for(lambda packet: packet.startswith(f"43{number}["))
        ack = next(packet for packet in self.events if packet.startswith(f"43{number}["))
        assert '"error"' not in ack, f"{self.name}: {event}: {ack}"

    def hears(self, text, author):
        def is_it(packet):
            if not packet.startswith('42["message:post"'):
                return False
            message = json.loads(packet[2:])[1]
            return message["message"] == text and message["user"] == author.name

        self.wait_for(is_it)


def chat(first, second):
    channel = secrets.token_hex(8)
    people = [Person(first), Person(second)]
    for person in people:
        person.emit("channel:join", {"channel": channel})
    for speaker, listener in [people, people[::-1]]:
        text = f"{speaker.name} to {listener.name}"
        speaker.emit("message:post", {"channel": channel, "message": text})
        listener.hears(text, speaker)


def serving(workers):
    deadline = time.monotonic() + DEADLINE
    while (seen := {worker_of(f"127.0.14.{host}") for host in range(1, 41)}) != workers:
        assert time.monotonic() < deadline, f"{seen} serve"
        time.sleep(0.1)


def limited():
    deadline = time.monotonic() + DEADLINE
    while True:
        status, text = post("/auth/login", {"name": "nobody", "password": "a wrong one"})
        if status == 429:
            return
        assert status == 401, f"{status} {text}"
        assert time.monotonic() < deadline, "no limit"


def knock(file):
    going = True

    def stop(*_):
        nonlocal going
        going = False

    signal.signal(signal.SIGTERM, stop)
    outcomes = {}
    for number in itertools.count():
        if not going and number > 0:
            break
        try:
            status, _ = request("GET", "/health", address=f"127.0.{40 + number // 250 % 20}.{1 + number % 250}")
            outcome = str(status)
        except (OSError, HTTPException) as error:
            outcome = repr(error)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        time.sleep(0.005)
    with open(file, "w", encoding="utf-8") as output:
        json.dump(outcomes, output)


def main(command, *arguments):
    if command == "serving":
        serving({int(number) for number in arguments})
    elif command == "chat":
        chat(*map(int, arguments))
    elif command == "limited":
        limited()
    elif command == "knock":
        knock(*arguments)
    else:
        raise SystemExit(__doc__)


main(*sys.argv[1:])

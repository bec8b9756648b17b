"""A small server with OpenAI's chat-completions interface, over real sockets, that also misbehaves.

Tests run it in a thread. As a script it prints its address and serves until its input ends: each
clip gets a caption of its own, and every tenth answer is an error.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Received:
    """A request for a completion."""

    body: dict[str, Any]
    headers: dict[str, str]

    @property
    def text(self) -> str:
        """What is asked."""
        (part,) = [p for p in self.body["messages"][0]["content"] if p["type"] == "text"]
        return part["text"]

    @property
    def images(self) -> list[str]:
        """The data URLs."""
        parts = self.body["messages"][0]["content"]
        return [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.images)


def fingerprint(images: Sequence[str]) -> str:
    """A short name of what `images` show."""
    return hashlib.sha256("\n".join(images).encode()).hexdigest()[:12]


Behavior = str | Callable[[Received], Any]
"""What happens to a request: the text of an answer, or one of

- a function that returns the whole JSON document of the answer;
- "status N", or "status N after S" with the header Retry-After: S (spaces as _);
- "broken" (JSON that ends in the middle), "page" (HTML), "cut" (fewer bytes than announced);
- "reset" (the connection is reset before an answer), "late S" (an answer after S seconds), "slow"
  (a byte now and then, without an end).
"""


@dataclass
class MisbehavingServer:
    """`behave` chooses what happens to a request, by its number from 0 on."""

    behave: Callable[[int, Received], Behavior]
    models: Sequence[str] | None = ("seer",)
    """None: it does not list its models."""
    key: str = ""
    """The bearer token without which it answers 401."""
    received: list[Received] = field(default_factory=list[Received])
    paths: list[str] = field(default_factory=list[str])
    """Of all requests, those for the models too."""
    answered: list[str] = field(default_factory=list[str])
    """The fingerprints of the requests that got a completion."""
    refusal: str = "as the test wants it"
    """The message of a status that is an error."""
    most_at_once: int = 0
    url: str = ""
    _now: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def started(self) -> int:
        with self._lock:
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
            return self._now

    def ended(self) -> None:
        with self._lock:
            self._now -= 1

    def number_of(self, request: Received) -> int:
        with self._lock:
            self.received.append(request)
            return len(self.received) - 1


def completion(text: Any, **choice: Any) -> dict[str, Any]:
    """A chat completion with this content."""
    message = {"role": "assistant", "content": text}
    return {"object": "chat.completion", "choices": [{"message": message, **choice}]}


@contextlib.contextmanager
def serving(server: MisbehavingServer, port: int = 0) -> Iterator[MisbehavingServer]:
    """`server` in a thread, at `server.url`."""

    class Handler(_Handler):
        chat = server

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # clients that go away, as killed ones do

    http = Quiet(("127.0.0.1", port), Handler)
    server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


class _Handler(BaseHTTPRequestHandler):
    chat: MisbehavingServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.chat.paths.append(self.path)
        if self.path != "/v1/models" or self.chat.models is None:
            self._send(404, {"error": {"message": "no such path"}})
        else:
            self._send(200, {"data": [{"id": name} for name in self.chat.models]})

    def do_POST(self) -> None:
        self.chat.paths.append(self.path)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        request = Received(body=body, headers={k.lower(): v for k, v in self.headers.items()})
        number = self.chat.number_of(request)
        self.chat.started()
        try:
            self._answer(request, self.chat.behave(number, request))
        finally:
            self.chat.ended()

    def _answer(self, request: Received, behavior: Behavior) -> None:
        if self.chat.key and request.headers.get("authorization") != f"Bearer {self.chat.key}":
            said = request.headers.get("authorization", "none")
            self._send(401, {"error": {"message": f"Incorrect key: {said}"}})
            return
        if callable(behavior):
            self._complete(request, behavior(request))
            return
        kind, *words = behavior.split() or [""]
        if kind == "status":
            headers = {"Retry-After": words[2].replace("_", " ")} if len(words) > 2 else {}
            self._send(int(words[0]), {"error": {"message": self.chat.refusal}}, headers)
        elif kind == "late":
            time.sleep(float(words[0]))
            self._complete(request, completion("late"))
        elif kind in ("broken", "page", "cut"):
            text = {"broken": '{"choices": [{"mess', "page": "<html>gateway</html>"}.get(kind, "{}")
            self._send_bytes(200, text.encode(), len(text) + 100 * (kind == "cut"))
        elif kind == "reset":
            # Closing with a linger time of 0 sends RST instead of FIN.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
        elif kind == "slow":
            self._send_bytes(200, b"", 10_000)
            while True:
                self.wfile.write(b" ")
                time.sleep(0.05)
        else:
            self._complete(request, completion(behavior))

    def _complete(self, request: Received, document: Any) -> None:
        self._send(200, document)
        self.chat.answered.append(request.fingerprint)

    def _send(self, status: int, document: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(document).encode()
        self._send_bytes(status, data, len(data), headers)

    def _send_bytes(
        self, status: int, data: bytes, length: int, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(data)
        if length != len(data):
            self.close_connection = True


def often_failing(seed: int, failures: Sequence[str]) -> Callable[[int, Received], Behavior]:
    """Each clip gets a caption of its own, and every tenth request one of `failures`; but not more
    than four in a row for a clip, after each of which it is asked again."""
    draws, in_a_row = random.Random(seed), Counter[str]()

    def behave(_: int, request: Received) -> Behavior:
        time.sleep(draws.uniform(0.005, 0.03))
        if draws.random() < 0.1 and in_a_row[request.fingerprint] < 4:
            in_a_row[request.fingerprint] += 1
            return draws.choice(failures)
        in_a_row[request.fingerprint] = 0
        return lambda received: completion(f"seen {received.fingerprint}")

    return behave


if __name__ == "__main__":
    with serving(MisbehavingServer(often_failing(0, ["status 503 after 0"]))) as running:
        print(running.url, flush=True)
        sys.stdin.read()

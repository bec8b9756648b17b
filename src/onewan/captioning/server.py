"""A server with OpenAI's chat-completions interface: vLLM, llama.cpp, LM Studio, Ollama and others.

Hides HTTP, which failures pass and are tried again, how long is waited, and in what servers differ:

- the limit of an answer is ``max_tokens``, of which some models of OpenAI know only the newer name
  ``max_completion_tokens``; Ollama knows only the older one;
- thinking is in the answer, or beside it under another key (`onewan.captioning.answers`);
- images are data URLs, since LM Studio and Ollama fetch none;
- the text of an error is at one of several places.

No proxy is used and no redirection followed: frames go to the host that was named, and nowhere
else. Uses the standard library, since one kind of request needs no more.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import random
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPMessage, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from onewan.captioning.answers import BrokenAnswerError, Caption, caption_of
from onewan.documents import shortened
from onewan.errors import one_line

_MOST_BYTES = 4 << 20
"""Of an answer; a caption has a few hundred."""
_MOST_SHOWN = 300
"""Characters of a server's own error message."""
_FIRST_WAIT = 1.0
"""Seconds before the first repetition; each further one waits for twice as long."""
_LONGEST_WAIT = 60.0
_LONGEST_ASKED_WAIT = 600.0
"""Seconds that a server may ask to wait for (Retry-After)."""
_PASSING = frozenset({408, 409, 425, 429, *range(500, 600)})
"""HTTP status codes after which the same request may succeed."""
_FOR_ALL = frozenset({401, 402, 403, 404, 405})
"""Those that every other request would get too: the key, the account, the model, the address."""
_NEWER_LIMIT = "max_completion_tokens"


class ServerFailure(Exception):  # noqa: N818  (not every failure ends in an error)
    """A request that got no completion. The message says why, and what to do."""

    def __init__(
        self,
        reason: str,
        *,
        passing: bool = False,
        for_all: bool = False,
        wait: float | None = None,
    ) -> None:
        super().__init__(one_line(reason))
        self.passing = passing
        """Whether the same request may succeed later."""
        self.for_all = for_all
        """Whether all other requests would fail too."""
        self.wait = wait
        """Seconds that the server asks to wait for."""


class NoServer(ServerFailure):
    """Nothing answers at the address."""


class Stopped(Exception):  # noqa: N818  (not an error)
    """`ChatServer.stop` was called."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a server is."""

    scheme: str
    host: str
    port: int
    path: str
    """That of the interface, such as /v1, without a slash at its end."""

    @staticmethod
    def of(url: str) -> Address:
        """The address in `url`: the one under which OpenAI's clients know it, such as
        http://127.0.0.1:8000/v1. ValueError with the reason if it is none."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise ValueError(f"is no address ({error})") from None
        if parts.scheme not in ("http", "https") or not host:
            raise ValueError("must begin with http:// or https:// and name a host")
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError("must have no user, password, ? or #; a key is read from a variable")
        if not re.fullmatch(r"[!-~]*", parts.path) or not re.fullmatch(r"[!-~]+", host):
            raise ValueError("has characters that no address has; write them as %xx or xn--")
        path = parts.path.rstrip("/").removesuffix("/chat/completions")
        return Address(
            scheme=parts.scheme,
            host=host,
            port=port or (443 if parts.scheme == "https" else 80),
            path=path or "/v1",
        )

    @property
    def is_local(self) -> bool:
        """Whether it is on this machine."""
        try:
            return ipaddress.ip_address(self.host.partition("%")[0]).is_loopback
        except ValueError:
            return self.host == "localhost"

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.path}"


@dataclass(kw_only=True)
class ChatServer:
    """Sends requests; its methods may be called from several threads."""

    address: Address
    model: str = ""
    key: str = field(default="", repr=False)
    """Sent as a bearer token; appears in no message."""
    timeout: float = 300.0
    """Seconds within which a request must be answered completely."""
    retries: int = 4
    """How often a request is repeated after a passing failure."""
    max_tokens: int = 1024
    """Limit of an answer, with its thinking."""

    def __post_init__(self) -> None:
        self._limit_name = "max_tokens"
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._sockets = set[socket.socket]()
        self._not_before = 0.0
        """Monotonic time before which the server wants no request."""

    def models(self) -> list[str]:
        """The names of the models that the server lists; empty if it lists none.

        Raises ServerFailure if no server answers at all, or it does not accept the key.
        """
        try:
            data = self._answer("GET", "/models")
            names = [model["id"] for model in data["data"]]
        except (KeyError, TypeError):
            return []
        except NoServer:
            raise
        except ServerFailure as failure:
            if failure.for_all and not isinstance(failure, _NoList):
                raise
            return []
        return [name for name in names if isinstance(name, str)]

    def caption(self, request: str, images: Sequence[str]) -> Caption:
        """The model's answer to `request` about `images`, which are data URLs.

        Passing failures are repeated. Raises ServerFailure, NoCaptionError for an answer that is no
        caption, or Stopped.
        """
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": image}} for image in images
        ]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": request}]}]
        body = {"model": self.model, "messages": messages, "stream": False}
        failures = 0
        while True:
            limit = self._limit_name
            try:
                return self._completion({**body, limit: self.max_tokens})
            except ServerFailure as failure:
                if limit != _NEWER_LIMIT and _NEWER_LIMIT in str(failure):
                    self._limit_name = _NEWER_LIMIT
                    continue
                failures += 1
                if not failure.passing or failures > self.retries:
                    raise
                self._delay(failure, failures)

    def stop(self) -> None:
        """Break off all requests, those that are waiting too; they raise Stopped."""
        self._stopped.set()
        with self._lock:
            for connected in self._sockets:
                _shut(connected)

    def _delay(self, failure: ServerFailure, failures: int) -> None:
        """Let time pass before the next attempt, for all threads if the server asks for it."""
        if failure.wait is not None:
            with self._lock:
                self._not_before = max(self._not_before, time.monotonic() + failure.wait)
            return
        longest = min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** (failures - 1))
        self._stopped.wait(random.uniform(0.5, 1.0) * longest)  # not all threads at once

    def _completion(self, body: dict[str, Any]) -> Caption:
        while (left := self._not_before - time.monotonic()) > 0 and not self._stopped.wait(left):
            pass  # another thread may have been told to wait for longer
        if self._stopped.is_set():
            raise Stopped
        try:
            return caption_of(self._answer("POST", "/chat/completions", body))
        except BrokenAnswerError as error:
            raise ServerFailure(str(error), passing=True) from None

    def _answer(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON document that the server answers with; ServerFailure or Stopped."""
        try:
            status, headers, content = self._exchange(method, path, body)
        except ssl.SSLCertVerificationError as error:
            reason = f"the certificate of {self.address} is not valid ({error.verify_message})"
            raise ServerFailure(reason, for_all=True) from None
        except (ConnectionRefusedError, socket.gaierror) as error:
            reason = f"no server answers at {self.address} ({error.strerror}); start it, or name"
            raise NoServer(f"{reason} another with --server", passing=True, for_all=True) from None
        except TimeoutError:
            reason = f"no answer within {self.timeout:g} s; --timeout waits longer"
            raise ServerFailure(reason, passing=True) from None
        except (OSError, HTTPException) as error:
            what = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise ServerFailure(f"the connection broke ({what})", passing=True) from None
        if status != 200:
            raise self._failure(status, headers, content)
        try:
            data = json.loads(content)
        except (ValueError, RecursionError):
            text = "the answer is no valid JSON; is this the address of a chat server?"
            raise ServerFailure(text, passing=True) from None
        if isinstance(data, dict) and data.get("error"):  # as some gateways answer
            raise self._failure(status, headers, content)
        return data

    def _exchange(
        self, method: str, path: str, body: dict[str, Any] | None
    ) -> tuple[int, HTTPMessage, bytes]:
        """(status, headers, content) of the answer to one request."""
        headers = {"Accept": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode()
        if data is not None:
            headers["Content-Type"] = "application/json"
        kind = HTTPSConnection if self.address.scheme == "https" else HTTPConnection
        with contextlib.closing(
            kind(self.address.host, self.address.port, timeout=self.timeout)
        ) as connection:
            connection.connect()
            with self._watched(connection.sock):
                connection.request(method, f"{self.address.path}{path}", data, headers)
                response = connection.getresponse()
                content = response.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ServerFailure(f"the answer is larger than {_MOST_BYTES >> 20} MiB")
        return response.status, response.headers, content

    @contextlib.contextmanager
    def _watched(self, connected: socket.socket) -> Iterator[None]:
        """Ends what the block does with the connection at the time limit, and on `stop`.

        The limit of a socket is one of each read, so a server that sends a byte now and then would
        never reach it.
        """
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            _shut(connected)

        timer = threading.Timer(self.timeout, expire)
        timer.daemon = True
        with self._lock:
            self._sockets.add(connected)
        timer.start()
        try:
            if self._stopped.is_set():
                raise Stopped
            yield
        except (OSError, HTTPException):
            if self._stopped.is_set():
                raise Stopped from None
            if expired.is_set():
                raise TimeoutError from None
            raise
        finally:
            timer.cancel()
            with self._lock:
                self._sockets.discard(connected)
        if expired.is_set():  # the end of the connection may look like the end of the answer
            raise TimeoutError
        if self._stopped.is_set():
            raise Stopped

    def _failure(self, status: int, headers: HTTPMessage, content: bytes) -> ServerFailure:
        """The failure that the server reports, with its own words."""
        said = _error_text(content)
        if self.key:
            said = said.replace(self.key, "***")
        text = f"the server answers {status}" + (f": {said}" if said else "")
        wait = _asked_wait(headers)
        if 300 <= status < 400:
            text += f", and sends on to {headers.get('Location', 'nowhere')}; name that address"
            return ServerFailure(text, for_all=True)
        if wait is not None and wait > _LONGEST_ASKED_WAIT:
            text += f"; it asks to wait for {wait:.0f} s, so run the command again then"
            return ServerFailure(text, for_all=True)
        if status in (401, 403):
            text += "; the key for the server is read from a variable (--key-variable)"
            return ServerFailure(text, for_all=True)
        kind = _NoList if status in (404, 405) else ServerFailure
        passing = status in _PASSING or status == 200
        return kind(text, passing=passing, for_all=status in _FOR_ALL, wait=wait)


class _NoList(ServerFailure):
    """There is nothing at this path, as with servers that do not list their models."""


def _shut(connected: socket.socket) -> None:
    """End a connection that another thread uses."""
    # The method of the base class: that of a TLS socket would let the other thread read plain
    # bytes.
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connected, socket.SHUT_RDWR)


def _asked_wait(headers: HTTPMessage) -> float | None:
    """Seconds that the header Retry-After asks to wait for; None if there is none that is valid."""
    value = (headers.get("Retry-After") or "").strip()
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", value):
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError, OSError):
        return None


def _error_text(content: bytes) -> str:
    """The message in the body of an answer that is an error, in one of the forms of servers."""
    text = content.decode("utf-8", "replace")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = re.sub(r"<[^>]*>", " ", text)  # a page of a web server
    for name in ("error", "message", "detail"):
        if isinstance(found, dict):
            found = found.get(name) or found
    if isinstance(found, dict):
        found = json.dumps(found, ensure_ascii=False)
    return shortened(" ".join(str(found).split()), _MOST_SHOWN)

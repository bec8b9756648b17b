"""Who may use the page, and what browsers may do with it: an ASGI middleware before every route.

Pages, media, the websocket and downloads all pass it. It checks the host (against DNS rebinding),
the origin (against requests that another site makes in the user's name), the token, the size and
the rate of requests, and adds a content security policy to every answer.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger(__name__)

COOKIE = "onewan_token"
_COOKIE_SECONDS = 30 * 24 * 60 * 60
MOST_BYTES = 4_000_000
"""Of the body of a request; run files and configurations of other trainers are far smaller."""
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
_MOST_ADDRESSES = 1000
"""Whose rates are remembered."""

# Vue compiles its templates in the browser, which needs 'unsafe-eval', and Quasar sets the style of
# elements; scripts come from the page's own files alone, or have the answer's nonce.
_POLICY = (
    "default-src 'none'; script-src 'self' 'nonce-{nonce}' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' blob:; "
    "font-src 'self'; connect-src 'self'; worker-src 'self' blob:; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'"
)
_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


def new_token() -> str:
    """A token of 256 random bits."""
    return secrets.token_urlsafe(32)


def digest(token: str) -> str:
    """What is stored of a token. It is random, so that a fast hash is enough."""
    return hashlib.sha256(token.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What is asked of requests."""

    token_digest: str | None
    """Digest of the token that every request needs; None: none is needed."""
    hosts: frozenset[str]
    """Host names, in lower case, by which the page may be addressed besides IP addresses."""
    any_address: bool
    """Whether every IP address is allowed as host; else those of this machine itself alone."""
    per_second: float = 500.0
    """Requests of one address in the long run."""
    burst: int = 5000
    guesses: int = 20
    """Wrong tokens of one address, after which it waits a minute for each next one."""


def is_loopback(host: str) -> bool:
    """Whether a server that listens on `host` is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class _Rates:
    """How much of what is allowed is left for each address, of those seen last."""

    def __init__(self, per_second: float, most: float) -> None:
        self._per_second, self._most = per_second, most
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, address: str) -> bool:
        """Whether one more is allowed; counts it."""
        now = time.monotonic()
        left, then = self._left.pop(address, (self._most, now))
        left = min(self._most, left + (now - then) * self._per_second)
        self._left[address] = (left - 1 if left >= 1 else left, now)
        while len(self._left) > _MOST_ADDRESSES:
            self._left.popitem(last=False)
        return left >= 1


class Access:
    """The middleware; `app` sees only requests that it lets through."""

    def __init__(self, app: ASGIApp, rules: Rules) -> None:
        self._app, self._rules = app, rules
        self._requests = _Rates(rules.per_second, rules.burst)
        self._guesses = _Rates(1 / 60, rules.guesses)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        nonce = secrets.token_urlsafe(16)
        send = _with_headers(send, nonce) if scope["type"] == "http" else send
        request = HTTPConnection(scope)
        given = request.query_params.get("token") if scope["type"] == "http" else None
        refusal = self._refusal(request, given)
        if refusal is not None:
            await _refuse(scope, receive, send, *refusal)
            return
        if self._rules.token_digest is not None and given is not None:
            # The link that was printed: the address bar must not keep the token.
            await _without_token(request, given)(scope, receive, send)
            return
        scope["headers"] = [
            (name, value)
            for name, value in scope["headers"]
            # Whoever sends it chooses where the page's own addresses lead.
            if name not in (b"x-forwarded-prefix",)
        ]
        state: MutableMapping[str, Any] = scope.setdefault("state", {})
        state["nonce"] = nonce
        await self._guarded(scope, _limited(receive), send)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application; an error in it is logged, and nothing of it is in the answer."""
        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except _TooLarge:
            if not begun:
                await _refuse(scope, receive, send, 413, _TOO_LARGE)
        except Exception:
            log.exception("a request failed: %s", scope.get("path"))
            if not begun:
                await _refuse(scope, receive, send, 500, DEFECT)

    def _refusal(self, request: HTTPConnection, token: str | None) -> tuple[int, str] | None:
        """Status and text of the refusal, or None. `token` is that of the address."""
        address = "" if request.client is None else request.client.host
        if not self._requests.take(address):
            return 429, "There were too many requests; wait some seconds."
        if not self._knows(request.headers.get("host", "")):
            return 421, "This name of the host is not known; use `onewan serve --name NAME`."
        if not _own_origin(request):
            return 403, "This request came from another site."
        size = request.headers.get("content-length", "0")
        if not size.isdecimal() or int(size) > MOST_BYTES:
            return 413, _TOO_LARGE
        given = token if token is not None else request.cookies.get(COOKIE)
        if self._rules.token_digest is None:
            return None
        if given is not None and hmac.compare_digest(digest(given), self._rules.token_digest):
            return None
        if given is not None and not self._guesses.take(address):
            return 429, "There were too many wrong tokens; wait a minute."
        return 401, _NEEDS_TOKEN

    def _knows(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
            urlsplit(f"//{host}").port  # noqa: B018  (raises for what is no port)
        except ValueError:
            return False
        if name in _LOOPBACK_NAMES or name in self._rules.hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return self._rules.any_address or is_loopback(name)


DEFECT = "This is a defect of onewan; what happened is in the log of onewan serve."
_NEEDS_TOKEN = (
    "This page needs a token. Open the link that `onewan serve` printed, "
    "or make a new one with `onewan serve --new-token`."
)
_TOO_LARGE = f"A request may have {MOST_BYTES / 1e6:.0f} MB at most."


class _TooLarge(Exception):  # noqa: N818  (the end of a request, which is answered)
    pass


def _limited(receive: Receive) -> Receive:
    """`receive` that ends a body of more than `MOST_BYTES`, whatever its header says."""
    seen = 0

    async def limited() -> Message:
        nonlocal seen
        message = await receive()
        if message["type"] == "http.request":
            seen += len(message.get("body", b""))
            if seen > MOST_BYTES:
                raise _TooLarge
        return message

    return limited


def _without_token(request: HTTPConnection, token: str) -> RedirectResponse:
    """To the same page without the token, which is a cookie from now on."""
    rest = urlencode([(k, v) for k, v in request.query_params.multi_items() if k != "token"])
    path = "/" + request.scope["path"].lstrip("/\\")  # "//host" would lead to another host
    response = RedirectResponse(f"{path}?{rest}" if rest else path, 303)
    response.set_cookie(
        COOKIE,
        token,
        max_age=_COOKIE_SECONDS,
        httponly=True,
        samesite="strict",
        secure=request.scope.get("scheme") == "https",
    )
    return response


def _own_origin(request: HTTPConnection) -> bool:
    """Whether a request was made by the page itself, or by a person who followed a link."""
    headers = request.headers
    site = headers.get("sec-fetch-site", "none")
    opened = headers.get("sec-fetch-mode") == "navigate" and request.scope.get("method") == "GET"
    if site not in ("none", "same-origin") and not opened:
        return False
    origin = headers.get("origin")
    if origin is None:
        # Browsers name it in all requests that change something, and for every websocket.
        return True
    try:
        return urlsplit(origin).netloc.lower() == headers.get("host", "").lower()
    except ValueError:
        return False


def _with_headers(send: Send, nonce: str) -> Send:
    async def with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers[name] = value
            headers.setdefault("content-security-policy", _POLICY.format(nonce=nonce))
            headers.setdefault("cache-control", "no-store")
        await send(message)

    return with_headers


async def _refuse(scope: Scope, receive: Receive, send: Send, status: int, text: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": text[:100]})
        return
    await PlainTextResponse(f"{text}\n", status)(scope, receive, send)


class Nonces:
    """Puts the nonce of the answer into the scripts of NiceGUI's pages, which are a part of them.

    NiceGUI writes texts into its pages with ``<`` as an entity, so a script in them is its own.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        nonce = scope.get("state", {}).get("nonce") if scope["type"] == "http" else None
        if nonce is None:
            await self._app(scope, receive, send)
            return
        start: Message | None = None
        parts: list[bytes] = []

        async def rewrite(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                kind = Headers(scope=message).get("content-type", "")
                if kind.startswith("text/html"):
                    start = message
                    return
            elif message["type"] == "http.response.body" and start is not None:
                parts.append(message.get("body", b""))
                if message.get("more_body", False):
                    return
                body = b"".join(parts).replace(b"<script", b'<script nonce="%s"' % nonce.encode())
                MutableHeaders(scope=start)["content-length"] = str(len(body))
                await send(start)
                await send({"type": "http.response.body", "body": body})
                return
            await send(message)

        await self._app(scope, receive, rewrite)


def host_names(names: Iterable[str]) -> frozenset[str]:
    """Names of hosts as `Rules` compares them."""
    return frozenset(name.lower() for name in names if name)

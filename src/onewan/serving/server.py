"""`serve`: an application as a server, which belongs to one folder of runs."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from starlette.middleware.gzip import GZipMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from onewan.errors import OnewanError
from onewan.files import replacing
from onewan.locks import locked
from onewan.serving.access import (
    MOST_BYTES,
    Access,
    Nonces,
    Rules,
    digest,
    host_names,
    is_loopback,
    new_token,
)
from onewan.serving.commands import Commands
from onewan.serving.roots import Roots

DEFAULT_PORT = 8320
_SWITCH_SECONDS = 0.0005
_PLAIN = ("/media/", "/poster/", "/clips/")
"""Not compressed: media are already, and parts of a file must keep their places."""


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """The options of ``onewan serve``."""

    runs: Path
    data: tuple[Path, ...] = ()
    host: str = "127.0.0.1"
    port: int | None = None
    """None: `DEFAULT_PORT`, or any other if that is in use."""
    names: tuple[str, ...] = ()
    """Names of this host besides its own, such as that of a proxy."""
    token: bool = False
    """Ask for a token on the loopback interface too."""
    new_token: bool = False


def guarded(app: ASGIApp, rules: Rules) -> ASGIApp:
    """`app` with nothing in it that `rules` does not guard."""
    return Access(_Compressed(Nonces(app)), rules)


class _Compressed:
    def __init__(self, app: ASGIApp) -> None:
        self._app, self._gzip = app, GZipMiddleware(app, minimum_size=500, compresslevel=4)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        plain = scope["type"] == "http" and scope["path"].startswith(_PLAIN)
        await (self._app if plain else self._gzip)(scope, receive, send)


def serve(
    options: ServeOptions,
    application: Callable[[Roots, Commands], ASGIApp],
    say: Callable[[str], None],
) -> None:
    """Serve `application` until the process is ended. `say` gets lines for the user.

    OnewanError if another process serves the page of these runs, with its address, or if the port
    is in use.
    """
    runs_folder = options.runs
    if runs_folder.exists() and not runs_folder.is_dir():
        raise OnewanError(f"{runs_folder}: is not a folder; give the folder of runs")
    runs_folder.mkdir(parents=True, exist_ok=True)
    for folder in options.data:
        if not folder.is_dir():
            raise OnewanError(f"{folder}: is not a folder; give a folder of clips or models")
    facts = runs_folder / ".page.json"
    kept = _read(facts)
    address = kept.get("address")
    where = f"the page is there already: {address}" if address else "stop that page first"
    with locked(runs_folder / ".page.lock", runs_folder, where), _listening(options) as listener:
        roots = Roots(runs_folder, options.data or (Path.cwd(),))
        token, rules = _rules(options, kept)
        url = _address(options, listener)
        _write(facts, {"address": url, "token_digest": rules.token_digest})
        for line in _greeting(options, url, token, rules):
            say(line)
        config = uvicorn.Config(
            guarded(application(roots, Commands(Path.cwd())), rules),
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            ws_max_size=MOST_BYTES,
            timeout_graceful_shutdown=2,
        )
        # The thread that answers waits for one that reads a long run no longer than that.
        sys.setswitchinterval(_SWITCH_SECONDS)
        uvicorn.Server(config).run(sockets=[listener])


def _rules(options: ServeOptions, kept: dict[str, Any]) -> tuple[str | None, Rules]:
    """The rules, and the token if it is a new one, which is printed once."""
    open_to_all = not is_loopback(options.host)
    token, stored = None, kept.get("token_digest")
    if not (open_to_all or options.token):
        stored = None
    elif options.new_token or not isinstance(stored, str):
        token = new_token()
        stored = digest(token)
    names = [*options.names, options.host]
    if open_to_all:
        names += [socket.gethostname(), socket.getfqdn()]
    return token, Rules(token_digest=stored, hosts=host_names(names), any_address=open_to_all)


@contextmanager
def _listening(options: ServeOptions) -> Iterator[socket.socket]:
    """The socket of the server. OnewanError if there can be none."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    wished = [options.port] if options.port is not None else [DEFAULT_PORT, 0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if hasattr(socket, "SO_REUSEADDR") and not hasattr(socket, "SO_EXCLUSIVEADDRUSE"):
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        for port in wished:
            try:
                listener.bind((options.host, port))
                break
            except (OSError, OverflowError) as error:
                if port == wished[-1]:
                    raise OnewanError(
                        f"{options.host}:{port}: can't be listened on ({error}); choose another "
                        "one with --host or --port"
                    ) from None
        listener.set_inheritable(False)
        listener.listen()  # so that whoever reads the address at once waits for the first answer
        yield listener
    finally:
        listener.close()


def _address(options: ServeOptions, listener: socket.socket) -> str:
    host = options.host
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    port = listener.getsockname()[1]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def _greeting(options: ServeOptions, url: str, token: str | None, rules: Rules) -> Sequence[str]:
    lines = [f"the page of {options.runs}: {url}{f'?token={token}' if token else ''}"]
    if token:
        lines.append(
            "  the link has the token, which is not shown again; --new-token makes another"
        )
    elif rules.token_digest:
        lines.append("  it asks for the token of before; --new-token makes another")
    else:
        port = url.rstrip("/").rpartition(":")[2]
        lines.append(f"  from another machine: ssh -L {port}:127.0.0.1:{port} USER@THIS_MACHINE")
    if not is_loopback(options.host):
        lines.append("  what is sent is not encrypted: use a network you trust, ssh -L or a proxy")
    return [*lines, "  Ctrl-C ends the page; runs go on without it"]


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(file: Path, facts: dict[str, Any]) -> None:
    with replacing(file) as temporary:
        temporary.touch(mode=0o600)
        temporary.write_text(json.dumps(facts), encoding="utf-8")

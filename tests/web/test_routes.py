"""All routes of the page, as the application itself lists them: who gets nothing, and no input that
ends in an error of the server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import re
import string
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
from fastapi.routing import APIRoute
from nicegui import core, ui
from starlette.routing import BaseRoute, Mount, Route

from onewan.serving.access import COOKIE, Rules, digest
from onewan.serving.commands import Commands
from onewan.serving.roots import Roots
from onewan.serving.server import guarded
from onewan.web import application as page_application
from tests.support.page import fresh_nicegui

TOKEN = "t" * 43
SECRET = "what is outside of all folders of the page"
HOST = "127.0.0.1:8320"
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS")

TRAVERSALS = (
    "../outside/secret.txt",
    "..%2foutside%2fsecret.txt",
    "%2e%2e/outside/secret.txt",
    "....//outside/secret.txt",
    "..\\outside\\secret.txt",
    "%00",
    "link.txt",
    "{absolute}",
    "%2f{absolute}",
    "data1/../../outside/secret.txt",
    "~/secret.txt",
    ".env",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with runs and data, and a secret beside them."""
    for name in ("runs/dog", "clips", "outside"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "runs/dog/events.jsonl").touch()
    (tmp_path / "clips/a.txt").write_text("a caption", encoding="utf-8")
    for name in ("outside/secret.txt", "clips/.env", "secret.txt"):
        (tmp_path / name).write_text(SECRET, encoding="utf-8")
    (tmp_path / "clips/link.txt").symlink_to(tmp_path / "outside/secret.txt")
    return tmp_path


@contextlib.asynccontextmanager
async def application(folder: Path, *, token: bool) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the whole application, in this process."""
    roots = Roots(folder / "runs", [folder / "clips"])
    rules = Rules(
        token_digest=digest(TOKEN) if token else None,
        hosts=frozenset(),
        any_address=False,
        per_second=1e9,
        burst=10**9,
        guesses=10**9,
    )
    with fresh_nicegui():
        whole = guarded(page_application.application(roots, Commands(folder)), rules)
        async with core.app.router.lifespan_context(core.app):
            transport = httpx.ASGITransport(whole, raise_app_exceptions=False)
            async with httpx.AsyncClient(
                transport=transport, base_url=f"http://{HOST}", timeout=10
            ) as client:
                yield client


def run(folder: Path, act: Callable[[httpx.AsyncClient], Awaitable[None]], *, token: bool) -> None:
    async def whole() -> None:
        async with application(folder, token=token) as client:
            await act(client)

    asyncio.run(whole())


def queries() -> list[tuple[str, str]]:
    """(path, name) of all parameters in the queries of routes."""
    return [
        (route.path, parameter.name)
        for route in core.app.routes
        if isinstance(route, APIRoute)
        for parameter in route.dependant.query_params
    ]


def routes(found: list[BaseRoute] | None = None, prefix: str = "") -> Iterator[str]:
    """The paths of all routes, with their parameters in braces; of a mounted application that has
    no routes, its root and a path below it."""
    for route in core.app.routes if found is None else found:
        if isinstance(route, Mount):
            below = getattr(route.app, "routes", None)
            if below:
                yield from routes(below, prefix + route.path)
            else:
                yield f"{prefix}{route.path}/"
                yield f"{prefix}{route.path}/{{path:path}}"
        elif isinstance(route, Route):
            yield prefix + route.path


def filled(template: str, value: str) -> str:
    return re.sub(r"\{[^}]*\}", lambda _: value, template)


def filled_one_at_a_time(template: str, value: str) -> Iterator[str]:
    """`template` with `value` for one parameter and plausible ones for the others."""
    names = re.findall(r"\{([^}:]*)(?::[^}]*)?\}", template)
    usual = {"root": "data1", "name": "dog", "path": "a.txt"}
    for chosen in range(len(names)):
        rest = iter(enumerate(names))

        def fill(_: re.Match[str], rest: Iterator[tuple[int, str]] = rest, at: int = chosen) -> str:
            number, name = next(rest)
            return value if number == at else usual.get(name, "1")

        yield re.sub(r"\{[^}]*\}", fill, template)


def test_without_the_token_and_for_other_sites_no_route_answers_with_data(folder: Path) -> None:
    async def act(client: httpx.AsyncClient) -> None:
        paths = [filled(route, "a.txt") for route in routes()]
        assert {"/", "/new", "/data", "/files", "/help"} <= set(paths) and len(paths) > 12
        strangers = [
            {},
            {"cookie": f"{COOKIE}=wrong"},
            {"cookie": f"{COOKIE}={TOKEN}", "origin": "http://evil.example"},
            {"cookie": f"{COOKIE}={TOKEN}", "host": "evil.example"},
            {"cookie": f"{COOKIE}={TOKEN}", "sec-fetch-site": "cross-site"},
            {"authorization": f"Bearer {TOKEN}"},
        ]
        for path in paths:
            for headers in strangers:
                for method in METHODS:
                    answer = await client.request(method, path, headers=headers)
                    assert answer.status_code in (401, 403, 421), (method, path, headers)
                    assert len(answer.content) < 300
            answer = await client.get(f"{path}?token=wrong")
            assert answer.status_code == 401, path
            allowed = await client.get(path, headers={"cookie": f"{COOKIE}={TOKEN}"})
            assert allowed.status_code not in (401, 403, 421), path

    run(folder, act, token=True)


def test_no_parameter_leads_out_of_the_folders(folder: Path) -> None:
    absolute = str(folder / "outside" / "secret.txt")

    async def act(client: httpx.AsyncClient) -> None:
        assert (await client.get("/media/data1/a.txt")).text == "a caption"
        asked: list[str] = []
        for route in routes():
            for traversal in TRAVERSALS:
                value = traversal.replace("{absolute}", absolute)
                asked += filled_one_at_a_time(route, value)
        for route, name in queries():
            for value in (*TRAVERSALS, absolute):
                asked.append(f"{filled(route, 'dog')}?{name}={quote(value)}")
        assert len(asked) > 150
        for path in asked:
            answer = await client.get(f"http://{HOST}{path}")
            assert answer.status_code < 500, path
            assert SECRET not in answer.text, path

    run(folder, act, token=False)


def test_texts_of_a_page_get_no_nonce(folder: Path) -> None:
    hostile = "</script><script>window.hostile = 1</script>"

    async def act(client: httpx.AsyncClient) -> None:
        @ui.page("/hostile")
        def _() -> None:
            ui.page_title(hostile)
            ui.label(hostile).props(f'title="{hostile}"')
            ui.input("name", value=hostile)

        answer = await client.get("/hostile")
        begins = re.findall(r"<script[^>]*>", answer.text)
        assert len(begins) > 4 and all("nonce=" in begin for begin in begins)
        # One more or less would be one that a text has begun or ended.
        assert answer.text.count("</script>") == len(begins)
        assert "window.hostile" in answer.text and ">window.hostile" not in answer.text

    run(folder, act, token=False)


def _text(source: random.Random) -> str:
    alphabets = (
        string.printable,
        "../\\%",
        "{}[]()<>\"'`$;&|",
        "äß漢字🎞\u202e\0\x7f",
        "0123456789-.e",
    )
    letters = source.choice(alphabets)
    return "".join(source.choice(letters) for _ in range(source.choice((0, 1, 3, 8, 40, 900))))


def _request(source: random.Random, paths: list[str]) -> httpx.Request:
    """A request that is nearly right, or not at all."""
    route = source.choice(paths)
    values = (
        "dog", "data1", "runs", "a.txt", "1", "-1", "9" * 30, "nan", quote(_text(source), safe=""),
        quote(_text(source)), source.choice(TRAVERSALS),
    )  # fmt: skip
    path = re.sub(r"\{[^}]*\}", lambda _: source.choice(values), route)
    if source.random() < 0.2:
        path += "/" + quote(_text(source))
    names = ("path", "token", "client_id", "EIO", "transport", "sid", *(n for _, n in queries()))
    query = "&".join(
        f"{source.choice(names)}={quote(source.choice(values))}"
        for _ in range(source.choice((0, 0, 1, 3)))
    )
    headers = {
        name: source.choice(values)
        for name in source.sample(
            ["range", "if-none-match", "accept-encoding", "content-type", "x-forwarded-prefix",
             "cookie", "accept", "sec-fetch-mode", "if-range", "accept-language"],
            source.choice((0, 1, 3)),
        )
    }  # fmt: skip
    headers["range"] = source.choice(("bytes=0-", "bytes=5-2", "bytes=-1", "bytes=9999-", "x", ""))
    return httpx.Request(
        source.choice(METHODS),
        f"http://{HOST}{path}{'?' + query if query else ''}",
        headers={**headers, "host": HOST},
        content=_text(source).encode("utf-8", "replace"),
    )


@pytest.mark.long
def test_ten_thousand_wrong_requests_end_in_no_error_of_the_server(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = random.Random(20)

    async def act(client: httpx.AsyncClient) -> None:
        paths, made = list(routes()), 0
        while made < 10_000:
            try:
                request = _request(source, paths)
            except (httpx.InvalidURL, UnicodeError):
                continue  # such an address can't be sent
            made += 1
            answer = await asyncio.wait_for(client.send(request), 10)
            assert answer.status_code < 500, (request.method, request.url, request.headers)
            assert "Traceback" not in answer.text and SECRET not in answer.text, request.url

    with caplog.at_level(logging.ERROR):
        run(folder, act, token=False)
    assert not [record.message for record in caplog.records if record.levelno >= logging.ERROR]

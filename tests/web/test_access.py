"""Who may use the page: host, origin, token, rate, size, and files outside its folders."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import httpx
import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from onewan.errors import OnewanError
from onewan.serving.access import COOKIE, MOST_BYTES, Access, Nonces, Rules, digest, is_loopback
from onewan.serving.roots import OutsideError, Roots

SECRET = "what only the application says"
TOKEN = "t" * 43


async def application(scope: Scope, receive: Receive, send: Send) -> None:
    while scope["type"] == "http" and (await receive()).get("more_body"):
        pass
    await PlainTextResponse(SECRET)(scope, receive, send)


def rules(
    *, token: bool = False, any_address: bool = False, per_second: float = 500, burst: int = 5000
) -> Rules:
    return Rules(
        token_digest=digest(TOKEN) if token else None,
        hosts=frozenset({"gpu-box"}),
        any_address=any_address,
        per_second=per_second,
        burst=burst,
        guesses=3,
    )


def answers(
    guard: Rules, act: Callable[[httpx.AsyncClient], Awaitable[None]], host: str = "127.0.0.1:8320"
) -> None:
    async def whole() -> None:
        transport = httpx.ASGITransport(Access(application, guard), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as client:
            await act(client)

    asyncio.run(whole())


def status(
    guard: Rules,
    headers: Mapping[str, str] | None = None,
    *,
    method: str = "GET",
    path: str = "/",
    host: str = "127.0.0.1:8320",
) -> int:
    found: list[int] = []

    async def act(client: httpx.AsyncClient) -> None:
        answer = await client.request(method, path, headers=headers)
        assert (SECRET in answer.text) == (answer.status_code == 200)
        found.append(answer.status_code)

    answers(guard, act, host)
    return found[0]


@pytest.mark.parametrize("host", ["127.0.0.1:8320", "localhost", "[::1]:9", "gpu-box", "127.9.9.9"])
def test_this_machine_is_known_by_its_names(host: str) -> None:
    assert status(rules(), host=host) == 200


@pytest.mark.parametrize("host", ["evil.example", "192.168.1.9:8320", "localhost.evil.example"])
def test_other_names_are_refused_as_a_rebound_name_would_be(host: str) -> None:
    assert status(rules(), host=host) == 421


def test_addresses_of_a_network_are_known_where_the_page_listens_on_it() -> None:
    assert status(rules(any_address=True), host="192.168.1.9:8320") == 200
    assert status(rules(any_address=True), host="evil.example") == 421


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9999"},
        {"origin": "http://[oops"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
        {"sec-fetch-site": "same-site", "sec-fetch-mode": "cors"},
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_requests_of_other_sites_are_refused(headers: dict[str, str], method: str) -> None:
    assert status(rules(), headers, method=method) == 403


def test_a_link_on_another_site_may_be_followed_but_nothing_may_be_sent() -> None:
    followed = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert status(rules(), followed) == 200
    assert status(rules(), followed, method="POST") == 403


def test_the_page_itself_may_ask() -> None:
    own = {"origin": "http://127.0.0.1:8320", "sec-fetch-site": "same-origin"}
    assert status(rules(), own, method="POST") == 200


def test_the_link_sets_a_cookie_that_scripts_cannot_read_and_leaves_the_address() -> None:
    async def act(client: httpx.AsyncClient) -> None:
        answer = await client.get(f"/run/dog?a=b&token={TOKEN}")
        assert (answer.status_code, answer.headers["location"]) == (303, "/run/dog?a=b")
        cookie = answer.headers["set-cookie"].lower()
        assert "httponly" in cookie and "samesite=strict" in cookie
        assert (await client.get("/")).text == SECRET  # the client has kept the cookie

    answers(rules(token=True), act)


def test_the_link_leads_to_no_other_host() -> None:
    async def act(client: httpx.AsyncClient) -> None:
        for path in ("//evil.example/", "/\\evil.example/", "/%5Cevil.example/"):
            answer = await client.get(f"http://127.0.0.1:8320{path}?token={TOKEN}")
            assert answer.headers["location"] == "/evil.example/"

    answers(rules(token=True), act)


@pytest.mark.parametrize(
    "headers",
    [{}, {"cookie": f"{COOKIE}=wrong"}, {"cookie": f"other={TOKEN}"}, {"cookie": f"{COOKIE}="}],
)
def test_without_the_token_nothing_is_answered(headers: dict[str, str]) -> None:
    assert status(rules(token=True), headers) == 401
    assert status(rules(token=True), headers, path="/?token=wrong") == 401
    assert status(rules(token=True), headers, path="/?token=") == 401


def test_wrong_tokens_are_slowed_down_but_not_the_right_one() -> None:
    async def act(client: httpx.AsyncClient) -> None:
        found = [(await client.get(f"/?token=wrong{n}")).status_code for n in range(6)]
        assert found == [401, 401, 401, 429, 429, 429]
        assert (await client.get(f"/?token={TOKEN}")).status_code == 303

    answers(rules(token=True), act)


def test_a_flood_of_requests_is_refused_and_passes() -> None:
    async def act(client: httpx.AsyncClient) -> None:
        found = [(await client.get("/")).status_code for _ in range(8)]
        assert found == [200] * 5 + [429] * 3

    answers(rules(per_second=0.001, burst=5), act)


def test_large_bodies_are_refused_also_if_their_size_is_not_said() -> None:
    async def act(client: httpx.AsyncClient) -> None:
        assert (await client.post("/", content=b"x" * MOST_BYTES)).status_code == 200
        assert (await client.post("/", content=b"x" * (MOST_BYTES + 1))).status_code == 413

        async def parts() -> object:
            for _ in range(9):
                yield b"x" * 1_000_000

        answer = await client.post("/", content=parts())  # type: ignore[arg-type]
        assert answer.status_code == 413

    answers(rules(), act)


def test_a_websocket_of_another_site_or_without_the_token_is_closed() -> None:
    async def connect(guard: Rules, headers: list[tuple[bytes, bytes]]) -> str:
        sent: list[str] = []

        async def receive() -> dict[str, object]:
            return {"type": "websocket.connect"}

        async def send(message: object) -> None:
            sent.append(message["type"])  # type: ignore[index]

        async def socket(_scope: Scope, _receive: Receive, send: Send) -> None:
            await send({"type": "websocket.accept"})

        host = (b"host", b"127.0.0.1:8320")
        scope = {"type": "websocket", "path": "/", "headers": [host, *headers], "query_string": b""}
        await Access(socket, guard)(scope, receive, send)  # type: ignore[arg-type]
        return sent[0]

    own = (b"origin", b"http://127.0.0.1:8320")
    cookie = (b"cookie", f"{COOKIE}={TOKEN}".encode())
    cases = [
        (rules(), [own], "accept"),
        (rules(), [(b"origin", b"http://evil.example")], "close"),
        (rules(token=True), [own], "close"),
        (rules(token=True), [own, (b"cookie", f"{COOKIE}=wrong".encode())], "close"),
        (rules(token=True), [own, cookie], "accept"),
    ]
    for guard, headers, expected in cases:
        assert asyncio.run(connect(guard, headers)) == f"websocket.{expected}"


def test_an_error_in_the_application_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError(SECRET)

    async def act() -> httpx.Response:
        transport = httpx.ASGITransport(Access(broken, rules()))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get("/")

    answer = asyncio.run(act())
    assert answer.status_code == 500 and SECRET not in answer.text
    assert SECRET in caplog.text


def test_every_answer_has_the_policy_and_scripts_of_pages_its_nonce() -> None:
    async def page(scope: Scope, receive: Receive, send: Send) -> None:
        text = "<html><script>1</script><script type=module>2</script></html>"
        await PlainTextResponse(text, media_type="text/html")(scope, receive, send)

    async def act() -> None:
        transport = httpx.ASGITransport(Access(Nonces(page), rules()))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            first, second = await client.get("/"), await client.get("/")
            policy = first.headers["content-security-policy"]
            nonce = policy.partition("'nonce-")[2].partition("'")[0]
            assert first.text.count(f'<script nonce="{nonce}"') == 2
            assert len(first.content) == int(first.headers["content-length"])
            assert nonce not in second.headers["content-security-policy"]
            assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
            refused = await client.get("/", headers={"origin": "http://evil.example"})
            assert refused.headers["x-content-type-options"] == "nosniff"

    asyncio.run(act())


def test_loopback_is_recognized() -> None:
    assert is_loopback("127.0.0.1") and is_loopback("::1") and is_loopback("localhost")
    assert not (is_loopback("0.0.0.0") or is_loopback("192.168.1.2") or is_loopback("gpu-box"))


@pytest.fixture
def roots(tmp_path: Path) -> Roots:
    for folder in ("runs/dog", "clips/.git", "outside"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "runs/dog/events.jsonl").touch()
    for file in ("clips/a.mp4", "clips/.git/config", "clips/.env", "outside/secret.mp4"):
        (tmp_path / file).write_bytes(b"x")
    (tmp_path / "clips/link.mp4").symlink_to(tmp_path / "outside/secret.mp4")
    (tmp_path / "clips/hidden.mp4").symlink_to(tmp_path / "clips/.env")
    (tmp_path / "clips/folder").symlink_to(tmp_path / "outside")
    return Roots(tmp_path / "runs", [tmp_path / "clips"])


@pytest.mark.parametrize(
    "path",
    [
        "../outside/secret.mp4",
        "..",
        "link.mp4",
        "hidden.mp4",
        "folder/secret.mp4",
        ".env",
        ".git/config",
        "no.mp4",
        "a.mp4\0",
        "a.mp4/b",
        "x" * 5000,
    ],
)
def test_addresses_lead_to_no_file_outside_and_to_no_hidden_one(roots: Roots, path: str) -> None:
    with pytest.raises(OutsideError):
        roots.at("data1", path)
    with pytest.raises(OutsideError):
        roots.at("data1", str(roots.data[0] / path))


def test_addresses_lead_to_files_of_the_roots(roots: Roots) -> None:
    file = roots.at("data1", "a.mp4")
    assert file == roots.data[0] / "a.mp4"
    assert roots.address(file) == "/media/data1/a.mp4"
    assert roots.inside(roots.data[0] / "new" / "clip.mp4").name == "clip.mp4"
    with pytest.raises(OutsideError, match="--data"):
        roots.inside(roots.data[0] / "link.mp4")


@pytest.mark.parametrize("name", ["", ".", "..", "dog/..", "../clips", "cat", ".page.lock"])
def test_runs_are_found_by_their_names_alone(roots: Roots, name: str) -> None:
    with pytest.raises(OnewanError):
        roots.run(name)
    assert roots.run("dog") == roots.runs / "dog"

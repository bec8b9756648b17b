"""Requests to a captioning server over real sockets, one that misbehaves included."""

from __future__ import annotations

import socket
import threading
import time
from email.utils import formatdate
from typing import Any

import pytest
from robustness.chat_server import Behavior, MisbehavingServer, serving

from onewan.captioning import server as server_module
from onewan.captioning.answers import NoCaptionError
from onewan.captioning.server import Address, ChatServer, NoServer, ServerFailure, Stopped


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_FIRST_WAIT", 0.01)


def in_turn(*behaviors: Behavior) -> MisbehavingServer:
    """A server that behaves so, request by request, and as in the last one from then on."""
    return MisbehavingServer(lambda number, _: behaviors[min(number, len(behaviors) - 1)])


def client(there: MisbehavingServer, **fields: Any) -> ChatServer:
    return ChatServer(address=Address.of(there.url), model="seer", **({"timeout": 5} | fields))


def test_a_request_has_the_images_before_the_text_and_the_answer_is_a_caption() -> None:
    with serving(in_turn("a fox")) as there:
        caption = client(there, max_tokens=77).caption("Describe it.", ["data:one", "data:two"])
    assert caption.text == "a fox"
    (request,) = there.received
    assert request.body == {
        "model": "seer",
        "stream": False,
        "max_tokens": 77,
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "data:one"}},
                    {"type": "image_url", "image_url": {"url": "data:two"}},
                    {"type": "text", "text": "Describe it."},
                ],
            }
        ],
    }
    assert "authorization" not in request.headers


@pytest.mark.parametrize(
    "passing",
    ["status 500", "status 503", "status 429", "status 408", "broken", "page", "cut", "reset"],
)
def test_a_passing_failure_is_repeated(passing: str) -> None:
    with serving(in_turn(passing, passing, "a fox")) as there:
        assert client(there).caption("?", []).text == "a fox"
    assert len(there.received) == 3


@pytest.mark.parametrize(
    ("failing", "reason"),
    [
        ("status 500", "answers 500: as the test wants it"),
        ("broken", "no valid JSON"),
        ("page", "no valid JSON; is this the address of a chat server"),
        ("reset", "the connection broke"),
    ],
)
def test_after_the_retries_the_failure_is_reported(failing: str, reason: str) -> None:
    with serving(in_turn(failing)) as there, pytest.raises(ServerFailure, match=reason) as caught:
        client(there, retries=2).caption("?", [])
    assert len(there.received) == 3
    assert caught.value.passing and not caught.value.for_all


@pytest.mark.parametrize(("status", "for_all"), [(400, False), (413, False), (404, True)])
def test_a_wrong_request_is_not_repeated(status: int, for_all: bool) -> None:
    with (
        serving(in_turn(f"status {status}")) as there,
        pytest.raises(ServerFailure, match=f"answers {status}: as the test") as caught,
    ):
        client(there).caption("?", [])
    assert len(there.received) == 1 and caught.value.for_all is for_all


def test_an_answer_that_is_no_caption_is_not_repeated() -> None:
    with serving(in_turn("I cannot help.")) as there, pytest.raises(NoCaptionError):
        client(there).caption("?", [])
    assert len(there.received) == 1


@pytest.mark.parametrize("behavior", ["late 30", "slow"])
def test_a_late_answer_and_one_that_never_ends_run_out_of_time(behavior: str) -> None:
    started = time.monotonic()
    with (
        serving(in_turn(behavior)) as there,
        pytest.raises(ServerFailure, match=r"no answer within 0.3 s; --timeout waits longer"),
    ):
        client(there, timeout=0.3, retries=1).caption("?", [])
    assert time.monotonic() - started < 5
    assert len(there.received) == 2


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_all_threads_wait_as_long_as_the_server_asks(form: str) -> None:
    date = formatdate(time.time() + 2, usegmt=True).replace(" ", "_")
    after = "1" if form == "seconds" else date
    times = list[float]()

    def behave(number: int, _: object) -> Behavior:
        times.append(time.monotonic())
        return f"status 429 after {after}" if number == 0 else "a fox"

    with serving(MisbehavingServer(behave)) as there:
        here, found = client(there), list[str]()
        asking = [
            threading.Thread(target=lambda: found.append(here.caption("?", []).text))
            for _ in range(2)
        ]
        asking[0].start()
        time.sleep(0.2)  # by then the server has asked for the wait
        asking[1].start()
        for thread in asking:
            thread.join(10)
    assert found == ["a fox"] * 2 and len(times) == 3
    assert min(times[1:]) - times[0] > 0.8


def test_a_server_that_asks_for_an_hour_ends_the_call() -> None:
    with (
        serving(in_turn("status 429 after 3600")) as there,
        pytest.raises(ServerFailure, match="wait for 3600 s, so run the command again") as caught,
    ):
        client(there).caption("?", [])
    assert len(there.received) == 1 and caught.value.for_all


def test_the_newer_name_of_the_limit_is_used_where_the_older_is_refused() -> None:
    def behave(_: int, request: Any) -> Behavior:
        return "status 400" if "max_tokens" in request.body else "a fox"

    there = MisbehavingServer(behave)
    there.refusal = "Unsupported parameter: use 'max_completion_tokens' instead."
    with serving(there):
        here = client(there, max_tokens=77)
        assert here.caption("?", []).text == "a fox"
        assert here.caption("?", []).text == "a fox"
    assert [r.body.get("max_completion_tokens") for r in there.received] == [None, 77, 77]


def test_the_key_is_sent_and_is_in_no_message() -> None:
    there = in_turn("a fox")
    there.key = "sk-right"
    with serving(there):
        assert client(there, key="sk-right").caption("?", []).text == "a fox"
        wrong = client(there, key="sk-wrong")
        with pytest.raises(ServerFailure, match=r"401: Incorrect key: Bearer \*\*\*") as caught:
            wrong.caption("?", [])
    assert caught.value.for_all and "sk-wrong" not in f"{caught.value!r} {wrong!r}"


def test_a_redirection_is_not_followed() -> None:
    with (
        serving(in_turn("status 302")) as there,
        pytest.raises(ServerFailure, match="sends on to nowhere; name that address") as caught,
    ):
        client(there).caption("?", [])
    assert there.paths == ["/v1/chat/completions"] and caught.value.for_all


def test_models_are_listed_if_the_server_lists_them() -> None:
    there = in_turn("a fox")
    with serving(there):
        assert client(there).models() == ["seer"]
        there.models = None
        assert client(there).models() == []
    with pytest.raises(NoServer, match=r"no server answers at http://127.0.0.1:\d+/v1"):
        client(there).models()


def test_a_server_that_is_started_again_meanwhile_is_asked_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    there = in_turn("a fox")
    there.url = f"http://127.0.0.1:{port}/v1"
    here, found = client(there, retries=20), list[str]()
    thread = threading.Thread(target=lambda: found.append(here.caption("?", []).text))
    thread.start()
    time.sleep(0.05)
    with serving(there, port):
        thread.join(20)
    assert found == ["a fox"]


def test_stopping_breaks_off_what_is_waited_for() -> None:
    with serving(in_turn("late 30")) as there:
        here, caught = client(there, timeout=60), list[BaseException]()

        def ask() -> None:
            try:
                here.caption("?", [])
            except Stopped as stopped:
                caught.append(stopped)

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        while len(there.received) < 3:
            time.sleep(0.01)
        here.stop()
        for thread in threads:
            thread.join(5)
        with pytest.raises(Stopped):
            here.caption("?", [])
    assert len(caught) == 3 and len(there.received) == 3


@pytest.mark.parametrize(
    ("url", "address", "is_local"),
    [
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1", True),
        ("http://localhost:11434", "http://localhost:11434/v1", True),
        ("http://[::1]:1234/v1/", "http://[::1]:1234/v1", True),
        ("http://localhost.evil.example/v1", "http://localhost.evil.example:80/v1", False),
        ("http://192.168.1.7:8080", "http://192.168.1.7:8080/v1", False),
        (
            "https://openrouter.ai/api/v1/chat/completions",
            "https://openrouter.ai:443/api/v1",
            False,
        ),
    ],
)
def test_addresses_are_those_of_other_clients(url: str, address: str, is_local: bool) -> None:
    found = Address.of(url)
    assert (str(found), found.is_local) == (address, is_local)


@pytest.mark.parametrize(
    "url",
    [
        *("127.0.0.1:8000", "ftp://host/v1", "http:///v1", "http://user:word@host/v1", ""),
        *("http://host/v1?key=x", "http://host:99999/v1", "http://host/a b", "http://h\u00f6st/"),
    ],
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"begin with|must have|no address|characters"):
        Address.of(url)

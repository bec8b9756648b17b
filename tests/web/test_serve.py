"""`onewan serve` as a process: where it is, who it lets in, a second one, and its sudden end."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.support.page import served

pytestmark = pytest.mark.long  # each process of a page takes two seconds to start


def serve_again(runs: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "onewan", "serve", str(runs), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_second_page_of_the_runs_says_where_the_first_is(tmp_path: Path) -> None:
    with served(tmp_path / "runs") as page:
        assert httpx.get(page.address).status_code == 200
        second = serve_again(tmp_path / "runs")
        assert second.returncode == 1 and page.address in second.stderr
        assert f"process {page.process.pid}" in second.stderr
    first = serve_again(tmp_path / "runs", "--host", "no.such.host.invalid")
    assert first.returncode == 1 and "--host" in first.stderr


def test_a_token_is_shown_once_stored_as_a_digest_and_outlives_a_killed_page(
    tmp_path: Path,
) -> None:
    runs = tmp_path / "runs"
    with served(runs, "--token") as page:
        token = page.address.partition("?token=")[2]
        assert len(token) >= 43
        assert httpx.get(page.root).status_code == 401
        with httpx.Client(follow_redirects=True) as client:
            assert client.get(page.address).status_code == 200
            assert client.get(f"{page.root}/new").status_code == 200
        stored = (runs / ".page.json").read_text(encoding="utf-8")
        assert token not in stored and json.loads(stored)["token_digest"]
        page.process.kill()
        page.process.wait(10)
    with served(runs, "--token") as page:
        assert "token=" not in page.address
        cookies = {"onewan_token": token}
        assert httpx.get(page.root, cookies=cookies).status_code == 200
    with served(runs, "--new-token") as page:
        assert httpx.get(page.root, cookies=cookies).status_code == 401


def test_other_machines_need_the_token(tmp_path: Path) -> None:
    with served(tmp_path / "runs", "--host", "0.0.0.0") as page:
        port = page.root.rpartition(":")[2]
        assert "token=" in page.address
        assert httpx.get(f"http://127.0.0.1:{port}/").status_code == 401


def test_what_is_wrong_with_the_options_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    wrong = serve_again(tmp_path / "file")
    assert wrong.returncode == 1 and "is not a folder" in wrong.stderr
    wrong = serve_again(tmp_path / "runs", "--data", str(tmp_path / "no"))
    assert wrong.returncode == 1 and str(tmp_path / "no") in wrong.stderr
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        wrong = serve_again(tmp_path / "runs", "--port", port)
        assert wrong.returncode == 1 and "--port" in wrong.stderr
    wrong = serve_again(tmp_path / "runs", "--port", "99999")
    assert wrong.returncode == 2 and "65535" in wrong.stderr

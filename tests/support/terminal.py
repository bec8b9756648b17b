"""A command in a terminal that is closed while it runs."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence


class Terminal:
    """A pseudo-terminal with `arguments` of the command line running in it, as a session of its
    own; `output` grows as the command prints."""

    def __init__(self, arguments: Sequence[str]) -> None:
        import pty

        self.output = ""
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _RUN, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        # EIO when the process has ended and nobody holds the other side.
        with contextlib.suppress(OSError):
            while piece := os.read(self._master, 1 << 16):
                self.output += piece.decode("utf-8", "replace")

    def close(self) -> None:
        """Hang up, as a lost connection does: writing fails, and the session gets SIGHUP."""
        os.close(self._master)


# The terminal has to be the session's controlling one, else closing it sends no SIGHUP.
_RUN = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from onewan.cli import main
sys.exit(main(sys.argv[1:]))
"""


@contextlib.contextmanager
def in_terminal(arguments: Sequence[str]) -> Iterator[Terminal]:
    """A `Terminal` whose process is killed at the end of the block."""
    terminal = Terminal(arguments)
    try:
        yield terminal
    finally:
        terminal.process.kill()
        terminal.process.wait()

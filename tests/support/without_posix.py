"""The command onewan without what only POSIX has, as on Windows: no signals but its own, no
`fcntl`, no links, no folder that can be opened, no process that forks.

Libraries are imported first, since they have their own code for each system.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import accelerate  # noqa: F401
import av  # noqa: F401
import diffusers
import filelock  # noqa: F401
import peft  # noqa: F401
import psutil  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
import transformers

_ = diffusers.WanPipeline, diffusers.AutoencoderKLWan, transformers.UMT5EncoderModel
_ = transformers.PreTrainedTokenizerFast

for name in [*vars(os)]:
    if name.startswith(("fork", "get_blocking", "getgid", "getpg", "getuid", "geteuid", "killpg")):
        delattr(os, name)
for name in ("chown", "mkfifo", "sched_getaffinity", "setsid"):
    delattr(os, name)
for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGKILL", "alarm", "setitimer"):
    delattr(signal, name)
for name in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules[name] = None  # pyright: ignore[reportArgumentType]


def refuse(*_: Any, **__: Any) -> Any:
    raise OSError("a required privilege is not held by the client")


plain_open = os.open


def without_folders(path: Any, *given: Any, **named: Any) -> int:
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return plain_open(path, *given, **named)


os.symlink = os.link = os.kill = refuse
os.open = without_folders  # pyright: ignore[reportAttributeAccessIssue]
sys.platform = "win32"  # pyright: ignore[reportConstantRedefinition]

from onewan import files  # noqa: E402

files.IS_WINDOWS = True

from onewan.cli import main  # noqa: E402

sys.exit(main(sys.argv[1:]))

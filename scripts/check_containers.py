"""Build images and use them, where there is neither a container engine nor their base image.

    python scripts/check_containers.py [cuda] [rocm] --torch-index URL [--mount PATH ...]

Needs root on Debian, buildah and mmdebstrap, and takes about ten minutes and 10 GB of temporary
files for an image. Without a name both are built. The base image is
made from Debian's packages, under the name that the Dockerfiles give it; PyTorch is its CPU build.
All other steps are those of the Dockerfiles. Then, as the image's user: onewan shows its version
and the state of the machine, trains the demo, and imports the packages that need libraries of the
system. `--mount` gives the build a file or folder of this machine, such as pip's configuration.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMAGES = {
    file.name.removesuffix(".Dockerfile"): file
    for file in sorted((ROOT / "containers").glob("*.Dockerfile"))
}
DEBIAN = "bookworm"
# What a run in the image needs of it; each fails with a message of its own.
USES = """
set -eux
test "$(id -u)" = 1000
onewan --version
python -c 'import bitsandbytes, cv2, pillow_heif, pyarrow, torchao'
for folder in /work /models /cache; do touch "$folder/made"; done
if touch /opt/onewan/made; then exit 1; fi
if command -v gcc cc c++ make; then exit 1; fi
onewan doctor
export OMP_NUM_THREADS=1  # a model as small as the demo's is faster on one thread
onewan demo --dir demo
"""


def run(*command: str | Path) -> str:
    """Standard output of a command, which it shows; SystemExit where the command fails."""
    print("$", *command, flush=True)
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{done.stdout}\n{command[0]} ended with {done.returncode}")
    return done.stdout.strip()


class Buildah:
    """buildah with images and containers in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        places = ["--root", folder / "images", "--runroot", folder / "run"]
        self.command = ["buildah", *places, "--storage-driver", "vfs"]

    def __call__(self, *options: str | Path) -> str:
        return run(*self.command, *options)

    def make_base(self, name: str, folder: Path) -> None:
        """Debian with its Python, as an image of that name."""
        system = folder / "base.tar"
        packages = "--include=python3,python3-venv,ca-certificates"
        run("mmdebstrap", "--variant=minbase", packages, DEBIAN, system)
        container = self("from", "scratch")
        self("add", container, system, "/")
        link = ["ln", "--symbolic", "python3", "/usr/bin/python"]
        self("run", "--isolation", "chroot", container, "--", *link)
        self("commit", "--rm", container, name)


def base_of(file: Path) -> str:
    """The name of the image that a Dockerfile starts from."""
    (name,) = re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", file.read_text("utf-8"), re.MULTILINE)
    return name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="*", metavar="IMAGE", help=", ".join(IMAGES))
    parser.add_argument("--torch-index", required=True, help="an index with a CPU build")
    parser.add_argument("--mount", action="append", default=[], type=Path)
    arguments = parser.parse_args()
    mounts = [f"--volume={path}:{path}:ro" for path in arguments.mount]
    chosen = {name: IMAGES[name] for name in arguments.images or IMAGES}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        buildah = Buildah(folder)
        (base,) = {base_of(file) for file in chosen.values()}
        buildah.make_base(base, folder)
        for name, file in chosen.items():
            image, argument = f"onewan:{name}", f"TORCH_INDEX={arguments.torch_index}"
            options = ["--isolation=chroot", "--build-arg", argument, "--tag", image, *mounts]
            buildah("build", *options, "--file", file, ROOT)
            container = buildah("from", image)
            print(buildah("run", "--isolation=chroot", container, "--", "sh", "-c", USES))
            buildah("rm", container)
            buildah("rmi", image)


if __name__ == "__main__":
    main()

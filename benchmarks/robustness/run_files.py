"""Reads hostile and damaged run files with `load_run`, and command-line overrides to them.

Each case starts from a valid run file (every variant, with every method, optimizer, schedule and
distribution of timesteps) as YAML or JSON and changes its data, its text and its bytes. A file that
is still valid must be written by `dump_run` and read back as equal settings.

    python benchmarks/robustness/run_files.py --count 20000 --out run_files.json
"""

from __future__ import annotations

import json
import os
import random
import string
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from harness import canary, run_cases

from onewan.cli.boundary import guarded
from onewan.config import dump_run, load_run
from onewan.config.fields import leaves, schema_fields
from onewan.config.section import members_of
from onewan.errors import ConfigError
from onewan.presets.starter import StarterRequest, starter
from onewan.variants import VARIANTS

Path_ = tuple[str | int, ...]


def run(arguments: Sequence[str]) -> int:
    """Read a run file with overrides as the commands do."""

    def command() -> int:
        config = load_run(Path(arguments[0]), arguments[1:])
        again = Path(arguments[0]).parent / "resolved.yaml"
        again.write_text(dump_run(config), encoding="utf-8")
        try:
            equal = load_run(again) == config
        except ConfigError as error:
            raise AssertionError(f"can't be read back: {error}") from error
        assert equal, "is read back as other settings"
        return 0

    return guarded(command)


# ------------------------------------------------------------------------------------ valid files


@cache
def documents() -> list[dict[str, Any]]:
    """Valid run files with every member of every union."""
    base: dict[str, Any] = {
        "schema_version": 1,
        "model": {"path": "org/model", "variant": "t2v-a14b", "experts": "both"},
        "wan_config": {"max_frames": 17, "temporal_consistency_weight": 1.5},
        "video_data": {
            "sources": [{"path": "clips", "repeats": 2}, {"path": "more"}],
            "resolution": ["832x480", 399360],
            "min_resolution": [64, 64],
        },
        "method": {"kind": "lora", "rank": 8, "per_module": [{"modules": ["ffn.0"], "rank": 4}]},
        "optimizer": {"name": "adamw", "lr": 1e-4},
        "train": {"steps": 100, "timesteps": "uniform", "loss": {"kind": "huber"}, "ema": {}},
        "validation": {"share": 0.1, "every": 50},
        "sample": {"prompts": ["a fox", {"prompt": "a \N{FOX FACE}", "seed": 3}], "every": 50},
        "embeddings": [],
        "output": {"dir": "runs", "name": "fox", "formats": ["comfyui", "kohya"]},
    }
    found = [base]
    for name, field in schema_fields().items():
        if (union := members_of(field)) is None:
            continue
        for kind in union.sections:
            document = json.loads(json.dumps(base))
            section: Any = document
            *around, last = name.split(".")
            if around[:2] == ["validation", "sources"]:
                continue  # the same section as that of the training clips
            for part in around:
                section = section[0] if part == "*" else section.setdefault(part, {})
            section[last] = {union.keyed.key: kind}
            found.append(document)
    for variant in VARIANTS:
        document = json.loads(json.dumps(base))
        document["model"]["variant"] = variant
        document["train"]["steps"] = 50
        found.append(document)
    return found


# ------------------------------------------------------------------------------------------- data


def nested(rng: random.Random, depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if rng.random() < 0.7 else {"a": value}
    return value


def odd_text(rng: random.Random) -> str:
    pieces = (
        "",
        " ",
        "\n",
        "\0",
        "\x1b[2J\x1b]0;title\a",
        "\u202eevil",
        "\u2028",
        "\x85",
        "\ud800",
        "\ufeff",
        "a" * 300,
        "x" * 100_000,
        "C:\\new\\clips",
        "//server/share",
        "..",
        "~root",
        "~nobody-of-this-name/x",
        "/dev/zero",
        "/dev/null/x",
        "/proc/self/mem",
        "1" * 5000,
        "9" * 400,
        "1e400",
        "-0",
        "nan",
        "inf",
        "true",
        "null",
        "832x480",
        "0x0",
        "99999999999999999999x1",
        "$(touch canary)",
        "`id`",
        "os.system",
        "torch.optim.SGD",
        "builtins.eval",
        "a.b.c",
        "{placeholder}",
        "%s%n",
        "<fox>",
        "\N{FOX FACE}",
        "caf\u00e9",
        "cafe\u0301",
        "".join(chr(rng.randrange(1, 0x3000)) for _ in range(rng.randrange(1, 30))),
    )
    return "".join(rng.choice(pieces) for _ in range(rng.choice((1, 1, 1, 2, 3))))


def odd_value(rng: random.Random) -> Any:
    kind = rng.randrange(10)
    if kind < 4:
        return odd_text(rng)
    if kind < 7:
        numbers = (0, -1, 1, 2, 3, 10**18, 2**63, 2**64, 10**30, 10**400, -(10**400), 1e300, 1e308)
        small = (5e-324, 1e-300, -0.0, 0.5, 1.5, float("inf"), float("-inf"), float("nan"))
        return rng.choice((*numbers, *small, rng.randrange(-100, 1000), rng.random() * 10))
    if kind == 7:
        return rng.choice((None, True, False, [], {}, [[]], [{}], [None], {"": None}, {"a": 1}))
    if kind == 8:
        return [odd_value(rng) for _ in range(rng.choice((1, 2, 5)))]
    return rng.choice(
        (
            lambda: {odd_text(rng): odd_value(rng) for _ in range(3)},
            lambda: nested(rng, rng.choice((3, 50, 600))),
            lambda: [1] * rng.choice((10, 1000, 20_000)),
            lambda: {f"key_{number}": number for number in range(rng.choice((10, 1000)))},
        )
    )()


def places(node: Any, path: Path_ = ()) -> Iterator[Path_]:
    """Paths of all values of a document."""
    pairs: Any = ()
    if isinstance(node, dict):
        pairs = node.items()
    elif isinstance(node, list):
        pairs = enumerate(node)
    for key, value in pairs:
        yield (*path, key)
        yield from places(value, (*path, key))


def at(node: Any, path: Path_) -> Any:
    for part in path:
        node = node[part]
    return node


def change_data(rng: random.Random, document: dict[str, Any]) -> None:
    """One random change of a document's data."""
    path = rng.choice(list(places(document)) or [("model",)])
    around, last = at(document, path[:-1]), path[-1]
    kind = rng.randrange(9)
    if kind < 4:
        around[last] = odd_value(rng)
    elif kind == 4:
        field = rng.choice(leaves()).replace("*", "0").split(".")
        section: Any = document
        for part in field[:-1]:
            section = section.setdefault(part, {}) if isinstance(section, dict) else {}
        if isinstance(section, dict):
            section[field[-1]] = odd_value(rng)
    elif kind == 5:
        around.pop(last, None) if isinstance(around, dict) else around.pop(last)
    elif kind == 6:
        around[last] = rng.choice(([around[last]], {"kind": around[last]}, str(around[last])))
    elif kind == 7 and isinstance(around, dict):
        name = str(last)
        cut = rng.randrange(len(name) + 1)
        around[name[:cut] + rng.choice(("", "s", "_", "\n", "\x1b[31m")) + name[cut + 1 :]] = 1
    elif isinstance(around, dict):
        prefix = rng.choice(("unknown_", "steps", "\ud800", ""))
        for number in range(rng.choice((1, 20, 500, 20_000))):
            around[f"{prefix}{number}"] = number


# ------------------------------------------------------------------------------------------- text


def yaml_lines(node: Any, indent: str = "") -> Iterator[str]:
    """YAML of a document, with its scalars and what is nested deeper as in JSON: much faster than a
    library, and with every character as it is."""
    pairs: Any = node.items() if isinstance(node, dict) else (("", item) for item in node)
    for key, value in pairs:
        start = f"{indent}- " if isinstance(node, list) else f"{indent}{json.dumps(key)[1:-1]}: "
        if isinstance(value, dict | list) and value and len(indent) < 6:
            yield start
            yield from yaml_lines(value, indent + "  ")
        else:
            yield start + json.dumps(value, ensure_ascii=False)


def pieces_of_yaml(rng: random.Random, mark: Path) -> str:
    """Something that YAML gives a meaning to, for the place of a value."""
    depth = rng.choice((10, 100, 600, 3000))
    command = f'"touch {mark}"'
    return rng.choice(
        (
            "[" * depth,
            "[" * depth + "]" * depth,
            "{a: " * depth + "1" + "}" * depth,
            "- " * depth,
            "? " * depth,
            "!!bool abc",
            "!!int abc",
            "!!int ''",
            "!!float x",
            "!!null x",
            "!!binary '***'",
            "!!binary aGVsbG8=",
            "!!timestamp abc",
            "2026-13-01",
            "2026-01-01T99:99:99Z",
            "2026-01-01",
            "!!set {a, b}",
            "!!omap [a: 1, b: 2]",
            "!!omap [1]",
            "!!pairs [a: 1]",
            "!!seq {a: 1}",
            "!!map [1]",
            "!!str [1]",
            "!!merge x",
            "!!value x",
            f"!!python/object/apply:os.system [{command}]",
            f"!!python/object/new:os.system [{command}]",
            "!!python/name:os.system",
            f"!!python/module:os {command}",
            "!unknown x",
            "!<tag:yaml.org,2002:int> x",
            "! x",
            "!!",
            "!e!x 1",
            "&a [*a]",
            "&a {b: *a}",
            "*unknown",
            "&a &b 1",
            "{<<: 1}",
            "{<<: [*x]}",
            "{<<: {a: 1}, a: 2}",
            "{<<: &a {<<: *a}}",
            "{[1, 2]: 3}",
            "{{a: 1}: 3}",
            "{? [a] : b}",
            "{null: 1, true: 2, 1.5: 3}",
            "{a: 1, a: 2}",
            '"\\UFFFFFFFF"',
            '"\\U00110000"',
            '"\\ud800"',
            '"\\x"',
            '"\\xZZ"',
            '"C:\\new\\clips"',
            '"C:\\Users\\me"',
            "'it''s",
            '"unfinished',
            "|\n  text\n more",
            ">9\n x",
            "|+-\n",
            "1" * rng.choice((400, 5000)),
            "0x" + "f" * 5000,
            "0o" + "7" * 5000,
            "0b" + "1" * 5000,
            "1_000_000",
            "1:30:00",
            "190:20:30",
            ".inf",
            "-.inf",
            ".nan",
            "1e999",
            "1." + "1" * 5000,
            "1e" + "9" * 5000,
            "+1",
            "08",
            "0o8",
            "0x",
            "~",
            "=",
            "<<",
            "%",
            "@",
            "`",
            "\t",
            "a: b: c",
            "- - -",
            "# comment",
            "--- ",
            "...",
            "\u2028",
            "\x85x",
            "\ufeff",
            "\U0010ffff",
        )
    )


def aliases(rng: random.Random) -> str:
    """A few lines of aliases that stand for a number of values that grows exponentially."""
    levels, width = rng.choice((5, 9, 11, 30)), rng.choice((2, 9, 10))
    opening, closing = rng.choice(("[]", "{}"))
    lines = [f"a0: &a0 {opening}{closing}"]
    for level in range(1, levels):
        parts = [
            f"*a{level - 1}" if opening == "[" else f"k{n}: *a{level - 1}" for n in range(width)
        ]
        lines.append(f"a{level}: &a{level} {opening}{', '.join(parts)}{closing}")
    where = rng.choice(("model", "wan_config", "sample", "method", "other", "embeddings"))
    return "\n".join([*lines, f"{where}: *a{levels - 1}"]) + "\n"


def change_text(rng: random.Random, text: str, mark: Path) -> str:
    """One random change of a file's text."""
    lines = text.split("\n")
    number = rng.randrange(len(lines))
    line = lines[number]
    kind = rng.randrange(12)
    if kind < 4:
        name, colon, _ = line.partition(":")
        lines[number] = f"{name}{colon} {pieces_of_yaml(rng, mark)}"
    elif kind == 4:
        cut = rng.randrange(len(line) + 1)
        odd = rng.choice(list(string.punctuation + "\t\r\n \0\x07\x1b\x7f\x85\xa0\u202e"))
        lines[number] = line[:cut] + odd + line[cut + rng.randrange(2) :]
    elif kind == 5:
        lines.pop(number)
    elif kind == 6:
        lines.insert(rng.randrange(len(lines)), line)
    elif kind == 7:
        lines[number] = " " * rng.randrange(5) + line.lstrip()
    elif kind == 8:
        return aliases(rng) + text if rng.random() < 0.5 else text + aliases(rng)
    elif kind == 9:
        head = ("%YAML 9.9\n---\n", "%YAML 1.1\n---\n", "%TAG ! x\n---\n", "%X\n---\n", "---\n")
        return rng.choice(head) + text + rng.choice(("", "---\na: 1\n", "...\n", "--- x"))
    elif kind == 10:
        start = rng.randrange(len(text) + 1)
        return text[:start] + text[start + rng.randrange(1, 50) :]
    else:
        return text[: rng.randrange(len(text) + 1)]
    return "\n".join(lines)


def change_json(rng: random.Random, text: str) -> str:
    """One random change of a JSON text."""
    start = rng.randrange(len(text) + 1)
    depth = rng.choice((10, 600, 3000, 100_000))
    piece = rng.choice(
        (
            "[" * depth,
            '{"a":' * depth,
            "[" * depth + "]" * depth,
            "NaN",
            "-Infinity",
            "1" * 5000,
            "1e999",
            '"\\ud800"',
            '"\\u0000"',
            '"\\x"',
            "// comment\n",
            ",",
            "}",
            "\0",
            '"model": 1, "model": 2,',
        )
    )
    return text[:start] + piece + text[start + rng.randrange(3) :]


def change_bytes(rng: random.Random, data: bytes) -> bytes:
    """One random change of a file's bytes, such as another encoding."""
    text = data.decode("utf-8", "replace")
    start = rng.randrange(len(data) + 1)
    choices: list[Callable[[], bytes]] = [
        lambda: b"\xef\xbb\xbf" + data,
        lambda: text.encode("utf-16"),
        lambda: text.encode("utf-16-be"),
        lambda: text.encode("utf-32"),
        lambda: text.encode("latin-1", "replace") + b"\n# \xe9",
        lambda: data[:start] + bytes(rng.randrange(256) for _ in range(5)) + data[start:],
        lambda: data[:start] + b"\0" * rng.choice((1, 1000)) + data[start:],
        lambda: data.replace(b"\n", b"\r\n"),
        lambda: data.replace(b"\n", b"\r"),
        lambda: b"",
        lambda: b" \n\n",
        lambda: bytes(rng.randrange(256) for _ in range(rng.randrange(200))),
        lambda: data + b"# comment\n" * rng.choice((1000, 200_000)),
        lambda: data + b"".join(b"key%d: 1\n" % n for n in range(rng.choice((1000, 20_000)))),
        lambda: data + b"key: [" + b"1, " * rng.choice((1000, 100_000)) + b"]\n",
        lambda: data + b"text: '" + b"x" * rng.choice((10_000, 3_000_000)) + b"'\n",
    ]
    return rng.choice(choices)()


# ------------------------------------------------------------------------------------------ cases


def odd_override(rng: random.Random, mark: Path) -> str:
    name = rng.choice([*leaves(), *schema_fields()]).replace("*", str(rng.choice((0, 1, 2, 99))))
    parts = name.split(".")
    if rng.random() < 0.4:
        odd = ("", "9" * 5000, "-1", "\u0663", "\u00b2", "0" * 400, "x\ny", "a" * 5000, "0", " ")
        parts[rng.randrange(len(parts))] = rng.choice(odd)
    if rng.random() < 0.05:
        parts *= 1000
    value = pieces_of_yaml(rng, mark) if rng.random() < 0.6 else str(odd_value(rng))
    return ".".join(parts) + rng.choice(("=", "=", "=", "=", "", "==", " = ")) + value


def odd_file(rng: random.Random, folder: Path) -> Path:
    """A path that is no regular file."""
    path = folder / "run.yaml"
    kind = rng.randrange(8)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.symlink_to(path.name)
    elif kind == 3:
        return Path(rng.choice(("/dev/zero", "/dev/stdin", "/dev/tty", "/proc/self/mem", "/sys")))
    elif kind == 4:
        return folder / ("x" * 300) / "run.yaml"
    elif kind == 5:
        return folder / "nul\0.yaml"
    elif kind == 6:
        path.write_bytes(b"")
        return path / "run.yaml"
    return path


def make(seed: int, folder: Path) -> list[str]:
    rng = random.Random(seed)
    mark = canary(folder)
    if rng.random() < 0.01:
        return [str(odd_file(rng, folder))]
    document = json.loads(json.dumps(rng.choice(documents())))
    for _ in range(rng.choice((0, 0, 1, 1, 2, 5))):
        change_data(rng, document)
    suffix = rng.choice((".yaml", ".yaml", ".yaml", ".json"))
    text = json.dumps(document) if suffix == ".json" else "\n".join(yaml_lines(document))
    if suffix == ".yaml" and rng.random() < 0.2:
        text = starter(StarterRequest(variant=rng.choice(list(VARIANTS))))
    for _ in range(rng.choice((0, 0, 1, 1, 2, 5))):
        text = change_json(rng, text) if suffix == ".json" else change_text(rng, text, mark)
    data = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        data = change_bytes(rng, data)
    name = rng.choice(("run", "run", "run", "a b", "\x1b[31mred", "new\nline", "\udcff", "con"))
    path = folder / f"{name}{suffix}"
    path.write_bytes(data)
    overrides = [odd_override(rng, mark) for _ in range(rng.choice((0, 0, 0, 1, 2)))]
    return [str(path), *overrides]


if __name__ == "__main__":
    run_cases(__doc__, make, run)

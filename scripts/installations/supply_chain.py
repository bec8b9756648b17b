"""What is installed with onewan: a bill of materials, its licences, and known vulnerabilities."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from environments import ROOT, Environment, run, tool

CYCLONEDX = "cyclonedx-bom==7.5.0"
PIP_AUDIT = "pip-audit==2.10.1"

# Licences under which a program of Apache-2.0 may depend on a package: SPDX identifiers, and the
# classifiers of packages that give no identifier. MPL-2.0 binds changes to the package's own files.
ALLOWED = {
    *("0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD-2-Clause", "BSD-3-Clause"),
    *("BSL-1.0", "CNRI-Python", "ISC", "MIT", "MIT-CMU", "MPL-2.0", "PSF-2.0", "Python-2.0"),
    *("Unlicense", "Zlib", "CC0-1.0"),
    *(
        "License :: OSI Approved :: Apache Software License",
        "License :: OSI Approved :: BSD License",
    ),
    "License :: OSI Approved :: CMU License (MIT-CMU)",
    "License :: OSI Approved :: MIT License",
    "License :: OSI Approved :: Mozilla Public License 2.0 (MPL 2.0)",
    "License :: OSI Approved :: Python Software Foundation License",
}

# Beginnings of names of packages that the rule above does not cover, and why they may be there.
EXCEPTIONS = {
    "pillow_heif": "BSD-3-Clause; its wheel also holds x265 (GPL-2.0), which is why it is an extra "
    "that the user installs (heic), and which nothing of onewan calls: it only reads",
    "docutils": "public domain and BSD; the GPL is of a mode for Emacs, which its wheel lacks. "
    "NiceGUI, of the extra web, needs it, and onewan uses nothing of it",
    "nvidia-": "NVIDIA's libraries, which come with PyTorch's build for CUDA",
    "cuda-": "NVIDIA's libraries, which come with PyTorch's build for CUDA",
}
# Packages whose metadata name no licence, and the one in their files.
UNNAMED = {
    "multidict": "Apache-2.0",
    "protobuf": "BSD-3-Clause",
    "torchao": "BSD-3-Clause",
    "transformers": "Apache-2.0",
}

# A version with a vulnerability of 2014, which a service that answers knows.
_KNOWN_BAD = "jinja2==2.4.1"


def write_bill(environment: Environment, file: Path) -> dict[str, Any]:
    """A bill of materials (CycloneDX) of what is installed in `environment`, checked against its
    schema and written to `file`."""
    command = tool(CYCLONEDX, "cyclonedx-py", "environment", str(environment.python))
    command += ["--pyproject", str(ROOT / "pyproject.toml"), "--mc-type", "application"]
    command += ["--output-reproducible", "--of", "JSON", "--validate", "-o", str(file)]
    run(command, ROOT)
    return json.loads(file.read_text(encoding="utf-8"))


def write_licences(bill: dict[str, Any], file: Path) -> None:
    """A list of the packages of `bill` and their licences, written to `file`. SystemExit if one
    may not be a dependency."""
    lines, refused = list[str](), list[str]()
    for component in sorted(bill["components"], key=lambda c: c["name"].lower()):
        name = component["name"]
        licences = sorted(set(_licences(component))) or [UNNAMED.get(name, "none named")]
        lines.append(f"{name} {component['version']}: {', '.join(licences)}")
        bad = [licence for licence in licences if not _is_allowed(licence)]
        reason = next((text for start, text in EXCEPTIONS.items() if name.startswith(start)), "")
        if bad and not reason:
            refused.append(lines[-1])
        elif bad:
            lines[-1] += f" ({reason})"
    if refused:
        names = "\n".join(refused)
        raise SystemExit(f"licences that supply_chain.py does not know as compatible:\n{names}")
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _licences(component: dict[str, Any]) -> Iterator[str]:
    for entry in component.get("licenses", ()):
        licence = entry.get("license", {})
        yield entry.get("expression") or licence.get("id") or licence["name"]


def _is_allowed(expression: str) -> bool:
    """Whether every part of an expression with AND is allowed, or one part of one with OR."""
    if expression in ALLOWED:
        return True
    for word, of in ((" AND ", all), (" OR ", any)):
        if word in expression:
            return of(_is_allowed(part.strip("() ")) for part in expression.split(word))
    return False


def check_vulnerabilities(folder: Path) -> None:
    """Ask the advisory service of the package index about every package of this environment.
    SystemExit if one has a known vulnerability, or, with the variable AUDIT=required, if the
    service does not answer; without it, the output says that nothing was checked."""
    installed = {f"{d.name}=={d.version.split('+')[0]}" for d in distributions()}
    installed -= {text for text in installed if text.startswith("onewan==")}
    requirements = folder / "installed.txt"
    requirements.write_text("\n".join([*sorted(installed)]) + "\n", encoding="utf-8")
    known_bad = folder / "known_bad.txt"
    known_bad.write_text(f"{_KNOWN_BAD}\n", encoding="utf-8")
    control = _audit(known_bad, folder / "control.json")
    if not any(package.get("vulns") for package in control):
        text = (
            f"not checked: the advisory service does not answer (it finds nothing in {_KNOWN_BAD})"
        )
        if os.environ.get("AUDIT") == "required":
            raise SystemExit(text)
        print(text)
        return
    packages = _audit(requirements, folder / "audit.json")
    unknown = [p["name"] for p in packages if "skip_reason" in p]
    bad = [
        f"{p['name']} {p['version']}: {v['id']}, fixed in {', '.join(v['fix_versions']) or 'none'}"
        for p in packages
        for v in p.get("vulns", ())
    ]
    if bad:
        raise SystemExit("known vulnerabilities:\n" + "\n".join(bad))
    print(f"{len(packages)} packages have no known vulnerability; not known: {unknown or 'none'}")


def _audit(requirements: Path, file: Path) -> list[dict[str, Any]]:
    """What pip-audit reports of each package; empty if the service can't be reached."""
    command = tool(PIP_AUDIT, "pip-audit", "--requirement", str(requirements), "--no-deps")
    command += ["--disable-pip", "--format", "json", "--output", str(file)]
    file.unlink(missing_ok=True)
    try:
        run(command, ROOT)
    except SystemExit as error:
        # It also ends like this with vulnerabilities, and then there is a report.
        if not file.is_file():
            print(str(error).strip().splitlines()[-2], file=sys.stderr)
            return []
    return json.loads(file.read_text(encoding="utf-8"))["dependencies"]

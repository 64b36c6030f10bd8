"""Every option that a document or a script's own docstring shows on a command line is one that the program takes."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import importlib
import inspect
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tyro

from rlhf import cli

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = ("rlhf", "base_models", "adapters", "feedback_app", "db", "benchmarks")
SCRIPTS = [
    p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*.py")) if '__name__ == "__main__"' in p.read_text(encoding="utf-8")
]


class Caught(Exception):  # noqa: N818 (no error)
    """Hands a script's parser over at the moment that it would read the command line."""


def commands(text: str) -> Iterator[list[str]]:
    """Words of what looks like a command: `spans`, and lines of fenced or indented blocks, continued lines joined, comments cut off."""
    text = re.sub(r"\\\n\s*", " ", text)
    blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = [*blocks.splitlines(), *re.findall(r"^ {4,}(.+)$", prose, re.MULTILINE), *re.findall(r"`([^`]+)`", prose)]
    for line in lines:
        try:
            yield shlex.split(re.sub(r"\s#\s.*", "", line))
        except ValueError:  # an apostrophe: words, no command
            continue


def program(words: list[str]) -> tuple[str, list[str]] | None:
    """(module of ours, what follows its name), or None."""
    for place, word in enumerate(words):
        rest = words[place + 1 :]
        if word in ("encore", ".venv/bin/encore") and place == 0:
            return ("feedback_app.owners", rest[1:]) if rest[:1] == ["owners"] else ("rlhf.cli", rest)
        if word == "-m" and rest and rest[0].split(".")[0] in FOLDERS:
            return rest[0], rest[1:]
        if re.fullmatch(r"[a-z_/]+\.py", word) and place <= 6:
            found = [p for p in SCRIPTS if p.relative_to(ROOT).as_posix() == word or p.name == word]
            if found:
                return ".".join(found[0].relative_to(ROOT).with_suffix("").parts), rest
    return None


def caught(read: object, *_: object, **__: object) -> None:
    raise Caught(read)


def what_reads(name: str, reader: object, word: str) -> Any:
    """What a program hands to `reader.word` when it would read its command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, word, caught)
        patch.setattr(sys, "argv", [name, "--"])  # some split their command line here before they read it
        patch.delitem(sys.modules, name, raising=False)
        with pytest.raises(Caught) as told:
            runpy.run_module(name, run_name="__main__")
    return told.value.args[0]


@functools.cache
def settings_of(name: str) -> set[str]:
    """The options of a script whose settings are a dataclass, or a function's arguments; none for others."""
    if "tyro.cli(" in (ROOT / name.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8"):
        names = list(inspect.signature(what_reads(name, tyro, "cli")).parameters)
    else:
        classes = [v for k, v in vars(importlib.import_module(name)).items() if k.endswith("Config") and v.__module__ == name]
        names = [field.name for kind in classes if dataclasses.is_dataclass(kind) for field in dataclasses.fields(kind)]
    return {f"--{no}{each.replace('_', '-')}" for each in names for no in ("", "no-")} | {"--preset", "--config"} if names else set()


@functools.cache
def parser_of(name: str) -> argparse.ArgumentParser:
    """The parser of any other program of ours."""
    return cli._parser() if name == cli.__name__ else what_reads(name, argparse.ArgumentParser, "parse_args")


def unknown(name: str, words: list[str]) -> list[str]:
    """Options among these words that the program does not take."""
    words = words[: words.index("--")] if "--" in words else words  # what follows is another program's
    known = settings_of(name)
    parser = None if known else parser_of(name)
    for word in ("", *words):
        if parser is None:
            break
        known = known | set(parser._option_string_actions)
        inner = [a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        parser = inner[0].get(word, parser) if inner else None
    shown = [word.strip("[]").split("=")[0] for word in words if re.match(r"\[?-[a-zA-Z-]", word) and " " not in word]
    return [option for option in shown if option not in known | {"--help"}]


def wrong(text: str) -> list[str]:
    found = [(told, words) for words in commands(text) if (told := program(words))]
    return [f"{option} in: {' '.join(words)}" for (name, rest), words in found for option in unknown(name, rest)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_option_that_a_document_shows_is_taken(document: Path) -> None:
    assert wrong(document.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_option_that_a_scripts_docstring_shows_is_taken(script: Path) -> None:
    assert wrong(ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or "") == []


def test_commands_are_found_and_an_invented_option_is_told() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    told = {name for words in commands(text) if (found := program(words)) for name in [found[0]]}
    assert {"rlhf.cli", "rlhf.train_ppo", "rlhf.train_dpo", "benchmarks.rlhf_proof", "feedback_app.app"} <= told
    block = "```\nencore loop \\\n  --heldout a.txt --no-such 1  # --nor-this\n```\n"
    for text in (
        block,
        "    python rlhf/train_ppo.py --no-such\n",
        "say `encore owners erase NAME --no-such`",
        "`train_sft.py --no-such=3`",
    ):
        (line,) = wrong(text)
        assert line.startswith("--no-such in:")

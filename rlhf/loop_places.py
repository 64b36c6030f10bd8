"""Where a loop's prompts, base and first champion lie: in its folder, and then they move with it, or elsewhere.

    loop.json -> kept_settings -> places as they are now; another place that is given for one -> the same content, or refused

Training goes by content, and the loop's files of prompts may change in their place from round to round. A file that is given from another
place is a slip more often than an intention, so that it has to be what the loop's last call found (contents.json); a base and an adapter
are what their own hashes in champion.json say.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters.library import read_adapter
from base_models.checkpoint import file_sha256, read_json, write_json
from base_models.errors import UserError
from base_models.policy import load_policy

PLACES = ("prompts", "heldout", "policy", "champion")
"""The settings of a loop that are places."""


def kept_settings(out: Path) -> dict[str, Any]:
    """What loop.json keeps; nothing where there is none. What lay in the loop's folder is where that folder is now."""
    if not (out / "loop.json").is_file():
        return {}
    kept: dict[str, Any] = read_json(out / "loop.json")
    there = {name: str(moved(kept[name], kept["out"], out)) for name in PLACES if kept.get(name) is not None}
    return kept | there | {"out": str(out)}


def moved(place: str | Path, old: str | Path, new: Path) -> Path:
    """Where a place is once the folder `old` is at `new`: what was in it is there, however it was written, and all else where it was."""
    whole, folder = Path(os.path.abspath(place)), Path(os.path.abspath(old))  # a link in it stays what it is called
    return new / whole.relative_to(folder) if whole.is_relative_to(folder) else Path(place)


def demand_there(out: Path, name: str, place: Path | None) -> None:
    """UserError where one of the PLACES of a loop that was begun is gone."""
    if place is not None and (out / "loop.json").is_file() and not place.exists():
        elsewhere = "" if place.is_absolute() else "; or call from the folder in which the loop was begun, by which it goes"
        remedy = f"put it back there, or say where the same content is now: --{name} PLACE{elsewhere}"
        raise UserError(f"no {place}", f"the {name} with which the loop was begun", remedy)


def refuse_other_content(out: Path, name: str, place: Path, before: Path) -> None:
    """UserError where one of PLACES is given as another one, and what is there is not what the loop had `before`."""
    found, known = content_sha256(name, place), known_sha256(out, name, before)
    if known is None:
        got = f"--{name} {place}, and nothing that tells whether it is what the loop in {out} began with"
        raise UserError(got, f"the {name} at {before}", f"put the {name} back at {before}, or choose another --out")
    if found != known:
        got, expected = f"--{name} {place} of sha256 {found[:12]}", f"{known[:12]}, as of what the loop in {out} had at {before}"
        raise UserError(got, expected, "give the same content, leave it out, or choose another --out")


def content_sha256(name: str, place: Path) -> str:
    """What the content of one of PLACES is known by: a base and an adapter by their own hashes. UserError where it is not there."""
    if name == "policy":
        return load_policy(place).sha256
    if name == "champion":
        return read_adapter(place).manifest.adapter_sha256
    if not place.is_file():
        raise UserError(f"no file {place}", f"the {name} of the loop", "check the path")
    return file_sha256(place)


def note_contents(out: Path, files: Mapping[str, Path | None]) -> None:
    """Keep what the files of prompts held at this call."""
    write_json(out / "contents.json", {name: content_sha256(name, file) for name, file in files.items() if file is not None})


def known_sha256(out: Path, name: str, before: Path) -> str | None:
    """What the loop knows of the content of one of PLACES, at its last call; None where it does not."""
    if name in ("prompts", "heldout"):
        if (out / "contents.json").is_file():
            return str(read_json(out / "contents.json")[name])
        return file_sha256(before) if before.is_file() else None  # a loop of an earlier version
    if not (out / "champion.json").is_file():
        return None
    record = read_json(out / "champion.json")
    if name == "policy":
        return str(record["policy_sha256"])
    while "before" in record:
        record = record["before"]
    return str(record["adapter_sha256"])

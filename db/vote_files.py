"""Files of votes that were given elsewhere -> checked rows, one at a time, so that memory does not grow with the file.

    a snapshot's folder     votes.jsonl + clips.jsonl of `export_snapshot`, any version; nothing of a row is lost
    .csv, .jsonl, .json     rows of (prompt, audio_a, audio_b, system_a, system_b, choice, rater, time ...)
    Music Arena             its published rows (`battle_uuid`, `preference`, `user_pseudonym` ...), or its servers' battle logs
                            (`uuid`, `a_metadata`, `vote` ...), as JSON or JSON lines

Required are prompt, audio_a, audio_b, system_a, system_b, choice, rater and time; known as well are id, prompt_id, split, comment,
confidence, and for both sides listen_a_ms, duration_a_s, sample_rate_a and sha256_a. A clip without a stated `sha256` is known by a
hash of its place and prompt, one without a stated length has a placeholder of 1 s, and size and rate are 0. No audio is fetched.

What is assumed of Music Arena, from its public code: A / B / TIE / BOTH_BAD; times in Unix seconds; a clip is known by its audio path,
or by battle and side where the audio is withheld; a rater by `user_pseudonym`, or `salted_ip`, else the whole battle is a rater of
its own. Battles without a vote are no votes and are counted as such.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from db.errors import StoreError
from db.schema import ASPECTS

CHOICES = {"a": "a", "b": "b", "tie": "tie", "both_bad": "both_bad", "bothbad": "both_bad", "both bad": "both_bad", "x": "x", "y": "y"}
MAX_ERRORS = 20
"""So many wrong rows are told one by one; all are counted."""
MAX_LINE = 4_000_000
"""Characters of one JSON line or CSV field. A vote with 500 events is a hundredth of it."""
MAX_WHOLE_BYTES = 64_000_000
"""A .json file is read whole, up to this size; JSON lines may be of any."""
UNFIT = re.compile("[\0\ud800-\udfff]")
"""What no database takes: NUL, and half a letter."""
UNREADABLE = (KeyError, TypeError, ValueError, AttributeError, OverflowError)
"""What a row that cannot be understood raises."""


@dataclass(frozen=True)
class VoteRow:
    """One vote, sides as shown: `clips` are the manifests of sides a and b; of a snapshot's only `sha256` and `system` are in
    them, and the system only since schema 5."""

    where: str
    key: str
    prompt_id: str
    prompt: str
    split: str
    clips: tuple[Mapping[str, Any], Mapping[str, Any]]
    choice: str
    rater: str
    at: datetime
    columns: Mapping[str, Any]
    """More columns of Vote."""
    asked: Mapping[str, Any]
    """Columns of Assignment."""
    gold: str | None
    """The side, as shown, that is known to be right."""
    aspects: Mapping[str, int]
    marks: tuple[Mapping[str, Any], ...]

    @property
    def text_sha256(self) -> str:
        return hashlib.sha256(self.prompt.encode()).hexdigest()


@dataclass
class Told:
    """What reading a file has told so far."""

    n_rows: int = 0
    n_without_vote: int = 0
    n_wrong: int = 0
    first_wrong: list[str] = field(default_factory=list)
    aspects: set[str] = field(default_factory=set)
    splits: dict[tuple[str, str], str] = field(default_factory=dict)
    """Of a snapshot's prompts outside `train`, by (prompt_id, hash of the text): its clips do not tell theirs."""

    def wrong(self, where: str, what: object) -> None:
        self.n_wrong += 1
        if len(self.first_wrong) < MAX_ERRORS:
            self.first_wrong.append(f"{where}: {what}")

    def refuse(self, name: str) -> None:
        """Raises StoreError that names the first wrong rows and counts all, or says that there is no vote."""
        if self.n_wrong:
            more = f"; and {self.n_wrong - MAX_ERRORS} more" if self.n_wrong > MAX_ERRORS else ""
            got = f"{self.n_wrong} wrong rows in {name}: {'; '.join(self.first_wrong)}{more}"
            raise StoreError(got, "rows that can all be read", "mend or drop them; nothing was stored")
        if not self.n_rows:
            raise StoreError(f"{name} without a vote", "at least one row with a choice", "check the file")


def read_votes(path: Path, told: Told) -> Iterator[VoteRow]:
    """The votes of a file or a snapshot's folder; rows that cannot be read are told and left out. Raises StoreError."""
    frozen = path.is_dir()
    for where, raw in _objects(path / "votes.jsonl" if frozen else path, told):
        try:
            if _unanswered(raw):
                told.n_without_vote += 1
                continue
            row = _of_snapshot(where, raw) if frozen else _of_row(where, raw)
        except UNREADABLE as error:
            told.wrong(where, f"no {error.args[0]!r}" if isinstance(error, KeyError) else error)
            continue
        told.n_rows += 1
        told.aspects |= row.aspects.keys()
        if frozen and row.split != "train":
            told.splits[row.prompt_id, row.text_sha256] = row.split
        yield row


def read_clips(folder: Path, told: Told) -> Iterator[dict[str, Any]]:
    """The clips of a snapshot in their order, `duration_ms` and all. Raises StoreError."""
    for where, raw in _objects(folder / "clips.jsonl", told):
        try:
            columns = {
                "uri": raw["uri"],
                "system": raw["system"],
                "prompt_id": str(raw["prompt_id"]),
                "prompt": _string(raw, "prompt", 20_000),
            }
            columns |= {
                "duration_s": float(raw["duration_s"]),
                "sample_rate": int(raw["sample_rate"]),
                "sha256": _sha256(str(raw["sha256"])),
            }
        except UNREADABLE as error:
            told.wrong(f"clips.jsonl {where}", f"no {error.args[0]!r}" if isinstance(error, KeyError) else error)
            continue
        yield raw | columns


def check_frozen(folder: Path) -> None:
    """Raises StoreError when a snapshot's lines were changed since its export."""
    from db.export import snapshot_sha256

    try:
        stated = json.loads((folder / "snapshot.json").read_text(encoding="utf-8")).get("sha256")
    except ValueError as error:
        raise StoreError(f"{folder / 'snapshot.json'}: {error}", "valid JSON", "export the snapshot again") from error
    if stated != snapshot_sha256(folder):
        raise StoreError(f"{folder}, changed since its export", "the votes and clips as they were hashed", "export it again")


# ---- lines -----------------------------------------------------------------------------------------------------------


def _objects(path: Path, told: Told) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, object) of a CSV, JSON or JSON-lines file; what is no object is told."""
    with path.open(encoding="utf-8-sig", newline="" if path.suffix == ".csv" else "\n") as file:
        found = {".csv": _csv_rows, ".json": _json_rows}.get(path.suffix, _json_lines)(file, told)
        for where, row in found:
            if isinstance(row, dict):
                yield where, row
            else:
                told.wrong(where, f"{type(row).__name__} instead of an object")


def _csv_rows(file: TextIO, told: Told) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(MAX_LINE)
    reader = csv.DictReader(file)
    try:
        for row in reader:
            yield f"line {reader.line_num}", {key: value for key, value in row.items() if key is not None and value not in ("", None)}
    except csv.Error as error:
        told.wrong(f"line {reader.line_num}", error)


def _json_rows(file: TextIO, told: Told) -> Iterator[tuple[str, Any]]:
    path = Path(file.name)
    if path.stat().st_size > MAX_WHOLE_BYTES:
        got = f"{path.name} of {path.stat().st_size} bytes"
        raise StoreError(got, f"at most {MAX_WHOLE_BYTES} in one JSON value", "write it as JSON lines, one row a line")
    try:
        whole = json.load(file)
    except (ValueError, RecursionError) as error:
        told.wrong(path.name, error)
        return
    yield from ((f"row {i}", row) for i, row in enumerate(whole if isinstance(whole, list) else [whole], start=1))


def _json_lines(file: TextIO, told: Told) -> Iterator[tuple[str, Any]]:
    number = 0
    while line := file.readline(MAX_LINE):
        number += 1
        if len(line) == MAX_LINE and not line.endswith("\n"):
            told.wrong(f"line {number}", f"more than {MAX_LINE} characters")
            return
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                told.wrong(f"line {number}", error)


# ---- rows ------------------------------------------------------------------------------------------------------------


def _unanswered(raw: Mapping[str, Any]) -> bool:
    """A Music Arena battle that was played and never voted on."""
    if "a_metadata" in raw:
        return not (raw.get("vote") or {}).get("preference")
    return "battle_uuid" in raw and not raw.get("preference")


def _of_row(where: str, raw: Mapping[str, Any]) -> VoteRow:
    if "a_metadata" in raw:
        return _of_row(where, _flat_battle(raw))
    if "battle_uuid" in raw:
        return _of_row(where, _flat_arena(raw))
    prompt = _text(raw, "prompt", 20_000)
    choice = CHOICES.get(str(raw.get("choice", "")).strip().lower(), "")
    if choice not in ("a", "b", "tie", "both_bad"):
        raise ValueError(f"choice {raw.get('choice')!r} instead of a, b, tie or both_bad")
    named = {name: None if raw.get(name) is None else str(raw[name]) for name in ("prompt_id", "split", "comment", "id")}
    prompt_id = _optional(named, "prompt_id", 128) or "i_" + hashlib.sha256(prompt.encode()).hexdigest()[:16]
    clips = tuple(_clip(raw, side, prompt) for side in "ab")
    if clips[0]["sha256"] == clips[1]["sha256"]:
        raise ValueError("audio_a and audio_b are the same clip")
    rater = _text(raw, "rater", 64)
    identity = [prompt, clips[0]["sha256"], clips[1]["sha256"], rater, str(raw["time"])]
    key = str(named["id"] or hashlib.sha256("\0".join(identity).encode()).hexdigest())
    confidence = int(raw["confidence"]) if raw.get("confidence") is not None else None
    if confidence is not None and not 1 <= confidence <= 3:
        raise ValueError(f"confidence {confidence} instead of 1 to 3")
    columns = {
        "listen_a_ms": _ms(raw, "listen_a_ms"),
        "listen_b_ms": _ms(raw, "listen_b_ms"),
        "comment": _optional(named, "comment", MAX_LINE),
        "confidence": confidence,
    }
    split = _optional(named, "split", 32) or "train"
    return VoteRow(where, key, prompt_id, prompt, split, (clips[0], clips[1]), choice, rater, _time(raw["time"]), columns, {}, None, {}, ())


def _flat_arena(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the published Music Arena data set, under our names."""
    battle = str(raw["battle_uuid"])
    return {
        "id": battle,
        "prompt": raw.get("prompt") or "(no prompt)",
        "choice": raw["preference"],
        "rater": raw.get("user_pseudonym") or f"battle {battle}"[:64],
        "time": raw.get("timestamp") or raw.get("date"),
        "comment": raw.get("feedback") or None,
        **{f"system_{s}": raw.get(f"system_{s}") for s in "ab"},
        **{f"audio_{s}": raw.get(f"audio_{s}") or f"music-arena:{battle}/{s}" for s in "ab"},
        **{f"listen_{s}_ms": round(1000 * float(raw.get(f"total_listening_time_{s}") or 0)) for s in "ab"},
        **{f"duration_{s}_s": raw.get(f"duration_{s}") for s in "ab"},
        **{f"sample_rate_{s}": raw.get(f"sample_rate_{s}") for s in "ab"},
    }


def _flat_battle(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A battle as Music Arena's servers log it, as a published row."""
    vote, meta = raw["vote"], {s: raw.get(f"{s}_metadata") or {} for s in "ab"}
    prompt = raw.get("prompt") or {}
    said = [vote.get(name) for name in ("feedback", "a_feedback", "b_feedback")]
    user = raw.get("vote_user") or raw.get("prompt_user") or {}
    return {
        "battle_uuid": raw["uuid"],
        "prompt": prompt.get("prompt") or (raw.get("prompt_detailed") or {}).get("overall_prompt"),
        "preference": vote["preference"],
        "user_pseudonym": user.get("salted_ip"),
        "timestamp": vote.get("preference_time"),
        "feedback": " | ".join(str(part) for part in said if part),
        **{f"system_{s}": (meta[s].get("system_key") or {}).get("system_tag") for s in "ab"},
        **{f"audio_{s}": raw.get(f"{s}_audio_url") for s in "ab"},
        **{f"total_listening_time_{s}": _heard_s(vote.get(f"{s}_listen_data") or []) for s in "ab"},
        **{f"duration_{s}": meta[s].get("duration") for s in "ab"},
        **{f"sample_rate_{s}": meta[s].get("sample_rate") for s in "ab"},
    }


def _heard_s(events: list[Any]) -> float:
    """Seconds between a PLAY or TICK and what follows it, up to PAUSE or STOP."""
    heard, since = 0.0, None
    for name, at in events:
        if since is not None and name in ("TICK", "PAUSE", "STOP"):
            heard += max(0.0, float(at) - since)
        since = float(at) if name in ("PLAY", "TICK") else None
    return heard


def _clip(raw: Mapping[str, Any], side: str, prompt: str) -> dict[str, Any]:
    uri, duration_s = _text(raw, f"audio_{side}", 4000), float(raw.get(f"duration_{side}_s") or 1.0)
    if not (math.isfinite(duration_s) and 0 < duration_s <= 3600):
        raise ValueError(f"duration_{side}_s {duration_s} instead of 0 to 3600")
    sha256 = str(raw.get(f"sha256_{side}") or hashlib.sha256(f"{uri}\0{prompt}".encode()).hexdigest())
    return {
        "sha256": _sha256(sha256),
        "uri": uri,
        "system": _text(raw, f"system_{side}", 128),
        "duration_s": duration_s,
        "sample_rate": int(raw.get(f"sample_rate_{side}") or 0),
    }


def _of_snapshot(where: str, raw: Mapping[str, Any]) -> VoteRow:
    first = raw.get("shown_first", "x")
    a, b = ("x", "y") if first == "x" else ("y", "x")
    side = {a: "a", b: "b"}
    turn = 1 if first == "x" else -1
    aspects = {name: turn * int(score) for name, score in (raw.get("aspects") or {}).items()}
    if odd := [name for name, score in aspects.items() if name not in ASPECTS or not -2 <= score <= 2]:
        raise ValueError(f"aspect {odd[0]!r} with {aspects[odd[0]]}")
    columns = {
        "listen_a_ms": _ms(raw, f"listen_{a}_ms"),
        "listen_b_ms": _ms(raw, f"listen_{b}_ms"),
        "coverage_a": raw.get(f"coverage_{a}"),
        "coverage_b": raw.get(f"coverage_{b}"),
        "confidence": raw.get("confidence"),
        "comment": _optional(raw, "comment", MAX_LINE),
        "events": [[since, what, side.get(who, who), at] for since, what, who, at in raw.get("events") or ()],
        **{name: _optional(raw, name, longest) for name, longest in (("excluded_reason", 32), ("ui_version", 32), ("source", 64))},
    }
    kind = raw.get("kind") or ("gold" if raw.get("gold") else "repeat" if raw.get("repeat") else "normal")
    choice, at = CHOICES[raw["choice"]], _time(raw["created_at"])
    return VoteRow(
        where=where,
        key=f"{raw['rater']}:{raw['vote_id']}",
        prompt_id=_optional(raw, "prompt_id", 128) or "",
        prompt=_string(raw, "prompt", 20_000),
        split=_optional(raw, "split", 32) or "train",
        clips=(_frozen_clip(raw, a), _frozen_clip(raw, b)),
        choice=side.get(choice, choice),
        rater=_text(raw, "rater", 64),
        at=at,
        columns=columns,
        asked={"kind": kind, "rep": int(raw.get("rep", bool(raw.get("repeat")))), "policy": _optional(raw, "policy", 32) or "import",
               "propensity": float(raw.get("propensity") or 1.0), "issued_at": _time(raw["issued_at"]) if raw.get("issued_at") else at},
        gold=side[raw["gold"]] if raw.get("gold") else None,
        aspects=aspects,
        marks=tuple({**mark, "side": side[mark["side"]], "tag": _text(mark, "tag", 32)} for mark in raw.get("marks") or ()),
    )  # fmt: skip


def _frozen_clip(raw: Mapping[str, Any], side: str) -> dict[str, Any]:
    return {"sha256": _sha256(raw[f"clip_{side}"]), "system": _optional(raw, f"system_{side}", 128)}


def _text(raw: Mapping[str, Any], key: str, longest: int) -> str:
    value = _string(raw, key, longest)
    if not value.strip():
        raise ValueError(f"{key} {value!r} instead of a text")
    return value


def _string(raw: Mapping[str, Any], key: str, longest: int) -> str:
    value = _optional(raw, key, longest)
    if value is None:
        raise ValueError(f"no {key}")
    return value


def _optional(raw: Mapping[str, Any], key: str, longest: int) -> str | None:
    """A text that both databases hold, or None."""
    value = raw.get(key)
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"{key} {value!r} instead of a text")
    if len(value) > longest or UNFIT.search(value):
        raise ValueError(f"{key} of {len(value)} characters instead of at most {longest}, none of them NUL or half a letter")
    return value


def _ms(raw: Mapping[str, Any], key: str) -> int:
    value = float(raw.get(key) or 0)
    if not 0 <= value < 2**31:
        raise ValueError(f"{key} {raw[key]!r} instead of 0 or more")
    return round(value)


def _time(value: Any) -> datetime:
    """Unix seconds or ISO 8601; without a zone it is UTC."""
    try:
        return datetime.fromtimestamp(float(value), UTC)
    except (TypeError, ValueError):
        at = datetime.fromisoformat(str(value))
        return at if at.tzinfo else at.replace(tzinfo=UTC)


def _sha256(text: str) -> str:
    if len(text) != 64 or set(text) - set("0123456789abcdef"):
        raise ValueError(f"sha256 {text[:70]!r} instead of 64 hexadecimal digits")
    return text

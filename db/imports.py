"""Votes that were given elsewhere -> clips, pairs, assignments and votes of a campaign, so that one board and one trainer serve all.

    a snapshot's folder     votes.jsonl + clips.jsonl of `export_snapshot`, version 1 or 2; nothing of a row is lost
    .csv, .jsonl, .json     rows of (prompt, audio_a, audio_b, system_a, system_b, choice, rater, time ...)
    Music Arena             its published rows (`battle_uuid`, `preference`, `user_pseudonym` ...), or its servers' battle logs
                            (`uuid`, `a_metadata`, `vote` ...), as JSON or JSON lines

What is assumed of Music Arena, from its public code: A / B / TIE / BOTH_BAD; times in Unix seconds; a clip is known by its audio path,
or by battle and side where the audio is withheld; a rater by `user_pseudonym`, or `salted_ip`, else the whole battle is a rater of
its own. Battles without a vote are no votes and are counted as such. No audio is fetched: a clip without stated `sha256` is known by a hash
of its place and prompt, one without a stated length has a placeholder of 1 s, and size and rate are 0. A rater's second answer to a pair
is kept as a repeat, which ranks nothing. Required are prompt, audio_a, audio_b, system_a, system_b, choice, rater and time; known as
well are id, prompt_id, split, comment, confidence, and for both sides listen_a_ms, duration_a_s, sample_rate_a and sha256_a.

Raters become `external`: they cannot sign in, and count. One transaction takes all rows or none; the same file again adds nothing.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import secrets
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.exc import DataError, IntegrityError
from sqlalchemy.orm import Session

from db.errors import StoreError
from db.gains import pair_gains_db
from db.schema import ASPECTS, Assignment, Campaign, Clip, Pair, Prompt, Rater, SpanMark, Vote, VoteAspect
from db.store import Store

CHOICES = {"a": "a", "b": "b", "tie": "tie", "both_bad": "both_bad", "bothbad": "both_bad", "both bad": "both_bad", "x": "x", "y": "y"}
MAX_ERRORS = 20
"""So many wrong rows are told one by one; all are counted."""


@dataclass(frozen=True)
class Imported:
    """What an import added. `n_known`: rows that were there already; `n_without_vote`: battles that nobody answered."""

    campaign: str
    n_votes: int
    n_known: int
    n_without_vote: int
    n_raters: int
    n_pairs: int


@dataclass(frozen=True)
class _Row:
    """One vote, sides as shown: `clips` are the manifests of sides a and b."""

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


def import_votes(store: Store, source: str | Path, campaign: str) -> Imported:
    """Reads a file or a snapshot's folder into a campaign, which is made (closed, no listening asked) if it is new.

    Raises: StoreError that names every wrong row with its line. Nothing is stored then.
    """
    path = Path(source)
    rows: list[_Row] = []
    errors: list[str] = []
    n_without_vote = 0
    try:
        clips = _snapshot_clips(path) if path.is_dir() else {}
        for where, raw in _read(path / "votes.jsonl" if path.is_dir() else path, errors):
            if _unanswered(raw):
                n_without_vote += 1
                continue
            try:
                rows.append(_of_snapshot(where, raw, clips) if path.is_dir() else _of_row(where, raw))
            except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
                errors.append(f"{where}: {_told(error)}")
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"{path}: {error}", "a readable file of votes in UTF-8, or a snapshot's folder", "check the path") from error
    if errors:
        more = f"; and {len(errors) - MAX_ERRORS} more" if len(errors) > MAX_ERRORS else ""
        got = f"{len(errors)} wrong rows in {path.name}: {'; '.join(errors[:MAX_ERRORS])}{more}"
        raise StoreError(got, "rows that can all be read", "mend or drop them; nothing was stored")
    if not rows:
        raise StoreError(f"{path.name} without a vote", "at least one row with a choice", "check the file")
    if not campaign or len(campaign) > 128 or not campaign.isprintable() or campaign != campaign.strip():
        raise StoreError(f"campaign name {campaign!r}", "1 to 128 printable characters", "choose another name")
    try:
        with store.write() as session:
            return _store(session, campaign, rows, f"import:{path.name}"[:64], n_without_vote)
    except (IntegrityError, DataError) as error:
        raise StoreError(f"{path.name} with a value that no vote can have ({error.orig})", "rows as exported", "mend them") from error


# ---- reading ---------------------------------------------------------------------------------------------------------


def _read(path: Path, errors: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of a CSV, JSON or JSON-lines file; lines that are no JSON go to `errors`."""
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        for row in reader:
            yield f"line {reader.line_num}", {key: value for key, value in row.items() if key is not None and value not in ("", None)}
        return
    if path.suffix == ".json":
        try:
            whole = json.loads(text)
        except ValueError as error:
            errors.append(f"{path.name}: {error}")
            return
        listed = whole if isinstance(whole, list) else [whole]
        numbered = [(f"row {i}", row) for i, row in enumerate(listed, start=1)]
    else:
        numbered = []
        for i, line in enumerate(io.StringIO(text), start=1):
            if line.strip():
                try:
                    numbered.append((f"line {i}", json.loads(line)))
                except ValueError as error:
                    errors.append(f"line {i}: {error}")
    for where, row in numbered:
        if isinstance(row, dict):
            yield where, row
        else:
            errors.append(f"{where}: {type(row).__name__} instead of an object")


def _unanswered(raw: Mapping[str, Any]) -> bool:
    """A Music Arena battle that was played and never voted on."""
    if "a_metadata" in raw:
        return not (raw.get("vote") or {}).get("preference")
    return "battle_uuid" in raw and not raw.get("preference")


def _of_row(where: str, raw: Mapping[str, Any]) -> _Row:
    if "a_metadata" in raw:
        return _of_row(where, _flat_battle(raw))
    if "battle_uuid" in raw:
        return _of_row(where, _flat_arena(raw))
    prompt = _text(raw, "prompt", 20_000)
    choice = CHOICES.get(str(raw.get("choice", "")).strip().lower(), "")
    if choice not in ("a", "b", "tie", "both_bad"):
        raise ValueError(f"choice {raw.get('choice')!r} instead of a, b, tie or both_bad")
    prompt_id = str(raw.get("prompt_id") or "i_" + hashlib.sha256(prompt.encode()).hexdigest()[:16])
    clips = tuple(_clip(raw, side, prompt) for side in "ab")
    if clips[0]["sha256"] == clips[1]["sha256"]:
        raise ValueError("audio_a and audio_b are the same clip")
    rater = _text(raw, "rater", 64)
    identity = [prompt, clips[0]["sha256"], clips[1]["sha256"], rater, str(raw["time"])]
    key = str(raw.get("id") or hashlib.sha256("\0".join(identity).encode()).hexdigest())
    confidence = int(raw["confidence"]) if raw.get("confidence") is not None else None
    if confidence is not None and not 1 <= confidence <= 3:
        raise ValueError(f"confidence {confidence} instead of 1 to 3")
    columns = {
        "listen_a_ms": _ms(raw, "listen_a_ms"),
        "listen_b_ms": _ms(raw, "listen_b_ms"),
        "comment": str(raw["comment"]) if raw.get("comment") is not None else None,
        "confidence": confidence,
    }
    split = str(raw.get("split") or "train")
    return _Row(where, key, prompt_id, prompt, split, (clips[0], clips[1]), choice, rater, _time(raw["time"]), columns, {}, None, {}, ())


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


def _snapshot_clips(folder: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Clips of a snapshot by (sha256, prompt_id, prompt), with their order. Raises StoreError when its lines were changed."""
    from db.export import snapshot_sha256

    told: list[str] = []
    try:
        stated = json.loads((folder / "snapshot.json").read_text(encoding="utf-8")).get("sha256")
    except ValueError as error:
        raise StoreError(f"{folder / 'snapshot.json'}: {error}", "valid JSON", "export the snapshot again") from error
    if stated != snapshot_sha256(folder):
        raise StoreError(f"{folder}, changed since its export", "the votes and clips as they were hashed", "export it again")
    rows = (row for _, row in _read(folder / "clips.jsonl", told))
    clips = {(str(row["sha256"]), str(row["prompt_id"]), str(row["prompt"])): row | {"order": i} for i, row in enumerate(rows)}
    if told:
        raise StoreError(f"{folder / 'clips.jsonl'}: {told[0]}", "one JSON object a line", "export the snapshot again")
    return clips


def _of_snapshot(where: str, raw: Mapping[str, Any], clips: Mapping[tuple[str, str, str], Mapping[str, Any]]) -> _Row:
    first = raw.get("shown_first", "x")
    a, b = ("x", "y") if first == "x" else ("y", "x")
    side = {a: "a", b: "b"}
    turn = 1 if first == "x" else -1
    aspects = {name: turn * int(score) for name, score in (raw.get("aspects") or {}).items()}
    if odd := [name for name, score in aspects.items() if name not in ASPECTS or not -2 <= score <= 2]:
        raise ValueError(f"aspect {odd[0]!r} with {aspects[odd[0]]}")
    known = {"confidence", "comment", "excluded_reason", "ui_version"} & raw.keys()
    columns = {name: raw[name] for name in known} | {
        "listen_a_ms": _ms(raw, f"listen_{a}_ms"),
        "listen_b_ms": _ms(raw, f"listen_{b}_ms"),
        "coverage_a": raw.get(f"coverage_{a}"),
        "coverage_b": raw.get(f"coverage_{b}"),
    }
    kind = raw.get("kind") or ("gold" if raw.get("gold") else "repeat" if raw.get("repeat") else "normal")
    choice = CHOICES[raw["choice"]]
    asked_for = (str(raw["prompt_id"]), raw["prompt"])
    return _Row(
        where=where,
        key=f"{raw['rater']}:{raw['vote_id']}",
        prompt_id=str(raw["prompt_id"]),
        prompt=raw["prompt"],
        split=raw.get("split") or "train",
        clips=(clips[raw[f"clip_{a}"], *asked_for], clips[raw[f"clip_{b}"], *asked_for]),
        choice=side.get(choice, choice),
        rater=_text(raw, "rater", 64),
        at=_time(raw["created_at"]),
        columns=columns | {"source": raw.get("source")},
        asked={"kind": kind, "rep": int(bool(raw.get("repeat"))), "policy": raw.get("policy") or "import",
               "propensity": float(raw.get("propensity") or 1.0)},
        gold=side[raw["gold"]] if raw.get("gold") else None,
        aspects=aspects,
        marks=tuple({**mark, "side": side[mark["side"]]} for mark in raw.get("marks") or ()),
    )  # fmt: skip


def _text(raw: Mapping[str, Any], key: str, longest: int) -> str:
    value = raw.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"no {key}" if value is None else f"{key} {value!r} instead of a text")
    if len(value) > longest or "\0" in value:
        raise ValueError(f"{key} of {len(value)} characters instead of at most {longest}, none of them NUL")
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


def _told(error: Exception) -> str:
    return f"no {error.args[0]!r}" if isinstance(error, KeyError) else str(error)


# ---- storing ---------------------------------------------------------------------------------------------------------


def _store(session: Session, name: str, rows: list[_Row], source: str, n_without_vote: int) -> Imported:
    campaign = session.scalar(select(Campaign).where(Campaign.name == name))
    if campaign is None:
        aspects = sorted({aspect for row in rows for aspect in row.aspects}, key=ASPECTS.index)
        campaign = Campaign(name=name, target_votes=1, min_listen_ms=0, status="closed", aspects=aspects)
        session.add(campaign)
        session.flush()
    raters: dict[str, Rater] = {}
    clips: dict[tuple[str, str], Clip] = {}
    pairs: dict[tuple[int, int], Pair] = {}
    n_votes = n_known = 0
    # x is the clip of the smaller id: clips come in the order in which the snapshot had them, so that x stays x.
    for asked, clip in sorted(((row, clip) for row in rows for clip in row.clips), key=lambda both: both[1].get("order", 0)):
        if _key(asked, clip) not in clips:
            clips[_key(asked, clip)] = _clip_row(session, asked, clip)
    for row in rows:
        rater = raters.get(row.rater) or raters.setdefault(row.rater, _rater(session, row))
        shown = [clips[_key(row, clip)] for clip in row.clips]
        ends = tuple(sorted(clip.id for clip in shown))
        known = session.scalar(select(Vote.id).where(Vote.rater_id == rater.id, Vote.idempotency_key == _idempotency(name, row)))
        if known is not None:
            n_known += 1
            continue
        pair = pairs.get((ends[0], ends[1])) or pairs.setdefault((ends[0], ends[1]), _pair(session, campaign, row, shown))
        swapped = shown[0].id != pair.clip_x_id
        rep = _free_rep(session, pair.id, rater.id, int(row.asked.get("rep", 0)))
        assignment = Assignment(
            **{"kind": "repeat" if rep else "normal", "policy": "import", "propensity": 1.0, **row.asked, "rep": rep},
            id=uuid.uuid4().hex,
            pair_id=pair.id,
            rater_id=rater.id,
            swapped=swapped,
            status="voted",
            issued_at=row.at,
            expires_at=row.at,
        )
        session.add(assignment)
        session.flush()
        vote = Vote(
            **{**row.columns, "source": row.columns.get("source") or source},
            assignment_id=assignment.id,
            rater_id=rater.id,
            idempotency_key=_idempotency(name, row),
            choice=row.choice,
            events=[],
            created_at=row.at,
        )
        session.add(vote)
        if assignment.kind == "normal" and vote.excluded_reason is None:
            pair.n_open += 1
            pair.target_votes = max(pair.target_votes, pair.n_open)
        session.flush()
        session.add_all(VoteAspect(vote_id=vote.id, aspect=aspect, score=score) for aspect, score in row.aspects.items())
        session.add_all(SpanMark(vote_id=vote.id, **mark) for mark in row.marks)
        n_votes += 1
    return Imported(name, n_votes, n_known, n_without_vote, len(raters), len(pairs))


def _key(row: _Row, clip: Mapping[str, Any]) -> tuple[str, str]:
    return row.prompt_id + "\0" + row.prompt, str(clip["sha256"])


def _idempotency(campaign: str, row: _Row) -> str:
    return "import:" + hashlib.sha256(f"{campaign}\0{row.key}".encode()).hexdigest()


def _rater(session: Session, row: _Row) -> Rater:
    rater = session.scalar(select(Rater).where(Rater.handle == row.rater))
    if rater is None:
        # A hash of nothing that anybody knows: no access code leads here.
        rater = Rater(handle=row.rater, token_sha256=secrets.token_hex(32), status="external")
        session.add(rater)
        session.flush()
    elif rater.status != "external":
        got = f"{row.where}: rater {row.rater!r}, who is a rater of this database"
        raise StoreError(got, "a name that is nobody's here", "rename the rater in the file; nothing was stored")
    return rater


def _clip_row(session: Session, row: _Row, raw: Mapping[str, Any]) -> Clip:
    text_sha256 = hashlib.sha256(row.prompt.encode()).hexdigest()
    prompt = session.scalar(select(Prompt).where(Prompt.key == row.prompt_id, Prompt.text_sha256 == text_sha256))
    if prompt is None:
        prompt = Prompt(key=row.prompt_id, text=row.prompt, text_sha256=text_sha256, split=row.split)
        session.add(prompt)
        session.flush()
    clip = session.scalar(select(Clip).where(Clip.prompt_id == prompt.id, Clip.sha256 == raw["sha256"]))
    if clip is None:
        optional = ("codes_uri", "lufs", "true_peak_dbfs", "policy_sha256", "seed", "tempo_bpm", "genre", "licence", "consent")
        clip = Clip(
            prompt_id=prompt.id,
            sha256=raw["sha256"],
            uri=raw["uri"],
            size_bytes=raw.get("size_bytes") or 0,
            duration_ms=max(1, round(1000 * raw["duration_s"])),
            sample_rate=raw["sample_rate"],
            system=raw["system"],
            adapters=list(raw.get("adapters") or []),
            gen=dict(raw.get("gen") or {}),
            **{name: raw.get(name) for name in optional},
        )
        session.add(clip)
        session.flush()
    return clip


def _pair(session: Session, campaign: Campaign, row: _Row, shown: list[Clip]) -> Pair:
    x, y = sorted(shown, key=lambda clip: clip.id)
    pair = session.scalar(select(Pair).where(Pair.campaign_id == campaign.id, Pair.clip_x_id == x.id, Pair.clip_y_id == y.id))
    if pair is None:
        gold = None if row.gold is None else ("x" if shown["ab".index(row.gold)] is x else "y")
        gain_x_db, gain_y_db = pair_gains_db(x.lufs, x.true_peak_dbfs, y.lufs, y.true_peak_dbfs)
        pair = Pair(
            campaign_id=campaign.id, prompt_id=x.prompt_id, clip_x_id=x.id, clip_y_id=y.id, gain_x_db=gain_x_db, gain_y_db=gain_y_db,
            gold=gold, target_votes=1, n_open=0,
        )  # fmt: skip
        session.add(pair)
        session.flush()
    return pair


def _free_rep(session: Session, pair_id: int, rater_id: int, rep: int) -> int:
    """A rater who answered a pair more often than we would ask has the later answers kept as repeats."""
    taken = set(session.scalars(select(Assignment.rep).where(Assignment.pair_id == pair_id, Assignment.rater_id == rater_id)))
    while rep in taken:
        rep += 1
    return rep

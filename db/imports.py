"""Votes that were given elsewhere -> clips, pairs, assignments and votes of a campaign, so that one board and one trainer serve all.

    file -> db.vote_files (looked through once, wrong rows told) -> CHUNK rows at a time, in one transaction -> campaign

Raters become `external`: they cannot sign in, and count. A rater's second answer to a pair is kept as a repeat, which ranks nothing.
All rows are taken in or none; the same file again adds nothing. Memory holds CHUNK rows, whatever the file's length. The file is read
twice: what is wrong with it is told before the database is locked for it.
"""

from __future__ import annotations

import secrets
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import Row, bindparam, case, func, select, update
from sqlalchemy.exc import DataError, IntegrityError
from sqlalchemy.orm import Session

from db.bulk import add, find
from db.campaigns import RANKS, claim_campaign
from db.errors import StoreError
from db.gains import pair_gains_db
from db.schema import ASPECTS, Assignment, Campaign, Clip, Pair, Prompt, Rater, SpanMark, Vote, VoteAspect
from db.store import Store
from db.vote_files import Told, VoteRow, check_frozen, read_clips, read_votes

CHUNK = 1000
"""Rows held in memory at a time."""
OPTIONAL = ("codes_uri", "lufs", "true_peak_dbfs", "policy_sha256", "seed", "tempo_bpm", "genre", "licence", "consent")
"""What a clip may lack."""
Item = TypeVar("Item")


@dataclass(frozen=True)
class Imported:
    """What an import added. `n_known`: rows that were there already; `n_without_vote`: battles that nobody answered."""

    campaign: str
    n_votes: int
    n_known: int
    n_without_vote: int
    n_raters: int
    """Raters whom this database did not know."""
    n_pairs: int
    """Pairs that the campaign did not have."""
    n_named: int
    """Pairs that it had, that ranked nothing, for want of two names or of a vote, and have the file's names now. Without gold pairs."""


class _Shown(NamedTuple):
    """A vote's pair as stored: where its clips are, and whether side a was clip y."""

    pair_id: int
    swapped: bool


def import_votes(store: Store, source: str | Path, campaign: str) -> Imported:
    """Reads a file or a snapshot's folder into a campaign, which is made (closed, no listening asked) if it is new.

    Raises: StoreError that names the first wrong rows with their lines and counts all. Nothing is stored then.
    """
    path = Path(source)
    try:
        if path.is_dir():
            check_frozen(path)
        looked = Told()
        for _ in read_votes(path, looked):
            pass
        looked.refuse(path.name)
        if not campaign or len(campaign) > 128 or not campaign.isprintable() or campaign != campaign.strip():
            raise StoreError(f"campaign name {campaign!r}", "1 to 128 printable characters", "choose another name")
        with store.write() as session:
            return _store(session, path, campaign, looked)
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"{path}: {error}", "a readable file of votes in UTF-8, or a snapshot's folder", "check the path") from error
    except (IntegrityError, DataError) as error:
        raise StoreError(f"{path.name} with a value that no vote can have ({error.orig})", "rows as exported", "mend them") from error


def _store(session: Session, path: Path, name: str, looked: Told) -> Imported:
    asked = sorted(looked.aspects, key=ASPECTS.index)
    campaign = claim_campaign(session, name, target_votes=1, min_listen_ms=0, status="closed", aspects=asked)
    told = Told()
    if path.is_dir():
        for clips in _chunks(read_clips(path, told)):
            splits = [looked.splits.get((clip["prompt_id"], _hash(clip["prompt"])), "train") for clip in clips]
            prompts = _prompts(session, [(clip["prompt_id"], clip["prompt"], split) for clip, split in zip(clips, splits)])
            _clips(session, [(prompts[clip["prompt_id"], clip["prompt"]], clip) for clip in clips], may_add=True)
    added = Counter[str]()
    renamed = set[int]()
    newest = session.scalar(select(func.max(Pair.id)).where(Pair.campaign_id == campaign.id)) or 0
    for rows in _chunks(read_votes(path, told)):
        _take_in(session, campaign, rows, f"import:{path.name}"[:64], told, added, renamed, known_clips=path.is_dir())
    told.refuse(path.name)
    n_named = sum(pair_id <= newest for pair_id in renamed)
    return Imported(name, added["votes"], added["known"], told.n_without_vote, added["raters"], added["pairs"], n_named)


def _take_in(
    session: Session,
    campaign: Campaign,
    rows: list[VoteRow],
    source: str,
    told: Told,
    added: Counter[str],
    renamed: set[int],
    known_clips: bool,
) -> None:
    """Stores a chunk. `known_clips`: the clips are there already, as a snapshot names them."""
    prompts = _prompts(session, [(row.prompt_id, row.prompt, row.split) for row in rows])
    at = [prompts[row.prompt_id, row.prompt] for row in rows]
    clips = _clips(session, [(prompt, clip) for prompt, row in zip(at, rows) for clip in row.clips], may_add=not known_clips)
    shown: list[tuple[VoteRow, Row[Any], Row[Any]]] = []
    for prompt, row in zip(at, rows):
        sides = [clips.get((prompt, clip["sha256"])) for clip in row.clips]
        if sides[0] is None or sides[1] is None or sides[0].id == sides[1].id:
            told.wrong(row.where, "a clip that clips.jsonl does not name, or one clip on both sides")
        else:
            shown.append((row, sides[0], sides[1]))
    raters = _raters(session, rows, told, added)
    keys = [(raters[row.rater], _idempotency(campaign.name, row)) for row, _, _ in shown]
    named = (Vote.rater_id, Vote.idempotency_key)
    known = {tuple(row) for row in find(session, named, named, keys)}
    first = {key: place for place, key in reversed(list(enumerate(keys)))}
    known_rows = [key in known or first[key] < place for place, key in enumerate(keys)]
    pairs = _pairs(session, campaign, shown, known_rows, told, added, renamed)
    asked_of = (Assignment.pair_id, Assignment.rater_id)
    met = [(pairs[_ends(a, b)], raters[row.rater]) for row, a, b in shown]
    taken = {tuple(row) for row in find(session, (*asked_of, Assignment.rep), asked_of, met)}
    assignments, votes, said, slots = [], [], [], Counter[int]()
    for (row, a, b), key in zip(shown, keys):
        if key in known:
            added["known"] += 1
            continue
        known.add(key)
        pair_id, rater_id, rep = pairs[_ends(a, b)], raters[row.rater], int(row.asked.get("rep", 0))
        while (pair_id, rater_id, rep) in taken:  # answered more often than we would ask: kept as a repeat
            rep += 1
        taken.add((pair_id, rater_id, rep))
        usual: dict[str, Any] = {"kind": "repeat" if rep else "normal", "policy": "import", "propensity": 1.0, "issued_at": row.at}
        asked = {**usual, **row.asked}
        if rep and asked["kind"] == "normal":  # a snapshot's rows bring their kind: of another campaign, where it was her first
            asked["kind"] = "repeat"
        asked |= {"id": uuid.uuid4().hex, "pair_id": pair_id, "rater_id": rater_id, "rep": rep, "swapped": a.id > b.id}
        asked |= {"min_listen_ms": 0, "aspects": list(row.aspects)}  # elsewhere votes are given under rules of their own
        assignments.append(asked | {"status": "voted", "expires_at": row.at})
        vote = {"events": [], "choice": row.choice, "created_at": row.at, **row.columns, "source": row.columns.get("source") or source}
        votes.append(vote | {"assignment_id": asked["id"], "rater_id": rater_id, "idempotency_key": key[1]})
        said.append(row)
        slots[pair_id] += asked["kind"] == "normal" and vote.get("excluded_reason") is None
    if not votes:
        return
    add(session, Assignment, assignments)
    add(session, Vote, votes)
    beside = [(vote["assignment_id"], row) for vote, row in zip(votes, said) if row.aspects or row.marks]
    stored = select(Vote.assignment_id, Vote.id).where(Vote.assignment_id.in_([key for key, _ in beside]))
    ids = {row.assignment_id: row.id for row in session.execute(stored)}
    scores = [{"vote_id": ids[key], "aspect": name, "score": n} for key, row in beside for name, n in row.aspects.items()]
    marks = [{"vote_id": ids[key], **mark} for key, row in beside for mark in row.marks]
    add(session, VoteAspect, scores)
    add(session, SpanMark, marks)
    more = Pair.n_open + bindparam("n")
    grown = {"n_open": more, "target_votes": case((Pair.target_votes < more, more), else_=Pair.target_votes)}
    statement = update(Pair).where(Pair.id == bindparam("pair")).values(grown)
    session.connection().execute(statement, [{"pair": pair_id, "n": n} for pair_id, n in sorted(slots.items())])
    added["votes"] += len(votes)


def _idempotency(campaign: str, row: VoteRow) -> str:
    return "import:" + _hash(f"{campaign}\0{row.key}")


def _hash(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def _ends(a: Row[Any], b: Row[Any]) -> tuple[int, int]:
    """x is the clip of the smaller id: a snapshot's clips come in its order, so that x stays x."""
    return min(a.id, b.id), max(a.id, b.id)


# ---- what is there already, and what is new --------------------------------------------------------------------------


def _prompts(session: Session, wanted: Sequence[tuple[str, str, str]]) -> dict[tuple[str, str], int]:
    """(prompt_id, text) -> id; those that are new are added with their split, in order."""
    by_hash = {(key, _hash(text)): (key, text, split) for key, text, split in reversed(wanted)}
    by_hash = dict(reversed(by_hash.items()))  # in order of appearance, and the first one's split

    def look() -> dict[tuple[str, str], int]:
        named = (Prompt.key, Prompt.text_sha256)
        return {(key, digest): id for key, digest, id in find(session, (*named, Prompt.id), named, by_hash)}

    have = look()
    fresh = [
        {"key": key, "text": text, "text_sha256": digest, "split": split}
        for (key, digest), (_, text, split) in by_hash.items()
        if (key, digest) not in have
    ]
    if fresh:
        add(session, Prompt, fresh)
        have = look()
    return {(key, text): have[key, digest] for (key, digest), (_, text, _) in by_hash.items()}


def _clips(session: Session, wanted: Sequence[tuple[int, Mapping[str, Any]]], may_add: bool) -> dict[tuple[int, str], Row[Any]]:
    """(prompt's id, sha256) -> the stored clip; those that are new are added in order."""
    keys = dict.fromkeys((prompt_id, clip["sha256"]) for prompt_id, clip in wanted)

    def look() -> dict[tuple[int, str], Row[Any]]:
        told = (Clip.id, Clip.prompt_id, Clip.sha256, Clip.system, Clip.lufs, Clip.true_peak_dbfs)
        return {(row.prompt_id, row.sha256): row for row in find(session, told, (Clip.prompt_id, Clip.sha256), keys)}

    have = look()
    fresh: dict[tuple[int, str], dict[str, Any]] = {}
    for prompt_id, clip in wanted if may_add else ():
        if (prompt_id, clip["sha256"]) not in have:
            fresh.setdefault(
                (prompt_id, clip["sha256"]),
                {
                    "prompt_id": prompt_id,
                    "sha256": clip["sha256"],
                    "uri": clip["uri"],
                    "size_bytes": clip.get("size_bytes") or 0,
                    "duration_ms": max(1, round(1000 * clip["duration_s"])),
                    "sample_rate": clip["sample_rate"],
                    "system": clip["system"],
                    "adapters": list(clip.get("adapters") or []),
                    "gen": dict(clip.get("gen") or {}),
                    **{name: clip.get(name) for name in OPTIONAL},
                },
            )
    if fresh:
        add(session, Clip, list(fresh.values()))
        have = look()
    return have


def _raters(session: Session, rows: Sequence[VoteRow], told: Told, added: Counter[str]) -> dict[str, int]:
    """handle -> id; those that are new are added. A handle of somebody who signs in here is told as wrong."""
    handles = dict.fromkeys(row.rater for row in rows)

    def look() -> dict[str, Any]:
        found = select(Rater.handle, Rater.id, Rater.status).where(Rater.handle.in_(handles))
        return {row.handle: row for row in session.execute(found)}

    have = look()
    # A hash of nothing that anybody knows: no access code leads here.
    fresh = [{"handle": name, "token_sha256": secrets.token_hex(32), "status": "external"} for name in handles if name not in have]
    if fresh:
        add(session, Rater, fresh)
        added["raters"] += len(fresh)
        have = look()
    for row in rows:
        if have[row.rater].status != "external":
            told.wrong(row.where, f"rater {row.rater!r}, who is a rater of this database; rename the rater in the file")
    return {name: row.id for name, row in have.items()}


def _pairs(
    session: Session,
    campaign: Campaign,
    shown: Sequence[tuple[VoteRow, Row[Any], Row[Any]]],
    known: Sequence[bool],
    told: Told,
    added: Counter[str],
    renamed: set[int],
) -> dict[tuple[int, int], int]:
    """(clip x, clip y) -> the campaign's pair; those that are new are added in order, and other names are noted in `renamed`.

    A pair that ranked nothing takes the systems of its first row. A vote for a pair of other systems is told as wrong, unless it is
    `known`, row by row, and so adds nothing.
    """
    keys = dict.fromkeys(_ends(a, b) for _, a, b in shown)

    def look() -> dict[tuple[int, int], Row[Any]]:
        named = (Pair.campaign_id, Pair.clip_x_id, Pair.clip_y_id)
        told = (Pair.clip_x_id, Pair.clip_y_id, Pair.id, Pair.system_x, Pair.system_y, Pair.gold, RANKS.label("ranks"))
        return {(row[0], row[1]): row for row in find(session, told, named, [(campaign.id, *ends) for ends in keys])}

    have = look()
    fresh: dict[tuple[int, int], dict[str, Any]] = {}
    for row, a, b in shown:
        if (ends := _ends(a, b)) in have or ends in fresh:
            continue
        x, y = sorted((a, b), key=lambda clip: clip.id)
        # Snapshots of before schema 5 do not say the systems of a pair.
        systems = {end.id: clip.get("system") or end.system for clip, end in zip(row.clips, (a, b))}
        gold = None if row.gold is None else ("x" if (a, b)["ab".index(row.gold)].id == x.id else "y")
        gain_x_db, gain_y_db = pair_gains_db(x.lufs, x.true_peak_dbfs, y.lufs, y.true_peak_dbfs)
        fresh[ends] = {
            "campaign_id": campaign.id, "prompt_id": x.prompt_id, "clip_x_id": x.id, "clip_y_id": y.id,
            "system_x": systems[x.id], "system_y": systems[y.id], "gain_x_db": gain_x_db,
            "gain_y_db": gain_y_db, "gold": gold, "target_votes": 1, "n_open": 0,
        }  # fmt: skip
    if fresh:
        add(session, Pair, list(fresh.values()))
        added["pairs"] += len(fresh)
        have = look()
    names = {ends: (pair.system_x, pair.system_y) for ends, pair in have.items()}
    voted = {ends for ends, pair in have.items() if pair.ranks}
    for (row, a, b), is_known in zip(shown, known):
        ends = _ends(a, b)
        turn = 1 if a.id == ends[0] else -1
        stands = names[ends][::turn]
        said = (row.clips[0].get("system") or stands[0], row.clips[1].get("system") or stands[1])
        may_name = have[ends].gold is not None or stands[0] == stands[1] or not (is_known or ends in voted)
        if said != stands and may_name:
            names[ends] = said[::turn]
        elif said != stands and not is_known:
            what = "systems {!r} and {!r} of a pair that the campaign has as {!r} and {!r}; import them into another campaign"
            told.wrong(row.where, what.format(*said, *stands))
        voted.add(ends)
    changed = [
        {"id": have[ends].id, "system_x": x, "system_y": y}
        for ends, (x, y) in names.items()
        if (x, y) != (have[ends].system_x, have[ends].system_y)
    ]
    if changed:
        session.execute(update(Pair), sorted(changed, key=lambda pair: pair["id"]))  # one order for all: no deadlock
        renamed |= {pair["id"] for pair in changed} - {pair.id for pair in have.values() if pair.gold is not None}
    return {ends: pair.id for ends, pair in have.items()}


def _chunks(items: Iterator[Item]) -> Iterator[list[Item]]:
    chunk: list[Item] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk

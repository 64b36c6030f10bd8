"""A samples manifest, checked: rows that can be believed, files that are what they say, pairs worth hearing.

rows of a manifest -> check_rows -> create: clips, pairs, gold pairs, rules and an audit entry in one transaction
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import and_, exists, select, text, update
from sqlalchemy.orm import Session

from db import storage
from db.bulk import add, find
from db.errors import ConflictError, StoreError
from db.gains import pair_gains_db
from db.schema import ASPECTS, CHOOSERS, Assignment, Audit, Campaign, Clip, Pair, Prompt, Vote

if TYPE_CHECKING:
    from db.store import Store

Measure = Callable[[Path], tuple[float, float]]
"""path -> (integrated loudness LUFS, true peak dBFS)."""
MAX_CLIP_S = 3600.0
SPOILED = "gold: spoiled"
"""The system of clips that were spoiled on purpose, to be one half of a gold pair."""
LIMITS = {"prompt": 20_000, "prompt_id": 128, "system": 128, "split": 32, "genre": 64, "licence": 128, "consent": 128, "policy_sha256": 64}
"""The longest text of each field, in characters."""
RANKS = and_(
    Pair.gold.is_(None),
    Pair.system_x != Pair.system_y,
    exists().where(Assignment.pair_id == Pair.id, Vote.assignment_id == Assignment.id),
)
"""SQL for whether a pair tells two systems apart by a vote, so that it keeps their names."""


@dataclass(frozen=True)
class Rules:
    """How a campaign asks. Raises StoreError for rules that no campaign can have."""

    target_votes: int = 3
    """Votes wanted for each pair."""
    min_listen_ms: int = 3000
    """Listening asked for on each side."""
    chooser: str = "least_voted"
    """One of CHOOSERS."""
    random_floor: float = 0.2
    """Share of `informative` choices that are drawn uniformly."""
    gold_rate: float = 0.0
    """Share of assignments with a known answer."""
    repeat_rate: float = 0.0
    """Share of assignments that are the rater's own earlier pairs, sides turned."""
    aspects: tuple[str, ...] = ()
    """Which of ASPECTS are asked for."""
    invited_only: bool = False
    practice: bool = False
    require_screen: bool = False
    """Whether a rater must have passed the headphone check."""

    def __post_init__(self) -> None:
        if not (1 <= self.target_votes <= 1000 and 0 <= self.min_listen_ms <= 600_000):
            got = f"target_votes={self.target_votes}, min_listen_ms={self.min_listen_ms}"
            raise StoreError(got, "target_votes in 1..1000 and min_listen_ms in 0..600000", "correct them")
        if self.chooser not in CHOOSERS:
            raise StoreError(f"chooser {self.chooser!r}", f"one of {', '.join(CHOOSERS)}", "choose one of them")
        if not 0 < self.random_floor <= 1:
            raise StoreError(f"random_floor={self.random_floor}", "a share in (0, 1]", "correct it")
        if not (self.gold_rate >= 0 and self.repeat_rate >= 0 and self.gold_rate + self.repeat_rate <= 0.5):
            got = f"gold_rate={self.gold_rate}, repeat_rate={self.repeat_rate}"
            raise StoreError(got, "shares of 0 or more, together at most .5", "lower them")
        if len(set(self.aspects)) < len(self.aspects) or not set(self.aspects) <= set(ASPECTS):
            raise StoreError(f"aspects {list(self.aspects)}", f"some of {', '.join(ASPECTS)}, each once", "choose among them")

    def columns(self) -> dict[str, Any]:
        return asdict(self) | {"aspects": list(self.aspects)}


def rules_of(campaign: Campaign) -> Rules:
    """The rules that a stored campaign has now."""
    return Rules(
        campaign.target_votes,
        campaign.min_listen_ms,
        campaign.chooser,
        campaign.random_floor,
        campaign.gold_rate,
        campaign.repeat_rate,
        tuple(campaign.aspects),
        campaign.invited_only,
        campaign.practice,
        campaign.require_screen,
    )


@dataclass(frozen=True)
class CampaignSummary:
    """What `create_campaign` found or made."""

    name: str
    n_clips: int
    n_pairs: int
    """Without gold pairs."""
    n_new_pairs: int
    n_gold: int = 0
    n_named: int = 0
    """Pairs that ranked nothing, for want of two names or of a vote, and have this call's names now. Without gold pairs."""


class ClipKey(NamedTuple):
    """What makes a clip one clip: the same bytes may answer two prompts, and are two clips then."""

    prompt_id: str
    text_sha256: str
    sha256: str


class _Clip(NamedTuple):
    """A stored clip, as far as a pair needs to know it."""

    id: int
    prompt_id: int
    sha256: str
    lufs: float | None
    true_peak_dbfs: float | None


@dataclass(frozen=True)
class Row:
    """One manifest row whose file was found and whose bytes have the stated hash."""

    sha256: str
    uri: str
    codes_uri: str | None
    size_bytes: int
    prompt: str
    prompt_id: str
    split: str
    fields: Mapping[str, Any]

    @property
    def key(self) -> ClipKey:
        return ClipKey(self.prompt_id, hashlib.sha256(self.prompt.encode()).hexdigest(), self.sha256)


def check_rows(rows: Iterable[Mapping[str, Any]], base_dir: str | Path, what: str = "manifest") -> dict[ClipKey, Row]:
    """Rows by key, in order; a clip listed twice is one. Raises StoreError naming the first row that is wrong.

    Args: base_dir: the folder that `file` and `codes_file` are relative to, local or an address that fsspec knows.
    """
    checked: dict[ClipKey, Row] = {}
    for number, fields in enumerate(rows, start=1):
        where = f"{what} row {number}"
        if not isinstance(fields, Mapping):
            raise StoreError(f"{where}: {type(fields).__name__}", "a JSON object", "write the manifest anew")
        for key in ("file", "sha256", "prompt", "prompt_id", "system", "duration_s", "sample_rate"):
            if fields.get(key) in (None, ""):
                raise StoreError(f"{where} without {key!r}", "a row as `encore sample` writes it", "write the manifest anew")
        for key, longest in LIMITS.items():
            check_text(fields.get(key), f"{where}: {key}", longest)
        uri = _inside(str(base_dir), str(fields["file"]), where)
        codes = fields.get("codes_file")
        row = Row(
            sha256=str(fields["sha256"]),
            uri=uri,
            codes_uri=_inside(str(base_dir), str(codes), where) if codes else None,
            size_bytes=storage.size_bytes(uri),
            prompt=str(fields["prompt"]),
            prompt_id=str(fields["prompt_id"]),
            split=str(fields.get("split") or "train"),
            fields=fields,
        )
        found = storage.sha256(uri)
        if found != row.sha256:
            got = f"{where}: {uri} with sha256 {found[:12]}"
            raise StoreError(got, f"sha256 {row.sha256[:12]}", "sample again; the file was changed after it was listed")
        if not 0 < _number(fields, "duration_s", where) < MAX_CLIP_S:
            raise StoreError(f"{where}: duration_s {fields['duration_s']}", f"a length in (0, {MAX_CLIP_S:.0f}) s", "drop the row")
        if not 1000 <= _number(fields, "sample_rate", where) <= 768_000:
            raise StoreError(f"{where}: sample_rate {fields['sample_rate']}", "a rate in Hz, 1000 to 768000", "correct the row")
        for key, lowest, highest in (("seed", -(2**63), 2**63 - 1), ("tempo_bpm", 0, 10_000), ("lufs", -math.inf, 100)):
            if fields.get(key) is not None and not lowest <= _number(fields, key, where) <= highest:
                raise StoreError(f"{where}: {key} {fields[key]!r}", f"a number in {lowest}..{highest}", "correct the row")
        checked.setdefault(row.key, row)
    if not checked:
        raise StoreError(f"an empty {what}", "one row a clip", "sample some clips first")
    return checked


def check_text(text: object, what: str, longest: int) -> None:
    """Raises StoreError unless `text` is None or fits in a text column of any database."""
    if text is None:
        return
    if not isinstance(text, str | int | float | bool) or len(str(text)) > longest:
        raise StoreError(f"{what} of {len(str(text))} characters", f"a text of at most {longest}", "shorten it")
    if "\x00" in str(text) or any("\ud800" <= letter <= "\udfff" for letter in str(text)):
        raise StoreError(f"{what} with a letter that no database takes", "text without NUL and lone surrogates", "mend the text")


def _number(fields: Mapping[str, Any], key: str, where: str) -> float:
    value = fields[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise StoreError(f"{where}: {key} {value!r}", "a number", "correct the row")
    return value


def clip_columns(row: Row, measure: Measure | None) -> dict[str, Any]:
    """The columns of `Clip` for a row, loudness included. Raises StoreError when it cannot be known."""
    fields = row.fields
    if fields.get("lufs") is not None and fields.get("true_peak_dbfs") is not None:
        lufs, true_peak_dbfs = float(fields["lufs"]), float(fields["true_peak_dbfs"])
    elif measure is not None:
        with storage.local_copy(row.uri) as path:
            lufs, true_peak_dbfs = measure(path)
    else:
        remedy = "pass measure=, or add lufs and true_peak_dbfs to the rows"
        raise StoreError(f"{row.uri} with no loudness", "a measured loudness", remedy)
    audible = math.isfinite(lufs) and math.isfinite(true_peak_dbfs) and lufs > -70.0
    return {
        "sha256": row.sha256,
        "uri": row.uri,
        "codes_uri": row.codes_uri,
        "size_bytes": row.size_bytes,
        "duration_ms": max(1, round(float(fields["duration_s"]) * 1000)),
        "sample_rate": int(fields["sample_rate"]),
        "lufs": lufs if audible else None,
        "true_peak_dbfs": true_peak_dbfs if audible else None,
        "system": str(fields["system"]),
        "policy_sha256": fields.get("policy_sha256"),
        "adapters": [str(adapter) for adapter in fields.get("adapters") or []],
        "seed": fields.get("seed"),
        "tempo_bpm": fields.get("tempo_bpm"),
        "genre": fields.get("genre"),
        "gen": dict(fields.get("gen") or {}),
        "licence": fields.get("licence"),
        "consent": None if fields.get("consent") is None else str(fields["consent"]),
    }


PairOf = tuple[str, str] | tuple[ClipKey, ClipKey]
"""Two clips that meet: by sha256, or by key where the same bytes answer several prompts."""


def choose_pairs(keys: Iterable[ClipKey]) -> list[tuple[ClipKey, ClipKey]]:
    """Clips of one prompt meet two by two, in order, each once; an odd one out waits for more samples."""
    by_prompt: dict[tuple[str, str], list[ClipKey]] = {}
    for key in keys:
        by_prompt.setdefault((key.prompt_id, key.text_sha256), []).append(key)
    return [(clips[i], clips[i + 1]) for clips in by_prompt.values() for i in range(0, len(clips) - 1, 2)]


def pairs_of_systems(rows: Mapping[ClipKey, Row]) -> list[tuple[ClipKey, ClipKey]]:
    """For each prompt, the k-th clip of one system meets the k-th clip of every other."""
    by_prompt: dict[tuple[str, str], dict[str, list[ClipKey]]] = {}
    for key, row in rows.items():
        by_prompt.setdefault((key.prompt_id, key.text_sha256), {}).setdefault(str(row.fields["system"]), []).append(key)
    pairs = []
    for systems in by_prompt.values():
        names = list(systems)
        for i, one in enumerate(names):
            pairs += [pair for other in names[i + 1 :] for pair in zip(systems[one], systems[other], strict=False)]
    return pairs


def named_pairs(keys: Iterable[ClipKey], pairs: Iterable[PairOf]) -> list[tuple[ClipKey, ClipKey]]:
    """Pairs given by sha256 or key, found among the clips. Raises StoreError where they are not two clips of one prompt."""
    by_sha: dict[str, list[ClipKey]] = {}
    for key in keys:
        by_sha.setdefault(key.sha256, []).append(key)
    found = []
    for pair in pairs:
        ends = []
        for clip in pair:
            sha = clip.sha256 if isinstance(clip, ClipKey) else clip
            if sha not in by_sha:
                raise StoreError(f"a pair with clip {sha[:12]}", "a clip of the manifest", "add its row or drop the pair")
            ends.append([clip] if isinstance(clip, ClipKey) else by_sha[sha])
        both = [(x, y) for x in ends[0] for y in ends[1] if x[:2] == y[:2] and x != y]
        if not both:
            got = f"the pair {ends[0][0].sha256[:12]}, {ends[1][0].sha256[:12]}"
            raise StoreError(got, "two different clips of one prompt", "drop or mend the pair")
        found.append(both[0])
    return found


def create(
    store: Store,
    name: str,
    rows: Mapping[ClipKey, Row],
    rules: Rules,
    *,
    pairs: Sequence[PairOf] | None = None,
    gold: Sequence[PairOf] = (),
    measure: Measure | None = None,
    owner_id: int | None = None,
    keep_rules: bool = False,
) -> CampaignSummary:
    """Registers checked rows under a name. The same call again adds nothing; more rows add their pairs.

    Args:
        pairs: which clips meet. Default: clips of one prompt, each once, in order.
        gold: pairs with a known answer, (the better, the worse). They take no votes from the others.
        owner_id: who does this; None on the server's command line.
        keep_rules: whether a campaign of that name keeps its own rules, but for target_votes and min_listen_ms.

    A pair's systems are those of these rows, whatever its clips are called in other campaigns.
    Raises: StoreError for a pair that cannot be, nothing to pair, or a campaign of that name with other rules, or with a pair that
        has votes under two other names. Nothing is stored then.
    """
    if not name or len(name) > 128 or not name.isprintable() or name != name.strip():
        raise StoreError(f"campaign name {name!r}", "1 to 128 printable characters", "choose another name")
    with store.read() as session:
        asked = (Prompt.key, Prompt.text_sha256)
        ids = {prompt_id: (key, text) for key, text, prompt_id in find(session, (*asked, Prompt.id), asked, [key[:2] for key in rows])}
        of_prompts = find(session, (Clip.prompt_id, Clip.sha256), (Clip.prompt_id,), [(prompt_id,) for prompt_id in ids])
        known = {ClipKey(*ids[prompt_id], sha256) for prompt_id, sha256 in of_prompts}
    columns = {key: clip_columns(row, measure) for key, row in rows.items() if key not in known}
    with store.write() as session:
        campaign = claim_campaign(session, name, owner_id=owner_id, **rules.columns())
        _same_rules(campaign, rules, keep_rules)
        summary = _register(session, campaign, rows, columns, pairs, gold)
        detail = {"campaign_id": campaign.id, "n_clips": summary.n_clips, "n_new_pairs": summary.n_new_pairs, "n_gold": summary.n_gold}
        detail["n_named"] = summary.n_named
        session.add(Audit(actor_id=owner_id, action="campaign.fill", detail=detail))
        return summary


def claim_campaign(session: Session, name: str, **columns: Any) -> Campaign:
    """The campaign of a name, made with these columns if there is none; whoever else fills or imports waits until the transaction ends.

    The first thing that a fill or an import does. They share prompts, clips and outside raters whatever the campaign, and an import
    meets them in the order of its file, a part at a time: no order of rows could be kept by all. Nobody else waits: not who votes,
    joins or reads. SQLite has one writer anyway.
    """
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("lock table clip in share row exclusive mode"))
    campaign = session.scalar(select(Campaign).where(Campaign.name == name).with_for_update(key_share=True))
    if campaign is None:
        campaign = Campaign(name=name, **columns)
        session.add(campaign)
        session.flush()
    return campaign


def _same_rules(campaign: Campaign, rules: Rules, keep_rules: bool) -> None:
    have, asked = rules_of(campaign).columns(), rules.columns()
    compared = ("target_votes", "min_listen_ms") if keep_rules else tuple(asked)
    if other := [key for key in compared if have[key] != asked[key]]:
        stands = ", ".join(f"{key}={have[key]}" for key in other)
        raise ConflictError(f"other rules for campaign {campaign.name!r}", stands, "repeat them, or choose another name")


def _register(
    session: Session,
    campaign: Campaign,
    rows: Mapping[ClipKey, Row],
    columns: Mapping[ClipKey, dict[str, Any]],
    pairs: Sequence[PairOf] | None,
    gold: Sequence[PairOf],
) -> CampaignSummary:
    clips = _clips(session, rows, columns)
    here = select(Pair.clip_x_id, Pair.clip_y_id, Pair.gold).where(Pair.campaign_id == campaign.id)
    have = {(x_id, y_id): answer for x_id, y_id, answer in session.execute(here)}
    systems = {clips[key].id: str(row.fields["system"]) for key, row in rows.items()}
    n_named = _name(session, campaign, systems)
    known_answers = named_pairs(clips, gold)
    if pairs is None:
        paired = {clip_id for pair, answer in have.items() if answer is None for clip_id in pair}
        spoiled = {worse for _, worse in known_answers} | {key for key, row in rows.items() if row.fields["system"] == SPOILED}
        wanted = choose_pairs(key for key, clip in clips.items() if clip.id not in paired and key not in spoiled)
    else:
        wanted = named_pairs(clips, pairs)
    fresh = [pair for x, y in wanted if (pair := _new_pair(campaign, clips[x], clips[y], systems, have, known=False))]
    answered = [pair for x, y in known_answers if (pair := _new_pair(campaign, clips[x], clips[y], systems, have, known=True))]
    add(session, Pair, fresh + answered)
    answers = [answer for answer in have.values() if answer is not None]
    if len(answers) == len(have):
        expected = "at least one prompt with two different clips"
        raise StoreError(f"no pair among {len(rows)} clips", expected, "sample with -n 2 or more")
    return CampaignSummary(campaign.name, len(clips), len(have) - len(answers), len(fresh), len(answers), n_named)


def _name(session: Session, campaign: Campaign, systems: Mapping[int, str]) -> int:
    """Gives a call's names to the campaign's pairs that ranked nothing; how many changed, gold pairs apart.

    Args: systems: of a call's clips by id. Raises: ConflictError for other names than those under which a pair is ranked.
    """
    named, n_named = [], 0
    columns = (Pair.id, Pair.clip_x_id, Pair.clip_y_id, Pair.gold, RANKS, Pair.system_x, Pair.system_y)
    stored = select(*columns).where(Pair.campaign_id == campaign.id).order_by(Pair.id)  # one order for all: no deadlock
    for pair_id, x_id, y_id, gold, ranks, *have in session.execute(stored):
        asked = [systems.get(x_id), systems.get(y_id)]
        if None in asked or asked == have:
            continue
        if ranks:
            got = f"a pair of {asked[0]!r} against {asked[1]!r}, which campaign {campaign.name!r} ranks as {have[0]!r} against {have[1]!r}"
            raise ConflictError(got, "the names that it has there", "repeat them, or choose another name for the campaign")
        named.append({"id": pair_id, "system_x": asked[0], "system_y": asked[1]})
        n_named += gold is None
    if named:
        session.execute(update(Pair), named)
    return n_named


def _clips(session: Session, rows: Mapping[ClipKey, Row], columns: Mapping[ClipKey, dict[str, Any]]) -> dict[ClipKey, _Clip]:
    """The stored clip of each row, in order; `columns` of those that are new. A clip that was known is where it was seen last."""
    prompts = dict.fromkeys(key[:2] for key in rows)
    asked = (Prompt.key, Prompt.text_sha256)
    known = {tuple(row) for row in find(session, asked, asked, prompts)}
    first = {key[:2]: row for key, row in reversed(list(rows.items()))}
    fresh = [pair for pair in prompts if pair not in known]
    added = [{"key": pair[0], "text_sha256": pair[1], "text": first[pair].prompt, "split": first[pair].split} for pair in fresh]
    add(session, Prompt, added)
    ids = {(key, digest): prompt_id for key, digest, prompt_id in find(session, (*asked, Prompt.id), asked, prompts)}
    wanted = {key: (ids[key[:2]], key.sha256) for key in rows}

    def look() -> dict[tuple[int, str], _Clip]:
        told = (Clip.id, Clip.prompt_id, Clip.sha256, Clip.lufs, Clip.true_peak_dbfs)
        return {(row[1], row[2]): _Clip(*row) for row in find(session, told, (Clip.prompt_id, Clip.sha256), wanted.values())}

    have = look()
    for key, row in rows.items():
        if (clip := have.get(wanted[key])) is not None:
            place = {"uri": row.uri} | ({"codes_uri": row.codes_uri} if row.codes_uri else {})
            session.execute(update(Clip).where(Clip.id == clip.id).values(place))
    add(session, Clip, [{"prompt_id": wanted[key][0], **columns[key]} for key in rows if wanted[key] not in have])
    have = look()
    return {key: have[wanted[key]] for key in rows}


def _new_pair(
    campaign: Campaign, one: _Clip, two: _Clip, systems: Mapping[int, str], have: dict[tuple[int, int], str | None], *, known: bool
) -> dict[str, Any] | None:
    """The pair's columns unless it is there; `known`: `one` is the right answer. Raises ConflictError for two answers."""
    x, y = sorted((one, two), key=lambda clip: clip.id)
    answer = ("x" if one is x else "y") if known else None
    if (x.id, y.id) in have:
        if have[x.id, y.id] != answer:
            got = f"the pair {x.sha256[:12]}, {y.sha256[:12]} with two answers"
            raise ConflictError(got, "a pair that is either gold or to be rated", "drop it from one of the lists")
        return None
    gain_x_db, gain_y_db = pair_gains_db(x.lufs, x.true_peak_dbfs, y.lufs, y.true_peak_dbfs)
    have[x.id, y.id] = answer
    return {
        "campaign_id": campaign.id,
        "prompt_id": x.prompt_id,
        "clip_x_id": x.id,
        "clip_y_id": y.id,
        "system_x": systems[x.id],
        "system_y": systems[y.id],
        "gain_x_db": gain_x_db,
        "gain_y_db": gain_y_db,
        "gold": answer,
        "target_votes": campaign.target_votes,
    }


def _inside(base_dir: str, name: str, where: str) -> str:
    uri = storage.inside(base_dir, name)
    if uri is None:
        raise StoreError(f"{where}: path {name!r}", f"a path inside {base_dir}", "list files relative to the manifest")
    if not storage.is_file(uri):
        raise StoreError(f"{where}: no file {uri}", "a file that exists", "sample again, or drop the row")
    return uri

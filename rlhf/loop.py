"""Online rounds: sample, collect votes, learn, and let listeners decide blindly whether what was learnt replaces what they had.

    encore loop --prompts examples/train.txt --heldout examples/heldout.txt --out runs/loop --serve --rater ada # people vote
    encore loop ... --raters "python my_rater.py --url {url} --campaign {campaign}"             # a program votes over HTTP
    encore loop status --out runs/loop

    champion -> clips -> votes -> snapshot of all rounds' votes (-> reward model) -> challenger by ppo, grpo, dpo_own, dpo or sft
             -> champion and challenger play held-out prompts -> blind votes -> promoted, or the champion stays

Votes add up: each round's clips join one campaign, each round's snapshot holds all of them, and the challenger is trained from the base
on all of it. So a reward learns where the last policy went (and fooled it), drift is always counted from the base, and an adapter never
depends on its ancestors. The verdict rests on other votes: held-out prompts, a campaign of its own, never trained on.

The rule (`rlhf.verdict`) is told before the votes: the challenger is promoted when the lower end of the 95 % interval of its win rate over
the champion, by prompt *and* rater, lies above one half, on at least `min_decided` decided votes of `min_prompts` prompts. In every other
case the champion stays. KL to the base and diversity are measured on the same held-out clips, and told beside it (`rlhf.loop_report`).

Everything is in --out: a folder a round, a stamp a stage, champion.json, report.md. A call that is stopped or killed goes on where it
was, also while it waits for votes. It needs no server of its own: votes may come from an app that runs elsewhere on the same database.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from adapters.library import Manifest, check_base, load_adapter, read_adapter, unload_adapters
from base_models.checkpoint import read_json, read_jsonl, write_json
from base_models.errors import UserError
from base_models.policy import PRETRAINED, Policy, load_policy
from base_models.settings import from_mapping, to_mapping
from db.errors import NoVotesError
from db.storage import is_file, local_path
from db.store import open_store
from rlhf.apart import write_furthest
from rlhf.collecting import Collecting, admit, collect, database_file, freeze, places
from rlhf.evaluate_models import BASE, evaluate
from rlhf.loop_places import PLACES, demand_there, kept_settings, moved, note_contents, refuse_other_content
from rlhf.reward_gates import Gate, GateError, missed
from rlhf.sample_pairs import Prompt, Settings, read_prompts, sample, write_prompts
from rlhf.snapshot import NothingToLearnError
from rlhf.stages import ROOT, Stage, only_one, resume_flag, run_python, run_stages, stamp, stamp_path
from rlhf.verdict import MIN_PROMPTS, comparisons, decide, read_outcomes, rule

CHAMPION, CHALLENGER = "champion", "challenger"
WATCHED, MOST_WATCHED = 6, 48
"""PPO watches one prompt in so many of those that were rated, two at least and no more than so many, and learns from the others."""


ALL_THE_SAME = "or give --reward-args without --strict, to learn from this reward all the same"
"""What an owner may do beside collecting more votes, where gates refused a reward."""


@dataclass(frozen=True)
class Method:
    """How a challenger is trained: by which script, with which options, and whether by a reward model or by the votes themselves."""

    script: str
    by_reward: bool
    options: tuple[str, ...] = ()


METHODS = {
    "ppo": Method("train_ppo", True, ("--preset", "votes")),
    "grpo": Method("train_grpo", True),
    "dpo_own": Method("train_dpo", True, ("--preset", "rounds")),
    "dpo": Method("train_dpo", False),
    "sft": Method("train_sft", False),
}


@dataclass(frozen=True)
class LoopConfig:
    """What a loop is; kept in loop.json, so that a later call need not repeat it."""

    out: Path = Path("runs/loop")
    policy: Path = PRETRAINED
    prompts: Path | None = None
    """What is sampled, voted on and trained on."""
    heldout: Path | None = None
    """What champion and challenger are compared on; no prompt of `prompts`."""
    champion: Path | None = None
    """The adapter to begin with; none: the base."""
    db: str = ""
    """Database of the votes; default: encore.db in --out."""
    campaign: str = "loop"
    method: str = "ppo"
    """One of METHODS."""
    clips_per_prompt: int = 2
    pairs_per_prompt: int | None = None
    """How many pairs of a prompt are asked about, those whose clips sound least alike (rlhf.apart); None: every two clips."""
    duration_s: float = 6.0
    target_votes: int = 2
    """Votes wanted for each pair that is trained on."""
    ab_votes: int = 2
    """Votes wanted for each comparison of champion and challenger."""
    ab_clips: int = 1
    """Clips of each for a held-out prompt."""
    min_decided: int = 20
    """Decided votes without which nobody is promoted."""
    min_prompts: int = MIN_PROMPTS
    """Held-out prompts on which these votes have to lie."""
    min_listen_ms: int = 3000
    train: str = ""
    """More options for the training script, as on a command line."""
    reward: str = ""
    """More options for train_reward.py."""
    licence: str = "unspecified"
    seed: int = 0


CHANGEABLE = ("out", "train", "reward")
"""Settings that a later round may have otherwise."""


def settings(given: dict[str, Any]) -> LoopConfig:
    """The loop's settings: those kept in loop.json, and those given now (None: not given). UserError where they contradict."""
    out = Path(given.get("out") or LoopConfig.out)
    said = {key: value for key, value in given.items() if value is not None}
    said |= {name: moved(said[name], out, out) for name in PLACES if name in said}
    kept = kept_settings(out)
    new = to_mapping(from_mapping(LoopConfig, {**kept, **said}))
    other = [key for key, value in kept.items() if new[key] != value and key not in CHANGEABLE]
    for name in [name for name in PLACES if name in other and kept[name] is not None]:
        refuse_other_content(out, name, Path(new[name]), Path(kept[name]))
        other.remove(name)
    if other:
        got = ", ".join(f"{key} {new[key]!r}" for key in other)
        expected = ", ".join(repr(kept[key]) for key in other)
        raise UserError(f"{got} for the loop in {out}", expected, "leave them out, or choose another --out")
    cfg = from_mapping(LoopConfig, new)
    if cfg.prompts is None or cfg.heldout is None:
        raise UserError(f"--prompts {cfg.prompts}, --heldout {cfg.heldout}", "both", "name two files of prompts, with none in common")
    if cfg.method not in METHODS:
        raise UserError(f"method {cfg.method!r}", f"one of {tuple(METHODS)}", "pass another --method")
    if min(cfg.target_votes, cfg.ab_votes, cfg.ab_clips) < 1 or cfg.clips_per_prompt < 2:
        raise UserError("fewer than 2 clips a prompt, or no votes", "2 clips and 1 vote or more", "correct the settings")
    if cfg.min_prompts < 2:
        raise UserError(f"--min-prompts {cfg.min_prompts}", "2 or more: a single prompt tells nothing of others", "raise it, better to 6")
    if cfg.pairs_per_prompt is not None and cfg.pairs_per_prompt < 1:
        raise UserError(f"{cfg.pairs_per_prompt} pairs a prompt", "1 or more", "raise it, or leave it out for all pairs")
    return cfg


def watched_file(cfg: LoopConfig) -> Path | None:
    """The file of prompts that PPO was told to watch."""
    words = shlex.split(cfg.train)
    for word, after in zip(words, [*words[1:], ""]):
        if word.split("=")[0].replace("_", "-") == "--heldout-prompts":
            return Path(word.partition("=")[2] or after)
    return None


def watches_own(cfg: LoopConfig) -> bool:
    """Whether the challenger is trained by PPO, which watches prompts, and no others were given to it."""
    return cfg.method == "ppo" and watched_file(cfg) is None


def refuse_shared(some: Sequence[Prompt], others: Iterable[str], what: str) -> None:
    """UserError where one of the prompts is among the others, in capitals or not: the text encoder hears no difference."""
    known = {_as_heard(prompt) for prompt in others}
    if shared := sorted(prompt.prompt for prompt in some if _as_heard(prompt.prompt) in known):
        raise UserError(f"{len(shared)} {what}, {shared[0]!r}", "none", "take them out of one of the files")


def _as_heard(prompt: str) -> str:
    return " ".join(prompt.casefold().split())


def ab_campaign(campaign: str, number: int) -> str:
    """The campaign in which champion and challenger of a round are compared."""
    return f"{campaign}-ab-{number:02d}"


def is_of(name: str, campaign: str) -> bool:
    """Whether a campaign of this name is that of a loop, or of one of its rounds' comparisons."""
    number = re.search(r"\d+$", name)
    return name == campaign or (number is not None and name == ab_campaign(campaign, int(number[0])))


def same_adapter(folder: str, sha256: str) -> Manifest:
    """The manifest of the adapter in a folder. UserError where it is another one than the loop met there."""
    manifest = read_adapter(folder).manifest
    if manifest.adapter_sha256 != sha256:
        got = f"{folder} with adapter {manifest.adapter_sha256[:12]}"
        raise UserError(got, f"adapter {sha256[:12]}, as the loop met it there", "restore the folder; what is voted on must not change")
    return manifest


def _place_of(uri: str, inside: Path) -> Path | None:
    """The folder in which a clip of this address is the file `inside`; None where the address ends otherwise, or is not of a file here."""
    path, n = local_path(uri), len(inside.parts)
    return Path(*path.parts[:-n]) if path is not None and path.is_absolute() and path.parts[-n:] == inside.parts else None


def why_refused(refused: Mapping[str, Any], whose: str) -> str:
    """In words, what stands in a round's refused.json; whose: the round's, as "the" or "its"."""
    of = f"{whose} reward model did not pass its gates" if "gates" in refused else f"nothing can be learnt from {whose} votes"
    return f"{of}: {refused['missed']}"


class Loop:
    """The loop's folder and its rounds."""

    def __init__(self, cfg: LoopConfig, collecting: Collecting) -> None:
        self.cfg, self.out = cfg, cfg.out
        self.collecting = replace(collecting, accounts=cfg.out / "accounts.json")
        self.db = cfg.db or f"sqlite:///{(cfg.out / 'encore.db').resolve()}"
        assert cfg.prompts is not None
        assert cfg.heldout is not None
        demand_there(cfg.out, "prompts", cfg.prompts)
        demand_there(cfg.out, "heldout", cfg.heldout)
        self.prompts, self.heldout = read_prompts(cfg.prompts), read_prompts(cfg.heldout)
        refuse_shared(self.heldout, [prompt.prompt for prompt in self.prompts], "held-out prompts that are trained on")
        if watches_own(cfg) and len(self.prompts) < 3:
            got = f"{len(self.prompts)} prompt(s) in {cfg.prompts}"
            raise UserError(got, "3 or more, better 50: PPO watches two or more and plays the others", "add prompts")
        self._policy: Policy | None = None

    @property
    def policy(self) -> Policy:
        if self._policy is None:
            self._policy = load_policy(self.cfg.policy)
        return self._policy

    def run(self, rounds: int) -> dict[str, Any]:
        """Play until `rounds` rounds are done in all; returns the champion's record."""
        self._check_votes()
        with only_one(self.out):
            refuse_shared(self.heldout, self._rated(), "held-out prompts that were rated in a round, whose votes are trained on")
            if (file := watched_file(self.cfg)) is not None:
                watched = [prompt.prompt for prompt in read_prompts(file)]
                refuse_shared(self.heldout, watched, "held-out prompts that PPO watches, and is stopped by")
                refuse_shared(self.prompts, watched, "prompts that are played, in the file of those that PPO only watches")
            first = None if (self.out / "champion.json").is_file() else self._first_champion()
            if first is not None:
                self._check_campaign()
            note_contents(self.out, {"prompts": self.cfg.prompts, "heldout": self.cfg.heldout})
            write_json(self.out / "loop.json", to_mapping(self.cfg))  # of a loop that can begin: the next call is held to it
            if first is not None:
                write_json(self.out / "champion.json", first)
            missing = [number for number in range(1, rounds + 1) if not stamp_path(self.round(number).folder, "verdict").is_file()]
            if missing:
                demand_there(self.out, "policy", self.cfg.policy)
                if not self.champion()["round"]:
                    demand_there(self.out, "champion", self.cfg.champion)
                self._check_place()
            if missing and self.collecting.serve:
                admit(self.db, self.collecting.people)
            for number in missing:
                print(f"round {number} of {rounds}", flush=True)
                made = self.round(number)
                made.look_again()
                run_stages(made.folder, made.stages())
        return self.champion()

    def round(self, number: int) -> Round:
        return Round(self, number, self.out / "rounds" / f"{number:02d}")

    def champion(self) -> dict[str, Any]:
        """The champion's record as it stands in champion.json."""
        record: dict[str, Any] = read_json(self.out / "champion.json")
        return record

    def adapter_of(self, champion: dict[str, Any]) -> str | None:
        """Where a champion's adapter lies: a promoted one in its round's folder, wherever the loop is; the first one where it was given."""
        if champion["round"]:
            return self.round(champion["round"]).challenger
        return str(self.cfg.champion) if self.cfg.champion else None

    def standing(self) -> dict[str, Any]:
        """The champion's record, with the place of its adapter, once that was found to hold what was promoted: the first one may be
        anywhere, and any may be trained into since."""
        record = self.champion()
        adapter = self.adapter_of(record)
        if adapter:
            same_adapter(adapter, record["adapter_sha256"])
        return record | {"adapter": adapter}

    def _rated(self) -> list[str]:
        """The prompts of all rounds' clips, as they were put up: the file of prompts may have changed since."""
        manifests = sorted(self.out.glob("rounds/*/samples/manifest.jsonl"))
        return [row["prompt"] for manifest in manifests for row in read_jsonl(manifest)]

    def _check_votes(self) -> None:
        cfg = self.cfg
        most = len(self.heldout) * cfg.ab_clips * cfg.ab_votes
        if len(self.heldout) < cfg.min_prompts:
            got = f"{len(self.heldout)} held-out prompts, of which nobody could be promoted"
            expected = f"{cfg.min_prompts} or more, as --min-prompts asks, better 20"
            raise UserError(got, expected, "hold out more prompts: what wins on so few may win by chance")
        if most < cfg.min_decided:
            got = f"{most} votes between champion and challenger ({len(self.heldout)} held-out prompts), of which nobody could be promoted"
            expected = f"{cfg.min_decided} or more, as --min-decided asks"
            raise UserError(got, expected, "hold out more prompts, or raise --ab-clips or --ab-votes")

    def _check_campaign(self) -> None:
        """A loop begins with campaigns of its own: the votes of all that is in them are learnt from, and decide."""
        with open_store(self.db) as store:
            there = [c.name for c in store.stats().campaigns if is_of(c.name, self.cfg.campaign)]
        if there:
            got = f"campaign {there[0]!r} in {self.db}, which is not this loop's"
            raise UserError(got, "a name that is free: votes on others' clips would count", "choose another --campaign, or another --db")

    def _check_place(self) -> None:
        """The database and every snapshot name clips by their place. A folder that was moved is refused before somebody is asked to listen
        to clips that cannot be played, and a database without the clips that were put up, as it has none of their votes."""
        manifests = sorted(self.out.glob("rounds/*/samples/manifest.jsonl"))
        if manifests:
            self.check_database()
        for manifest in manifests:
            folder, first = manifest.parents[1], read_jsonl(manifest)[0]
            file, known = manifest.parent / first["file"], places(self.db, first["sha256"])
            if not known and stamp_path(folder, "samples").is_file():
                got = f"{self.db}, which does not know the clips of round {int(folder.name)}"
                raise UserError(got, "the database in which they were put up, and which has their votes", self._find_database())
            if known and file.is_file() and not any(map(is_file, known)):
                old = _place_of(known[0], file.relative_to(self.out))
                got = f"{self.out}, whose clips are known at {old or known[0]}"
                remedy = self._leave_link(old) if old else f"bring the clips back there, or put them up again, from {manifest}"
                raise UserError(got, "the place where they were put up, by which the database and snapshots name them", remedy)

    def check_database(self) -> None:
        """UserError where the file of the votes is not there: to open it would make an empty one. For a loop that has put up clips."""
        file = database_file(self.db)
        if file is not None and not file.is_file():
            raise UserError(f"no database at {file}", "the one in which the loop's clips were put up", self._find_database())

    def _find_database(self) -> str:
        """What to do where the database is not that of the votes."""
        file = database_file(self.db)
        if file is not None and not file.is_absolute():
            return f"call from the folder in which the loop was begun, by which {file} goes; or restore it from a backup"
        if file is not None and file.parent.resolve() != self.out.resolve() and (self.out / file.name).is_file():
            return self._leave_link(file.parent)
        return "restore it from a backup, or begin in a new --out"

    def _leave_link(self, old: Path) -> str:
        """What to do where the folder was moved from `old`."""
        how = f"move what is at {old} away and" if old.exists() else "move the folder back, or"
        return f"{how} leave a link at its old place: ln -s {shlex.quote(str(self.out.resolve()))} {shlex.quote(str(old))}"

    def _first_champion(self) -> dict[str, Any]:
        record: dict[str, Any] = {"round": 0, "adapter": None, "adapter_sha256": None, "policy_sha256": self.policy.sha256, "votes": None}
        if self.cfg.champion is not None:
            adapter = read_adapter(self.cfg.champion)
            check_base(adapter, self.policy.sha256)
            record |= {"adapter": str(self.cfg.champion), "adapter_sha256": adapter.manifest.adapter_sha256}
        return record

    # ---- clips -------------------------------------------------------------------------------------------------------

    def play(self, adapter: str | None, prompts: Sequence[Prompt], out: Path, how: Settings, system: str) -> Path:
        """Clips of the base with or without an adapter; refuses one of another base."""
        unload_adapters(self.policy.lm)
        hashes = [m.adapter_sha256 for m in load_adapter(self.policy, adapter)] if adapter else []
        try:
            return sample(self.policy, prompts, out, how, system, hashes)
        finally:
            unload_adapters(self.policy.lm)

    def put_up(self, name: str, sources: Sequence[tuple[str, Path]], target_votes: int, which: Sequence[Any]) -> None:
        """Register clips for rating; `which` says which of them meet. The same call again adds nothing."""
        wanted = ["--target-votes", target_votes, "--min-listen-ms", self.cfg.min_listen_ms]
        named = [part for system, path in sources for part in ("--source", path, "--system", system)]
        run_python(["-m", "feedback_app.campaigns", "--db", self.db, "--name", name, *named, *wanted, *which])


class Round:
    """One round's folder and stages."""

    def __init__(self, loop: Loop, number: int, folder: Path) -> None:
        self.loop, self.cfg, self.number, self.folder = loop, loop.cfg, number, folder
        self.ab = ab_campaign(self.cfg.campaign, number)
        self.method = METHODS[self.cfg.method]

    def stages(self) -> list[Stage]:
        collected = [
            Stage("samples", "the champion plays what will be rated", 100, self.samples),
            Stage("votes", "votes on pairs of its clips", 60, self.votes),
            Stage("snapshot", "freezing the votes of all rounds", 1, self.snapshot),
        ]
        if self.refused_again:
            done = [stage for stage in collected if stamp_path(self.folder, stage.name).is_file()]
            return [*done, Stage("verdict", "the verdict, without a challenger", 1, self.verdict)]
        return [
            *collected,
            *([Stage("reward", "training the reward model", 30, self.reward)] if self.method.by_reward else []),
            Stage("train", f"training the challenger by {self.cfg.method}", 200, self.train),
            Stage("ab_samples", "champion and challenger play held-out prompts", 60, self.ab_samples),
            Stage("ab_votes", "blind votes between the two", 60, self.ab_votes),
            Stage("verdict", "the verdict", 1, self.verdict),
        ]

    def samples(self) -> dict[str, Any]:
        champion = self.loop.standing()
        how = Settings(n=self.cfg.clips_per_prompt, seed=self.cfg.seed + 2 * self.number, duration_s=self.cfg.duration_s)
        system = f"round-{self.number:02d}"
        manifest = self.loop.play(champion["adapter"], self.loop.prompts, self.folder / "samples", how, system)
        meet: list[Any] = ["--all-pairs"]
        if self.cfg.pairs_per_prompt is not None:
            meet = ["--pairs", self.folder / "pairs.jsonl"]
            write_furthest(self.loop.policy, manifest, self.folder / "pairs.jsonl", self.cfg.pairs_per_prompt)
        self.loop.put_up(self.cfg.campaign, [(system, manifest)], self.cfg.target_votes, meet)
        return {"adapter_sha256": champion["adapter_sha256"]}

    def votes(self) -> dict[str, Any]:
        return collect(self.loop.db, self.cfg.campaign, self.loop.collecting)

    def snapshot(self) -> dict[str, Any]:
        """Freeze the votes. Raises: NothingToLearnError where none counts, once; the next call ends the round, unless some count then."""
        try:
            return freeze(self.loop.db, self.cfg.campaign, self.folder, "snapshot")
        except NoVotesError as error:
            remedy = f"where some of them count by then, round {self.number} goes on with them"
            raise self._refuse("snapshot", NothingToLearnError(error.got, error.expected, remedy)) from error

    def look_again(self) -> None:
        """A round of which no vote counted goes on where some count now, those of a rater who was let in again say."""
        refused = self.refused()
        if refused is not None and refused["stage"] == "snapshot":
            with suppress(NoVotesError):
                freeze(self.loop.db, self.cfg.campaign, self.folder, "snapshot")
                (self.folder / "refused.json").unlink()

    def reward(self) -> dict[str, Any]:
        """Train it. One that its gates refuse (--strict) is noted: the votes are frozen, so that the same training would be refused again.

        Raises: GateError, or NothingToLearnError, once; the next call ends the round, unless it has other options for the training.
        """
        out = self.folder / "reward"
        (out / "figures.json").unlink(missing_ok=True)  # of a start before: what stands there afterwards is of this one
        common = ["--snapshot", self.folder / "snapshot", "--policy", self.cfg.policy, "--out", out]
        try:
            run_python([ROOT / "rlhf" / "train_reward.py", *common, *shlex.split(self.cfg.reward)])
        except NothingToLearnError as error:
            raise self._refuse("reward", error) from error
        except UserError as error:
            if not (out / "figures.json").is_file() or not read_json(out / "config.json")["strict"]:
                raise
            found = self._figures()
            if (short := missed([Gate(**gate) for gate in found["gates"]])) is None:
                raise
            self._note("reward", short[0], ALL_THE_SAME, found)
            got = f"round {self.number}'s reward model, by {stamp(self.folder, 'snapshot')['n_votes']} votes: {short[0]}"
            raise GateError(got, short[1], self.after_refusal) from error
        return self._figures()

    def _figures(self) -> dict[str, Any]:
        found = read_json(self.folder / "reward" / "figures.json")
        return {key: found[key] for key in ("accuracy", "ci", "ceiling", "gates")}

    def _note(self, stage: str, missed: str, remedy: str, figures: Mapping[str, Any]) -> None:
        """Keep that a stage refused what was voted, by which options, and what would help beside more votes."""
        told = {"stage": stage, "args": self._options(stage), "missed": missed, "remedy": remedy}
        write_json(self.folder / "refused.json", told | dict(figures))

    def _options(self, stage: str) -> str:
        return {"reward": self.cfg.reward, "train": self.cfg.train}.get(stage, "")

    def _refuse(self, stage: str, error: NothingToLearnError) -> NothingToLearnError:
        """What to raise where a stage can learn nothing from the votes: they are frozen, so that the same call would fail again."""
        remedy = error.remedy if stage == "snapshot" else f"{error.remedy}; other --{stage}-args are tried on the same votes"
        self._note(stage, error.got, remedy, {})
        return NothingToLearnError(f"round {self.number}'s votes: {error.got}", error.expected, self.after_refusal)

    def refused(self) -> dict[str, Any] | None:
        """Which `stage` refused what was voted, by which `args`, what it `missed`, and the figures of a reward that its gates refused. None
        where nothing was, or the stage was done since."""
        if not (self.folder / "refused.json").is_file():
            return None
        found: dict[str, Any] = read_json(self.folder / "refused.json")
        if "stage" not in found:  # an earlier version, of which gates alone refused
            found |= {"stage": "reward", "args": found["reward_args"], "remedy": ALL_THE_SAME}
        return None if stamp_path(self.folder, found["stage"]).is_file() else found

    @property
    def refused_again(self) -> bool:
        """Whether the options of now would be refused as before, on the same votes."""
        refused = self.refused()
        return refused is not None and shlex.split(refused["args"]) == shlex.split(self._options(refused["stage"]))

    @property
    def after_refusal(self) -> str:
        """What the owner can do."""
        refused = self.refused()
        assert refused is not None
        return (
            f"call again with --rounds {self.number + 1} or more: round {self.number} ends without a challenger, and the next one asks "
            f"about new clips, whose votes add to these; {refused['remedy']}"
        )

    def train(self) -> dict[str, Any]:
        out = self.folder / "train"
        common = ["--policy", self.cfg.policy, "--out", out, "--licence", self.cfg.licence, "--seed", self.cfg.seed + self.number]
        if self.method.by_reward:
            frames = self.loop.policy.n_frames(self.cfg.duration_s)
            prompts, watching = self.prompts_to_learn_from()
            own = ["--reward", self.folder / "reward", "--prompts", prompts, *watching, "--n-frames", frames]
        else:
            own = ["--snapshot", self.folder / "snapshot"]
        script = ROOT / "rlhf" / f"{self.method.script}.py"
        try:
            run_python([script, *self.method.options, *common, *own, *shlex.split(self.cfg.train), *resume_flag(out)])
        except NothingToLearnError as error:
            raise self._refuse("train", error) from error
        manifest = read_adapter(out / "adapter").manifest
        return {"adapter_sha256": manifest.adapter_sha256, "figures": manifest.figures}

    def prompts_to_learn_from(self) -> tuple[Path | None, list[str | Path]]:
        """The prompts that training plays, and PPO's flags for those that it only watches: what a part of the reward is held by, and
        what the brake goes by. They are taken from the rated ones: those of the verdict are nobody's before it."""
        known = self.loop.prompts
        if not watches_own(self.cfg):
            return self.cfg.prompts, []
        by_chance = sorted(known, key=lambda prompt: hashlib.sha256(prompt.prompt_id.encode()).hexdigest())
        n = min(max(2, len(known) // WATCHED), MOST_WATCHED)
        watch, plays = self.folder / "watch.jsonl", self.folder / "play.jsonl"
        write_prompts(watch, [asdict(prompt) for prompt in by_chance[:n]])
        write_prompts(plays, [asdict(prompt) for prompt in by_chance[n:]])
        return plays, ["--heldout-prompts", watch]

    @property
    def challenger(self) -> str:
        return str(self.folder / "train" / "adapter")

    def ab_samples(self) -> dict[str, Any]:
        """Held-out clips of both, with the same seeds; how far each is from the base, and how varied; the comparisons are put up.

        Two clips of each prompt at least are played, as diversity asks; the first `ab_clips` are compared.
        """
        how = Settings(n=max(2, self.cfg.ab_clips), seed=self.cfg.seed + 2 * self.number + 1, duration_s=self.cfg.duration_s)
        champion = self.loop.standing()["adapter"]
        same_adapter(self.challenger, stamp(self.folder, "train")["adapter_sha256"])
        adapters = {self.named(CHAMPION): champion, self.named(CHALLENGER): self.challenger}
        systems = {name: Path(adapter) for name, adapter in adapters.items() if adapter}
        moved = evaluate(self.loop.policy, systems, self.loop.heldout, self.folder / "heldout", how)
        both = [(name, Path(moved[name if adapter else BASE]["manifest"])) for name, adapter in adapters.items()]
        theirs, ours = (read_jsonl(manifest) for _, manifest in both)
        pairs = comparisons(theirs, ours, self.cfg.ab_clips)
        if pairs:
            write_prompts(self.folder / "ab_pairs.jsonl", pairs)
            self.loop.put_up(self.ab, both, self.cfg.ab_votes, ["--pairs", self.folder / "ab_pairs.jsonl"])
        told = {name: {key: moved[name][key] for key in ("kl", "kl_ci", "diversity_ratio")} for name in systems}
        return {
            "clips_that_differ": len(pairs),
            "rule": rule(self.cfg.min_decided, self.cfg.min_prompts),
            **{key.split("-")[0]: told[key] for key in told},
        }

    def named(self, system: str) -> str:
        return f"{system}-{self.number:02d}"

    def ab_votes(self) -> dict[str, Any]:
        put_up = stamp(self.folder, "ab_samples")
        if not put_up["clips_that_differ"]:
            return {"votes": 0, "wanted": 0}
        print(f"        {put_up['rule']}", flush=True)
        return collect(self.loop.db, self.ab, self.loop.collecting)

    def verdict(self) -> dict[str, Any]:
        """Compare, decide, record. The champion's file is replaced in one stroke, and a second call writes the same."""
        before = self.loop.champion()
        if before["round"] == self.number:
            return {"promoted": True, **before["votes"]}
        promoted, votes = self._compare()
        votes |= {"at": datetime.now(UTC).isoformat(timespec="seconds"), "champion_sha256": before["adapter_sha256"]}
        print(f"        {'promoted' if promoted else 'the champion stays'}: {votes['why']}", flush=True)
        if promoted:
            write_json(self.loop.out / "champion.json", self._promoted(before, votes))
        return {"promoted": promoted, **votes}

    def _compare(self) -> tuple[bool, dict[str, Any]]:
        nothing: dict[str, Any] = {"win_rate": None, "ci": None, "decided": 0, "ties": 0}
        if (refused := self.refused()) is not None:
            return False, nothing | {"why": why_refused(refused, "the")}
        if not stamp(self.folder, "ab_votes")["votes"]:
            return False, nothing | {"why": "the challenger plays what the champion plays"}
        try:
            frozen = freeze(self.loop.db, self.ab, self.folder, "ab_snapshot")
        except NoVotesError as error:
            return False, nothing | {"why": f"no vote counts: {error.got}"}
        challenger = self.named(CHALLENGER)
        manifest = self.folder / "heldout" / challenger / "manifest.jsonl"
        if not manifest.is_file():
            expected = "the clips of the challenger, by which it is known whom a vote is for"
            again = f"restore it, or remove {stamp_path(self.folder, 'ab_samples')} and call again: the same seeds play the same clips"
            raise UserError(f"no {manifest}", expected, again)
        played = {(row["prompt_id"], row["sha256"]) for row in read_jsonl(manifest)}
        outcomes = read_outcomes(self.folder / "ab_snapshot", challenger, played)
        promoted, votes = decide(outcomes, self.cfg.min_decided, self.cfg.seed, self.cfg.min_prompts)
        of = {"ab_snapshot_sha256": frozen["sha256"], **{key: frozen[key] for key in ("n_votes", "n_raters", "n_excluded")}}
        return promoted, votes | of

    def _promoted(self, before: dict[str, Any], votes: dict[str, Any]) -> dict[str, Any]:
        manifest = same_adapter(self.challenger, stamp(self.folder, "train")["adapter_sha256"])
        return {
            "round": self.number,
            "adapter": str(Path(self.challenger).relative_to(self.loop.out)),
            "adapter_sha256": manifest.adapter_sha256,
            "policy_sha256": manifest.base_sha256,
            "parents": {
                "snapshot_sha256": stamp(self.folder, "snapshot")["sha256"],
                "reward_sha256": manifest.reward_sha256,
                "clips_of_adapter_sha256": stamp(self.folder, "samples")["adapter_sha256"],
                "beat_adapter_sha256": before["adapter_sha256"],
            },
            "votes": votes,
            "before": before,
        }


NAMES = tuple(field.name for field in fields(LoopConfig))

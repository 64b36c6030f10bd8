"""Online rounds: sample, collect votes, learn, and let listeners decide blindly whether what was learnt replaces what they had.

    encore loop --prompts train.txt --heldout heldout.txt --out runs/loop --serve        # people vote in the browser
    encore loop ... --raters "python my_rater.py --url {url} --campaign {campaign}"      # a program votes over HTTP
    encore loop status --out runs/loop

    champion -> clips -> votes -> snapshot of all rounds' votes (-> reward model) -> challenger by ppo, dpo or sft
             -> champion and challenger play held-out prompts -> blind votes -> promoted, or the champion stays

Votes add up: each round's clips join one campaign, each round's snapshot holds all of them, and the challenger is trained from the base
on all of it. So a reward learns where the last policy went (and fooled it), drift is always counted from the base, and an adapter never
depends on its ancestors. The verdict rests on other votes: held-out prompts, a campaign of its own, never trained on.

The rule: the challenger is promoted when the lower end of the 95 % interval of its win rate over the champion, by prompt *and* rater,
lies above one half, on at least `min_decided` decided votes. In every other case the champion stays.

Everything is in --out: a folder a round, a stamp a stage, champion.json. A call that is stopped or killed goes on where it was, also
while it waits for votes. It needs no server of its own: votes may come from an app that runs elsewhere on the same database.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from adapters.library import check_base, load_adapter, read_adapter, unload_adapters
from base_models.checkpoint import read_json, read_jsonl, write_json
from base_models.errors import UserError
from base_models.policy import PRETRAINED, Policy, load_policy
from base_models.settings import from_mapping, to_mapping
from rlhf.collecting import Collecting, collect, counted, freeze
from rlhf.sample_pairs import Prompt, Settings, read_prompts, sample
from rlhf.stages import ROOT, Stage, only_one, resume_flag, run_python, run_stages, stamp, stamp_path
from rlhf.verdict import decide, read_outcomes

METHODS = ("ppo", "dpo", "sft")
CHAMPION, CHALLENGER = "champion", "challenger"


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
    clips_per_prompt: int = 2
    duration_s: float = 6.0
    target_votes: int = 2
    """Votes wanted for each pair that is trained on."""
    ab_votes: int = 2
    """Votes wanted for each comparison of champion and challenger."""
    ab_clips: int = 1
    """Clips of each for a held-out prompt."""
    min_decided: int = 20
    """Decided votes without which nobody is promoted."""
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
    kept: dict[str, Any] = read_json(out / "loop.json") if (out / "loop.json").is_file() else {}
    new = to_mapping(from_mapping(LoopConfig, {**kept, **said}))
    if other := [key for key, value in kept.items() if new[key] != value and key not in CHANGEABLE]:
        got = ", ".join(f"{key} {new[key]!r}" for key in other)
        expected = ", ".join(repr(kept[key]) for key in other)
        raise UserError(f"{got} for the loop in {out}", expected, "leave them out, or choose another --out")
    cfg = from_mapping(LoopConfig, new)
    if cfg.prompts is None or cfg.heldout is None:
        raise UserError(f"--prompts {cfg.prompts}, --heldout {cfg.heldout}", "both", "name two files of prompts, with none in common")
    if cfg.method not in METHODS:
        raise UserError(f"method {cfg.method!r}", f"one of {METHODS}", "pass another --method")
    if min(cfg.target_votes, cfg.ab_votes, cfg.ab_clips) < 1 or cfg.clips_per_prompt < 2:
        raise UserError("fewer than 2 clips a prompt, or no votes", "2 clips and 1 vote or more", "correct the settings")
    return cfg


class Loop:
    """The loop's folder and its rounds."""

    def __init__(self, cfg: LoopConfig, collecting: Collecting) -> None:
        self.cfg, self.out = cfg, cfg.out
        self.collecting = replace(collecting, accounts=cfg.out / "accounts.json")
        self.db = cfg.db or f"sqlite:///{(cfg.out / 'encore.db').resolve()}"
        assert cfg.prompts is not None
        assert cfg.heldout is not None
        self.prompts, self.heldout = read_prompts(cfg.prompts), read_prompts(cfg.heldout)
        if shared := {p.prompt for p in self.prompts} & {p.prompt for p in self.heldout}:
            got = f"{len(shared)} held-out prompts that are trained on, {sorted(shared)[0]!r}"
            raise UserError(got, "none", "take them out of one of the files")
        self._policy: Policy | None = None

    @property
    def policy(self) -> Policy:
        if self._policy is None:
            self._policy = load_policy(self.cfg.policy)
        return self._policy

    def run(self, rounds: int) -> dict[str, Any]:
        """Play until `rounds` rounds are done in all; returns the champion's record."""
        with only_one(self.out):
            write_json(self.out / "loop.json", to_mapping(self.cfg))
            if not (self.out / "champion.json").is_file():
                write_json(self.out / "champion.json", self._first_champion())
            for number in range(1, rounds + 1):
                folder = self.out / "rounds" / f"{number:02d}"
                if not stamp_path(folder, "verdict").is_file():
                    print(f"round {number} of {rounds}", flush=True)
                    run_stages(folder, Round(self, number, folder).stages())
        return self.champion()

    def champion(self) -> dict[str, Any]:
        record: dict[str, Any] = read_json(self.out / "champion.json")
        return record

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

    def put_up(self, name: str, sources: Sequence[tuple[str, Path]], target_votes: int) -> None:
        """Register clips for rating. The same call again adds nothing."""
        wanted = ["--target-votes", target_votes, "--min-listen-ms", self.cfg.min_listen_ms]
        named = [part for system, path in sources for part in ("--source", path, "--system", system)]
        every = ["--all-pairs"] if len(sources) == 1 else []
        run_python(["-m", "feedback_app.campaigns", "--db", self.db, "--name", name, *named, *wanted, *every])


class Round:
    """One round's folder and stages."""

    def __init__(self, loop: Loop, number: int, folder: Path) -> None:
        self.loop, self.cfg, self.number, self.folder = loop, loop.cfg, number, folder
        self.ab = f"{self.cfg.campaign}-ab-{number:02d}"

    def stages(self) -> list[Stage]:
        ppo = self.cfg.method == "ppo"  # the others learn from the votes themselves
        return [
            Stage("samples", "the champion plays what will be rated", 100, self.samples),
            Stage("votes", "votes on pairs of its clips", 60, self.votes),
            Stage("snapshot", "freezing the votes of all rounds", 1, self.snapshot),
            *([Stage("reward", "training the reward model", 30, self.reward)] if ppo else []),
            Stage("train", f"training the challenger by {self.cfg.method}", 200, self.train),
            Stage("ab_samples", "champion and challenger play held-out prompts", 60, self.ab_samples),
            Stage("ab_votes", "blind votes between the two", 60, self.ab_votes),
            Stage("verdict", "the verdict", 1, self.verdict),
        ]

    def samples(self) -> dict[str, Any]:
        champion = self.loop.champion()
        how = Settings(n=self.cfg.clips_per_prompt, seed=self.cfg.seed + 2 * self.number, duration_s=self.cfg.duration_s)
        system = f"round-{self.number:02d}"
        manifest = self.loop.play(champion["adapter"], self.loop.prompts, self.folder / "samples", how, system)
        self.loop.put_up(self.cfg.campaign, [(system, manifest)], self.cfg.target_votes)
        return {"adapter_sha256": champion["adapter_sha256"]}

    def votes(self) -> dict[str, Any]:
        return collect(self.loop.db, self.cfg.campaign, self.loop.collecting)

    def snapshot(self) -> dict[str, Any]:
        return freeze(self.loop.db, self.cfg.campaign, self.folder, "snapshot")

    def reward(self) -> None:
        common = ["--snapshot", self.folder / "snapshot", "--policy", self.cfg.policy, "--out", self.folder / "reward"]
        run_python([ROOT / "rlhf" / "train_reward.py", *common, *shlex.split(self.cfg.reward)])

    def train(self) -> dict[str, Any]:
        out = self.folder / "train"
        common = ["--policy", self.cfg.policy, "--out", out, "--licence", self.cfg.licence, "--seed", self.cfg.seed + self.number]
        if self.cfg.method == "ppo":
            frames = self.loop.policy.n_frames(self.cfg.duration_s)
            own = ["--reward", self.folder / "reward", "--prompts", self.cfg.prompts, "--n-frames", frames]
        else:
            own = ["--snapshot", self.folder / "snapshot"]
        script = ROOT / "rlhf" / f"train_{self.cfg.method}.py"
        run_python([script, *common, *own, *shlex.split(self.cfg.train), *resume_flag(out)])
        manifest = read_adapter(out / "adapter").manifest
        return {"adapter_sha256": manifest.adapter_sha256, "figures": manifest.figures}

    @property
    def challenger(self) -> str:
        return str(self.folder / "train" / "adapter")

    def ab_samples(self) -> dict[str, Any]:
        how = Settings(n=self.cfg.ab_clips, seed=self.cfg.seed + 2 * self.number + 1, duration_s=self.cfg.duration_s)
        both = []
        for system, adapter in ((CHAMPION, self.loop.champion()["adapter"]), (CHALLENGER, self.challenger)):
            name = f"{system}-{self.number:02d}"
            both.append((name, self.loop.play(adapter, self.loop.heldout, self.folder / system, how, name)))
        heard = [{row["sha256"] for row in read_jsonl(manifest)} for _, manifest in both]
        differ = len(heard[0] - heard[1])
        if differ:
            self.loop.put_up(self.ab, both, self.cfg.ab_votes)
        return {"clips_that_differ": differ}

    def ab_votes(self) -> dict[str, Any]:
        if not stamp(self.folder, "ab_samples")["clips_that_differ"]:
            return {"votes": 0, "wanted": 0}
        return collect(self.loop.db, self.ab, self.loop.collecting)

    def verdict(self) -> dict[str, Any]:
        """Compare, decide, record. The champion's file is replaced in one stroke, and a second call writes the same."""
        before = self.loop.champion()
        if before["round"] == self.number:
            return {"promoted": True, **before["votes"]}
        votes: dict[str, Any] = {"win_rate": None, "decided": 0, "why": "the challenger plays what the champion plays"}
        promoted = False
        if stamp(self.folder, "ab_votes")["votes"]:
            frozen = freeze(self.loop.db, self.ab, self.folder, "ab_snapshot")
            outcomes = read_outcomes(self.folder / "ab_snapshot", f"{CHALLENGER}-{self.number:02d}")
            promoted, votes = decide(outcomes, self.cfg.min_decided, self.cfg.seed)
            votes |= {"ab_snapshot_sha256": frozen["sha256"], "n_votes": frozen["n_votes"], "n_raters": frozen["n_raters"]}
        print(f"        {'promoted' if promoted else 'the champion stays'}: {votes['why']}", flush=True)
        if promoted:
            write_json(self.loop.out / "champion.json", self._promoted(before, votes))
        return {"promoted": promoted, **votes}

    def _promoted(self, before: dict[str, Any], votes: dict[str, Any]) -> dict[str, Any]:
        manifest = read_adapter(self.challenger).manifest
        return {
            "round": self.number,
            "adapter": self.challenger,
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


# ---- status ----------------------------------------------------------------------------------------------------------


def status(out: Path) -> list[str]:
    """What the loop has done and waits for, in lines."""
    if not (out / "loop.json").is_file():
        raise UserError(f"{out} without loop.json", "the folder of a loop", "check --out")
    cfg = from_mapping(LoopConfig, read_json(out / "loop.json"))
    loop = Loop(cfg, Collecting())
    lines = [f"loop in {out}: {cfg.method}, {len(loop.prompts)} prompts, {len(loop.heldout)} held out"]
    for folder in sorted((out / "rounds").glob("[0-9][0-9]")):
        made = Round(loop, int(folder.name), folder)
        done = [stage.name for stage in made.stages() if stamp_path(folder, stage.name).is_file()]
        if "verdict" in done:
            told = stamp(folder, "verdict")
            lines.append(f"  round {folder.name}: {'PROMOTED' if told['promoted'] else 'champion stays'}: {told['why']}")
            continue
        now = next(stage for stage in made.stages() if stage.name not in done)
        lines.append(f"  round {folder.name}: {len(done)} of {len(made.stages())} stages done; now: {now.what}")
        if now.name in ("votes", "ab_votes"):
            votes, wanted = counted(loop.db, cfg.campaign if now.name == "votes" else made.ab)
            lines.append(f"    {votes} of {wanted} votes are there")
    champion = loop.champion()
    lines.append(f"champion: {champion['adapter'] or 'the base'}, since round {champion['round']}")
    return lines


NAMES = tuple(field.name for field in fields(LoopConfig))

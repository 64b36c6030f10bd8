"""The proof as a graph of cells: what is trained on what, and who judges it.

    prompts -> samples of the base -> pairs that sound least alike -> votes through the app -> snapshot -> (first N, turned)
    -> reward -> PPO | DPO | best of n | SFT -> held-out prompts -> the taste judges in a process of its own

A replication (seed) has prompts, clips, votes, reward, training and held-out prompts of its own. The tastes of one seed vote on the same
clips. Prompts come from ranges that never meet: training 100 + seed, play 200 + seed, watch 300 + seed, held out 9000 + seed, familiar
400 + seed (the genre and mood pairs of training, in prompts that neither votes nor training have seen);
for choosing settings (`tuning`) 500, 600, 700 and 8000 + seed, and no held-out prompt is among those of `TUNED_ON`."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

from base_models.errors import UserError
from base_models.policy import PRETRAINED
from rlhf.proof.cells import HERE, PYTHON, Cell, place, portable
from rlhf.proof.plan import (
    ALONE,
    BEST,
    CONTROLLED,
    ROUNDS,
    SCOUT,
    SCRIPTS,
    SECONDS,
    STRENGTH,
    STRONG,
    Arguments,
    Outcome,
    Plan,
    RewardRow,
    Sizes,
    Trail,
    trainer_of,
)

TUNED_ON = (0, 1, *range(8000, 8006), 9003, 9004, *range(9006, 9009), 9010, 9012, 9013, 9015, 9016)
"""Seeds of held-out prompts on which settings have been compared, in the demo's time and by `tuning`."""


def serving(*judge: str) -> str:
    """The command of a taste, or a constant, as a judge in a process of its own."""
    return shlex.join((PYTHON, "-m", "rlhf.simulation.serve", *judge))  # quoted: the interpreter's path may hold a space


def program(name: str) -> tuple[str, ...]:
    """A script by its path, or a module by its dotted name."""
    return (PYTHON, name) if name.endswith(".py") else (PYTHON, "-m", name)


@dataclass(frozen=True)
class Builder:
    """Cells by what they are. Equal calls give equal cells, which are done once."""

    sizes: Sizes
    arguments: Arguments
    policy: Path = PRETRAINED
    tuning: bool = False
    tokens: Path | None = None

    def settings(self, *arguments: Sequence[str]) -> str:
        """A short name of what training was told and of how much there was of everything, but for votes, which every table names."""
        counted = {k: v for k, v in asdict(self.sizes).items() if k not in ("votes", "weak_votes", "shuffles")}
        told = [counted, portable(self.policy), self.arguments.crew, *arguments]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]

    @property
    def on_policy(self) -> tuple[str, str]:
        return "--policy", portable(self.policy)

    # ---- clips and votes -----------------------------------------------------------------------------------------------

    def prompts(self, kind: str, seed: int) -> Cell:
        first, split, n = {
            "train": (500 if self.tuning else 100, "train", self.sizes.train_prompts),
            "play": (600 if self.tuning else 200, "train", self.sizes.play_prompts),
            "watch": (700 if self.tuning else 300, "train", self.sizes.watch_prompts),
            "familiar": (800 if self.tuning else 400, "train", self.sizes.heldout_prompts),
            "heldout": (8000 if self.tuning else 9000, "heldout", self.sizes.heldout_prompts),
            "trail": (8000 if self.tuning else 9000, "heldout", self.sizes.trail_prompts),
        }[kind]
        named = ("--n", str(n), "--split", split, "--seed", str(first + seed), "--name", f"{kind}{seed}", "--out", f"{HERE}/prompts.jsonl")
        avoid = ("--avoid", *map(str, TUNED_ON)) if split == "heldout" and not self.tuning else ()
        needs = tuple(self.prompts(other, seed) for other in ("train", "play", "watch")) if kind == "familiar" else ()
        unlike = ("--unlike", *(place(other, "prompts.jsonl") for other in needs)) if needs else ()
        return Cell(f"prompts/{kind}/s{seed}", (*program("rlhf.proof.prompts"), *named, *avoid, *unlike), needs, weight=6)

    def samples(self, seed: int) -> Cell:
        return self.sampled(f"samples/s{seed}", seed, seed, ("--system", "base"))

    def sampled(self, label: str, seed: int, clip_seed: int, system: tuple[str, ...], *needs: Cell) -> Cell:
        prompts = self.prompts("train", seed)
        given = (*self.on_policy, "--prompts", place(prompts, "prompts.jsonl"), "-n", str(self.sizes.clips))
        to = (*system, "--out", f"{HERE}/samples")
        how = ("--seed", str(clip_seed + 50 * self.tuning), "--duration", str(self.sizes.duration_s), *to)
        return Cell(label, (*program("rlhf.cli"), "sample", *given, *how), (prompts, *needs), weight=240)

    def pairs(self, samples: Cell) -> Cell:
        """Of `samples`, those of each prompt that sound least alike."""
        given = (*self.on_policy, "--manifest", place(samples, "samples", "manifest.jsonl"), "--out", f"{HERE}/pairs.jsonl")
        argv = (*program("rlhf.proof.pairs"), *given, "--pairs-per-prompt", str(self.sizes.pairs))
        return Cell(samples.label.replace("samples/", "pairs/", 1), argv, (samples,), weight=40)

    def votes(self, taste: str, seed: int) -> Cell:
        return self.voted(f"votes/{taste}/s{seed}", taste, seed, self.samples(seed))

    def voted(self, label: str, taste: str, seed: int, samples: Cell) -> Cell:
        pairs = self.pairs(samples)
        shown = ("--manifest", place(samples, "samples", "manifest.jsonl"), "--pairs", place(pairs, "pairs.jsonl"))
        given = (*shown, "--out", HERE)
        size = ("--raters", str(self.sizes.raters), "--target-votes", str(self.sizes.target_votes))
        vote = ("--", "--taste", taste, "--seed", str(seed), *self.arguments.crew)
        return Cell(label, (*program("rlhf.proof.collect"), *given, *size, *vote), (samples, pairs), weight=110)

    def snapshot(self, taste: str, seed: int, votes: int, turn: str = "none", turn_seed: int = 0) -> Cell:
        label = f"snapshot/{taste}/s{seed}/n{votes}" + ("" if turn == "none" else f"-{turn}{turn_seed}")
        how = ("--turn", turn, "--seed", str(seed if turn == "none" else turn_seed))
        return self.derived(label, self.votes(taste, seed), votes, how)

    def derived(self, label: str, parent: Cell, votes: int, how: tuple[str, ...]) -> Cell:
        given = ("--snapshot", place(parent, "snapshot"), "--out", f"{HERE}/snapshot", "--votes", str(votes))
        return Cell(label, (*program("rlhf.proof.snapshots"), *given, *how), (parent,), weight=3)

    def snapshot_of_rounds(self, taste: str, seed: int, votes: int) -> Cell:
        """Half of the votes about clips of the base, and half about clips of an adapter that was trained on the first half."""
        first = votes // 2
        asked = self.snapshot(taste, seed, first)
        scout = self.trained(SCOUT, asked, self.reward(asked), seed)
        at = f"{taste}/s{seed}/after-n{first}"
        system = ("--adapter", place(scout, "run", "adapter"), "--system", "scout")
        clips = self.sampled(f"samples/{at}", seed, 20_000 + seed, system, scout)
        again = self.derived(f"snapshot/{at}", self.voted(f"votes/{at}", taste, seed, clips), votes - first, ("--seed", str(seed)))
        both = ("--snapshot", place(asked, "snapshot"), "--also", place(again, "snapshot"), "--out", f"{HERE}/snapshot")
        return Cell(f"snapshot/{taste}/s{seed}/n{votes}{ROUNDS}", (*program("rlhf.proof.snapshots"), *both), (asked, again), weight=3)

    # ---- training --------------------------------------------------------------------------------------------------------

    def reward(self, snapshot: Cell, weak: bool = False) -> Cell:
        given = ("--snapshot", place(snapshot, "snapshot"), *self.on_policy, "--out", f"{HERE}/reward")
        more = self.arguments.weak_reward if weak else self.arguments.reward
        label = snapshot.label.replace("snapshot/", "weak/" if weak else "reward/", 1)
        return Cell(label, (*program("rlhf/train_reward.py"), *given, *more), (snapshot,), weight=55)

    def trained(self, method: str, snapshot: Cell, reward: Cell, seed: int, more: Sequence[str] | None = None, arm: str = "") -> Cell:
        """The run of a training script; its adapter is <cell>/run/adapter."""
        own = tuple(getattr(self.arguments, method) if more is None else more)
        script = SCRIPTS[method]
        prompts = self.prompts("play", seed)
        given: tuple[str, ...] = (*self.on_policy, "--out", f"{HERE}/run", "--licence", "Apache-2.0", "--seed", str(seed))
        needs: tuple[Cell, ...] = ()
        if self.arguments.trained_on[method] in ("votes", "both"):
            given, needs = (*given, "--snapshot", place(snapshot, "snapshot")), (*needs, snapshot)
        if self.arguments.trained_on[method] in ("reward", "both"):
            judge = ("--reward", place(reward, "reward"), "--prompts", place(prompts, "prompts.jsonl"))
            given, needs = (*given, *judge), (*needs, reward, prompts)
            if script != "sft":
                given = (*given, "--n-frames", str(self.sizes.n_frames))
        if script == "ppo":
            watch = self.prompts("watch", seed)
            given, needs = (*given, "--heldout-prompts", place(watch, "prompts.jsonl")), (*needs, watch)
        label = snapshot.label.replace("snapshot/", f"{arm or method}/", 1)
        argv = (*program(f"rlhf/train_{script}.py"), *given, *own)
        return Cell(label, argv, needs, resume=("--resume",), weight=SECONDS[method])

    def outside(self, judge: Sequence[str], label: str, seed: int, more: Sequence[str], watched: bool, weight: float) -> Cell:
        """PPO whose reward is a program. watched: at held-out prompts too, without which nothing can be held."""
        prompts, watch = self.prompts("play", seed), self.prompts("watch", seed)
        given = (*self.on_policy, "--out", f"{HERE}/run", "--licence", "Apache-2.0", "--seed", str(seed))
        judged = ("--score-command", serving(*judge), "--prompts", place(prompts, "prompts.jsonl"))
        how = ("--n-frames", str(self.sizes.n_frames), *more, "--credit", "score")  # a program has no slope
        looks = ("--heldout-prompts", place(watch, "prompts.jsonl")) if watched else ()
        script = (*program("rlhf/train_ppo.py"), *given, *judged, *looks, *how)
        return Cell(label, script, (prompts, watch) if watched else (prompts,), resume=("--resume",), weight=weight)

    def kept(self, arm: str, snapshot: Cell, reward: Cell, seed: int, more: Sequence[str]) -> Cell:
        """PPO of which every checkpoint's adapter is kept, in <cell>/kept."""
        plain = self.trained("ppo", snapshot, reward, seed, more, f"trail-{arm}")
        keeping = (*program("rlhf.proof.keep"), "--run", f"{HERE}/run", "--kept", f"{HERE}/kept", "--", *plain.argv[1:])
        return Cell(plain.label, keeping, plain.needs, plain.resume, weight=600)

    # ---- what came of it ----------------------------------------------------------------------------------------------

    def probe(self, seed: int) -> Cell:
        samples = self.samples(seed)
        argv = (*program("rlhf.proof.play"), "--out", HERE, "--fit-probe", place(samples, "samples", "manifest.jsonl"))
        return Cell(f"probe/s{seed}", argv, (samples,), weight=25)

    def known(self) -> Cell:
        how = (*self.on_policy, "--n", str(self.sizes.known_clips), "--duration", str(self.sizes.duration_s), "--out", HERE)
        return Cell("known", (*program("rlhf.proof.known"), *how), weight=40)

    def how_to_play(self, seed: int, kind: str = "heldout") -> tuple[tuple[str, ...], tuple[Cell, ...]]:
        prompts, probe, samples, known = self.prompts(kind, seed), self.probe(seed), self.samples(seed), self.known()
        n = 1 if kind == "trail" else self.sizes.heldout_clips
        how = (
            *self.on_policy, "--prompts", place(prompts, "prompts.jsonl"), "-n", str(n), "--seed", str(10_000 + seed),
            "--duration", str(self.sizes.duration_s), "--probe", place(probe, "probe.npz"), "--real-probe", place(known, "probe.npz"),
            "--rated", place(samples, "samples", "manifest.jsonl"), *(("--tokens", portable(self.tokens)) if self.tokens else ()),
        )  # fmt: skip
        return how, (prompts, probe, samples, known)

    def base(self, seed: int, kind: str = "heldout") -> Cell:
        how, needs = self.how_to_play(seed, kind)
        return Cell(f"base/{kind}/s{seed}", (*program("rlhf.proof.play"), "--out", HERE, *how), needs, weight=43)

    def played(self, run: Cell, method: str, seed: int, proxy: Cell | None, kind: str = "heldout") -> Cell:
        """Clips of a run's adapter, or, for a method that says so, at another weight, or the best of several by all that it was trained
        for."""
        how, needs = self.how_to_play(seed, kind)
        base = self.base(seed, kind)
        given = ("--system", method, "--adapter", place(run, "run", "adapter"), "--out", HERE, "--beside", place(base))
        more = ("--proxy", place(proxy, "reward")) if proxy else ()
        label, weight, needs = run.label, 75, (*needs, run, base, *((proxy,) if proxy else ()))
        if method.endswith(BEST):
            assert proxy is not None
            more = (*more, "--best-of", str(self.sizes.adapted_best_of), "--reward", place(proxy, "reward"))
            weight = 200
        elif method.endswith(STRONG):
            more = (*more, "--weight", str(STRENGTH))
        if method.endswith((BEST, STRONG)):
            label = f"{method}/{label.partition('/')[2]}"
        label = label if kind == "heldout" else f"{kind}/{label}"
        return Cell(f"play/{label}", (*program("rlhf.proof.play"), *given, *more, *how), needs, weight=weight)

    def best_of_n(self, reward: Cell, seed: int) -> Cell:
        judged = ("--reward", place(reward, "reward"), "--proxy", place(reward, "reward"))
        return self.best_by(judged, f"play/{reward.label.replace('reward/', 'best_of_n/', 1)}", seed, reward)

    def best_by_gold(self, taste: str, seed: int) -> Cell:
        """The best of n as the taste itself would choose: what a perfect reward would bring without training."""
        return self.best_by(("--score-command", serving("--taste", taste)), f"play/gold-best_of_n/{taste}/s{seed}", seed)

    def best_by(self, judged: Sequence[str], label: str, seed: int, *judges: Cell) -> Cell:
        """The best of n as play's flags `judged` choose; judges: the cells that these name."""
        how, needs = self.how_to_play(seed)
        base = self.base(seed)
        given = ("--system", "best_of_n", "--out", HERE, "--beside", place(base), "--best-of", str(self.sizes.best_of))
        return Cell(label, (*program("rlhf.proof.play"), *given, *judged, *how), (*needs, *judges, base), weight=300)

    def gold(self, played: Cell, base: Cell, taste: str) -> Cell:
        manifests = [part for cell in (base, played) for part in ("--manifest", place(cell, "samples", "manifest.jsonl"))]
        argv = (*program("rlhf.simulation.judge"), *manifests, "--taste", taste, "--out", f"{HERE}/gold.json")
        return Cell(played.label.replace("play/", "gold/", 1), argv, (played, base), weight=6)

    def unseen(self, played: Cell, base: Cell, seed: int, others: Sequence[int]) -> tuple[Cell, ...]:
        """Whether an adapter's clips come nearer to what it has seen than to what it has not: a cell for each other seed, whose rated clips
        it has not, and one for the corpus. No name hangs on which other seeds a call has."""

        def clips(**cells: Cell) -> tuple[str, ...]:
            return tuple(part for name, cell in cells.items() for part in (f"--{name}", place(cell, "samples", "manifest.jsonl")))

        argv, label = (*program("rlhf.proof.unseen"), "--out", HERE), played.label.replace("play/", "unseen/", 1)
        argv, own, cells = (*argv, *clips(played=played, base=base)), self.samples(seed), []
        for other in others:
            unseen = self.samples(other)
            cells.append(Cell(f"{label}/by-s{other}", (*argv, *clips(own=own, unseen=unseen)), (played, base, own, unseen), weight=12))
        if self.tokens:
            cells.append(Cell(f"{label}/corpus", (*argv, "--tokens", portable(self.tokens)), (played, base), weight=15))
        return tuple(cells)

    def trail(self, run: Cell, reward: Cell, taste: str, seed: int) -> Cell:
        how, needs = self.how_to_play(seed, "trail")
        base = self.base(seed, "trail")
        given = ("--kept", place(run, "kept"), "--base", place(base), "--taste", taste, "--out", HERE)
        argv = (*program("rlhf.proof.trail"), *given, "--", "--proxy", place(reward, "reward"), *how)
        return Cell(f"judged/{run.label}", argv, (*needs, run, reward, base), weight=170)

    # ---- experiments --------------------------------------------------------------------------------------------------

    def outcome(
        self,
        experiment: str,
        method: str,
        taste: str,
        seed: int,
        votes: int,
        turn: str = "none",
        turn_seed: int = 0,
        more: tuple[str, ...] = (),
        kind: str = "heldout",
        others: Sequence[int] | None = None,
    ) -> Outcome:
        """A method on the first `votes` votes. turn: none, half of each prompt's pairs (turn_seed says which half), or all; training has
        the replication's seed in every draw. more: than the method's own settings, for PPO and DPO. kind: of the prompts that
        an adapter plays. others: seeds whose rated clips it has not seen, to compare its near copies with; None compares nothing."""
        rounds = method.endswith(ROUNDS)
        snapshot = self.snapshot_of_rounds(taste, seed, votes) if rounds else self.snapshot(taste, seed, votes, turn, turn_seed)
        reward = self.reward(snapshot)
        if method == "best_of_n":
            played = self.best_of_n(reward, seed)
        else:
            trainer = trainer_of(method)
            own = (*getattr(self.arguments, trainer), *more)
            run = self.trained(trainer, snapshot, reward, seed, own, f"{experiment}-{trainer}" if more else "")
            played = self.played(run, method, seed, reward, kind)
        base, adapted = self.base(seed, kind), method != "best_of_n"
        settings = self.settings(self.arguments.reward, own if adapted else (), *self.scouted(rounds))
        unseen = self.unseen(played, base, seed, others) if adapted and others is not None else ()
        return Outcome(experiment, method, taste, seed, votes, played, base, self.gold(played, base, taste), settings, turn_seed, unseen)

    def scouted(self, rounds: bool) -> tuple[tuple[str, ...], ...]:
        """What settings hang on besides, where votes come in two rounds."""
        return (getattr(self.arguments, SCOUT),) if rounds else ()

    def reward_rows(self, taste: str, seed: int, votes: int, methods: Sequence[str]) -> list[RewardRow]:
        """The rewards that `methods` learn from: of votes that came at once, of votes in two rounds, or both."""
        rows = []
        for rounds in sorted({method.endswith(ROUNDS) for method in methods}):
            snapshot = self.snapshot_of_rounds(taste, seed, votes) if rounds else self.snapshot(taste, seed, votes)
            settings = self.settings(self.arguments.reward, *self.scouted(rounds))
            rows.append(RewardRow(taste, seed, votes, self.reward(snapshot), settings, ROUNDS if rounds else None))
        return rows

    def main_table(self, plan: Plan, tastes: Sequence[str], seeds: Sequence[int], methods: Sequence[str]) -> None:
        for seed in seeds:
            others = sorted({*seeds} - {seed})
            for taste in tastes:
                plan.rewards += self.reward_rows(taste, seed, self.sizes.votes, methods)
                plan.outcomes += [self.outcome("main", method, taste, seed, self.sizes.votes, others=others) for method in methods]

    def familiar(self, plan: Plan, tastes: Sequence[str], seeds: Sequence[int], methods: Sequence[str]) -> None:
        """The main table's adapters on new prompts of the genre and mood pairs that they were trained on."""
        adapted = [method for method in methods if method != "best_of_n"]
        votes = self.sizes.votes
        for seed in seeds:
            others = sorted({*seeds} - {seed})
            for taste in tastes:
                plan.outcomes += [self.outcome("familiar", m, taste, seed, votes, kind="familiar", others=others) for m in adapted]

    def curve(self, plan: Plan, taste: str, seed: int, methods: Sequence[str], votes: Sequence[int]) -> None:
        for n in votes:
            plan.rewards += self.reward_rows(taste, seed, n, methods)
            plan.outcomes += [self.outcome("curve", method, taste, seed, n) for method in methods]

    def over_optimisation(self, plan: Plan, taste: str, seed: int) -> None:
        snapshot = self.snapshot(taste, seed, self.sizes.weak_votes)
        weak, given = self.reward(snapshot, weak=True), self.arguments
        arms = (("free", weak, given.free), ("stopped", weak, given.stopped), ("braked", self.reward(snapshot), given.braked))
        for arm, reward, more in arms:
            run = self.kept(arm, snapshot, reward, seed, more)
            trail = self.trail(run, reward, taste, seed)
            settings = self.settings(self.arguments.reward if arm == "braked" else self.arguments.weak_reward, more)
            plan.trails.append(Trail(arm, taste, seed, self.sizes.weak_votes, trail, settings))

    def controls(self, plan: Plan, which: Sequence[str], taste: str, seed: int, methods: Sequence[str]) -> None:
        """Each control by the methods that have it. Raises UserError where none of `methods` has one of them."""
        if not any(method in CONTROLLED[name] for name in which for method in methods):
            known = "; ".join(f"{name} by {', '.join(CONTROLLED[name])}" for name in which)
            got = f"--controls {','.join(which)} with --methods {','.join(methods)}"
            raise UserError(got, known, "name a method that has such a control, or leave the controls out")
        votes, draws = self.sizes.votes, range(1, self.sizes.shuffles + 1)
        for name in which:
            having = [method for method in methods if method in CONTROLLED[name]]
            if name == "reversed":
                plan.outcomes += [self.outcome("reversed", method, taste, seed, votes, "all") for method in having]
            elif name == "shuffled":
                plan.outcomes += [self.outcome("shuffled", method, taste, seed, votes, "half", n) for n, method in product(draws, having)]
            elif name == "listeners":
                plan.outcomes += [self.outcome(name, method, taste, seed, votes, "half", n, ALONE) for n, method in product(draws, having)]
            elif name == "constant":
                plan.outcomes += [self.ppo_outside(name, method, ("--constant", "0"), taste, seed, ALONE) for method in having]
            elif name == "gold":
                by_ppo = [method for method in having if method != "best_of_n"]
                plan.outcomes += [self.ppo_outside(name, method, ("--taste", taste), taste, seed) for method in by_ppo]
                if "best_of_n" in having:
                    played, base = self.best_by_gold(taste, seed), self.base(seed)
                    plan.outcomes.append(
                        Outcome(name, "best_of_n", taste, seed, None, played, base, self.gold(played, base, taste), self.settings())
                    )

    def ppo_outside(self, name: str, method: str, judge: Sequence[str], taste: str, seed: int, more: tuple[str, ...] = ()) -> Outcome:
        """PPO, with the settings of `method` and more, on what a program says, watched and held where the program is a taste."""
        own = (*getattr(self.arguments, method), *more)
        arm = f"outside-{name}" if method == "ppo" else f"outside-{name}-{method}"
        trained = self.outside(judge, f"{arm}/{taste}/s{seed}", seed, own, watched=name == "gold", weight=SECONDS[method])
        played, base = self.played(trained, method, seed, None), self.base(seed)
        return Outcome(name, method, taste, seed, None, played, base, self.gold(played, base, taste), self.settings(own))

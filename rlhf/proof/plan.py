"""What the proof asks and what a result is: methods, sizes, what each training script is told, and the rows of its tables.

Sizes, Arguments -> rlhf.proof.builder -> Plan of outcomes, trails and rewards, each of which names the cells that hold its figures"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rlhf.proof.cells import Cell, Kept

METHODS = (
    "ppo", "ppo_strong", "ppo_best", "ppo_rounds", "ppo_score",
    "dpo", "dpo_strong", "dpo_best", "dpo_rounds", "dpo_rated",
    "best_of_n", "sft",
)  # fmt: skip
SCRIPTS = {"ppo": "ppo", "ppo_score": "ppo", "dpo": "dpo", "dpo_rated": "dpo", "sft": "sft"}
"""Run -> which rlhf/train_*.py makes it. Two runs of one script differ by what it is told: ppo_score gets a number a clip and has a critic,
dpo_rated learns from the rated pairs and from nothing else."""
BEST = "_best"
"""Ending of a method that plays several clips of an adapter and keeps the best by what it was trained for (rlhf.objective)."""
STRONG, STRENGTH = "_strong", 1.2
"""Ending of a method that plays an adapter at this weight instead of 1, as `encore generate --weight` does."""
ROUNDS, SCOUT = "_rounds", "ppo"
"""Ending of a method whose votes are asked for in two rounds, as `encore loop` asks: half are about clips of the base, and half about those
of the adapter that SCOUT trained on the first half. The reward learns from all of them, and the adapter begins anew."""
SECONDS = {"ppo": 390, "ppo_score": 1100, "dpo": 500, "dpo_rated": 800, "sft": 200}
"""What training takes of one core, roughly; finished cells tell better."""
ALONE = ("--weights", "human=1", "--hold", "")
"""Nothing but the listeners' part is trained on."""
CONTROLLED = {
    "shuffled": ("ppo", "ppo_score", "dpo", "dpo_rated"),
    "listeners": ("ppo", "ppo_score", "dpo"),
    "reversed": ("ppo", "ppo_score", "dpo", "dpo_rated"),
    "constant": ("ppo", "ppo_score"),
    "gold": ("ppo", "ppo_score", "best_of_n"),
}
"""Control -> the methods that have it. DPO on rated pairs has no checks of the prompt that `listeners` could leave out. A program has no
slope, and PPO alone can follow it."""


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    train_prompts: int = 252
    clips: int = 8
    pairs: int = 8
    """Of each prompt that listeners are asked about: those that sound least alike (rlhf.apart)."""
    raters: int = 16
    target_votes: int = 2
    votes: int = 2000
    """Votes of the main table and of the controls; some 4,000 are collected (252 prompts of 8 pairs, 2 votes each)."""
    play_prompts: int = 480
    watch_prompts: int = 48
    """By which PPO's brake watches the run; training prompts too, since nobody may look at held-out ones."""
    heldout_prompts: int = 144
    heldout_clips: int = 2
    trail_prompts: int = 96
    duration_s: float = 4.0
    best_of: int = 8
    """Clips of the base for each that is kept."""
    adapted_best_of: int = 4
    """Clips of an adapter for each that is kept."""
    weak_votes: int = 50
    shuffles: int = 3
    known_clips: int = 600
    """Renderings of real melodies that the second judge of genre is fitted on."""

    @property
    def n_frames(self) -> int:
        """At 25 frames a second, which the shipped codec has."""
        return round(self.duration_s * 25)


SMALL = Sizes(
    train_prompts=24, clips=3, pairs=3, raters=6, target_votes=1, votes=60, play_prompts=12, watch_prompts=6, heldout_prompts=12,
    trail_prompts=12, duration_s=1.0, best_of=2, adapted_best_of=2, weak_votes=40, shuffles=2, known_clips=60,
)  # fmt: skip
"""The same graph in minutes, to see that it runs. Its figures mean nothing."""


@dataclass(frozen=True)
class Arguments:
    """What is passed to each training script beside its parents; the benchmark names the values."""

    reward: tuple[str, ...] = ()
    weak_reward: tuple[str, ...] = ()
    ppo: tuple[str, ...] = ()
    ppo_score: tuple[str, ...] = ()
    dpo: tuple[str, ...] = ()
    dpo_rated: tuple[str, ...] = ()
    sft: tuple[str, ...] = ()
    free: tuple[str, ...] = ()
    """PPO with no price on KL and no brake."""
    braked: tuple[str, ...] = ()
    """The same with both, and with a cautious reward."""
    stopped: tuple[str, ...] = ()
    """The same with the brake alone, on the same reward."""
    crew: tuple[str, ...] = ()
    trained_on: Mapping[str, str] = field(
        default_factory=lambda: {"ppo": "reward", "ppo_score": "reward", "dpo": "both", "dpo_rated": "votes", "sft": "votes"}
    )
    """Run -> what it learns from: votes, reward (and prompts to play), or both."""


@dataclass(frozen=True)
class Outcome:
    """One row of a table: which cells hold its figures."""

    experiment: str
    method: str
    taste: str
    seed: int
    votes: int | None
    play: Kept
    base: Kept
    gold: Kept
    settings: str
    """Of all that trained it: results of other settings are never pooled with it."""
    draw: int = 0
    """Of shuffled votes."""
    unseen: tuple[Kept, ...] = ()
    """Near copies of clips that were seen beside those of clips that were not: one by each other seed, and one by the corpus."""


@dataclass(frozen=True)
class Trail:
    """One run whose checkpoints were all judged."""

    arm: str
    taste: str
    seed: int
    votes: int
    cell: Kept
    settings: str


@dataclass(frozen=True)
class RewardRow:
    """One reward model, for the table of accuracies."""

    taste: str
    seed: int
    votes: int
    cell: Kept
    settings: str
    method: str | None = None
    """ROUNDS where the votes came in two rounds; otherwise all methods share it."""


@dataclass
class Plan:
    outcomes: list[Outcome] = field(default_factory=list)
    trails: list[Trail] = field(default_factory=list)
    rewards: list[RewardRow] = field(default_factory=list)

    def results(self) -> list[Cell]:
        """The last cell of each row."""
        last = [o.gold for o in self.outcomes] + [r.cell for r in self.rewards] + [t.cell for t in self.trails]
        return [cell for cell in last if isinstance(cell, Cell)]

    def cells(self) -> list[Cell]:
        """All that is to be done; what stands early is done early. A row is shown without its `unseen` cells, so they come last."""
        return [*self.results(), *(cell for o in self.outcomes for cell in o.unseen if isinstance(cell, Cell))]


def trainer_of(method: str) -> str:
    """The training that a method plays the adapter of."""
    return method.removesuffix(BEST).removesuffix(STRONG).removesuffix(ROUNDS)

"""What a reward model must show before anybody trains on it, each with its number.

figures -> gates: name, number, what was asked, PASS | FAIL | not asked
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from base_models.checkpoint import read_json
from base_models.errors import UserError
from rlhf.metrics import decimals
from rlhf.reward_committee import Committee
from rlhf.reward_heads import EARNED, Head, Pairs

MIN_SHARE, SHARE_FROM = 0.8, 500
"""Of what the raters' ceiling leaves above chance, asked from so many pairs on."""
MAX_ECE = 0.05
OVERFIT_PAIRS, MIN_OVERFIT = 20, 0.95


class GateError(UserError):
    """A gate that was asked for with --strict; the exit code tells it from bad input."""

    exit_code = 1


@dataclass(frozen=True)
class Gate:
    """One demand."""

    name: str
    value: float | None
    asked: str
    passed: bool | None
    """None: it was not asked of so few votes."""
    places: int = 3
    """Decimals by which the number is told: as many as tell it from what was asked."""

    @property
    def told(self) -> str:
        return "unknown" if self.value is None else f"{self.value:.{self.places}f}"

    @property
    def line(self) -> str:
        verdict = {True: "PASS", False: "FAIL", None: "n/a "}[self.passed]
        return f"{verdict}  {self.name}: {self.told} (asked: {self.asked})"


def gates(figures: Mapping[str, Any]) -> list[Gate]:
    """All gates, from the figures of train_reward.

    A ceiling that nobody can tell fails where it is asked for: a share of the unknown cannot be shown. A calibration error is asked to be
    no larger than chance makes it of so few votes, where that is more than MAX_ECE.
    """
    share = share_of_ceiling(figures)
    enough = figures["n_pairs"] >= SHARE_FROM
    low, beats = figures["ci"][0], figures["above_baseline"]["ci"][0]
    most_ece = max(MAX_ECE, figures.get("ece_by_chance", 0.0))
    of_ece = decimals(figures["ece"], most_ece)
    return [
        Gate("accuracy, lower end of its interval", low, "above .5", low > 0.5, decimals(low, 0.5)),
        Gate(
            "share of the ceiling above chance", share, f"{MIN_SHARE} from {SHARE_FROM} pairs on; here {figures['n_pairs']}",
            (share is not None and share >= MIN_SHARE) if enough else None, decimals(share, MIN_SHARE),
        ),
        Gate("calibration error", figures["ece"], f"at most {most_ece:.{of_ece}f}", figures["ece"] <= most_ece, of_ece),
        Gate("accuracy above loudness and length, lower end", beats, "above 0", beats > 0, decimals(beats, 0)),
        Gate(
            f"accuracy on {OVERFIT_PAIRS} pairs it was fitted on", figures["overfit"], f"{MIN_OVERFIT} or more",
            figures["overfit"] >= MIN_OVERFIT, decimals(figures["overfit"], MIN_OVERFIT),
        ),
    ]  # fmt: skip


def share_of_ceiling(figures: Mapping[str, Any]) -> float | None:
    """(accuracy - 1/2) / (ceiling - 1/2); None where the raters agree no more than by chance, or nobody can tell."""
    ceiling = figures["ceiling"]
    return None if ceiling is None or ceiling <= 0.5 else float((figures["accuracy"] - 0.5) / (ceiling - 0.5))


def doubt(reward: Path | None) -> str | None:
    """A line for whoever trains on a reward model that foretells held-out votes no better than chance; else None, as without a reward."""
    if reward is None:
        return None
    if not (reward / "figures.json").is_file():
        return f"{reward} without figures.json: nobody can tell whether votes bear it out"
    figures = read_json(reward / "figures.json")
    of = figures.get("reward_sha256")  # which figures of earlier versions do not say
    if of is not None and (reward / "manifest.json").is_file() and of != read_json(reward / "manifest.json").get("reward_sha256"):
        return f"{reward} with the figures.json of another reward model: nobody can tell whether votes bear it out; train it again"
    (low, high), t = figures["ci"], figures.get("evidence")
    if t is not None and t < EARNED**0.5:
        return (
            f"{reward} has learnt nothing that held-out votes bear out ({t:.1f} standard errors): its scores differ by next "
            "to nothing; collect more votes"
        )
    if low > 0.5:
        return None
    return (
        f"{reward} foretells held-out votes no better than chance ([{low:.3f}, {high:.3f}] holds .5): little or nothing can be "
        "learnt from it; collect more votes"
    )


def missed(asked: Sequence[Gate]) -> tuple[str, str] | None:
    """What the gates that failed got, and what they asked; None where none failed."""
    failed = [gate for gate in asked if gate.passed is False]
    got = "; ".join(f"{gate.name} {gate.told}" for gate in failed)
    return (got, "; ".join(gate.asked for gate in failed)) if failed else None


def demand(asked: Sequence[Gate]) -> None:
    """Raises: GateError naming what failed."""
    if (short := missed(asked)) is not None:
        raise GateError(*short, "collect more votes, or look at figures.json; the model was written all the same")


def as_json(asked: Sequence[Gate]) -> list[dict[str, Any]]:
    return [asdict(gate) for gate in asked]


def drawn(pairs: Pairs, seed: int) -> Pairs:
    """OVERFIT_PAIRS decided pairs (or all, if there are fewer), each weighing alike."""
    decided = (pairs.p != 0.5).nonzero()[:, 0]
    few = pairs.index(decided[torch.randperm(len(decided), generator=torch.Generator().manual_seed(seed))[:OVERFIT_PAIRS]])
    return few.reweighted(torch.ones(len(few)))


def overfit(committee: Committee, inputs: Mapping[Head, Tensor], pairs: Pairs, seed: int) -> float:
    """Accuracy on 20 decided pairs of heads fitted on these alone, their priors ten times as wide: whether they can learn at all.

    What cannot tell apart what it was told sees no difference between the clips, or sees the wrong clips.
    """
    few = drawn(pairs, seed)
    wide = {replace(head, prior=10 * head.prior): inputs[head] for head in committee.heads}
    score = Committee(tuple(wide)).scores(wide, few)
    margin = score[few.chosen] - score[few.rejected]
    return float(((margin > 0).double() + 0.5 * (margin == 0)).mean())

"""What a reward model is said to be: its figures by votes on prompts it has not met, and the lines that `train_reward` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from rlhf import metrics, raters, reward_gates
from rlhf.preferences import TIE, Preference, Snapshot, both_bad
from rlhf.reward_committee import Committee, read_committee
from rlhf.reward_folds import Clips, Folds, ordering


def judgement(
    snapshot: Snapshot,
    truth: Sequence[Preference],
    clips: Clips,
    folds: Folds,
    scores: Tensor,
    baseline: Tensor,
    stranger: Tensor | None,
    seed: int,
) -> dict[str, Any]:
    """How far unseen margins agree with single votes, with intervals by prompt, the raters' ceiling and what was left out.

    Args: scores, baseline [n_folds, N]. stranger: margins of the votes that order, by fits that have met neither prompt nor rater.
    """
    ordered = ordering(snapshot.votes)
    votes = [vote for vote in ordered if vote.choice != TIE]
    single, prompts = clips.single(votes), [vote.prompt_id for vote in votes]
    by_vote, plain = (folds.margins(rows, single).numpy() for rows in (scores, baseline))
    accuracy = metrics.accuracy(by_vote, prompts, seed=seed)
    above = metrics.mean_ci(_right(by_vote) - _right(plain), prompts, seed=seed)
    pairs = clips.pairs(truth)
    majority = folds.margins(scores, pairs).numpy()
    agreed = raters.agreement(snapshot.votes, seed=seed)
    choices = Counter(vote.choice for vote in snapshot.votes)
    decided_rows = [row for row, vote in enumerate(ordered) if vote.choice != TIE]
    return {
        "accuracy": accuracy.value,
        "ci": list(accuracy.ci),
        "n": accuracy.n,
        "n_prompts": accuracy.n_clusters,
        "ceiling": None if agreed is None else agreed.ceiling,
        "ceiling_ci": None if agreed is None else list(agreed.ci),
        "agreement": None if agreed is None else agreed.rate,
        "accuracy_majority": metrics.accuracy(majority, [p.prompt_id for p in truth], pairs.p.numpy(), seed).as_json(),
        "accuracy_unseen_raters": None
        if stranger is None
        else metrics.accuracy(stranger[decided_rows].numpy(), prompts, seed=seed).as_json(),
        "baseline": metrics.accuracy(plain, prompts, seed=seed).as_json(),
        "above_baseline": above.as_json(),
        "n_votes": len(snapshot.votes),
        "n_pairs": len(truth),
        "n_ties": choices[TIE],
        "n_both_bad": len(both_bad(snapshot)),
        "n_excluded": dict(snapshot.n_excluded),
        "n_artists": clips.n_artists,
    }


def _right(margin: np.ndarray) -> np.ndarray:
    return np.where(margin == 0, 0.5, (margin > 0).astype(float))


def name(committee: Committee) -> str:
    kinds = Counter(head.kind for head in committee.heads)
    return f"{', '.join(f'{n} {kind}' for kind, n in kinds.items())} on {' + '.join(committee.blocks)}"


def report(figures: dict[str, Any]) -> str:
    """What the script prints."""
    low, high = figures["ci"]
    ceiling, stranger = figures["ceiling"], figures["accuracy_unseen_raters"]
    best = "unknown: no pair has two votes" if ceiling is None else f"{ceiling:.3f} (raters agree in {figures['agreement']:.3f})"
    new = "unknown" if stranger is None else "{:.3f} [{:.3f}, {:.3f}]".format(stranger["value"], *stranger["ci"])
    excluded = ", ".join(f"{n} {reason}" for reason, n in figures["n_excluded"].items()) or "none"
    lines = [
        f"votes      {figures['n_votes']} on {figures['n_pairs']} pairs of {figures['n_prompts']} prompts; "
        f"{figures['n_ties']} ties, {figures['n_both_bad']} both bad; excluded: {excluded}",
        f"accuracy   {figures['accuracy']:.3f} [{low:.3f}, {high:.3f}] of {figures['n']} single votes on unseen prompts",
        f"strangers  {new} on unseen prompts by unseen raters",
        f"ceiling    {best}",
        f"baseline   {figures['baseline']['value']:.3f} by loudness and length alone",
        f"calibrated {figures['ece']:.3f} expected calibration error at temperature {figures['temperature']:.2f}{_of_evidence(figures)}",
        f"heads      {name(read_committee(figures['heads']))}, over {figures['features']} features; their scores are averaged",
        _of_raters(figures),
        *(_of_extra(name, told) for name, told in figures["extras"].items()),
    ]
    if figures["trunk"] is not None:
        lines.append(_of_trunk(figures["trunk"]))
    frames = figures["frames"]
    if frames["n"]:
        told = (
            "too few"
            if frames["auc"] is None
            else "a marked frame is told from others in {:.3f} [{:.3f}, {:.3f}]".format(frames["auc"], *frames["ci"])
        )
        lines.append(f"marks      on {frames['n']} clips: {told}")
    return "\n".join([*lines, *(f"gate       {gate.line}" for gate in reward_gates.gates(figures))])


def _of_trunk(told: dict[str, Any]) -> str:
    tokens, frozen, gain = ("{value:.3f} [{ci[0]:.3f}, {ci[1]:.3f}]".format(**told[name]) for name in ("tokens", "frozen", "gain"))
    done = "kept" if told["kept"] and not told["forced"] else "kept, as --trunk tokens asks" if told["forced"] else "not used"
    return f"trunk      {tokens} by codec tokens, {frozen} by frozen features, {gain} between them: {done}"


def _of_evidence(figures: dict[str, Any]) -> str:
    t = figures["evidence"]
    return "" if t is None else f"; held-out votes follow it by {t:.1f} standard errors"


def _of_raters(figures: dict[str, Any]) -> str:
    people = figures["raters"]
    little = [rater for rater, told in people.items() if 0 <= told["weight"] < 0.25]
    against = [rater for rater, told in people.items() if told["adversary"] or told.get("against_the_music")]
    done = {"silence": "silenced", "invert": "turned round"}[figures["adversaries"]]
    acted_on = [rater for rater in against if people[rater]["weight"] <= 0]
    others = [rater for rater in against if people[rater]["weight"] > 0]
    counted = f"; answer against the others or the music, and count: {', '.join(others)}" if others else ""
    losses = ", ".join(f"{option} {loss:.4f}" for option, loss in figures["weights_loss"].items())
    return (
        f"raters     {len(people)}, weighed by {figures['weights_by']} (held-out loss: {losses}); "
        f"hardly count: {', '.join(little) or '-'}; adversaries, {done}: {', '.join(acted_on) or '-'}{counted}"
    )


def _of_extra(name: str, told: dict[str, Any]) -> str:
    if "auc" in told:
        value = "too few" if told["auc"] is None else f"ranked below other votes in {told['auc']:.3f} on unseen prompts"
        return f"both bad   {told['n']} votes: {value}"
    value = "too few" if told["accuracy"] is None else "{:.3f} [{:.3f}, {:.3f}] on unseen prompts".format(told["accuracy"], *told["ci"])
    return f"aspect     {name}, {told['n']} decided pairs: {value}"

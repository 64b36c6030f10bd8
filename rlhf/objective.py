"""What an adapter was trained for, asked once more: every part of its reward, by the weights and the scales of the run that made it.

    manifest.objective {weights, scales: name -> (mean, sd)} + reward model + checks -> codes [B, K, T], prompts -> total [B]

The weights are those that the run was told, and not where held ones ended: what pressure it took to keep a policy at the base's level says
nothing of what a clip is worth (clips chosen so were more similar to their prompts, less varied and liked less: docs/proof-history.md).

A clip that is chosen by the listeners' part alone may well be chosen against its prompt: what listeners like goes, for some tastes, with
leaving the genre that was asked for. What the adapter was trained for holds both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from adapters.library import Manifest
from base_models.errors import UserError
from base_models.policy import Policy
from rlhf.consistency import HEARD, asked_of_ears, checks
from rlhf.ears import ears_of
from rlhf.judges import Judge
from rlhf.reward_model import RewardModel
from rlhf.rewards import HUMAN, LEAST_LOGITS, Reward, weighted


@dataclass(frozen=True)
class Objective:
    """A judge of single clips: codes [B, K, T] and their prompts -> sum over the parts of weight * z [B]. What a prompt does not ask for is
    as good as the base's mean, so that where it asks for nothing the first of several wins."""

    reward: Reward

    @property
    def weights(self) -> dict[str, float]:
        """What a spread of each part counts."""
        return {name: self.reward.now[name] for name in self.reward.trained}

    def __call__(self, codes: Tensor, prompts: list[str]) -> Tensor:
        return self.reward.weighed(self.reward.in_spreads(self.reward.marks(codes, prompts)), prompts)


def objective_of(
    policy: Policy, reward: RewardModel, manifests: Sequence[Manifest], weights: Mapping[str, float] | None = None
) -> Objective | None:
    """The objective of the adapter that `policy` carries, or None where there is none to be had: no adapter or several, one that keeps no
    objective or none for single clips, or one that another reward model trained.

    weights: instead of those that the run was told; any part that the run has measured and that judges a clip by itself. Of the run's own,
    parts that hold clips of one prompt against each other (diversity) are left out, and those of which it met no clip.
    Raises UserError where weights are given and there is nothing to weigh by, or one of a part without a scale or that compares clips; and
    where a part asks ears which are not those of the run.
    """
    if problem := _missing(reward, manifests):
        if weights is not None:
            raise UserError(problem, "an adapter that this reward model trained, for its scales", "leave out --choose-by")
        return None
    (manifest,) = manifests
    ears = ears_of(policy)
    found = checks(policy, ears) | reward.judges_of_extras()
    alone = {HUMAN} | {name for name, part in found.items() if not (isinstance(part, Judge) and part.compares)}
    scales = {name: scale for name, scale in manifest.objective["scales"].items() if name in alone}
    wanted = manifest.objective["weights"] if weights is None else weights
    unknown = sorted({name for name, weight in wanted.items() if weight} - set(scales))
    if unknown and weights is not None:
        measured = f"some of {', '.join(sorted(scales))}, which the run measured and which judge a clip by itself"
        remedy = "correct --choose-by, or train with --heldout-prompts, whose first look measures every part"
        raise UserError(f"weights of {', '.join(unknown)}", measured, remedy)
    single = {name: weight for name, weight in wanted.items() if weight and name in scales}
    if not single:
        return None
    known, now = manifest.figures.get("ears_sha256"), asked_of_ears(ears)
    if set(single) & set(HEARD) and known != now:
        raise UserError(
            f"adapter {manifest.name!r}, trained by ears {str(known)[:12]}",
            f"the ears in {policy.path}, {now[:12] if now else 'which has none'}",
            "use the policy's folder as it was, or choose by what asks no ears: --choose-by human=1",
        )
    whole = weighted(single, reward.judge, found, LEAST_LOGITS)
    whole.scales = {name: (float(mean), float(sd)) for name, (mean, sd) in scales.items()}
    return Objective(whole)


def _missing(reward: RewardModel, manifests: Sequence[Manifest]) -> str | None:
    """Why there is no objective, in words."""
    if len(manifests) != 1:
        return f"{len(manifests)} adapters"
    (manifest,) = manifests
    if not manifest.objective:
        return f"adapter {manifest.name!r}, whose manifest keeps no objective"
    if manifest.reward_sha256 != reward.sha256:
        return f"adapter {manifest.name!r} of reward model {str(manifest.reward_sha256)[:12]}, and reward model {reward.sha256[:12]}"
    return None

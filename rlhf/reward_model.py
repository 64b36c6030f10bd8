"""Codes -> how much the raters would like the clip: frozen features, small heads, an ensemble that knows what it does not know.

    codes [B, K, T] -> blocks of frozen features [B, F] -> standardise within prompts -> E committees of heads
                    -> (mean - lam * spread) / temperature [B]

A few hundred votes cannot teach a network to listen, so nothing that listens is trained here: what a head sees is frozen
(rlhf.reward_features), and what learns is small (rlhf.reward_heads): a few heads whose scores are averaged (rlhf.reward_committee).
Which features they hear is settled by held-out votes. Five committees see bootstraps of the prompts; where they disagree, lam makes
the score cautious, which keeps a policy from walking where no vote has been (Coste et al. 2024, arXiv:2310.02743).

Deliberately not here: the taste of any rater, or a waveform.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from base_models.checkpoint import load_tensors, read_json, save_tensors, tensors_sha256, write_json
from base_models.errors import UserError
from rlhf.frame_reward import FrameHead, frame_features, frame_tensors, read_frame_head
from rlhf.judges import Judge, Score, Slope, SlopeOf
from rlhf.reward_committee import Committee, read_committee
from rlhf.reward_features import Base, Heard, Table, blocks_of, features_heard, features_sha256
from rlhf.reward_heads import Lens, pessimistic
from rlhf.token_reward import TokenTrunk, TrunkShape

SETTINGS = ("heads", "lam", "temperature", "extras", "trunk")
"""What of a manifest a score depends on."""


@dataclass(frozen=True)
class Extra:
    """A second opinion over the same features: one aspect of the music, or whether a clip is acceptable at all."""

    members: Tensor
    """[E, P]"""
    offsets: Tensor
    """[E]: what a score of 0 stands for: the mean clip, or of `acceptable` the level that raters draw."""
    temperature: float


ACCEPTABLE = "acceptable"
"""The extra head of "both bad": log-odds that the better of two clips like this one is not called bad."""


class RewardModel:
    """An ensemble of committees of heads over a base's frozen features.

    score(codes, prompts) -> [B], in calibrated nats: sigmoid(score(a) - score(b)) is how probably a is preferred to b.
    spread(codes, prompts) -> [B]: how far the committees are apart, in the same unit. extra_scores: by aspect, and `acceptable`.
    per_frame(codes, prompts) -> [B, T]: where a clip is good and bad, where raters have marked clips.
    """

    def __init__(
        self,
        base: Base,
        committee: Committee,
        lenses: Sequence[Lens],
        members: Tensor,
        offsets: Tensor,
        lam: float,
        temperature: float,
    ) -> None:
        self.base, self.committee = base, committee
        self.lenses = tuple(lenses)
        """One a head of the committee."""
        self.members = members
        """[E, P]: the weights of all heads, side by side."""
        self.offsets = offsets
        """[E]: each committee's mean over the clips it was fitted on; scores are only defined up to a constant."""
        self.lam, self.temperature = lam, temperature
        self.snapshot_sha256: str | None = None
        """The votes it was fitted on."""
        self.extras: dict[str, Extra] = {}
        """Heads of aspects, and ACCEPTABLE, where votes told enough."""
        self.frames: FrameHead | None = None
        """rlhf.frame_reward.FrameHead, where raters marked enough."""
        self.trunk: TokenTrunk | None = None
        """Judges clips in place of the heads, where held-out votes said so; the heads of aspects and frames stay."""

    def member_scores(self, table: Table) -> Tensor:
        """Features, blocks [B, F] -> [E, B], each committee about 0 on the clips it was fitted on."""
        return self._centred(self.committee.expand(self.lenses, table))

    def _centred(self, inputs: Tensor) -> Tensor:
        """[B, P] -> [E, B]"""
        return self.members @ inputs.T - self.offsets[:, None]

    def score_features(self, table: Table) -> Tensor:
        """Features, blocks [B, F] -> (mean - lam * spread over the committees) / temperature [B]."""
        return pessimistic(self.member_scores(table), self.lam) / self.temperature

    @torch.no_grad()
    def score(self, codes: Tensor, prompts: Sequence[str]) -> Tensor:
        """codes [B, K, T] and their prompts -> score [B] on the codes' device."""
        return pessimistic(self._judged(codes, prompts), self.lam).to(codes.device) / self.temperature

    @property
    def judge(self) -> Score:
        """`score`, sharing what it hears with other judges of the base, where it hears (a trunk reads)."""
        return self.score if self.trunk is not None else Judge(self.base, self._score_heard)

    @property
    def judge_of_spread(self) -> Score:
        """`spread` likewise."""
        return self.spread if self.trunk is not None else Judge(self.base, lambda heard: self._spread_of(self._members_heard(heard)))

    def judges_of_extras(self) -> dict[str, Score]:
        """`extra_scores` likewise, by name."""
        return {name: Judge(self.base, partial(self._extra_heard, extra)) for name, extra in self.extras.items()}

    @property
    def has_slope(self) -> bool:
        """Whether the score follows from the codec's latents; a trunk knows codes by their number, not by their sound."""
        return self.trunk is None

    @property
    def has_spread(self) -> bool:
        """Whether there is more than one judge, so that they can disagree."""
        return (len(self.members) if self.trunk is None else len(self.trunk.names)) > 1

    def slope(self, codes: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """codes [B, K, T] and their prompts -> d score / d latents [B, D, T] and score [B]: where each frame should have moved.

        Raises: UserError for a reward that reads codec tokens.
        """
        if not self.has_slope:
            raise UserError("a reward that reads codec tokens", "one over what the codec plays", "train it with --trunk frozen")
        return self.judge_of_slope(codes, list(prompts))

    @property
    def judge_of_slope(self) -> Slope:
        """`slope`, sharing what it hears with other judges of the base."""
        return SlopeOf(Judge(self.base, self._score_heard))

    @torch.no_grad()
    def spread(self, codes: Tensor, prompts: Sequence[str]) -> Tensor:
        """codes [B, K, T] and their prompts -> standard deviation between the committees [B], in units of the score; 0 for a
        single one."""
        return self._spread_of(self._judged(codes, prompts)).to(codes.device)

    @torch.no_grad()
    def extra_scores(self, codes: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """codes [B, K, T] and their prompts -> aspect, or `acceptable` -> [B] in calibrated nats, without caution."""
        heard = Heard(self.base, prompts, codes=codes)
        return {name: self._extra_heard(extra, heard).to(codes.device) for name, extra in self.extras.items()}

    @torch.no_grad()
    def per_frame(self, codes: Tensor, prompts: Sequence[str]) -> Tensor:
        """codes [B, K, T] and their prompts -> [B, T] in nats: how good each frame is beside the rest of its clip; 0 on average.

        Raises: UserError when the votes it was fitted on had too few marks.
        """
        return self._frame_head(codes, prompts)(frame_features(self.base.codec, codes).cpu()).to(codes.device)

    def frame_slope(self, codes: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """codes [B, K, T] and their prompts -> where each frame should have moved for its stretch to sound better [B, D, T], and
        `per_frame` [B, T], with its error."""
        return self._frame_head(codes, prompts).slope(self.base.codec, codes)

    def _frame_head(self, codes: Tensor, prompts: Sequence[str]) -> FrameHead:
        if len(prompts) != len(codes):
            raise ValueError(f"{len(codes)} clips and {len(prompts)} prompts")
        if self.frames is None:
            got = "a reward model without a head for frames"
            raise UserError(got, "votes with stretches marked as bad", "ask raters to mark stretches, then train again")
        return self.frames

    def _judged(self, codes: Tensor, prompts: Sequence[str]) -> Tensor:
        """[E, B]: what each judge says, before the temperature."""
        if self.trunk is not None:
            return self.trunk.member_scores(codes, prompts)
        return self._members_heard(Heard(self.base, prompts, codes=codes))

    def _inputs(self, heard: Heard) -> Tensor:
        """[B, P]: what all heads are linear in."""

        def make() -> Tensor:
            table = features_heard(heard, self.committee.blocks)
            return self.committee.expand(self.lenses, {block: rows.cpu() for block, rows in table.items()})

        return heard.once(self, make)

    def _members_heard(self, heard: Heard) -> Tensor:
        return self._centred(self._inputs(heard))

    def _score_heard(self, heard: Heard) -> Tensor:
        return pessimistic(self._members_heard(heard), self.lam) / self.temperature

    def _extra_heard(self, extra: Extra, heard: Heard) -> Tensor:
        return (extra.members @ self._inputs(heard).T - extra.offsets[:, None]).mean(0) / extra.temperature

    def _spread_of(self, members: Tensor) -> Tensor:
        """[E, B] -> [B]"""
        members = members / self.temperature
        return members.std(0, correction=1) if len(members) > 1 else torch.zeros_like(members[0])

    def tensors(self) -> dict[str, Tensor]:
        state = {f"lens.{i}.{field.name}": getattr(lens, field.name) for i, lens in enumerate(self.lenses) for field in fields(lens)}
        for name, extra in self.extras.items():
            state |= {f"extra.{name}.members": extra.members, f"extra.{name}.offsets": extra.offsets}
        if self.trunk is not None:
            state |= {f"trunk.{name}": tensor for name, tensor in self.trunk.tensors().items()}
        return {**state, **frame_tensors(self.frames), "members": self.members, "offsets": self.offsets}

    def settings(self) -> dict[str, Any]:
        """What a score depends on beside the tensors, by the names of SETTINGS."""
        return {
            "heads": self.committee.as_json(),
            "lam": self.lam,
            "temperature": self.temperature,
            "extras": {name: extra.temperature for name, extra in self.extras.items()},
            "trunk": None if self.trunk is None else {"members": len(self.trunk.names), **asdict(self.trunk.shape)},
        }

    @property
    def sha256(self) -> str:
        return hash_of(self.settings(), tensors_sha256(self.tensors()))

    def save(self, folder: str | Path) -> None:
        """Write model.safetensors, then manifest.json with its hash: without a manifest that fits, nothing loads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(folder / "model.safetensors", self.tensors())
        manifest = {
            "kind": "reward",
            "base_sha256": self.base.sha256,
            "features_sha256": features_sha256(self.base),
            "snapshot_sha256": self.snapshot_sha256,
            "reward_sha256": self.sha256,
            **self.settings(),
        }
        write_json(folder / "manifest.json", manifest)


def hash_of(settings: Mapping[str, Any], weights_sha256: str) -> str:
    """Over all that a score depends on: the same heads at another temperature are another reward."""
    return hashlib.sha256(f"{json.dumps(settings, sort_keys=True)}|{weights_sha256}".encode()).hexdigest()


def load_reward(folder: str | Path, base: Base) -> RewardModel:
    """Read a reward model onto the base whose clips it was trained on.

    Raises: UserError when the folder is not one, was changed, or belongs to another base.
    """
    folder = Path(folder)
    manifest = read_json(folder / "manifest.json")
    if manifest.get("kind") != "reward":
        raise UserError(f"{folder} of kind {manifest.get('kind')!r}", "a reward model", "train one with rlhf/train_reward.py")
    if manifest["base_sha256"] != base.sha256:
        raise UserError(
            f"a reward model of base {manifest['base_sha256'][:12]}",
            f"one of base {base.sha256[:12]}",
            "train a reward model on votes about this base's clips",
        )
    if "heads" not in manifest:
        raise UserError(
            f"{folder}, a reward model with one head, of an earlier version", "one with `heads`", "train it again on its snapshot"
        )
    if manifest["features_sha256"] != features_sha256(base):
        raise UserError(
            "a reward model over another audio-text space",
            "the one it was trained on",
            "restore the policy's contrastive/ folder",
        )
    state = load_tensors(folder / "model.safetensors")
    weights_sha256 = tensors_sha256(state)
    if weights_sha256 == manifest["reward_sha256"]:
        raise UserError(
            f"{folder}, a reward model of an earlier version", "one whose hash covers its temperature", "train it again on its snapshot"
        )
    if hash_of({name: manifest.get(name) for name in SETTINGS}, weights_sha256) != manifest["reward_sha256"]:
        raise UserError(f"{folder}, which was changed", f"hash {manifest['reward_sha256'][:12]}", "train or copy it again")
    committee = read_committee(manifest["heads"])
    lenses = [Lens(**{field.name: state[f"lens.{i}.{field.name}"] for field in fields(Lens)}) for i in range(len(committee.heads))]
    if unknown := sorted(set(committee.blocks) - set(blocks_of(base))):
        raise UserError(f"a reward model over {', '.join(unknown)}", f"some of {', '.join(blocks_of(base))}", "train it again")
    model = RewardModel(base, committee, lenses, state["members"], state["offsets"], manifest["lam"], manifest["temperature"])
    model.snapshot_sha256 = manifest["snapshot_sha256"]
    for name, temperature in manifest.get("extras", {}).items():
        model.extras[name] = Extra(state[f"extra.{name}.members"], state[f"extra.{name}.offsets"], temperature)
    model.frames = read_frame_head(state)
    if (told := manifest.get("trunk")) is not None:
        speaker: Any = base
        shape = TrunkShape(told["layers"], told["r"], told["alpha"])
        model.trunk = TokenTrunk(speaker, shape, told["members"], seed=0)
        model.trunk.fill({name.removeprefix("trunk."): tensor for name, tensor in state.items() if name.startswith("trunk.")})
    return model

"""The benchmark of committees: folds judge what they have not seen, and every candidate is told."""

from __future__ import annotations

import math

import pytest

from base_models.errors import UserError
from benchmarks.reward_committee import ONE, SEVERAL, Config, compare, main
from rlhf.preferences import load_snapshot
from rlhf.reward_committee import committees
from rlhf.reward_features import DESCRIPTORS, LATENTS
from rlhf.reward_heads import candidates
from rlhf.reward_toy import toy_base, write_toy_snapshot

BLOCKS = (LATENTS, DESCRIPTORS)


def test_heads_and_committees_are_told_beside_what_folds_would_choose(tmp_path) -> None:
    base = toy_base(0)
    write_toy_snapshot(tmp_path / "snapshot", base.sha256, 0)
    told = compare(base, load_snapshot(tmp_path / "snapshot", base.sha256), n_folds=3, blocks=BLOCKS)
    assert {ONE, SEVERAL} <= set(told)
    assert len(told) == len(candidates(BLOCKS)) + len(committees(BLOCKS)) + 2
    assert min(told.values()) < 0.95 * math.log(2)  # the toy's raters like what its clips differ in
    alone = [loss for asked, loss in told.items() if ", prior " in asked]
    assert len(alone) == len(candidates(BLOCKS))
    assert told[ONE] < max(alone)  # folds do not choose the worst
    assert told[SEVERAL] < max(alone)
    with pytest.raises(UserError, match="no --snapshot"):
        main(Config())

"""How fine-tuning batches what it learns."""

from __future__ import annotations

import torch

from rlhf.sft_run import by_length
from rlhf.sft_task import Winner


def test_clips_of_several_lengths_are_never_padded():
    winners = [Winner(torch.zeros(2, length, dtype=torch.long), 0, str(i), 1.0) for i, length in enumerate([5, 9, 5, 5, 9])]
    groups = by_length(winners, 2)
    assert [len({w.codes.shape for w in group}) for group in groups] == [1] * len(groups)
    assert sorted(w.prompt_id for group in groups for w in group) == list("01234")
    assert max(len(group) for group in groups) == 2

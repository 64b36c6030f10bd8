"""A PPO run that is taken up again: what it must find, and what it has kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapters.library import read_adapter
from base_models.errors import UserError
from rlhf import rewards
from rlhf.ppo_task import toy_task
from rlhf.train_ppo import main
from tests.rlhf.ppo_toys import CODES, collapsing, config, largest_difference, weights


def test_resuming_with_another_base_is_refused(tmp_path: Path) -> None:
    main(config(tmp_path, steps=1))
    with pytest.raises(UserError, match="base_sha256"):
        main(config(tmp_path, resume=True), toy_task(1))


def test_a_used_folder_is_refused_without_resume(tmp_path: Path) -> None:
    main(config(tmp_path, steps=1))
    with pytest.raises(UserError, match="--resume"):
        main(config(tmp_path, steps=2))


def test_a_braked_run_that_is_resumed_ends_at_once_with_the_same_adapter(tmp_path: Path) -> None:
    figures = main(collapsing(tmp_path, brake="rewind"))
    before = weights(tmp_path)
    again = main(collapsing(tmp_path, brake="rewind", resume=True))
    assert largest_difference(weights(tmp_path), before) == 0
    assert (again["stopped"], again["rewound_to"], again["kl"]) == (figures["stopped"], figures["rewound_to"], figures["kl"])


def test_a_resumed_run_takes_held_weights_up_again(tmp_path: Path) -> None:
    settings = {"weights": "human=1,movement=0.02", "hold": "movement", "steps": 4, "save_every": 2, "look_every": 1}
    main(config(tmp_path / "whole", **settings))
    main(config(tmp_path / "parts", **settings, max_minutes=1e-9))
    main(config(tmp_path / "parts", **settings, resume=True))
    assert largest_difference(weights(tmp_path / "whole"), weights(tmp_path / "parts")) == 0


def test_a_resumed_run_takes_up_the_weights_of_every_kind_of_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rewards.KINDS, "movement", lambda prompt: "even" if int(prompt[-1]) % 2 == 0 else "odd")
    settings = {"weights": "human=1,movement=0.02", "hold": "movement", "steps": 4, "save_every": 2, "look_every": 1, **CODES}
    settings |= {"credit": "score", "average": 0.5}
    main(config(tmp_path / "whole", **settings))
    main(config(tmp_path / "parts", **settings, max_minutes=1e-9))
    main(config(tmp_path / "parts", **settings, resume=True))
    assert largest_difference(weights(tmp_path / "whole"), weights(tmp_path / "parts")) == 0
    now = [read_adapter(tmp_path / name / "adapter").manifest.objective["now"] for name in ("whole", "parts")]
    assert now[0] == now[1]
    assert {"movement/even", "movement/odd"} < now[0].keys()
    assert len(set(now[0].values())) == 4  # human, all, even, odd

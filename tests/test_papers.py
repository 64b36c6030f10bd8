"""docs/papers.md tells the defaults that the scripts have: a value that was changed in one place only is found here."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from base_models import train_lm
from base_models.lm import MusicLMConfig
from rlhf import train_dpo, train_ppo, train_reward, train_sft

PAGE = Path(__file__).resolve().parents[1] / "docs" / "papers.md"
SETTINGS: dict[str, tuple[Any, ...]] = {
    "Codes and the language model": (train_lm.Config, MusicLMConfig),
    "Votes and reward": (train_reward.Config,),
    "DPO": (train_dpo.Config,),
    "PPO": (train_ppo.Config,),
    "Best of n and fine-tuning on winners": (train_sft.Config,),
    "Adapters": (train_ppo.Config, train_dpo.Config, train_sft.Config),
}
"""Section -> whose settings it tells."""
DEMANDED = {
    "Votes and reward": {"members", "lam", "folds"},
    "DPO": {"beta", "lr", "batch_size", "epochs", "rounds", "pairing", "round_clips", "edit_price", "sft_weight", "gamma"},
    "PPO": {"lr", "critic_lr", "batch_size", "epochs", "minibatches", "vf_coef", "max_grad_norm", "kl_coef", "kl_budget", "cliprange"}
    | {"cliprange_value", "lam", "gamma", "credit", "baseline", "max_disagreement", "min_diversity"},
    "Best of n and fine-tuning on winners": {"lr", "epochs", "batch_size", "best_of"},
    "Adapters": {"r", "alpha"},
}
"""What must have a row."""


def rows(section: str) -> list[tuple[list[str], str]]:
    """(names in backticks of the first column, value) of each row of a section's table."""
    text = PAGE.read_text(encoding="utf-8").split(f"\n## {section}\n")[1].split("\n## ")[0]
    cells = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")][2:]
    return [(re.findall(r"`([^`]+)`", first), value.strip()) for first, value, *_ in cells]


def defaults(section: str) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for config in SETTINGS[section]:
        for field in dataclasses.fields(config):
            found.setdefault(field.name, []).append(field.default)
    return found


def told(section: str) -> dict[str, str]:
    """Setting -> what the page tells of it. Several names of one row have as many values, told apart by commas or crosses."""
    known, found = defaults(section), {}
    for names, value in rows(section):
        if not any(name in known for name in names):
            continue
        named = [name for name in names if not name.startswith("--")]
        values = re.split(r", | x ", value) if len(named) > 1 else [value]
        assert len(values) >= len(named), (names, value)
        found |= {name: text for name, text in zip(named, values) if name in known}
    return found


def says(text: str, default: Any) -> bool:
    """Whether a text begins with this value: .5 for 0.5, off for False."""
    if isinstance(default, bool):
        return text.startswith("on" if default else "off")
    if isinstance(default, int | float):
        number = re.match(r"-?[\d.]+(e-?\d+)?", text)
        return number is not None and float(number[0]) == default
    return re.match(rf"{re.escape(str(default))}\b", text) is not None


@pytest.mark.parametrize("section", SETTINGS)
def test_the_values_on_the_page_are_the_defaults(section):
    known = defaults(section)
    wrong = {name: (text, known[name]) for name, text in told(section).items() if not any(says(text, value) for value in known[name])}
    assert wrong == {}


@pytest.mark.parametrize(
    ("section", "ending", "preset", "least"),
    [
        ("DPO", " in rounds", train_dpo.PRESETS["rounds"], {"lr", "batch_size"}),
        ("PPO", " by votes", train_ppo.PRESETS["votes"], {"average", "kl_power"}),
    ],
)
def test_what_the_page_tells_of_a_preset_is_the_presets(section, ending, preset, least):
    of_it = {name: text.split("; ")[1] for name, text in told(section).items() if text.endswith(ending)}
    assert least <= of_it.keys()
    wrong = {name: text for name, text in of_it.items() if not says(text, preset[name])}
    assert wrong == {}


@pytest.mark.parametrize("section", DEMANDED)
def test_the_defaults_of_which_one_would_ask_have_a_row(section):
    assert DEMANDED[section] - told(section).keys() == set()


def test_a_wrong_value_would_be_found():
    assert says(".2; .1 later", 0.2)
    assert not says(".25", 0.2)
    assert says("edits, both ways", "edits")
    assert not says("all", "edits")
    assert says("off; on for some", False)

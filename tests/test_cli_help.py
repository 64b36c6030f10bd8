"""Every option of every program of ours says in --help what it means and what it is without it; every alias means what it meant."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import re
from collections.abc import Iterator

import pytest
import tyro

from base_models.corpus.build import build_corpus
from base_models.settings import attribute_docstrings, parse
from feedback_app import app, campaigns, owners
from rlhf import cli

PARSERS = {"encore": cli._parser, "encore owners": owners._parser, "app": app._parser, "campaigns": campaigns._parser}
SCRIPTS = ("train_ppo", "train_dpo", "train_grpo", "train_sft", "train_reward", "train_ears")


def actions(parser: argparse.ArgumentParser, path: str) -> Iterator[tuple[str, argparse.ArgumentParser, argparse.Action]]:
    """(what it is called, its parser, itself) of each option and positional, of sub-commands too."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield from actions(inner, f"{path} {name}")
        elif not isinstance(action, argparse._HelpAction):
            yield f"{path} {'/'.join(action.option_strings) or action.dest}", parser, action


def faults(parser: argparse.ArgumentParser, path: str) -> list[str]:
    """What lacks help, and what has a default that its help does not tell."""
    found = []
    for name, inner, action in actions(parser, path):
        told = inner._get_formatter()._expand_help(action) if action.help else ""
        if not told.strip():
            found.append(f"{name}: no help")
        silent = action.default is None or action.default is False or action.default in ((), [], "")
        if told and not silent and not re.search(rf"default:? {re.escape(str(action.default))}|{action.default} \(default\)", told):
            found.append(f"{name}: default {action.default} is not told")
    return found


@pytest.mark.parametrize("name", PARSERS)
def test_every_option_has_help_that_tells_its_default(name: str) -> None:
    parser = PARSERS[name]()
    assert len(list(actions(parser, name))) > 5
    assert faults(parser, name) == []


def test_an_option_without_help_and_a_default_that_is_not_told_are_found() -> None:
    parser = argparse.ArgumentParser()
    inner = parser.add_subparsers().add_parser("go")
    inner.add_argument("place")
    inner.add_argument("--seed", type=int, default=0, help="of the clips")
    inner.add_argument("--port", type=int, default=7860, help="default %(default)s")
    assert faults(parser, "x") == ["x go place: no help", "x go --seed: default 0 is not told"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_setting_of_a_script_has_help_and_every_preset_a_line(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    script = importlib.import_module(f"rlhf.{name}")
    fields = {field.name for field in dataclasses.fields(script.Config)}
    assert fields - attribute_docstrings(script.Config).keys() == set()
    say, groups = getattr(script, "PRESETS_SAY", {}), getattr(script, "GROUPS", {})
    assert not say or say.keys() == script.PRESETS.keys()
    with pytest.raises(SystemExit) as ended:
        parse(script.Config, script.PRESETS, ["--help"], say=say, groups=groups)
    assert ended.value.code == 0
    told = capsys.readouterr().out
    for option in ("preset", "config", *fields):
        assert f"--{option.replace('_', '-')}" in told
    assert all(f"{preset}: " in told for preset in script.PRESETS)
    assert all(f" {title} options " in told for title in groups)


@pytest.mark.parametrize("name", ["train_ppo", "train_dpo"])
def test_grouped_settings_are_filled_as_before(name: str) -> None:
    script = importlib.import_module(f"rlhf.{name}")
    argv = ["--preset", "smoke", "--lr", "0.5", "--base-looks", "3", "--no-toy", "--reward", "there"]
    grouped = parse(script.Config, script.PRESETS, argv, say=script.PRESETS_SAY, groups=script.GROUPS)
    assert grouped == parse(script.Config, script.PRESETS, argv)
    assert (grouped.lr, grouped.base_looks, grouped.toy, str(grouped.reward)) == (0.5, 3, False, "there")


def test_what_only_credit_by_score_uses_says_so() -> None:
    told = attribute_docstrings(importlib.import_module("rlhf.train_ppo").Config)
    only = {name for name, text in told.items() if "Only --credit score uses it." in text}
    assert only == {"gamma", "lam", "critic_lr", "vf_coef", "cliprange_value"}


def test_the_corpus_builder_tells_each_of_its_options(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        tyro.cli(build_corpus, args=["--help"])
    told = capsys.readouterr().out
    assert all(words in told for words in ("Clips over all splits", "Seconds a clip", "8000 to 48000 Hz", "Processes that render"))


@pytest.mark.parametrize(
    ("old", "new"),
    [("--reward=--strict", "--reward-args=--strict"), ("--train=-x", "--train-args=-x"), ("--raters=go", "--rater-command=go")],
)
def test_the_loops_old_names_mean_what_their_new_ones_do(old: str, new: str) -> None:
    parser = cli._parser()
    assert parser.parse_args(["loop", old]) == parser.parse_args(["loop", new]) != parser.parse_args(["loop"])

"""DPO over the flat policy: starts at log 2, learns, resumes, and runs as a file, alone and on two processes."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import get_scheduler

from adapters.library import read_adapter
from base_models.errors import UserError
from rlhf import dpo_task, train_dpo
from rlhf.dpo_arguments import training_arguments
from rlhf.dpo_task import toy_task
from rlhf.flat_dpo import smoothed
from rlhf.losses import dpo_loss
from rlhf.preferences import content_sha256
from rlhf.train_dpo import PRESETS, Config
from tests.rlhf.two_processes import launch
from tests.rlhf.vote_toys import ToyPolicy, write_snapshot


def config(out: Path, **changes: object) -> Config:
    return dataclasses.replace(Config(**PRESETS["smoke"]), out=out, **changes)  # type: ignore[arg-type]


def metrics(out: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "dpo/loss" in row]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, object], Path]:
    """One whole smoke run in float32 in this process."""
    out = tmp_path_factory.mktemp("dpo") / "run"
    return train_dpo.main(config(out, precision="fp32", save_every=10)), out


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """The smoke preset as a file from another folder, on two gloo processes."""
    folder = tmp_path_factory.mktemp("launched")
    flags = ("--preset", "smoke", "--out", "run", "--precision", "fp32", "--batch-size", "4", "--steps", "20")
    return launch(folder, "train_dpo.py", *flags), folder / "run"


def test_the_first_loss_is_log_2(run):
    _, out = run
    first = metrics(out)[0]
    assert first["dpo/loss_hard_labels"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["dpo/kl_reference_to_policy"] == 0.0


def test_in_bfloat16_the_first_loss_is_log_2_too(tmp_path):
    train_dpo.main(config(tmp_path / "run", precision="bf16", steps=1, kl_clips=0))
    assert metrics(tmp_path / "run")[0]["dpo/loss_hard_labels"] == pytest.approx(math.log(2), abs=1e-7)


def test_preference_accuracy_rises_on_trained_and_held_out_pairs(run):
    figures, out = run
    rows = metrics(out)
    assert rows[0]["dpo/accuracy_decided"] == 0.0
    assert rows[-1]["dpo/accuracy_decided"] > 0.9
    assert rows[-1]["dpo/loss_hard_labels"] < 0.6
    assert figures["held_out_accuracy"] == 1.0
    assert rows[-1]["logps/chosen"] - rows[0]["logps/chosen"] > rows[-1]["logps/rejected"] - rows[0]["logps/rejected"]


@pytest.mark.parametrize(("lr_end", "last"), [(0.0, 0.0), (0.3, 0.3), (1.0, 1.0)])
def test_the_rate_ends_at_its_share_of_the_peak(lr_end, last):
    args = training_arguments(config(Path("nowhere"), lr_end=lr_end), 80)
    steps = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    schedule = get_scheduler(args.lr_scheduler_type, steps, args.warmup_steps, 30, args.lr_scheduler_kwargs)
    rates = []
    for _ in range(30):
        steps.step()
        schedule.step()
        rates.append(schedule.get_last_lr()[0])
    assert max(rates) == pytest.approx(args.learning_rate)
    assert rates[-1] == pytest.approx(last * args.learning_rate, abs=1e-9)
    with pytest.raises(UserError, match=r"--lr-end 1\.5"):
        train_dpo.check(config(Path("nowhere"), lr_end=1.5))


def test_kl_of_played_clips_is_positive_after_learning(run):
    figures, _ = run
    assert 0.05 < figures["kl_nats_per_clip"] < 50


def test_the_adapter_folder_names_its_base_and_settings(run):
    figures, out = run
    adapter = read_adapter(out / "adapter")
    assert adapter.manifest.base_sha256 == toy_task(Config()).base_sha256
    assert adapter.manifest.method == "dpo"
    assert adapter.manifest.figures == figures
    assert adapter.manifest.config == json.loads((out / "config.json").read_text())
    assert adapter.lora.r == 4
    assert max(float(adapter.lora.delta(m).abs().max()) for m in adapter.lora.modules) > 1e-3


def test_nothing_in_the_run_folder_is_a_pickle(run):
    _, out = run
    suffixes = {p.suffix for p in out.rglob("*") if p.is_file() and "tfevents" not in p.name}
    assert suffixes == {".json", ".jsonl", ".safetensors", ".md", ".wav", ".png"}
    assert any(out.glob("tensorboard/*tfevents*"))


def test_speed_kl_by_codebook_and_clips_are_told(run):
    figures, out = run
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = metrics(out)
    assert all(row["seconds_learn"] > 0 for row in steps)
    assert steps[0]["tokens_per_second"] * steps[0]["seconds_learn"] == pytest.approx(8 * 2 * (4 * 12 + 1))  # a clip's codes and its prompt
    (kl,) = [row for row in rows if "kl" in row]
    assert kl["kl"] == pytest.approx(figures["kl_nats_per_clip"], abs=1e-4)
    assert kl["kl"] == pytest.approx(sum(kl[f"kl_book_{k}"] for k in range(4)), abs=1e-6)
    clips = out / "clips" / "step_00000030"
    assert sorted(p.name for p in clips.iterdir()) == [f"{i}-toy-prompt-{i}.{kind}" for i in range(2) for kind in ("png", "wav")]
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert {"kl_book_3", "dpo/loss", "tokens_per_second"} <= set(events.Tags()["scalars"])
    assert events.Tags()["audio"] == events.Tags()["images"] == ["0-toy-prompt-0", "1-toy-prompt-1"]


def test_a_resumed_run_ends_bitwise_where_the_unbroken_one_does(run, tmp_path):
    _, out = run
    broken = tmp_path / "run"
    train_dpo.main(config(broken, precision="fp32", save_every=10))
    shutil.rmtree(broken / "checkpoints" / "step_00000030")
    shutil.rmtree(broken / "adapter")
    train_dpo.main(config(broken, precision="fp32", save_every=10, resume=True))
    steps = [row["step"] for row in metrics(broken)]
    assert steps == list(range(1, 31))
    assert metrics(broken)[-1]["dpo/loss"] == metrics(out)[-1]["dpo/loss"]
    one, two = read_adapter(out / "adapter").lora.tensors, read_adapter(broken / "adapter").lora.tensors
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_finished_run_learns_nothing_more_when_it_is_resumed(run, tmp_path):
    """Killed between its last checkpoint and its adapter; 30 steps end within a pass, where the trainer would take another."""
    figures, out = run
    shutil.copytree(out, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    again = train_dpo.main(config(tmp_path / "run", precision="fp32", save_every=10, resume=True))
    one, two = read_adapter(out / "adapter").lora.tensors, read_adapter(tmp_path / "run" / "adapter").lora.tensors
    assert all(torch.equal(one[name], two[name]) for name in one)
    timeless = {name for name in figures if "seconds" not in name}
    assert {name: again[name] for name in timeless} == {name: figures[name] for name in timeless}
    assert len(metrics(tmp_path / "run")) == 30


def test_another_run_is_not_overwritten_and_not_resumed_with_other_votes(run):
    _, out = run
    with pytest.raises(UserError, match="another run"):
        train_dpo.main(config(out))
    with pytest.raises(UserError, match="ordered_pairs_sha256"):
        train_dpo.main(config(out, resume=True, ties="drop"))
    with pytest.raises(UserError, match=r"of lr 0\.005, now 0\.1"):  # else the scheduler's state would overrule it without a word
        train_dpo.main(config(out, resume=True, lr=0.1))


def test_held_out_figures_are_of_all_pairs_however_they_fall_into_batches(tmp_path, monkeypatch):
    told = []
    for n in (3, 100):
        monkeypatch.setattr(
            train_dpo,
            "training_arguments",
            lambda cfg, rows, n=n: dataclasses.replace(training_arguments(cfg, rows), per_device_eval_batch_size=n),
        )
        told.append(train_dpo.main(config(tmp_path / str(n), precision="fp32", steps=12, kl_clips=0, held_out=0.4)))
    assert told[0]["pairs_held_out"] % 3  # the last batch is a smaller one
    for name in ("held_out_accuracy", "held_out_margin", "held_out_loss"):
        assert told[0][name] == pytest.approx(told[1][name], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"label_smoothing": 0.9}, "--label-smoothing 0.9"),
        ({"label_smoothing": 0.1, "loss": "kto"}, "--label-smoothing 0.1 with --loss kto"),
        ({"labels": "soft", "weights": "human=1,similarity=0.3"}, "--labels soft with --weights human=1,similarity=0.3"),
        ({"labels": "soft", "weights": "human=2"}, "--labels soft with --weights human=2"),
    ],
)
def test_labels_that_would_say_something_else_are_refused(tmp_path, changes, said):
    with pytest.raises(UserError, match=re.escape(said)):
        train_dpo.check(config(tmp_path, **changes))


def softly(out: Path, p: float, steps: int, **changes: float) -> list[dict[str, float]]:
    """What a run tells whose pairs all have the label p."""
    task = toy_task(Config())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_dpo, "toy_task", lambda _: dataclasses.replace(task, pairs=[dataclasses.replace(x, p=p) for x in task.pairs]))
        train_dpo.main(config(out, precision="fp32", steps=steps, kl_clips=0, batch_size=1, warmup_steps=0, **changes))
    return metrics(out)


def test_ties_alone_have_no_gradient_at_log_2(tmp_path):
    """With hard labels there would be one."""
    rows = softly(tmp_path / "run", 0.5, 4)
    assert rows[-1]["dpo/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(rows[-1]["rewards/margins"]) < 1e-6
    assert rows[0]["grad_norm"] < 1e-6
    assert softly(tmp_path / "likelihood", 0.5, 1, sft_weight=5.0)[0]["grad_norm"] < 1e-6  # neither clip of a tie becomes likelier


def test_soft_labels_give_the_loss_of_our_own_formula(tmp_path):
    """p = .75, a pair a step: -p log sigmoid(m) - (1 - p) log sigmoid(-m) at the margin m that is told, which grows to its least point
    log 3 and not beyond; the first gradient is half of that of a hard label."""
    rows = softly(tmp_path / "soft", 0.75, 60)
    for row in rows:
        margin = torch.tensor([row["rewards/margins"] / Config().beta])
        want = dpo_loss(margin, *(torch.zeros(1) for _ in range(3)), Config().beta, torch.tensor([0.75]))[0]
        assert row["dpo/loss"] == pytest.approx(float(want), abs=1e-5)
    margins = [row["rewards/margins"] for row in rows]
    assert max(margins) > 0.6
    assert sum(margins[-10:]) / 10 < math.log(3) + 0.4
    hard = softly(tmp_path / "hard", 1.0, 1)
    assert rows[0]["grad_norm"] == pytest.approx(0.5 * hard[0]["grad_norm"], rel=1e-4)


def test_the_reported_loss_is_the_trained_loss(run):
    _, out = run
    assert all(row["loss"] == pytest.approx(row["dpo/loss"], abs=1e-5) for row in metrics(out))


def test_label_smoothing_mixes_the_label_with_a_coin():
    assert smoothed(1.0, 0.1) == pytest.approx(0.9)
    assert smoothed(0.5, 0.1) == pytest.approx(0.5)
    assert smoothed(0.8, 0.0) == 0.8
    flat = dpo_loss(*(torch.tensor([x]) for x in (3.0, 0.0, 0.0, 0.0)), 1.0, torch.tensor([smoothed(1.0, 0.5)]))[0]
    assert flat > dpo_loss(*(torch.tensor([x]) for x in (0.0, 0.0, 0.0, 0.0)), 1.0)[0]


def test_dropped_ties_leave_fewer_pairs_and_the_likelihood_term_is_nats_a_code(tmp_path):
    changes = {"precision": "fp32", "steps": 3, "kl_clips": 0, "ties": "drop", "held_out": 0.0, "sft_weight": 2.0, "weight_pairs": False}
    figures = train_dpo.main(config(tmp_path / "run", **changes))
    assert figures["pairs"] == 56
    for row in metrics(tmp_path / "run"):
        nats_a_code = -row["logps/chosen"] / (4 * 12)
        assert row["loss"] == pytest.approx(row["dpo/loss"] + 2.0 * nats_a_code, abs=1e-4)


def test_shuffled_votes_teach_nothing_about_held_out_pairs(run, tmp_path):
    """By the votes as they were, in nats of beta times log-probs, over several shuffles: one alone points somewhere, but not far."""
    learnt, _ = run
    margins = []
    for seed in range(4):
        figures = train_dpo.main(config(tmp_path / str(seed), precision="fp32", shuffle_votes=seed, kl_clips=0))
        assert read_adapter(tmp_path / str(seed) / "adapter").manifest.method == "dpo_shuffled"
        margins.append(figures["held_out_margin"] / learnt["held_out_margin"])
    assert learnt["held_out_accuracy"] == 1.0
    assert max(map(abs, margins)) < 0.4, margins
    assert abs(sum(margins) / len(margins)) < 0.2, margins


def test_the_clock_stops_a_run_and_keeps_what_it_learnt(tmp_path):
    figures = train_dpo.main(config(tmp_path / "run", precision="fp32", max_minutes=1e-6, kl_clips=0))
    assert figures["steps"] == 1
    assert (tmp_path / "run" / "adapter" / "manifest.json").is_file()


@pytest.mark.parametrize("loss", ["sigmoid", "kto"])
def test_what_the_clock_cuts_short_is_not_done_again(loss, tmp_path):
    settings = {"precision": "fp32", "loss": loss, "steps": 3, "kl_clips": 0}
    train_dpo.main(config(tmp_path / "whole", **settings))
    for steps in (1, 2, 3):
        figures = train_dpo.main(config(tmp_path / "parts", **settings, max_minutes=1e-6, resume=steps > 1))
        assert figures["steps"] == steps
    one, two = (read_adapter(tmp_path / name / "adapter").lora.tensors for name in ("whole", "parts"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_without_a_snapshot_the_remedy_is_named(tmp_path):
    with pytest.raises(UserError, match="export one"):
        train_dpo.main(Config(out=tmp_path / "run"))


def test_a_wrong_number_of_processes_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"got 1 process\(es\); expected 2"):
        train_dpo.main(config(tmp_path / "run", processes=2))


def test_as_a_file_on_two_processes_it_learns_and_one_of_them_writes(launched):
    done, out = launched
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning" not in done.stderr, done.stderr[-3000:]
    assert done.stdout.count("adapter: pairs") == 1
    rows = metrics(out)
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert rows[0]["dpo/loss_hard_labels"] == pytest.approx(math.log(2), abs=1e-7)
    assert rows[-1]["dpo/accuracy_decided"] > 0.9


def test_two_processes_learn_what_one_learns_from_the_same_batches(launched, run):
    """4 pairs a process x 2 are the 8 pairs of the single run: the first steps' losses agree."""
    _, two = launched
    _, one = run
    pairs = list(zip(metrics(two), metrics(one)))[:7]
    assert all(a["dpo/loss"] == pytest.approx(b["dpo/loss"], abs=1e-5) for a, b in pairs)
    assert pairs[-1][0]["dpo/loss"] < math.log(2) - 1e-3


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """A frozen snapshot on disk: 12 pairs of the toy base, each with three votes, two of them for the same clip."""
    votes = [(pair, f"r{rater}", choice, {}) for pair in range(12) for rater, choice in enumerate("xxy")]
    task = toy_task(Config())
    return write_snapshot(tmp_path / "snapshot", votes, 12, task.base_sha256, n_q=task.lm.n_q)


def test_votes_of_a_snapshot_become_soft_labels_and_the_manifest_names_it(snapshot, tmp_path, monkeypatch):
    task = toy_task(Config())
    monkeypatch.setattr(dpo_task, "load_policy", lambda folder: ToyPolicy(task.lm, task.base_sha256))
    common = {"toy": False, "snapshot": snapshot, "precision": "fp32", "steps": 3, "kl_clips": 0, "held_out": 0.0}
    figures = train_dpo.main(config(tmp_path / "run", weights_by="nothing", **common))
    assert figures["pairs"] == 12
    for row in metrics(tmp_path / "run"):  # 2 of 3 raters: -2/3 log sigmoid(m) - 1/3 log sigmoid(-m), near m = 0
        assert row["dpo/loss"] == pytest.approx(math.log(2) - row["rewards/margins"] / 6, abs=1e-3)
    adapter = read_adapter(tmp_path / "run" / "adapter")
    assert adapter.manifest.snapshot_sha256 == content_sha256(snapshot)


def test_a_snapshot_of_another_base_is_refused_before_anything_is_written(snapshot, tmp_path, monkeypatch):
    monkeypatch.setattr(dpo_task, "load_policy", lambda folder: ToyPolicy(toy_task(Config()).lm, "0" * 64))
    with pytest.raises(UserError, match="clips of base"):
        train_dpo.main(config(tmp_path / "run", toy=False, snapshot=snapshot))
    assert not (tmp_path / "run").exists()

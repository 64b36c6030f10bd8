import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from base_models.atomic import atomic_folder
from base_models.checkpoint import (
    latest_training_state,
    load_tensors,
    load_training_state,
    read_json,
    refuse_another_run,
    save_tensors,
    save_training_state,
    tensors_sha256,
    write_json,
)
from base_models.errors import UserError


def test_hash_depends_on_names_types_shapes_and_bytes():
    base = {"a": torch.arange(6.0)}
    others = [
        {"b": torch.arange(6.0)},
        {"a": torch.arange(6.0).double()},
        {"a": torch.arange(6.0).reshape(2, 3)},
        {"a": torch.tensor([0.0, 1, 2, 3, 4, 6])},
    ]
    assert len({tensors_sha256(t) for t in [base, *others]}) == 5
    assert tensors_sha256({"a": torch.arange(6.0)}) == tensors_sha256(base)


def test_pickled_weights_are_refused(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "model.bin")
    for name in ("model.bin", "model.safetensors"):
        with pytest.raises(UserError, match="pickled"):
            load_tensors(tmp_path / name)


def test_cut_safetensors_are_refused(tmp_path):
    save_tensors(tmp_path / "w.safetensors", {"a": torch.zeros(1000)})
    content = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(content[:-100])
    with pytest.raises(UserError, match="cut or damaged"):
        load_tensors(tmp_path / "w.safetensors")


def test_a_failed_write_leaves_the_old_folder_and_no_litter(tmp_path):
    with atomic_folder(tmp_path / "run") as folder:
        (folder / "x").write_text("old")

    def fail_half_way():
        with atomic_folder(tmp_path / "run") as folder:
            (folder / "x").write_text("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert (tmp_path / "run" / "x").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_nan_is_no_json(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not list(tmp_path.iterdir())


def test_cut_json_is_a_clear_error(tmp_path):
    (tmp_path / "a.json").write_text('{"x": ')
    with pytest.raises(UserError, match="valid JSON"):
        read_json(tmp_path / "a.json")


def test_training_state_restores_weights_optimiser_and_every_random_stream(tmp_path):
    import random

    import numpy as np

    torch.manual_seed(1)
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    save_training_state(tmp_path, 7, {"model": model.state_dict()}, {"optimizer": optimizer.state_dict()}, {"note": "x"})
    expected = (torch.rand(3), np.random.rand(), random.random())
    step, tensors, states, extra = load_training_state(latest_training_state(tmp_path))
    assert (step, extra) == (7, {"note": "x"})
    assert (torch.equal(torch.rand(3), expected[0]), np.random.rand(), random.random()) == (True, *expected[1:])
    other, other_optimizer = torch.nn.Linear(4, 2), None
    other.load_state_dict(tensors["model"])
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=0.1)
    other_optimizer.load_state_dict(states["optimizer"])
    for m, o in ((model, optimizer), (other, other_optimizer)):
        o.zero_grad()
        m(torch.full((1, 4), 2.0)).pow(2).sum().backward()
        o.step()
    assert torch.equal(model.weight, other.weight)


def test_only_the_newest_states_are_kept(tmp_path):
    for step in range(5):
        save_training_state(tmp_path, step, {"model": {"w": torch.zeros(1)}}, keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000003", "step_00000004"]


def test_a_run_of_other_parents_is_neither_resumed_nor_overwritten(tmp_path):
    assert latest_training_state(tmp_path, {"base": "a"}) is None
    refuse_another_run(tmp_path, resume=False)
    save_training_state(tmp_path, 1, {"model": {"w": torch.zeros(1)}}, extra={"base": "a", "seed": 0})
    assert latest_training_state(tmp_path, {"base": "a"}) == tmp_path / "checkpoints" / "step_00000001"
    with pytest.raises(UserError, match="the same one"):
        latest_training_state(tmp_path, {"base": "b"})
    with pytest.raises(UserError, match="without votes: an earlier version began it"):
        latest_training_state(tmp_path, {"base": "a", "votes": "c"})
    refuse_another_run(tmp_path, resume=True)
    with pytest.raises(UserError, match="another run"):
        refuse_another_run(tmp_path, resume=False)


def test_killed_while_saving_there_is_always_a_whole_state(tmp_path):
    program = f"""
import torch, itertools
from base_models.checkpoint import save_training_state
for step in itertools.count():
    save_training_state({str(tmp_path)!r}, step, dict(m=dict(w=torch.full((200_000,), float(step)))))
    print(step, flush=True)
"""
    for delay_s in (0.01, 0.05, 0.11):
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay_s)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        step, tensors, _, _ = load_training_state(latest_training_state(tmp_path))
        assert (tensors["m"]["w"] == step).all()


def test_killed_while_an_old_state_is_removed_no_half_of_it_is_left(tmp_path, monkeypatch):
    removed = []

    def killed(folder):
        (folder / "state.json").unlink()  # as far as it came
        removed.append(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr("base_models.checkpoint.shutil.rmtree", killed)
    save_training_state(tmp_path, 1, {"model": {"w": torch.zeros(1)}}, keep=1)
    with pytest.raises(KeyboardInterrupt):
        save_training_state(tmp_path, 2, {"model": {"w": torch.ones(1)}}, keep=1)
    assert len(removed) == 1
    for folder in (tmp_path / "checkpoints").glob("step_*"):
        load_training_state(folder)
    assert latest_training_state(tmp_path).name == "step_00000002"
    monkeypatch.undo()
    save_training_state(tmp_path, 3, {"model": {"w": torch.ones(1)}}, keep=1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000003"]

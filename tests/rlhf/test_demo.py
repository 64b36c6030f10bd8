"""The whole loop with real parts, small: real app, real HTTP, real training, a report."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from base_models.checkpoint import read_json, read_jsonl, write_json
from base_models.errors import UserError
from base_models.lm import MusicLM
from base_models.policy import load_policy
from db.export import export_snapshot, snapshot_sha256
from db.store import open_store
from rlhf import cli
from rlhf.demo import CAMPAIGN, ROOT, YOURS, Demo, DemoConfig
from rlhf.preferences import load_snapshot, training_pairs
from rlhf.sample_pairs import Prompt, Settings, clip_seed, read_prompts, sample, write_prompts
from tests.rlhf.vote_toys import cut_off_by_an_older_version


@pytest.fixture
def prompts(tmp_path) -> Path:
    (tmp_path / "prompts.txt").write_text("sad piano\nfast techno, 130 BPM\n")
    return tmp_path / "prompts.txt"


def test_the_loop_closes(policy_dir, tmp_path):
    cfg = DemoConfig.small(policy_dir, tmp_path / "demo")
    page = Demo(cfg).run()
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert {"seconds", "votes", "raters", "snapshot_sha256", "codec", "base", "reward", "systems"} <= report.keys()
    assert {"accuracy", "ci", "ceiling"} <= report["reward"].keys()
    for name in ("dpo", "ppo", "shuffled"):
        assert {"gold_win_rate", "ci", "n", "kl", "diversity"} <= report["systems"][name].keys()
    assert report["votes"] == cfg.train_prompts * (cfg.clips_per_prompt * (cfg.clips_per_prompt - 1) // 2) * cfg.target_votes
    assert report["raters"] == 12
    text = page.read_text()
    local = re.findall(r"<audio[^>]+src='([^']+)'", text)
    assert len(local) >= 3 * 12
    assert all((page.parent / path).is_file() for path in local)
    assert not re.findall(r"(?:src|href)=['\"]https?:", text)
    assert not re.findall(r"\d\.\d{7}", html.unescape(re.sub(r"base64,[^']+", "", text)))  # figures have the places that mean something
    assert len(list((tmp_path / "demo" / "tracks").glob("*.wav"))) == 3

    # Who rates by hand afterwards is asked about the base and PPO: simulated raters have answered all the rest.
    with open_store(f"sqlite:///{tmp_path / 'demo' / 'encore.db'}") as store:
        rater = store.sign_in("me", str(store.add_rater("me")))
        assert rater is not None
        offer = store.next_assignment(rater.id)
        assert offer is not None
        assert offer.campaign == YOURS
        assert offer.progress.open == cfg.heldout_prompts * cfg.heldout_clips
        assert offer.prompt in {row.prompt for row in read_prompts(tmp_path / "demo" / "prompts_heldout.jsonl")}

    # A second call does nothing again, and says the same.
    before = page.read_bytes()
    Demo(cfg).run()
    assert page.read_bytes() == before
    # After the loss of one stage, that stage alone is done again. The time of one that was killed on its way is unknown.
    (tmp_path / "demo" / "stages" / "report.json").unlink()
    page.unlink()
    votes = tmp_path / "demo" / "stages" / "votes.json"
    write_json(votes, read_json(votes) | {"seconds": None})
    assert "<b>unknown time</b>" in Demo(cfg).run().read_text()
    assert read_json(tmp_path / "demo" / "report.json")["seconds"] is None
    # The chain from adapter to votes can be walked.
    from rlhf.lineage import trace

    lines = "\n".join(trace(tmp_path / "demo" / "ppo" / "adapter", tmp_path / "demo"))
    assert report["snapshot_sha256"] in lines
    assert "unchanged" in lines
    assert "not found" not in lines

    # An adapter of this base is refused by another.
    torch.manual_seed(1)
    other = tmp_path / "other"
    shutil.copytree(policy_dir, other)
    MusicLM(load_policy(policy_dir).lm.config).save(other / "lm")
    code = cli.main(
        ["generate", "sad piano", "--policy", str(other), "--adapter", str(tmp_path / "demo/dpo/adapter"), "--out", str(tmp_path / "x.wav")]
    )
    assert code == 2
    assert not (tmp_path / "x.wav").exists()


def test_demo_of_other_settings_is_not_overwritten(policy_dir, tmp_path):
    write_json(tmp_path / "demo.json", {"policy": "another"})
    with pytest.raises(UserError, match="other settings"):
        Demo(DemoConfig.small(policy_dir, tmp_path)).run()


def test_the_same_call_gives_the_same_codes_and_a_resumed_one_too(policy_dir, prompts, tmp_path):
    policy = load_policy(policy_dir)
    settings = Settings(n=2, seed=5, duration_s=1.0, batch_size=2)
    whole = sample(policy, read_prompts(prompts), tmp_path / "a", settings, "base")
    rows = [json.loads(line) for line in whole.read_text().splitlines()]
    assert [row["file"] for row in rows] == ["000000_0.wav", "000000_1.wav", "000001_0.wav", "000001_1.wav"]
    assert [row["tempo_bpm"] for row in rows] == [None] * 4
    assert len({row["seed"] for row in rows}) == 4

    # As if it had been killed after two clips, in the middle of writing the third row.
    cut = tmp_path / "b"
    cut.mkdir()
    shutil.copy(tmp_path / "a" / "sample.json", cut)
    for row in rows[:2]:
        shutil.copy(tmp_path / "a" / row["file"], cut)
        shutil.copy(tmp_path / "a" / row["codes_file"], cut)
    (cut / "manifest.partial.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]) + '{"file": "0000')
    resumed = sample(policy, read_prompts(prompts), cut, settings, "base")
    assert resumed.read_text() == whole.read_text()
    for row in rows:
        again = np.load(cut / row["codes_file"], allow_pickle=False)
        assert np.array_equal(again, np.load(tmp_path / "a" / row["codes_file"], allow_pickle=False))
        assert again.shape == (4, 25)


def test_a_changed_label_of_a_prompt_reaches_the_rows_and_samples_nothing_anew(policy_dir, prompts, tmp_path):
    policy, asked = load_policy(policy_dir), read_prompts(prompts)
    settings = Settings(n=2, duration_s=1.0)
    before = [json.loads(line) for line in sample(policy, asked, tmp_path / "a", settings, "base").read_text().splitlines()]
    moved = [asked[0], dataclasses.replace(asked[1], split="test", genre="folk")]
    after = [json.loads(line) for line in sample(policy, moved, tmp_path / "a", settings, "base").read_text().splitlines()]
    assert after[:2] == before[:2]
    assert after[2:] == [row | {"split": "test", "genre": "folk"} for row in before[2:]]
    assert json.loads(sample(policy, asked, tmp_path / "a", settings, "base").read_text().splitlines()[2])["split"] == "test"  # it has none


@pytest.mark.parametrize("changes", [{"n": 0}, {"duration_s": -3.0}, {"duration_s": float("nan")}])
def test_clips_without_length_or_number_are_refused(changes, policy_dir, prompts, tmp_path):
    with pytest.raises(UserError, match=r"expected 1 clip or more of more than 0 s"):
        sample(load_policy(policy_dir), read_prompts(prompts), tmp_path / "a", Settings(**changes), "base")
    assert not (tmp_path / "a").exists()


def test_another_seed_does_not_overwrite_samples(policy_dir, prompts, tmp_path):
    policy = load_policy(policy_dir)
    settings = {"n": 1, "duration_s": 1.0}
    sample(policy, read_prompts(prompts), tmp_path / "a", Settings(seed=1, **settings), "base")
    with pytest.raises(UserError, match="other samples"):
        sample(policy, read_prompts(prompts), tmp_path / "a", Settings(seed=2, **settings), "base")


def test_an_adapter_at_another_weight_does_not_pass_for_samples_that_are_there(policy_dir, prompts, tmp_path):
    policy, how = load_policy(policy_dir), Settings(n=1, duration_s=1.0)
    plain = sample(policy, read_prompts(prompts), tmp_path / "a", how, "ppo", ["hash"])
    assert sample(policy, read_prompts(prompts), tmp_path / "a", how, "ppo", ["hash"], weights=[1.0]) == plain
    with pytest.raises(UserError, match="other samples"):
        sample(policy, read_prompts(prompts), tmp_path / "a", how, "ppo", ["hash"], weights=[1.2])
    strong = sample(policy, read_prompts(prompts), tmp_path / "b", how, "ppo", ["hash"], weights=[1.2])
    assert [row["gen"].get("adapter_weights") for row in read_jsonl(plain)] == [None, None]
    assert [row["gen"]["adapter_weights"] for row in read_jsonl(strong)] == [[1.2], [1.2]]


def test_clip_seeds_have_no_collisions():
    seeds = {clip_seed(s, i, k) for s in range(5) for i in range(40) for k in range(4)}
    assert len(seeds) == 800
    assert max(seeds) < 2**63


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("p.txt", "", "without prompts"),
        ("p.txt", "one\none\n", "twice"),
        ("p.jsonl", '{"text": "x"}\n', "KeyError"),
        ("p.jsonl", "{\n", "prompt"),
        ("p.txt", "\U0001f3b5\U0001f3b5\n", "letter"),
        ("p.txt", "calm folk\n" + "x" * 5000, r"p.txt:2: a prompt of 5,000"),
        ("p.jsonl", '{"prompt": null}\n', r"p.jsonl:1: .*prompt None"),
        ("p.jsonl", '{"prompt": "calm folk", "tempo_bpm": "fast"}\n', "tempo_bpm 'fast', no number of 30 to 300"),
        ("p.jsonl", '{"prompt": "calm folk", "tempo_bpm": 5000}\n', "tempo_bpm 5000, no number"),
        ("p.jsonl", '{"prompt": "calm folk, 90 BPM", "tempo_bpm": 120}\n', "p.jsonl:1: tempo_bpm 120 of a prompt that says 90 BPM"),
        ("p.txt", "f\udcfcr Klavier\n", "UTF-8"),  # Latin-1, by surrogateescape below
    ],
)
def test_unusable_prompts_are_told_with_their_place(tmp_path, name, content, match):
    (tmp_path / name).write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UserError, match=match):
        read_prompts(tmp_path / name)


def test_a_prompt_with_unicode_line_separators_keeps_its_row_all_the_way(policy_dir, tmp_path):
    """JSON lines end at a newline alone; U+2028, U+0085 and form feeds are text."""
    text = "sad\u2028piano\u0085slow\x0cwaltz"
    write_prompts(tmp_path / "p.jsonl", [{"prompt": text, "prompt_id": "p"}])
    prompts = read_prompts(tmp_path / "p.jsonl")
    assert [p.prompt for p in prompts] == [text]
    manifest = sample(load_policy(policy_dir), prompts, tmp_path / "s", Settings(n=2, duration_s=1.0), "base")
    with open_store(f"sqlite:///{tmp_path / 'e.db'}") as store:
        code = [sys.executable, "-m", "feedback_app.campaigns", "--db", f"sqlite:///{tmp_path / 'e.db'}", "--name", "c"]
        subprocess.run([*code, "--manifest", str(manifest), "--min-listen-ms", "0"], check=True, cwd=ROOT)
        rater = store.sign_in("ada", store.add_rater("ada"))
        assert rater is not None
        assert rater is not None
        offer = store.next_assignment(rater.id)
        assert offer is not None
        assert offer.prompt == text
        store.submit_vote(rater.id, offer.assignment_id, "a", idempotency_key="key-1")
        export_snapshot(store, "c", tmp_path / "snapshots", "c")
    snapshot = load_snapshot(tmp_path / "snapshots" / "c")
    assert [p.prompt for p in training_pairs(snapshot, n_q=4, card=1024)] == [text]


def test_a_snapshot_that_a_kill_and_an_older_version_left_is_made_again(policy_dir, tmp_path):
    """Killed between the folder and its record, then upgraded: the same votes have another hash, and nobody has read the old one."""
    from feedback_app.campaigns import register_campaign

    demo = Demo(DemoConfig.small(policy_dir, tmp_path))
    manifest = sample(load_policy(policy_dir), [Prompt("calm folk", "p")], tmp_path / "s", Settings(n=2, duration_s=1.0), "base")
    with open_store(demo.db) as store:
        register_campaign(store, CAMPAIGN, manifest, target_votes=1, min_listen_ms=0)
        rater = store.sign_in("ada", store.add_rater("ada"))
        assert rater is not None
        offer = store.next_assignment(rater.id)
        assert offer is not None
        store.submit_vote(rater.id, offer.assignment_id, "a", idempotency_key="key-1234")
    told = demo.snapshot()
    assert demo.snapshot() == told
    cut_off_by_an_older_version(tmp_path / "encore.db", demo.snapshot_dir)
    assert demo.snapshot() == told
    assert snapshot_sha256(demo.snapshot_dir) == told["sha256"]


def test_generate_writes_a_mastered_track_and_repeats_it(policy_dir, tmp_path, capsys):
    arguments = ["generate", "sad piano, slow", "--policy", str(policy_dir), "--duration", "2", "--seed", "3", "--out"]
    assert cli.main([*arguments, str(tmp_path / "a.wav")]) == 0
    assert cli.main([*arguments, str(tmp_path / "b.wav")]) == 0
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()
    assert "LUFS" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["generate", "x" * 5000], "5,000 characters"),
        (["generate", "\U0001f3b5"], "without a letter"),
        (["generate", ""], "empty prompt"),
        (["generate", "piano", "--policy", "nowhere"], "policy.json"),
        (["corpus", "import", "nowhere"], "no folder"),
        (["ratings", "export", "--campaign", "c", "--name", "n", "--db", "sqlite:///{tmp}/e.db", "--out", "{tmp}"], "campaign"),
        (["adapters", "show", "{tmp}"], "manifest"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, match, tmp_path, capsys):
    filled = [a.replace("{tmp}", str(tmp_path)) for a in arguments]
    if filled[0] == "generate":
        filled += ["--out", str(tmp_path / "x.wav")]
    assert cli.main(filled) == 2
    error = capsys.readouterr().err
    assert match in error
    assert "remedy" in error
    assert not list(tmp_path.glob("*.wav"))

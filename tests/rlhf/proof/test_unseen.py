"""Copying is told from a style: what was copied comes nearer to the clips that were seen, and not to others."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from base_models.corpus.tokens import TokenisedCorpus
from base_models.errors import UserError
from base_models.evaluate_base import nearest_training_clip
from rlhf.proof import page, unseen
from rlhf.proof.figures import Pairs, Told, beyond, copies, together, won

CLIPS, K, T = 40, 2, 60
rng = np.random.default_rng(0)


def noise(n: int) -> np.ndarray:
    return rng.integers(0, 1024, (n, K, T))


def sustained(notes: range) -> np.ndarray:
    """A clip a note, which it holds for three quarters of its time."""
    codes = noise(len(notes))
    codes[:, 0, : T * 3 // 4] = np.array(notes)[:, None]
    return codes


def altered(codes: np.ndarray) -> np.ndarray:
    """The same clips with a fifth of their codes changed: still near copies."""
    return np.where(rng.random(codes.shape) < 1 / 5, noise(len(codes)), codes)


def written(folder: Path, codes: np.ndarray, prompts: int | None = None) -> Path:
    """A manifest of clips, two of each prompt unless there are so many `prompts`."""
    folder.mkdir(parents=True)
    rows = []
    for i, clip in enumerate(codes):
        np.save(folder / f"{i}.npy", clip)
        named = {"file": f"{i // 2:06d}_{i % 2}.wav", "codes_file": f"{i}.npy", "sha256": f"{folder.name}-{i}"}
        rows.append({**named, "prompt_id": f"p{i // 2 if prompts is None else i % prompts}"})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "manifest.jsonl"


def compared(tmp_path: Path, played: np.ndarray, own: np.ndarray, others: list[np.ndarray]) -> tuple[dict, dict]:
    """(row of a table, row of a replication) of an adapter that played `played`, with a cell for each of `others`."""
    base = noise(CLIPS)
    manifests = {name: written(tmp_path / name, codes) for name, codes in (("played", played), ("base", base), ("own", own))}
    cells = []
    for index, other in enumerate(others):
        given = [part for name, manifest in manifests.items() for part in (f"--{name}", str(manifest))]
        cells.append(tmp_path / f"by-{index}")
        rated = ["--unseen", str(written(tmp_path / f"other{index}", other))]
        assert unseen.main([*given, *rated, "--out", str(cells[-1])]) == 0
    for name, codes in (("played", played), ("base", base)):  # as rlhf.proof.play tells it
        near = nearest_training_clip(torch.from_numpy(codes), torch.from_numpy(own)).tolist()
        told = {"prompt_id": [f"p{i // 2}" for i in range(CLIPS)], "nearest_rated": near}
        (tmp_path / name / "clips.json").write_text(json.dumps(told))
    pairs = Pairs(np.ones(CLIPS), np.zeros(CLIPS), [f"p{i // 2}" for i in range(CLIPS)])
    row = {"experiment": "main", "taste": "space", "method": "ppo", "seed": 3, "votes": 9, "kl": 60.0, "diversity_ratio": 1.0, **won(pairs)}
    row |= {"fit": {}, "copies": copies(tmp_path / "played", tmp_path / "base"), "beyond": beyond(cells)}
    return together([Told(row, pairs)]), row


def test_a_planted_copy_is_nearer_to_the_clips_that_were_seen_and_is_named(tmp_path):
    own = noise(30)
    played = np.concatenate([altered(own[:20]), noise(20)])
    row, each = compared(tmp_path, played, own, [noise(30), noise(30)])
    assert (row["nearest_rated_change"], row["nearest_rated_beyond_change"]) == (0.5, 0.5)
    assert each["beyond"]["nearest_rated"]["sets"] == 2
    assert page.missed(row) == "copies rated"
    assert "| copies rated" in page.guard_table([each]).splitlines()[-1]


def test_a_mere_style_comes_nearer_to_unseen_clips_too_and_is_not_named(tmp_path):
    played, own, other = (np.concatenate([sustained(range(20)), noise(20)]) for _ in range(3))
    row, each = compared(tmp_path, played, own, [other])
    assert row["nearest_rated_change"] - row["nearest_rated_half_ci"] > 0.2  # by the base alone it would be named
    assert (row["nearest_rated_beyond_seen"], row["nearest_rated_beyond_unseen"]) == (0.5, 0.5)
    assert row["nearest_rated_beyond_change"] == 0
    assert page.missed(row) == ""
    assert page.guard_table([each]).splitlines()[-1].split("|")[-2].strip() == "nothing"
    assert page.missed(together([Told({**each, "beyond": {}}, Pairs(np.ones(2), np.zeros(2), ["a", "b"]))])) == "copies rated"


def test_a_style_that_copies_besides_is_named_by_what_it_copies_beyond_its_style(tmp_path):
    own, other = (np.concatenate([sustained(range(10)), noise(20)]) for _ in range(2))
    played = np.concatenate([sustained(range(10)), altered(own[10:]), noise(10)])
    row, _ = compared(tmp_path, played, own, [other])
    assert (row["nearest_rated_change"], row["nearest_rated_beyond_change"]) == (0.75, 0.5)
    assert page.missed(row) == "copies rated"


def test_sets_that_are_compared_have_equal_numbers_by_a_seeded_draw(tmp_path):
    own, small, large = (written(tmp_path / name, noise(n)) for name, n in (("own", 12), ("small", 7), ("large", 30)))
    seen, others = unseen.rated_sets(own, [small, large], 0)
    assert [len(codes) for codes in seen] == [len(codes) for codes in others] == [7, 12]
    again, differently = unseen.rated_sets(own, [small, large], 0), unseen.rated_sets(own, [small, large], 1)
    assert torch.equal(again[1][1], others[1])
    assert not torch.equal(differently[1][1], others[1])
    whole = {clip.numpy().tobytes() for clip in seen[1]}
    assert len(whole) == 12  # each once
    assert {clip.numpy().tobytes() for clip in seen[0]} < whole


def corpus(counts: dict[str, int]) -> TokenisedCorpus:
    rows = [{"split": name} for name, n in counts.items() for _ in range(n)]
    return TokenisedCorpus(noise(len(rows)).astype(np.int16), rows, "", "", K, 1024, 25.0)


def test_training_clips_are_compared_in_blocks_of_as_many_as_the_unseen_and_test_combo_is_left_out(tmp_path, monkeypatch):
    tokens = corpus({"train": 70, "val": 4, "test_piece": 6, "test_combo": 20})
    monkeypatch.setattr(unseen, "load_tokens", lambda path: tokens)
    train, others = unseen.corpus_sets(Path("tokens"), 0)
    assert [len(codes) for codes in (*train, *others)] == [10] * (unseen.BLOCKS + 1)
    known = {name: {clip.tobytes() for clip in tokens.codes[tokens.split(name)]} for name in ("train", "val", "test_piece")}
    blocks = [{clip.numpy().tobytes() for clip in codes} for codes in train]
    assert len(set.union(*blocks)) == 10 * unseen.BLOCKS
    assert set.union(*blocks) <= known["train"]
    assert {clip.numpy().tobytes() for clip in others[0]} == known["val"] | known["test_piece"]
    combos = tokens.codes[tokens.split("test_combo")]
    manifests = [written(tmp_path / name, codes) for name, codes in (("played", combos), ("base", noise(20)))]
    given = ["--played", str(manifests[0]), "--base", str(manifests[1]), "--tokens", "tokens"]
    assert unseen.main([*given, "--out", str(tmp_path / "out")]) == 0
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert (figures["training_seen"], figures["training_unseen"]) == (0, 0)  # a clip that follows its prompt is not held against it
    assert "rated_seen" not in figures


def test_a_training_clip_that_is_played_again_counts_in_its_block_alone(tmp_path, monkeypatch):
    tokens = corpus({"train": 20, "val": 5, "test_piece": 5})
    monkeypatch.setattr(unseen, "load_tokens", lambda path: tokens)
    played = altered(tokens.codes[tokens.split("train")])
    given = ["--played", str(written(tmp_path / "played", played)), "--base", str(written(tmp_path / "base", noise(20)))]
    assert unseen.main([*given, "--tokens", "tokens", "--out", str(tmp_path / "out")]) == 0
    told = beyond([tmp_path / "out"])
    assert set(told) == {"nearest_training"}
    assert told["nearest_training"]["seen"] == told["nearest_training"]["change"] == 0.5  # of two blocks


def refused(argv: list[str], match: str) -> None:
    with pytest.raises(UserError, match=match):
        unseen.main(argv)


def test_clips_of_other_prompts_are_refused(tmp_path):
    played, shuffled, fewer, rated, other = (
        str(written(tmp_path / name, noise(n), prompts))
        for name, n, prompts in (("played", 8, None), ("base", 8, 3), ("few", 6, None), ("own", 5, None), ("other", 5, None))
    )
    rest = ["--own", rated, "--unseen", other, "--out", str(tmp_path / "out")]
    refused(["--played", played, "--base", shuffled, *rest], "'p0'.* and .*'p1'")
    refused(["--played", played, "--base", fewer, *rest], "8 and 6 clips")
    assert not (tmp_path / "out").exists()
    assert unseen.main(["--played", played, "--base", played, *rest]) == 0


def test_clips_that_were_rated_are_refused_as_unseen(tmp_path):
    played, own = (str(written(tmp_path / name, noise(6))) for name in ("played", "own"))
    given = ["--played", played, "--base", played, "--out", str(tmp_path / "out")]
    refused([*given, "--own", own, "--unseen", own], "with 6 clips of")
    refused([*given, "--own", own], "--own with --unseen")
    refused([*given, "--unseen", own], "--own with --unseen")
    refused(given, "--own with --unseen")


@pytest.mark.parametrize("counts", [{"train": 5, "test_combo": 5}, {"val": 5, "test_piece": 2}])
def test_a_corpus_without_training_or_unseen_clips_is_refused(counts, monkeypatch):
    monkeypatch.setattr(unseen, "load_tokens", lambda path: corpus(counts))
    with pytest.raises(UserError, match=f"with {counts.get('train', 0)} clips of train"):
        unseen.corpus_sets(Path("tokens"), 0)


def test_a_row_over_seeds_tells_what_is_beyond_unseen_only_if_every_seed_has_it(tmp_path):
    own = noise(30)
    _, each = compared(tmp_path, altered(np.concatenate([own, own])[:CLIPS]), own, [noise(30)])
    pairs = Pairs(np.ones(2), np.zeros(2), ["a", "b"])
    half = {**each["beyond"]["nearest_rated"], "change": 0.25, "ci": [0.15, 0.35]}
    rows = [each | {"beyond": {"nearest_rated": {**half, "change": change}}} for change in (0.25, 0.75)]
    both = together([Told(row, pairs) for row in rows])
    assert both["nearest_rated_beyond_change"] == 0.5
    assert both["nearest_rated_beyond_half_ci"] == pytest.approx(0.1 / 2**0.5)
    one = together([Told(rows[0], pairs), Told({**each, "beyond": {}}, pairs)])
    assert "nearest_rated_change" in one
    assert "nearest_rated_beyond_change" not in one
    columns = [part.strip() for part in page.main_table([one]).splitlines()[0].split("|")]
    told = dict(zip(columns, (part.strip() for part in page.main_table([one]).splitlines()[-1].split("|"))))
    assert (told["copies rated"][:6], told["rated beyond unseen"], told["training beyond unseen"]) == ("+1.000", "-", "-")

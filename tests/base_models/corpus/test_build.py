"""The demo corpus on disk: the same on any number of workers, split without leaks, whole or absent, cached."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from base_models.corpus import build
from base_models.corpus.build import ClipBuilder, build_corpus, piece_bucket, plan
from base_models.corpus.captions import tempo_words
from base_models.corpus.styles import GENRES, HELD_OUT_MOOD, MOODS, STEMS
from base_models.corpus.tunes import Tune
from base_models.errors import UserError

N_CLIPS = 120
SPLITS = ("train", "val", "test_piece", "test_combo")


@pytest.fixture(scope="module", autouse=True)
def tunes() -> Iterator[list[Tune]]:
    """The real tunes, read once for all builds in this process."""
    with pytest.MonkeyPatch.context() as patch:
        read = build.load_tunes()
        patch.setattr(build, "load_tunes", lambda: read)
        yield read


@pytest.fixture(scope="module")
def corpus(tunes: list[Tune], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_corpus(tmp_path_factory.mktemp("demo") / "corpus", N_CLIPS, duration_s=1.0, workers=1)


def read_rows(corpus: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (corpus / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_one_worker_and_two_build_the_same_bytes(tmp_path: Path):
    one = build_corpus(tmp_path / "one", 26, duration_s=1.0, workers=1, stems=True)
    two = build_corpus(tmp_path / "two", 26, duration_s=1.0, workers=2, stems=True)
    assert contents(one) == contents(two)
    assert len(contents(one)) == 26 * 5 + 2


def test_a_clip_does_not_depend_on_how_many_others_there_are(corpus: Path, tmp_path: Path):
    few = build_corpus(tmp_path / "few", 6, duration_s=1.0, workers=1)
    assert read_rows(few) == read_rows(corpus)[:6]


def test_another_seed_gives_other_clips(corpus: Path, tmp_path: Path):
    other = build_corpus(tmp_path / "other", 6, duration_s=1.0, seed=1, workers=1)
    assert not {row["sha256"] for row in read_rows(other)} & {row["sha256"] for row in read_rows(corpus)}


def test_every_row_has_its_audio_and_every_audio_its_row(corpus: Path):
    rows = read_rows(corpus)
    assert len(rows) == N_CLIPS
    assert {row["file_name"] for row in rows} == {str(p.relative_to(corpus)) for p in corpus.rglob("*.flac")}
    for row in rows:
        samples, sample_rate = soundfile.read(corpus / row["file_name"], dtype="int16")
        assert sample_rate == row["sample_rate"] == 16000
        assert samples.shape == (16000,)
        assert hashlib.sha256(samples.astype("<i2").tobytes()).hexdigest() == row["sha256"]
        assert Path(row["file_name"]).parts[0] == row["split"]


def test_rows_describe_their_clips(corpus: Path):
    for row in read_rows(corpus):
        assert row["caption"] == row["captions"][0]
        assert len(row["captions"]) == 4
        assert row["tempo_word"] == tempo_words(row["tempo_bpm"])[0]
        assert row["key"].split()[1] in (("major", "mixolydian") if MOODS[row["mood"]].valence == "major" else ("minor", "dorian"))
        assert all(0 <= start < stop <= 1.0 for start, stop, _ in row["melody"] + row["chords"])
        assert "public-domain" in row["licence"]
        assert row["source"]


def test_stem_files_add_up_to_the_mix(tmp_path: Path):
    corpus = build_corpus(tmp_path / "stems", 12, duration_s=1.0, workers=1, stems=True)
    for row in read_rows(corpus):
        assert set(row["stems"]) == set(STEMS)
        mix, _ = soundfile.read(corpus / row["file_name"], dtype="int16")
        total = sum(soundfile.read(corpus / path, dtype="int16")[0].astype(np.int32) for path in row["stems"].values())
        assert np.abs(total - mix).max() <= 2


def test_genres_are_balanced_and_every_split_is_there(corpus: Path):
    rows = read_rows(corpus)
    assert Counter(row["genre"] for row in rows) == dict.fromkeys(GENRES, N_CLIPS // 12)
    assert {row["split"] for row in rows} == set(SPLITS)


def test_held_out_combinations_stand_in_the_combination_test_and_nowhere_else(corpus: Path):
    for row in read_rows(corpus):
        assert (HELD_OUT_MOOD[row["genre"]] == row["mood"]) == (row["split"] == "test_combo")


def test_no_group_of_tunes_is_on_both_sides(corpus: Path):
    sides: dict[str, set[str]] = {}
    for row in read_rows(corpus):
        sides.setdefault(row["group"], set()).add("test" if row["split"].startswith("test") else row["split"])
        assert piece_bucket(row["group"]) in sides[row["group"]]
    assert all(len(side) == 1 for side in sides.values())


def test_the_real_tunes_give_every_genre_pieces_for_every_split(tunes: list[Tune]):
    parameters = build.BuildParameters(1, 1.0, 16000, 0, False)
    pools = ClipBuilder(Path(), parameters, tunes).pools
    groups: dict[str, set[str]] = {bucket: set() for bucket in ("train", "val", "test")}
    for (_, bucket, _), pool in pools.items():
        groups[bucket] |= {tune.group for tune in pool}
    assert not groups["train"] & (groups["val"] | groups["test"])
    assert not groups["val"] & groups["test"]
    for genre in GENRES:
        for bucket in groups:
            for valence in ("major", "minor"):
                assert pools[genre, bucket, valence], (genre, bucket, valence)


def test_the_plan_gives_splits_their_shares_in_every_genre_and_oversamples_the_strict_test():
    planned = [plan(index) for index in range(6000)]
    shares = Counter(split for split, _ in planned)
    assert shares["train"] == pytest.approx(5160, abs=60)
    for split in SPLITS[1:]:
        assert shares[split] >= 0.035 * 6000
        by_genre = Counter(genre for where, genre in planned if where == split)
        assert min(by_genre[genre] for genre in GENRES) >= 15
    # Drawing moods and pieces freely would put a quarter of the tenth that are test pieces there.
    assert shares["test_combo"] > 1.5 * 0.25 * 0.10 * 6000


def test_a_second_call_builds_nothing(corpus: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(build, "load_tunes", lambda: pytest.fail("the corpus was built again"))
    before = contents(corpus)
    assert build_corpus(corpus, N_CLIPS, duration_s=1.0, workers=2) == corpus
    assert contents(corpus) == before


def test_other_parameters_or_damage_build_again(tmp_path: Path):
    out = tmp_path / "corpus"
    build_corpus(out, 4, duration_s=1.0, workers=1)
    first = contents(out)
    build_corpus(out, 3, duration_s=1.0, workers=1)
    assert len(read_rows(out)) == 3
    build_corpus(out, 4, duration_s=1.0, workers=1)
    assert contents(out) == first
    (out / "metadata.jsonl").write_text("{}\n")
    build_corpus(out, 4, duration_s=1.0, workers=1)
    assert contents(out) == first
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_build_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]):
    kept = build_corpus(tmp_path / "kept", 3, duration_s=1.0, workers=1)
    before = contents(kept)
    whole = ClipBuilder.build

    def build_until_interrupted(self: ClipBuilder, index: int) -> dict[str, Any]:
        if index == 4:
            raise error
        return whole(self, index)

    monkeypatch.setattr(ClipBuilder, "build", build_until_interrupted)
    for out in (tmp_path / "new", kept):
        with pytest.raises(error):
            build_corpus(out, 8, duration_s=1.0, workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert contents(kept) == before


@pytest.mark.parametrize("build_json", [None, "{}", "not json"])
def test_a_folder_that_is_no_demo_corpus_is_refused_and_left_alone(tmp_path: Path, build_json: str | None):
    (tmp_path / "thesis.txt").write_text("mine")
    if build_json is not None:
        (tmp_path / "build.json").write_text(build_json)
    with pytest.raises(UserError, match="choose another out_dir"):
        build_corpus(tmp_path, 4)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("wrong", [{"n_clips": 0}, {"workers": 0}, {"duration_s": 0.1}, {"sample_rate": 4000}])
def test_impossible_parameters_are_refused_before_anything_is_written(tmp_path: Path, wrong: dict[str, Any]):
    with pytest.raises(UserError):
        build_corpus(tmp_path / "corpus", **wrong)
    assert not list(tmp_path.iterdir())


def test_the_module_runs_from_another_folder(tmp_path: Path):
    command = [sys.executable, "-m", "base_models.corpus.build", "--out-dir", "made", "--n-clips", "2", "--duration-s", "1"]
    root = Path(build.__file__).resolve().parents[2]
    done = subprocess.run([*command, "--workers", "1"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert len(read_rows(tmp_path / "made")) == 2

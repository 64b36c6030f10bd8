"""A corpus as tokens, and as one memory map of samples."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from base_models.audio import write_audio
from base_models.codec import CodecConfig, MagnitudeCodec, load_codec
from base_models.corpus.tokens import load_tokens, synthetic_tokens, tokenise
from base_models.corpus.waves import Waves, load_waves, synthetic_waves
from base_models.errors import UserError


@pytest.fixture(scope="module")
def codec(tmp_path_factory) -> MagnitudeCodec:
    torch.manual_seed(0)
    codec = MagnitudeCodec(
        CodecConfig(width=32, latent_dim=16, card=16, n_q=2, encoder_blocks=1, decoder_blocks=1, griffin_lim_iterations=2)
    )
    codec.initialise(torch.from_numpy(synthetic_waves(4, 2.0, 16000).crops(16, 16000, np.random.default_rng(0))))
    folder = tmp_path_factory.mktemp("codec")
    codec.save(folder)
    loaded = load_codec(folder)
    assert isinstance(loaded, MagnitudeCodec)
    return loaded


@pytest.fixture
def corpus(tmp_path) -> Path:
    folder = tmp_path / "corpus"
    waves = synthetic_waves(4, 2.1, 16000)
    rows = []
    for i, (split, length) in enumerate([("train", 2.1), ("train", 1.0), ("val", 2.1), ("train", 0.4)]):
        name = f"{split}/{i:06d}.wav"
        (folder / split).mkdir(parents=True, exist_ok=True)
        write_audio(folder / name, waves.clip(i)[None, : round(length * 16000)], 16000)
        rows.append({"file_name": name, "caption": "x\u2028y", "captions": ["x"], "split": split, "melody": [[0, 1, 60]]})
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")
    return folder


def test_every_whole_second_becomes_a_row_with_its_clips_metadata(corpus, codec, tmp_path):
    tokens = load_tokens(tokenise(corpus, codec, tmp_path / "codes", segment_s=1.0))
    assert tokens.codes.shape == (5, 2, 25)
    assert tokens.codes.dtype == np.int16
    starts = [(row["file_name"], row["segment_start_s"]) for row in tokens.rows]
    assert starts == [
        ("train/000000.wav", 0.0),
        ("train/000000.wav", 1.0),
        ("train/000001.wav", 0.0),
        ("val/000002.wav", 0.0),
        ("val/000002.wav", 1.0),
    ]
    assert tokens.rows[0]["caption"] == "x\u2028y"
    assert (tokens.n_q, tokens.card, tokens.frame_rate) == (2, 16, 25.0)
    assert tokens.codec_sha256 == codec.sha256()
    assert tokens.split("val").tolist() == [3, 4]


def test_the_codes_are_those_of_the_codec_itself(corpus, codec, tmp_path):
    tokens = load_tokens(tokenise(corpus, codec, tmp_path / "codes", segment_s=1.0))
    clip = load_waves(corpus, ["train"], 16000).clip(0)
    direct = codec.encode(torch.from_numpy(clip[16000:32000])[None, None])[0]
    assert np.array_equal(tokens.codes[1], direct.numpy())


def test_a_second_call_reads_the_cache_and_another_codec_or_length_does_not(corpus, codec, tmp_path):
    first = tokenise(corpus, codec, tmp_path / "codes", segment_s=1.0)
    stamp = (first / "codes.npy").stat().st_mtime_ns
    assert tokenise(corpus, codec, tmp_path / "codes", segment_s=1.0) == first
    assert (first / "codes.npy").stat().st_mtime_ns == stamp
    assert tokenise(corpus, codec, tmp_path / "codes", segment_s=0.8) != first
    codec.save(tmp_path / "other")
    other = load_codec(tmp_path / "other")
    with torch.no_grad():
        other.mean += 0.01
    assert tokenise(corpus, other, tmp_path / "codes", segment_s=1.0) != first


def test_the_folder_above_one_tokenised_corpus_will_do_but_not_above_two(corpus, codec, tmp_path):
    first = tokenise(corpus, codec, tmp_path / "codes", segment_s=1.0)
    assert load_tokens(tmp_path / "codes").sha256 == load_tokens(first).sha256
    tokenise(corpus, codec, tmp_path / "codes", segment_s=0.8)
    with pytest.raises(UserError, match="2 tokenised corpora"):
        load_tokens(tmp_path / "codes")


def test_codes_that_were_altered_are_refused(corpus, codec, tmp_path):
    folder = tokenise(corpus, codec, tmp_path / "codes", segment_s=1.0)
    codes = np.load(folder / "codes.npy")
    codes[0, 0, 0] = (codes[0, 0, 0] + 1) % 16
    np.save(folder / "codes.npy", codes)
    with pytest.raises(UserError, match="differs from its hash"):
        load_tokens(folder)


def test_a_corpus_of_too_short_clips_is_refused(corpus, codec, tmp_path):
    with pytest.raises(UserError, match="as long as 5"):
        tokenise(corpus, codec, tmp_path / "codes", segment_s=5.0)


@pytest.mark.parametrize("name", ["../outside.wav", "/etc/passwd"])
def test_metadata_that_points_outside_the_corpus_is_refused(corpus, name):
    (corpus / "metadata.jsonl").write_text(json.dumps({"file_name": name, "split": "train"}) + "\n")
    with pytest.raises(UserError, match="inside the corpus"):
        load_waves(corpus, ["train"], 16000)


def test_waves_hold_the_files_samples_and_are_decoded_once(corpus):
    waves = load_waves(corpus, ["train"], 16000)
    assert len(waves) == 3
    original = synthetic_waves(4, 2.1, 16000).clip(0)
    assert np.abs(waves.clip(0) - original).max() < 2 / 32768
    (corpus / "train" / "000000.wav").touch()
    cached = next((corpus / ".waves").glob("*/samples.npy"))
    stamp = cached.stat().st_mtime_ns
    load_waves(corpus, ["train"], 16000)
    assert cached.stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="no clips"):
        load_waves(corpus, ["nothing"], 16000)


def test_waves_are_resampled_to_the_rate_asked_for(corpus):
    assert len(load_waves(corpus, ["val"], 8000).clip(0)) == pytest.approx(2.1 * 8000, abs=2)


def test_crops_are_excerpts_whose_gain_never_clips():
    ramp = np.arange(-16000, 16000, dtype=np.int16)
    waves = Waves(np.concatenate([ramp, ramp[:10]]), np.array([0, 32000, 32010]))
    crops = waves.crops(64, 100, np.random.default_rng(0), (-6, 40))
    assert crops.shape == (64, 1, 100)
    assert crops.dtype == np.float32
    assert np.abs(crops).max() <= 1
    short = [crop for crop in crops[:, 0] if not crop[10:].any()]
    long = [crop for crop in crops[:, 0] if crop[10:].any()]
    assert short
    for crop in long:
        steps = np.diff(crop)
        assert np.allclose(steps, steps[0], atol=1e-5)


def test_synthetic_tokens_differ_by_genre_and_cover_the_splits():
    tokens = synthetic_tokens()
    assert {row["split"] for row in tokens.rows} == {"train", "val", "test_piece"}
    assert tokens.codes.max() < tokens.card
    sets = [set(tokens.codes[i, 0].tolist()) for i in range(3)]
    assert sets[0] != sets[1] != sets[2]
    assert np.array_equal(tokens.codes, synthetic_tokens().codes)

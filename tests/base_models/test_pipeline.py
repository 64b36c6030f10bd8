"""A prompt goes in, a mastered track comes out, and a bad prompt is refused before anything is computed."""

from __future__ import annotations

from pathlib import Path

import pytest
import soundfile
import torch

from base_models.codec import CodecConfig, MagnitudeCodec
from base_models.errors import UserError
from base_models.lm import MusicLM, MusicLMConfig
from base_models.pipeline import MusicPipeline, check_prompt
from base_models.policy import load_policy, save_policy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random policy on disk, with the text encoder that ships."""
    torch.manual_seed(0)
    codec = MagnitudeCodec(
        CodecConfig(width=16, latent_dim=8, encoder_blocks=1, decoder_blocks=1, n_q=2, card=16, griffin_lim_iterations=2)
    ).eval()
    noise = 0.1 * torch.randn(4, 1, codec.sample_rate)
    codec.initialise(noise)
    lm = MusicLM(MusicLMConfig(n_q=2, card=16, d_model=32, n_layers=1, n_heads=2, d_ff=32)).eval()
    path = tmp_path_factory.mktemp("policy")
    save_policy(path, lm, codec)
    return path


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> MusicPipeline:
    return MusicPipeline.from_pretrained(folder)


def test_three_lines_write_a_track(folder: Path, tmp_path: Path) -> None:
    pipeline = MusicPipeline.from_pretrained(folder)
    track = pipeline.generate("sad piano, slow", duration_s=1.0, seed=7)
    path = track.save(tmp_path / "track.wav")
    info = soundfile.info(path)
    assert (info.samplerate, info.channels) == (44_100, 2)
    assert info.duration == pytest.approx(1.0, abs=0.05)


def test_a_track_is_mastered_and_knows_its_parents(pipeline: MusicPipeline) -> None:
    track = pipeline.generate("  calm waltz, 90 BPM ", duration_s=1.0, seed=3)
    assert track.lufs == pytest.approx(-14.0, abs=0.3)
    assert track.true_peak_dbfs <= -1.0
    assert (track.prompt, track.seed) == ("calm waltz, 90 BPM", 3)
    assert track.codes.shape == (2, 25)
    assert track.policy_sha256 == pipeline.policy.sha256


def test_a_seed_reproduces_a_track_and_another_seed_does_not(pipeline: MusicPipeline) -> None:
    first, again, other = (pipeline.generate("jazz trio", duration_s=1.0, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.codes, again.codes)
    assert (first.wav == again.wav).all()
    assert not torch.equal(first.codes, other.codes)


def test_mono_at_the_codec_rate_is_there_for_the_asking(pipeline: MusicPipeline) -> None:
    track = pipeline.generate("jazz trio", duration_s=1.0, sample_rate=None, stereo=False)
    assert track.wav.shape == (1, 16_000)
    assert track.sample_rate == 16_000


def test_a_policy_that_is_already_loaded_goes_through_the_same_door(folder: Path, pipeline: MusicPipeline) -> None:
    track = MusicPipeline(load_policy(folder)).generate("jazz trio", duration_s=1.0)
    assert torch.equal(track.codes, pipeline.generate("jazz trio", duration_s=1.0).codes)


@pytest.mark.parametrize(
    ("prompt", "got"),
    [
        ("", "an empty prompt"),
        (" \n\t", "an empty prompt"),
        ("a" * 5_000, "5,000 characters"),
        ("\N{MUSICAL NOTE}\N{FIRE}", "without a letter"),
        ("123 ...", "without a letter"),
        ("sad piano \ud83c", "that is no text: 'sad piano "),  # half an emoji
    ],
)
def test_a_prompt_that_says_nothing_or_too_much_is_refused(pipeline: MusicPipeline, prompt: str, got: str) -> None:
    with pytest.raises(UserError, match=got):
        pipeline.generate(prompt)


@pytest.mark.parametrize("prompt", ["грустное пианино", "悲しいピアノ", "8-bit \N{FIRE}", "a" * 1_000])
def test_prompts_in_any_script_and_with_an_emoji_among_words_are_taken(prompt: str) -> None:
    assert check_prompt(f" {prompt} ") == prompt


@pytest.mark.parametrize(
    ("settings", "got"),
    [
        ({"duration_s": 0.0}, "duration of 0.0 s"),
        ({"duration_s": float("nan")}, "duration of nan s"),
        ({"duration_s": 3_600.0}, "duration of 3600.0 s"),
        ({"seed": -1}, "seed -1"),
        ({"tempo_bpm": 1_000.0}, "tempo of 1000.0 BPM"),
        ({"temperature": 0.0}, "temperature of 0.0"),
        ({"top_k": 17}, "top-k of 17"),
        ({"sample_rate": 1}, "output at 1 Hz"),
    ],
)
def test_a_setting_out_of_range_is_refused(pipeline: MusicPipeline, settings: dict[str, float], got: str) -> None:
    with pytest.raises(UserError, match=got):
        pipeline.generate("jazz trio", **{"duration_s": 1.0, **settings})


def test_a_folder_without_a_policy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"policy\.json"):
        MusicPipeline.from_pretrained(tmp_path)

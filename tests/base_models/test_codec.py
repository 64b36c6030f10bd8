"""The codec: wav <-> codes, for ours and for transformers' models behind the same interface."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import DacConfig, DacModel, EncodecConfig, EncodecModel, MimiConfig, MimiModel

from base_models.codec import CodecConfig, MagnitudeCodec, griffin_lim, load_codec
from base_models.corpus.waves import synthetic_waves
from base_models.errors import UserError

SMALL = CodecConfig(width=32, latent_dim=16, card=16, n_q=3, encoder_blocks=1, decoder_blocks=1, griffin_lim_iterations=8)


@pytest.fixture(scope="module")
def codec() -> MagnitudeCodec:
    torch.manual_seed(0)
    codec = MagnitudeCodec(SMALL)
    crops = synthetic_waves(6, 2.0, 16000).crops(24, 16000, np.random.default_rng(0))
    codec.initialise(torch.from_numpy(crops))
    return codec.eval()


@pytest.fixture(scope="module")
def wav() -> torch.Tensor:
    waves = synthetic_waves(3, 1.0, 16000, seed=1)
    return torch.stack([torch.from_numpy(waves.clip(i))[None] for i in range(3)])


@pytest.mark.parametrize("length", [1, 639, 640, 641, 16000])
def test_t_is_the_length_in_hops_rounded_up(codec, length):
    codes = codec.encode(torch.randn(2, 1, length) * 0.1)
    assert codes.shape == (2, 3, math.ceil(length / 640))
    assert codes.dtype == torch.int64
    assert codec.decode(codes).shape == (2, 1, 640 * codes.shape[2])


def test_padding_is_silence_at_the_end(codec, wav):
    short = wav[..., :15500]
    padded = torch.nn.functional.pad(short, (0, 500))
    assert torch.equal(codec.encode(short), codec.encode(padded))


def test_codes_stay_below_card_and_use_more_than_one_entry(codec, wav):
    codes = codec.encode(wav)
    assert codes.min() >= 0
    assert codes.max() < codec.card
    assert all(len(codes[:, k].unique()) > 2 for k in range(codec.n_q))


def test_a_clip_is_coded_the_same_whatever_its_batch(codec, wav):
    codes = codec.encode(wav)
    assert torch.equal(codes[1:2], codec.encode(wav[1:2]))
    assert torch.equal(codec.decode(codes)[1:2], codec.decode(codes[1:2]))


def test_decoding_twice_gives_the_same_samples_and_leaves_the_random_stream_alone(codec, wav):
    codes = codec.encode(wav[:1])
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = codec.decode(codes)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, codec.decode(codes))


def test_decoded_audio_is_nearer_to_its_original_than_to_other_clips(codec, wav):
    decoded = codec.decode(codec.encode(wav))
    assert bool(torch.isfinite(decoded).all())
    assert decoded.abs().max() <= 1
    spectra = [codec.compress(codec.magnitude(w)) for w in (wav, decoded)]
    distance = (spectra[0][:, None] - spectra[1][None]).abs().mean((2, 3))
    assert torch.equal(distance.argmin(1), torch.arange(3))


def test_encoding_decoded_audio_again_changes_less_than_encoding_another_clip(codec, wav):
    codes = codec.encode(wav)
    again = codec.encode(codec.decode(codes))
    same = (codes[:, 0] == again[:, 0]).float().mean()
    other = (codes[:, 0] == codes[:, 0].roll(1, 0)).float().mean()
    assert same > other + 0.2


def test_latents_are_the_sum_of_codebook_vectors(codec, wav):
    codes = codec.encode(wav)
    by_hand = sum(codec.codebooks[k][codes[:, k]] for k in range(codec.n_q)).transpose(1, 2)
    latents = codec.latents(codes)
    assert latents.shape == (3, codec.latent_dim, codes.shape[2])
    torch.testing.assert_close(latents, by_hand)


def test_encode_picks_the_nearest_entry_of_the_first_codebook(codec, wav):
    with torch.no_grad():
        latents = codec.to_latents(codec.compress(codec.magnitude(wav[:1])))[0]
    nearest = torch.cdist(latents, codec.codebooks[0]).argmin(1)
    assert torch.equal(codec.encode(wav[:1])[0, 0], nearest)


def test_more_codebooks_leave_less_error(codec, wav):
    codes = codec.encode(wav)
    with torch.no_grad():
        latents = codec.to_latents(codec.compress(codec.magnitude(wav)))
    books = codec.codebooks
    partial = torch.stack([books[k][codes[:, k]] for k in range(codec.n_q)]).cumsum(0)
    errors = [(latents - part).square().mean().item() for part in partial]
    assert errors[0] > errors[1] > errors[2]


def test_expand_inverts_compress(codec, wav):
    magnitude = codec.magnitude(wav)
    loud = magnitude > 1e-2
    torch.testing.assert_close(codec.expand(codec.compress(magnitude))[loud], magnitude[loud], rtol=1e-3, atol=1e-4)


def test_griffin_lim_finds_a_signal_with_the_magnitudes_asked_for(codec, wav):
    magnitude = codec.magnitude(wav[:1])[0]

    def distance(iterations: int) -> float:
        found = griffin_lim(magnitude, codec.window, 160, iterations)[:16000]
        return float((codec.magnitude(found[None, None])[0] - magnitude).norm() / magnitude.norm())

    assert distance(32) < 0.2
    assert distance(32) < distance(2)


def test_revive_moves_every_dead_code_beside_a_popular_one(codec):
    copy = MagnitudeCodec(SMALL)
    copy.load_state_dict(codec.state_dict())
    book = copy.rvq.layers[0]._codebook
    book.cluster_size.fill_(1.0)
    book.cluster_size[0, 5] = 0.0
    book.cluster_size[0, 2] = 4.0
    before = book.embed[0].clone()
    assert copy.revive() >= 1
    scale = before.norm(dim=-1).mean()
    assert (book.embed[0, 5] - before[2]).norm() < 0.1 * scale
    assert torch.equal(book.embed[0, 2], before[2])
    assert book.cluster_size[0, 5] == book.cluster_size[0, 2] == 2.0


def test_a_saved_codec_loads_bit_for_bit(codec, wav, tmp_path):
    codec.save(tmp_path)
    loaded = load_codec(tmp_path)
    codes = codec.encode(wav)
    assert torch.equal(loaded.encode(wav), codes)
    assert torch.equal(loaded.decode(codes), codec.decode(codes))
    for name, tensor in codec.tensors().items():
        assert torch.equal(loaded.tensors()[name], tensor), name


def test_half_precision_halves_the_file_and_survives_another_round_trip(codec, wav, tmp_path):
    codec.save(tmp_path / "full")
    codec.save(tmp_path / "half", torch.float16)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("full", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    first = load_codec(tmp_path / "half")
    first.save(tmp_path / "again", torch.float16)
    second = load_codec(tmp_path / "again")
    assert first.sha256() == second.sha256() != codec.sha256()
    assert torch.equal(first.encode(wav), second.encode(wav))


@pytest.mark.parametrize(
    ("wav", "rate", "said"),
    [
        (torch.zeros(1, 1, 100), 44100, "44100 Hz"),
        (torch.zeros(1, 100), None, "shape"),
        (torch.zeros(1, 2, 100), None, "shape"),
        (torch.zeros(1, 1, 0), None, "shape"),
        (torch.zeros(1, 1, 100, dtype=torch.int16), None, "int16"),
        (torch.full((1, 1, 100), math.nan), None, "NaN"),
    ],
)
def test_wrong_audio_is_refused_with_a_remedy(codec, wav, rate, said):
    with pytest.raises(UserError, match=said) as error:
        codec.encode(wav, rate)
    assert error.value.remedy


@pytest.mark.parametrize(
    "codes",
    [
        torch.zeros(1, 4, 5, dtype=torch.long),
        torch.zeros(3, 5, dtype=torch.long),
        torch.zeros(1, 3, 0, dtype=torch.long),
        torch.zeros(1, 3, 5),
        torch.full((1, 3, 5), 16),
        torch.full((1, 3, 5), -1),
    ],
)
def test_wrong_codes_are_refused(codec, codes):
    with pytest.raises(UserError):
        codec.decode(codes)


def test_a_folder_that_is_no_codec_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        load_codec(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="bert"):
        load_codec(tmp_path)


def test_tensors_of_another_shape_are_refused(codec, tmp_path):
    codec.save(tmp_path)
    text = (tmp_path / "config.json").read_text().replace('"width": 32', '"width": 48')
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="other tensors"):
        load_codec(tmp_path)


def test_the_default_shape_is_four_codebooks_at_25_hz_in_less_than_9_mb():
    codec = MagnitudeCodec()
    assert (codec.sample_rate, codec.frame_rate, codec.n_q, codec.card, codec.hop_length) == (16000, 25.0, 4, 1024, 640)
    assert 2 * sum(tensor.numel() for tensor in codec.tensors().values()) < 9e6


# ---- transformers' codecs --------------------------------------------------------------------------------------------


def _encodec() -> EncodecModel:
    return EncodecModel(
        EncodecConfig(
            target_bandwidths=[6.0],
            sampling_rate=16000,
            num_filters=4,
            hidden_size=8,
            codebook_dim=8,
            codebook_size=16,
            upsampling_ratios=[8, 5, 4, 2],
            num_lstm_layers=1,
        )
    )


def _dac() -> DacModel:
    return DacModel(
        DacConfig(
            encoder_hidden_size=4,
            downsampling_ratios=[2, 4, 8],
            upsampling_ratios=[8, 4, 2],
            decoder_hidden_size=32,
            n_codebooks=3,
            codebook_size=16,
            codebook_dim=4,
            hidden_size=32,
        )
    )


def _mimi() -> MimiModel:
    return MimiModel(
        MimiConfig(
            sampling_rate=16000,
            hidden_size=16,
            num_filters=4,
            codebook_size=16,
            codebook_dim=8,
            vector_quantization_hidden_dimension=8,
            num_quantizers=4,
            num_hidden_layers=1,
            intermediate_size=16,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            upsample_groups=16,
        )
    )


@pytest.fixture(params=["encodec", "dac", "mimi"])
def foreign_folder(request, tmp_path):
    torch.manual_seed(0)
    model = {"encodec": _encodec, "dac": _dac, "mimi": _mimi}[request.param]().eval()
    for name, buffer in model.named_buffers():  # untrained codebooks are all zero, so every code would sound alike
        if name.endswith(("embed", "embed_sum")):
            buffer.normal_()
    model.save_pretrained(tmp_path)
    return tmp_path


def test_a_transformers_codec_speaks_the_same_interface(foreign_folder):
    codec = load_codec(foreign_folder)
    wav = torch.randn(2, 1, 4000) * 0.1
    codes = codec.encode(wav, codec.sample_rate)
    T = math.ceil(4000 / codec.hop_length)
    assert codes.shape == (2, codec.n_q, T)
    assert codes.dtype == torch.int64
    assert len(codes.unique()) > 1
    decoded = codec.decode(codes)
    assert decoded.shape == (2, 1, T * codec.hop_length)
    assert decoded.std() > 0
    assert torch.equal(codec.decode(codes[1:]), decoded[1:])
    assert codec.latents(codes).shape == (2, codec.latent_dim, T)
    with pytest.raises(UserError):
        codec.encode(wav, 44100)


def test_a_transformers_codecs_latents_are_the_sum_of_its_codebooks(foreign_folder):
    codec = load_codec(foreign_folder)
    codes = torch.randint(codec.card, (2, codec.n_q, 5))
    books = codec.codebooks
    assert books.shape == (codec.n_q, codec.card, codec.latent_dim)
    by_hand = sum(books[k][codes[:, k]] for k in range(codec.n_q)).transpose(1, 2)
    torch.testing.assert_close(codec.latents(codes), by_hand, rtol=1e-3, atol=1e-4)


def test_a_transformers_codec_survives_save_and_load(foreign_folder, tmp_path):
    codec = load_codec(foreign_folder)
    codec.save(tmp_path / "copy")
    again = load_codec(tmp_path / "copy")
    assert again.sha256() == codec.sha256()


def test_fewer_codebooks_can_be_asked_of_a_transformers_codec(foreign_folder):
    codec = load_codec(foreign_folder, n_q=2)
    codes = codec.encode(torch.randn(1, 1, 2000) * 0.1)
    assert codes.shape[1] == 2
    assert codec.decode(codes).shape[-1] >= 2000
    with pytest.raises(UserError, match="n_q=99"):
        load_codec(foreign_folder, n_q=99)

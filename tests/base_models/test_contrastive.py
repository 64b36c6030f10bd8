"""The audio-text embedding, its loss and its recall."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from base_models.codec import CodecConfig, MagnitudeCodec, load_codec
from base_models.contrastive import AudioTextModel, ContrastiveConfig, contrastive_loss, load_contrastive, recall_at
from base_models.errors import UserError

SMALL = ContrastiveConfig(n_q=2, card=8, latent_dim=6, width=16, blocks=2, embed_dim=12)


@pytest.fixture(scope="module")
def model() -> AudioTextModel:
    torch.manual_seed(0)
    model = AudioTextModel(SMALL)
    model.set_codebooks(torch.randn(2, 8, 6))
    return model.eval()


@pytest.fixture
def codes() -> torch.Tensor:
    return torch.randint(8, (3, 2, 20), generator=torch.Generator().manual_seed(1))


def test_both_ends_are_unit_vectors_of_one_space(model, codes):
    with torch.no_grad():
        audio, text = model.embed_codes(codes), model.embed_text(["jazz", "a slow sad piano piece"])
    assert audio.shape == (3, 12)
    assert text.shape == (2, 12)
    torch.testing.assert_close(audio.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(text.norm(dim=1), torch.ones(2))
    assert (text[0] - text[1]).abs().max() > 1e-3


def test_a_clips_embedding_does_not_depend_on_its_batch(model, codes):
    with torch.no_grad():
        torch.testing.assert_close(model.embed_codes(codes)[1:2], model.embed_codes(codes[1:2]))
        features = model.features(codes)
    assert features.shape == (3, model.feature_dim)


def test_every_codebook_is_heard(model, codes):
    for k in range(2):
        changed = codes.clone()
        changed[:, k] = (changed[:, k] + 1) % 8
        with torch.no_grad():
            assert (model.features(changed) - model.features(codes)).abs().max() > 1e-4


def test_gradients_reach_the_towers_but_neither_the_codebooks_nor_the_text_encoder(model, codes):
    audio, text, scale = model(codes, model.text_encoder.pooled(["a", "b", "c"]))
    contrastive_loss(audio, text, scale, torch.eye(3, dtype=torch.bool)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.zero_grad()
    assert not model.codebooks.requires_grad
    assert not any(name.startswith("_text_encoder") or "codebooks" in name for name, _ in model.named_parameters())


def test_a_saved_model_loads_bit_for_bit(model, codes, tmp_path):
    model.save(tmp_path)
    loaded = load_contrastive(tmp_path)
    assert loaded.sha256() == model.sha256()
    assert loaded.config == model.config
    with torch.no_grad():
        assert torch.equal(loaded.embed_codes(codes), model.embed_codes(codes))


def test_half_precision_moves_embeddings_by_little(model, codes, tmp_path):
    model.save(tmp_path, torch.float16)
    with torch.no_grad():
        torch.testing.assert_close(load_contrastive(tmp_path).embed_codes(codes), model.embed_codes(codes), atol=5e-3, rtol=0)


def test_folders_that_are_no_such_model_are_refused(model, tmp_path):
    with pytest.raises(UserError):
        load_contrastive(tmp_path)
    model.save(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"width": 16', '"width": 24'))
    with pytest.raises(UserError, match="other tensors"):
        load_contrastive(tmp_path)
    (tmp_path / "config.json").write_text(text.replace("encore_audio_text", "bert"))
    with pytest.raises(UserError, match="bert"):
        load_contrastive(tmp_path)


def test_codes_of_another_codec_and_blinks_of_an_eye_are_refused(model):
    with pytest.raises(UserError):
        model.features(torch.full((1, 2, 20), 8))
    with pytest.raises(UserError, match="3 frames"):
        model.features(torch.zeros(1, 2, 3, dtype=torch.long))


def test_without_shared_captions_the_loss_is_clips_cross_entropy():
    torch.manual_seed(0)
    audio, text = F.normalize(torch.randn(5, 4), dim=1), F.normalize(torch.randn(5, 4), dim=1)
    logits, labels = 7.0 * audio @ text.T, torch.arange(5)
    clip = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(contrastive_loss(audio, text, torch.tensor(7.0), torch.eye(5).bool()), clip)


def test_two_clips_with_one_caption_do_not_push_each_other_away():
    audio = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), dim=1)
    same = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]]).bool()
    shared = audio.clone().requires_grad_()
    contrastive_loss(shared, audio, torch.tensor(50.0), same).backward()
    assert shared.grad[:2].abs().max() < 1e-4
    strict = audio.clone().requires_grad_()
    loss = contrastive_loss(strict, audio, torch.tensor(50.0), torch.eye(3).bool())
    assert loss.item() == pytest.approx(2 / 3 * math.log(2), abs=1e-4)


def test_recall_counts_a_right_clip_among_the_first_k():
    similarity = torch.tensor([[0.9, 0.8, 0.1, 0.0], [0.9, 0.8, 0.1, 0.0]])
    right = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 1]]).bool()
    recall, chance = recall_at(similarity, right, k=2)
    assert recall == 0.5
    assert chance == 0.5


def test_a_model_that_ties_all_clips_scores_exactly_chance():
    right = torch.zeros(3, 20, dtype=torch.bool)
    right[0, :1] = right[1, :3] = right[2, 19] = True
    recall, chance = recall_at(torch.zeros(3, 20), right, k=5)
    assert recall == pytest.approx(chance)
    assert chance == pytest.approx((0.25 + 0.25 + _three_of_twenty()) / 3)


def _three_of_twenty() -> float:
    """1 - P(no one of 3 special balls among 5 draws of 20), by counting draw after draw."""
    miss = 1.0
    for draw in range(5):
        miss *= (17 - draw) / (20 - draw)
    return 1 - miss


def test_model_saved_without_codebooks_takes_them_from_the_codec_beside_it(tmp_path):
    torch.manual_seed(0)
    codec = MagnitudeCodec(CodecConfig(width=16, latent_dim=8, encoder_blocks=1, decoder_blocks=1, n_q=2, card=8))
    codec.save(tmp_path / "codec")
    codec = load_codec(tmp_path / "codec")
    config = ContrastiveConfig(n_q=2, card=8, latent_dim=8, width=16, blocks=1, embed_dim=8, text_dim=12, codec_sha256=codec.sha256())
    model = AudioTextModel(config).eval()
    model.set_codebooks(codec.codebooks)
    model.save(tmp_path / "contrastive", codebooks=False)
    codes = torch.randint(0, 8, (2, 2, 10))
    assert torch.equal(load_contrastive(tmp_path / "contrastive").embed_codes(codes), model.embed_codes(codes))
    with torch.no_grad():
        codec.mean += 1
    codec.save(tmp_path / "codec")
    with pytest.raises(UserError, match="restore the codec"):
        load_contrastive(tmp_path / "contrastive")

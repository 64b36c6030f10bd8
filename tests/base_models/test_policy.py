import json

import pytest
import torch
from transformers import EncodecConfig, EncodecModel

from base_models.checkpoint import save_tensors
from base_models.codec import CodecConfig, MagnitudeCodec, load_codec
from base_models.contrastive import AudioTextModel, ContrastiveConfig
from base_models.errors import UserError
from base_models.lm import MusicLM, MusicLMConfig
from base_models.policy import assemble, load_policy, save_policy
from base_models.sampling import generate


@pytest.fixture
def parts(tmp_path):
    """Folders of a tiny codec, language model and shared space that belong together."""
    torch.manual_seed(0)
    codec = MagnitudeCodec(CodecConfig(width=16, latent_dim=8, encoder_blocks=1, decoder_blocks=1, n_q=4, card=32))
    codec.save(tmp_path / "codec", torch.float16)
    codec = load_codec(tmp_path / "codec")
    shape = MusicLMConfig(card=32, d_model=32, n_layers=1, n_heads=2, d_ff=64, codec_sha256=codec.sha256())
    MusicLM(shape).save(tmp_path / "lm")
    shared = AudioTextModel(ContrastiveConfig(n_q=4, card=32, latent_dim=8, width=16, blocks=1, embed_dim=8, codec_sha256=codec.sha256()))
    shared.set_codebooks(codec.codebooks)
    shared.save(tmp_path / "contrastive")
    return tmp_path


def test_assembled_policy_plays_and_has_one_hash(parts):
    policy = assemble(parts / "lm", parts / "codec", parts / "contrastive", parts / "policy")
    again = load_policy(parts / "policy")
    assert again.sha256 == policy.sha256
    cond = again.conditions(["sad piano", "techno, 130 BPM"])
    codes = generate(again.lm, cond, again.n_frames(1.0), seeds=[0, 1]).codes
    assert codes.shape == (2, 4, 25)
    assert again.decode(codes).shape == (2, 1, 16000)
    assert torch.isfinite(again.contrastive.embed_codes(codes)).all()


def test_a_shared_space_over_a_transformers_codec_is_assembled_too(tmp_path):
    torch.manual_seed(0)
    small = {"num_filters": 4, "hidden_size": 8, "codebook_dim": 8, "codebook_size": 16, "upsampling_ratios": [8, 5, 4, 2]}
    model = EncodecModel(EncodecConfig(target_bandwidths=[6.0], sampling_rate=16000, num_lstm_layers=1, **small)).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("embed"):
            buffer.normal_()
    model.save_pretrained(tmp_path / "codec")
    codec = load_codec(tmp_path / "codec")
    of_it = {"n_q": codec.n_q, "card": codec.card, "codec_sha256": codec.sha256()}
    MusicLM(MusicLMConfig(d_model=32, n_layers=1, n_heads=2, d_ff=64, **of_it)).save(tmp_path / "lm")
    shared = AudioTextModel(ContrastiveConfig(latent_dim=codec.codebooks.shape[-1], width=16, blocks=1, embed_dim=8, **of_it))
    shared.set_codebooks(codec.codebooks)
    shared.save(tmp_path / "contrastive")
    policy = assemble(tmp_path / "lm", tmp_path / "codec", tmp_path / "contrastive", tmp_path / "policy")
    assert torch.equal(policy.contrastive.codebooks, shared.codebooks)


def test_parts_of_two_codecs_are_not_put_together(parts):
    torch.manual_seed(1)
    other = MagnitudeCodec(CodecConfig(width=16, latent_dim=8, encoder_blocks=1, decoder_blocks=1, n_q=4, card=32))
    other.save(parts / "other")
    with pytest.raises(UserError, match="tokens of this codec"):
        assemble(parts / "lm", parts / "other", None, parts / "policy")
    assert not (parts / "policy").exists()


def test_a_codec_that_was_changed_later_is_refused(parts):
    policy = assemble(parts / "lm", parts / "codec", parts / "contrastive", parts / "policy")
    tensors = {name: t.clone() for name, t in policy.codec.state_dict().items()}
    tensors["mean"] += 1
    save_tensors(parts / "policy" / "codec" / "model.safetensors", tensors)
    with pytest.raises(UserError, match="codec"):
        load_policy(parts / "policy")


def test_any_changed_weight_changes_the_hash(parts):
    policy = assemble(parts / "lm", parts / "codec", parts / "contrastive", parts / "policy")
    with torch.no_grad():
        policy.lm.no_tempo[0] += 1
    save_policy(parts / "changed", policy.lm, policy.codec, policy.contrastive)
    assert load_policy(parts / "changed").sha256 != policy.sha256


def test_a_folder_that_is_no_policy_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"policy\.json"):
        load_policy(tmp_path)


def test_another_vocabulary_is_refused(parts):
    policy = assemble(parts / "lm", parts / "codec", None, parts / "policy")
    lm = MusicLM(MusicLMConfig(card=16, d_model=32, n_layers=1, n_heads=2, d_ff=64))
    lm.save(parts / "policy" / "lm")
    assert json.loads((parts / "policy" / "policy.json").read_text())["frame_rate"] == policy.codec.frame_rate
    with pytest.raises(UserError, match="same vocabulary"):
        load_policy(parts / "policy")

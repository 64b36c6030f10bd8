import json
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import EncodecConfig, MusicgenConfig, MusicgenForConditionalGeneration, PreTrainedTokenizerFast, T5Config
from transformers.models.musicgen.configuration_musicgen import MusicgenDecoderConfig

from base_models.conditions import Conditions
from base_models.errors import UserError
from base_models.lm import MusicLM, MusicLMConfig, codes_of_steps, disable_functional_dropout, load_lm, sum_by_step
from base_models.patterns import delay_mask
from base_models.sampling import generate
from base_models.text_encoder import load_text_encoder


@pytest.fixture
def codes():
    return torch.randint(0, 32, (3, 4, 9), generator=torch.Generator().manual_seed(2))


def test_step_log_prob_is_the_joint_of_the_codes_that_stand_there(tiny_lm, tiny_conditions, codes):
    logps = tiny_lm.logps(codes, tiny_conditions)
    logits = tiny_lm.heads(tiny_lm.hidden(codes, tiny_conditions))  # [B, K, S, V]
    expected = torch.zeros_like(logps)
    for k, s in delay_mask(4, 9).nonzero().tolist():
        probability = logits[:, k, s].softmax(-1)
        expected[:, s] += probability[torch.arange(3), codes[:, k, s - k]].log()
    torch.testing.assert_close(logps, expected, atol=1e-5, rtol=1e-5)


def test_a_code_changes_no_step_up_to_its_own(tiny_lm, tiny_conditions, codes):
    before = tiny_lm.hidden(codes, tiny_conditions)
    for k, t in ((0, 0), (2, 3), (3, 8)):
        changed = codes.clone()
        changed[:, k, t] = (changed[:, k, t] + 1) % 32
        after = tiny_lm.hidden(changed, tiny_conditions)
        own = k + t
        torch.testing.assert_close(after[:, : own + 1], before[:, : own + 1])
        if own + 1 < before.shape[1]:
            assert not torch.allclose(after[:, own + 1 :], before[:, own + 1 :])


def test_padding_of_the_text_changes_nothing(tiny_lm, tiny_conditions, codes):
    c = tiny_conditions
    longer = Conditions(torch.randn(1, 9, 16), torch.ones(1, 9).bool(), torch.tensor([60.0]))
    both = Conditions.cat([c, longer])
    padded = Conditions(both.text[:3], both.mask[:3], both.tempo_bpm[:3])
    wide = Conditions(torch.cat([c.text, torch.randn(3, 4, 16)], 1), torch.cat([c.mask, torch.zeros(3, 4).bool()], 1), c.tempo_bpm)
    for other in (padded, wide):
        torch.testing.assert_close(tiny_lm(codes, other), tiny_lm(codes, c), atol=1e-5, rtol=1e-5)


def test_tempo_and_text_both_reach_the_codes(tiny_lm, tiny_conditions, codes):
    c = tiny_conditions
    faster = Conditions(c.text, c.mask, c.tempo_bpm + 40)
    assert not torch.allclose(tiny_lm(codes, faster)[0], tiny_lm(codes, c)[0])
    assert torch.allclose(tiny_lm(codes, faster)[1], tiny_lm(codes, c)[1])  # no tempo was given there
    assert not torch.allclose(tiny_lm(codes, c.null())[1], tiny_lm(codes, c)[1])


def test_the_beat_clock_turns_once_a_beat_and_only_where_a_tempo_is_known(tiny_lm, tiny_conditions):
    c = Conditions(tiny_conditions.text, tiny_conditions.mask, torch.tensor([75.0, float("nan"), 150.0]))
    plain = tiny_lm.decoder.model.decoder.embed_positions(torch.zeros(1, 1, 200))
    clock = tiny_lm.positions(c, 200) - plain  # 25 frames a second: 20 a beat at 75 BPM, 10 at 150
    assert clock[1].abs().max() == 0
    torch.testing.assert_close(clock[2, :100], clock[0, :200:2], atol=1e-4, rtol=0)
    all_hands = 20 * 24  # frames after which 8 beats and 3 beats are both over
    again = tiny_lm.positions(c, all_hands + 5) - tiny_lm.decoder.model.decoder.embed_positions(torch.zeros(1, 1, all_hands + 5))
    torch.testing.assert_close(again[0, all_hands:], again[0, :5], atol=1e-3, rtol=0)
    assert not torch.allclose(again[0, 20:25], again[0, :5], atol=0.1)  # the bar's hands have not come round after one beat


def test_a_clock_without_a_tempo_is_refused():
    with pytest.raises(ValueError, match="runs by the tempo"):
        MusicLM(MusicLMConfig(d_model=32, n_layers=1, n_heads=2, d_ff=64, tempo=False, beat_clock=True))


def test_unconditional_rows_are_all_alike(tiny_lm, tiny_conditions, codes):
    same = codes[:1].expand(3, -1, -1)
    out = tiny_lm(same, tiny_conditions.null())
    torch.testing.assert_close(out[0], out[1])
    torch.testing.assert_close(out[0], out[2])


def test_temperature_scales_the_logits(tiny_lm, tiny_conditions, codes):
    logits = tiny_lm(codes, tiny_conditions) / 0.7
    picked = logits.log_softmax(-1).gather(-1, codes[..., None])[..., 0]
    torch.testing.assert_close(tiny_lm.logps(codes, tiny_conditions, temperature=0.7), sum_by_step(picked), atol=1e-5, rtol=1e-5)


def test_saved_model_comes_back_bit_for_bit(tiny_lm, tiny_conditions, codes, tmp_path):
    tiny_lm.save(tmp_path)
    again = load_lm(tmp_path)
    assert torch.equal(again(codes, tiny_conditions), tiny_lm(codes, tiny_conditions))
    assert again.sha256() == tiny_lm.sha256()


def test_a_changed_weight_changes_the_hash(tiny_lm):
    before = tiny_lm.sha256()
    with torch.no_grad():
        tiny_lm.decoder.lm_heads[0].weight[0, 0] += 1e-3
    assert tiny_lm.sha256() != before


def test_weights_that_do_not_fit_their_config_are_refused(tiny_lm, tmp_path):
    tiny_lm.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "n_layers": 3}))
    with pytest.raises(UserError, match="unfit tensors"):
        load_lm(tmp_path)


def test_text_of_another_encoder_is_refused(tiny_lm, codes):
    with pytest.raises(UserError, match="width 8"):
        tiny_lm(codes, Conditions(torch.zeros(3, 2, 8), torch.ones(3, 2).bool(), torch.full((3,), 100.0)))


def test_scrubbed_model_is_deterministic_in_train_mode(tiny_lm, tiny_conditions, codes):
    tiny_lm.train()
    assert not torch.equal(tiny_lm(codes, tiny_conditions), tiny_lm(codes, tiny_conditions))
    disable_functional_dropout(tiny_lm)
    assert torch.equal(tiny_lm(codes, tiny_conditions), tiny_lm(codes, tiny_conditions))


def test_both_attentions_compute_the_same(tiny_lm, tiny_conditions, codes):
    before = tiny_lm(codes, tiny_conditions)
    tiny_lm.fast_training()
    torch.testing.assert_close(tiny_lm(codes, tiny_conditions), before, atol=1e-5, rtol=1e-5)


@pytest.fixture
def musicgen_folder(tmp_path):
    torch.manual_seed(3)
    config = MusicgenConfig(
        text_encoder=T5Config(vocab_size=64, d_model=24, d_ff=32, num_layers=1, num_heads=2, d_kv=12).to_dict(),
        audio_encoder=EncodecConfig(hidden_size=16, num_filters=4, codebook_size=32, codebook_dim=16).to_dict(),
        decoder=MusicgenDecoderConfig(
            vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=64, num_codebooks=4,
            pad_token_id=32, bos_token_id=32,
        ).to_dict(),
    )  # fmt: skip
    model = MusicgenForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.decoder.parameters():  # large weights, so that the greedy choice is not a tie
            parameter.normal_(0, 0.2)
    model.save_pretrained(tmp_path)
    return tmp_path, model


def test_the_text_encoder_of_a_musicgen_folder_is_its_t5(musicgen_folder):
    folder, model = musicgen_folder
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "sad", "piano"])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **tokens).save_pretrained(folder)
    encoder = load_text_encoder(load_lm(folder).config.text_encoder)
    states, mask = encoder.encode(["sad piano"])
    with torch.no_grad():
        wanted = model.text_encoder(input_ids=torch.tensor([[3, 4]])).last_hidden_state
    torch.testing.assert_close(states[:, mask[0]], wanted)


def test_musicgen_folder_gives_the_greedy_codes_of_transformers(musicgen_folder, monkeypatch):
    folder, model = musicgen_folder
    lm = load_lm(folder)
    ids = torch.tensor([[5, 9, 3, 7], [8, 2, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    with torch.no_grad():
        text = model.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    cond = Conditions(text, mask.bool(), torch.full((2,), float("nan")))
    T = 12
    ours = generate(lm, cond, T, seeds=[0, 0], greedy=True).codes
    heard = {}

    def listen(codes, audio_scales=None, **_):
        heard["codes"] = codes
        return SimpleNamespace(audio_values=torch.zeros(codes.shape[1], 1, 1))

    monkeypatch.setattr(model.audio_encoder, "decode", listen)
    settings = model.generation_config
    settings.pad_token_id = settings.bos_token_id = settings.decoder_start_token_id = 32
    model.generate(input_ids=ids, attention_mask=mask, do_sample=False, guidance_scale=1.0, max_new_tokens=T + 3)
    theirs = heard["codes"][0]
    assert torch.equal(ours, theirs)


def test_musicgen_without_text_is_unconditional(musicgen_folder):
    lm = load_lm(musicgen_folder[0])
    cond = Conditions(torch.randn(2, 3, 24), torch.ones(2, 3).bool(), torch.full((2,), float("nan")))
    codes = torch.randint(0, 32, (1, 4, 6)).expand(2, -1, -1)
    out = lm(codes, cond.null())
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out[0], out[1])


def test_unknown_pattern_is_refused():
    with pytest.raises(UserError, match="delay"):
        MusicLM(MusicLMConfig(pattern="flatten"))


def test_each_code_has_the_value_of_the_step_at_which_it_stands():
    """codes_of_steps is the adjoint of sum_by_step."""
    codes, steps = torch.randn(2, 4, 5), torch.randn(2, 8)
    torch.testing.assert_close((sum_by_step(codes) * steps).sum(), (codes * codes_of_steps(steps, 4)).sum())
    assert codes_of_steps(torch.arange(8)[None], 4).tolist() == [[[0, 1, 2, 3, 4], [1, 2, 3, 4, 5], [2, 3, 4, 5, 6], [3, 4, 5, 6, 7]]]

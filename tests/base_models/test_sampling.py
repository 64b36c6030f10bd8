import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from base_models.errors import UserError
from base_models.lm import LORA_TARGETS
from base_models.patterns import undelay
from base_models.sampling import Matrix, Stepper, filtered_log_probs, generate


def test_sampler_and_teacher_forcing_give_one_log_prob(tiny_lm, tiny_conditions):
    made = generate(tiny_lm, tiny_conditions, 11, seeds=[1, 2, 3], temperature=0.8)
    logps, hidden = tiny_lm.logps(made.codes, tiny_conditions, temperature=0.8, return_hidden=True)
    torch.testing.assert_close(made.logps, logps, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made.hidden, hidden, atol=1e-5, rtol=1e-5)


def test_what_every_choice_had_is_kept_where_it_is_asked_for(tiny_lm, tiny_conditions):
    how = {"seeds": [1, 2, 3], "temperature": 0.8}
    made = generate(tiny_lm, tiny_conditions, 11, **how, with_choices=True)
    logits = tiny_lm(made.codes, tiny_conditions) / 0.8
    torch.testing.assert_close(made.choice_logps, logits.log_softmax(-1), atol=1e-5, rtol=1e-5)
    without = generate(tiny_lm, tiny_conditions, 11, **how)
    assert torch.equal(without.codes, made.codes)
    assert without.choice_logps.numel() == 0
    assert without.choice_logps.shape[:3] == made.codes.shape


@pytest.mark.parametrize("how", [{"temperature": 1e-40}, {"cfg_coef": 1e39}])
def test_nothing_is_drawn_by_probabilities_that_are_no_numbers(tiny_lm, tiny_conditions, how):
    """Each code would be the codebook's last, and the clip mastered like any other."""
    with pytest.raises(UserError, match="probabilities that are no numbers"):
        generate(tiny_lm, tiny_conditions, 4, seeds=[1, 2, 3], **how)


def test_a_row_depends_on_its_seed_and_not_on_its_batch(tiny_lm, tiny_conditions):
    together = generate(tiny_lm, tiny_conditions, 8, seeds=[4, 5, 6]).codes
    for row, seed in enumerate((4, 5, 6)):
        alone = generate(tiny_lm, tiny_conditions.index([row]), 8, seeds=[seed]).codes
        assert torch.equal(alone[0], together[row])


def test_other_seeds_give_other_codes_and_equal_seeds_equal_codes(tiny_lm, tiny_conditions):
    cond = tiny_conditions.index([0, 0, 0])
    codes = generate(tiny_lm, cond, 8, seeds=[1, 1, 2]).codes
    assert torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], codes[2])


def test_a_longer_clip_begins_like_the_shorter_one(tiny_lm, tiny_conditions):
    short = generate(tiny_lm, tiny_conditions, 6, seeds=[1, 2, 3]).codes
    long = generate(tiny_lm, tiny_conditions, 12, seeds=[1, 2, 3]).codes
    assert torch.equal(long[:, 0, :6], short[:, 0])
    assert torch.equal(long[..., :3], short[..., :3])


def test_drawn_frequencies_follow_the_probabilities(tiny_lm, tiny_conditions):
    n = 4000
    cond = tiny_conditions.index([0] * n)
    first = generate(tiny_lm, cond, 1, seeds=range(n)).codes[:, 0, 0]
    expected = tiny_lm(torch.zeros((1, 4, 1), dtype=torch.long), tiny_conditions.index([0]))[0, 0, 0].softmax(-1)
    found = torch.bincount(first, minlength=32) / n
    assert (found - expected).abs().max() < 5 * (expected.max() / n).sqrt()


def test_top_k_never_draws_another_code_and_is_scored_as_it_was_drawn(tiny_lm, tiny_conditions):
    made = generate(tiny_lm, tiny_conditions, 10, seeds=[1, 2, 3], top_k=3)
    logits = tiny_lm(made.codes, tiny_conditions)
    rank = (logits > logits.gather(-1, made.codes[..., None])).sum(-1)
    assert rank.max() < 3
    scored = filtered_log_probs(logits, 1.0, 3).gather(-1, made.codes[..., None])[..., 0]
    torch.testing.assert_close(made.code_logps, scored, atol=1e-4, rtol=1e-4)


def test_guidance_mixes_the_logits_of_both_passes(tiny_lm, tiny_conditions):
    made = generate(tiny_lm, tiny_conditions, 6, seeds=[1, 2, 3], cfg_coef=2.5)
    given, null = tiny_lm(made.codes, tiny_conditions), tiny_lm(made.codes, tiny_conditions.null())
    scored = (null + 2.5 * (given - null)).log_softmax(-1).gather(-1, made.codes[..., None])[..., 0]
    torch.testing.assert_close(made.code_logps, scored, atol=1e-4, rtol=1e-4)


def test_adapter_is_folded_in_while_sampling(tiny_lm, tiny_conditions):
    plain = generate(tiny_lm, tiny_conditions, 6, seeds=[1, 2, 3])
    config = LoraConfig(r=4, lora_alpha=8, target_modules=LORA_TARGETS, init_lora_weights=False)
    inject_adapter_in_model(config, tiny_lm)
    tiny_lm.eval()
    adapted = generate(tiny_lm, tiny_conditions, 6, seeds=[1, 2, 3])
    torch.testing.assert_close(adapted.logps, tiny_lm.logps(adapted.codes, tiny_conditions), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(adapted.hidden, plain.hidden)


def test_stepper_agrees_with_the_network_at_every_step(tiny_lm, tiny_conditions):
    codes = torch.randint(0, 32, (3, 4, 7))
    hidden = tiny_lm.hidden(codes, tiny_conditions)
    from base_models.patterns import delay

    steps = delay(codes, tiny_lm.special)
    stepper = Stepper(tiny_lm, tiny_conditions, steps.shape[-1])
    tokens = torch.full((3, 4), tiny_lm.special)
    for s in range(steps.shape[-1]):
        with torch.no_grad():
            torch.testing.assert_close(stepper.step(tokens), hidden[:, s], atol=1e-5, rtol=1e-5)
        tokens = steps[:, :, s]
    assert torch.equal(undelay(steps), codes)


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"top_k": -1}, {"top_k": 33}, {"n_frames": 0}, {"seeds": [1]}])
def test_impossible_requests_are_refused(tiny_lm, tiny_conditions, wrong):
    with pytest.raises(ValueError, match=r"needed|seeds"):
        generate(tiny_lm, tiny_conditions, **({"n_frames": 4, "seeds": [1, 2, 3]} | wrong))


@pytest.mark.parametrize("rows", [1, 2, 16])
def test_a_packed_matrix_is_the_plain_product(rows):
    weight, x, residual = torch.randn(48, 32), torch.randn(rows, 32), torch.randn(rows, 48)
    matrix = Matrix(weight, rows)
    assert (matrix.packed is not None) == (rows > 1 and torch.backends.mkldnn.is_available())
    torch.testing.assert_close(matrix(x), x @ weight.T, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(matrix.plus(x, residual), residual + x @ weight.T, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(matrix.gelu(x), torch.nn.functional.gelu(x @ weight.T), atol=1e-5, rtol=1e-5)


def test_an_activation_other_than_gelu_is_applied_too(tiny_lm, tiny_conditions):
    for layer in tiny_lm.decoder.model.decoder.layers:
        layer.activation_fn = torch.nn.ReLU()
    made = generate(tiny_lm, tiny_conditions, 6, seeds=[1, 2, 3])
    torch.testing.assert_close(made.logps, tiny_lm.logps(made.codes, tiny_conditions), atol=1e-5, rtol=1e-5)


def test_a_sampler_in_half_precision_is_not_packed(tiny_lm, tiny_conditions):
    stepper = Stepper(tiny_lm.bfloat16(), tiny_conditions, 4)
    assert stepper.head.packed is None
    with torch.no_grad():
        assert stepper.step(torch.full((3, 4), tiny_lm.special)).dtype == torch.bfloat16

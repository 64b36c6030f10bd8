"""The flat view scores exactly what the LM scores, causally, and cuts nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from trl.trainer.utils import add_fused_lm_head

from adapters.lora import attach_lora
from base_models.conditions import Conditions
from base_models.lm import MusicLM, MusicLMConfig
from base_models.sampling import generate
from rlhf.flat_policy import (
    PAD,
    FlatCausalLM,
    flat_order,
    flatten_codes,
    make_tokenizer,
    prompt_id,
    unflatten_ids,
    use_native_heads,
)

K, V, T = 4, 16, 7


@pytest.fixture
def lm() -> MusicLM:
    torch.manual_seed(0)
    return MusicLM(MusicLMConfig(n_q=K, card=V, d_model=32, n_layers=2, n_heads=2, d_ff=48, text_dim=12, beat_clock=True)).eval()


@pytest.fixture
def table() -> Conditions:
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(5)[None] < torch.tensor([2, 5, 3])[:, None]
    return Conditions(torch.randn(3, 5, 12, generator=generator), mask, torch.tensor([90.0, float("nan"), 140.0]))


@pytest.fixture
def codes() -> Tensor:
    return torch.randint(0, V, (3, K, T), generator=torch.Generator().manual_seed(2))


def batch(flat: FlatCausalLM, clips: list[Tensor], rows: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """(input_ids, attention_mask, labels), padded on the right as TRL's collator does."""
    sequences = [[*prompt, *ids] for prompt, ids in (flat.sequence(row, clip) for clip, row in zip(clips, rows))]
    width = max(map(len, sequences))
    ids = torch.tensor([sequence + [PAD] * (width - len(sequence)) for sequence in sequences])
    labels = ids.masked_fill(ids == PAD, -100)
    labels[:, 0] = -100
    return ids, (ids != PAD).long(), labels


def native(lm: MusicLM, clip: Tensor, cond: Conditions, temperature: float = 1.0) -> Tensor:
    """Log-prob of each code in flat order, straight from the LM: [K * T]."""
    per_code, _ = lm.code_logps(clip[None], cond, temperature)
    book, frame = flat_order(K, clip.shape[1])
    return per_code[0, book, frame]


def test_flat_ids_and_back_are_the_same_codes(codes):
    ids = flatten_codes(codes, V)
    assert ids.shape == (3, K * T)
    assert torch.equal(unflatten_ids(ids, K, V), codes)


@pytest.mark.parametrize("way", ["native", "trl"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@torch.no_grad()
def test_flat_log_probs_equal_the_lm_in_every_code(lm, table, codes, way, temperature):
    rows = [2, 0, 1]
    flat = FlatCausalLM(lm, table, temperature).eval()
    if way == "trl":
        add_fused_lm_head(flat, outputs=("log_probs", "entropy"))
    ids, mask, labels = batch(flat, list(codes), rows)
    got = flat(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs
    expected = torch.stack([native(lm, clip, table.index([row]), temperature) for clip, row in zip(codes, rows)])
    assert (got - expected).abs().max() < 1e-5
    assert (got.sum(1) - lm.logps(codes, table.index(rows), temperature).sum(1)).abs().max() < 1e-3


@torch.no_grad()
def test_flat_log_probs_equal_musicgens_own_teacher_forcing(table, codes):
    """transformers' decoder with its own delay mask and its own position ids, none of our forward pass between."""
    torch.manual_seed(0)
    lm = MusicLM(MusicLMConfig(n_q=K, card=V, d_model=32, n_layers=2, n_heads=2, d_ff=48, text_dim=12)).eval()
    S = T + K - 1
    start = torch.full((3 * K, 1), lm.special)
    _, mask = lm.decoder.build_delay_pattern_mask(start, pad_token_id=lm.special, max_length=S + 1)
    grid = torch.zeros((3, K, S + 1), dtype=torch.long)
    for k in range(K):
        grid[:, k, 1 + k : 1 + k + T] = codes[:, k]
    said = lm.decoder.apply_delay_pattern_mask(grid.reshape(3 * K, S + 1), mask)
    memory, valid = lm.memory(table)
    logits = lm.decoder(input_ids=said[:, :-1], encoder_hidden_states=memory, encoder_attention_mask=valid.long()).logits
    logps = logits.log_softmax(-1).reshape(3, K, S, V)
    book, frame = flat_order(K, T)
    expected = logps[:, book, book + frame].gather(-1, codes[:, book, frame][..., None])[..., 0]
    flat = FlatCausalLM(lm, table).eval()
    ids, attention, labels = batch(flat, list(codes), [0, 1, 2])
    got = flat(ids, attention, labels=labels, fused_lm_head=True).log_probs
    assert (got - expected).abs().max() < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 0.8])
@torch.no_grad()
def test_the_sampler_and_the_flat_scorer_agree_on_every_code(lm, table, temperature):
    attach_lora(lm, r=2, alpha=4, init_b=True)
    made = generate(lm, table, T, seeds=[1, 2, 3], temperature=temperature)
    flat = FlatCausalLM(lm, table, temperature).eval()
    ids, attention, labels = batch(flat, list(made.codes), [0, 1, 2])
    got = flat(ids, attention, labels=labels, fused_lm_head=True).log_probs
    book, frame = flat_order(K, T)
    assert (got - made.code_logps[:, book, frame]).abs().max() < 1e-4


@torch.no_grad()
def test_plain_logits_give_the_same_log_probs(lm, table, codes):
    flat = FlatCausalLM(lm, table).eval()
    ids, mask, _ = batch(flat, list(codes), [0, 1, 2])
    logps = flat(ids, mask).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    expected = torch.stack([native(lm, clip, table.index([i])) for i, clip in enumerate(codes)])
    assert (logps - expected).abs().max() < 1e-5


@torch.no_grad()
def test_native_and_stock_heads_agree_on_entropy(lm, table, codes):
    flat = FlatCausalLM(lm, table).eval()
    ids, mask, labels = batch(flat, list(codes), [0, 1, 2])
    ours = flat(ids, mask, labels=labels, fused_lm_head=True)
    add_fused_lm_head(flat, outputs=("log_probs", "entropy", "is_top1"))
    stock = flat(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    torch.testing.assert_close(ours.entropy, stock.entropy, atol=1e-4, rtol=0)
    assert torch.equal(ours.is_top1, stock.is_top1.bool())


@pytest.mark.parametrize("way", ["native", "trl"])
@torch.no_grad()
def test_clips_of_different_lengths_share_a_batch_without_touching_each_other(lm, table, codes, way):
    clips = [codes[0], codes[1][:, :4], codes[2][:, :1]]
    flat = FlatCausalLM(lm, table).eval()
    if way == "trl":
        add_fused_lm_head(flat)
    ids, mask, labels = batch(flat, clips, [0, 1, 2])
    got = flat(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs
    for i, clip in enumerate(clips):
        n = K * clip.shape[1]
        assert (got[i, :n] - native(lm, clip, table.index([i]))).abs().max() < 1e-5
        assert not got[i, n:].any()


@pytest.mark.parametrize("way", ["native", "trl"])
@torch.no_grad()
def test_changing_a_code_changes_no_log_prob_before_it(lm, table, codes, way):
    """Causality in delay-step order; probed at every place of every codebook, with a change that must show somewhere behind it.

    The codes of one step are drawn together, so a change at its first book reaches no other book of the same step either."""
    flat = FlatCausalLM(lm, table).eval()
    if way == "trl":
        add_fused_lm_head(flat)
    base_ids, mask, labels = batch(flat, [codes[0]], [0])

    def logps(ids: Tensor) -> Tensor:
        return flat(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs[0]

    before = logps(base_ids)
    book, frame = flat_order(K, T)
    step = book + frame
    reached = 0
    for place in range(K * T):
        ids = base_ids.clone()
        offset = 2 + int(book[place]) * V
        ids[0, 1 + place] = offset + (ids[0, 1 + place] - offset + 1) % V
        change = (logps(ids) - before).abs()
        elsewhere = (step <= step[place]) & (torch.arange(K * T) != place)
        assert not (change[elsewhere] >= 1e-6).any()
        reached += bool(change[place + 1 :].max() > 1e-4) if place + 1 < K * T else 0
    assert reached >= K * T - K


def test_frame_by_frame_order_would_not_be_causal():
    """Why the order is by step: in frame order, book 1 of frame t comes before book 0 of frame t + 1, in the LM after it."""
    book, frame = flat_order(K, T)
    step = book + frame
    assert bool((step[1:] >= step[:-1]).all())
    by_frame = torch.tensor([t + k for t in range(T) for k in range(K)])
    assert bool((by_frame[1:] < by_frame[:-1]).any())


@pytest.mark.parametrize("cut", [1, 2, K * T - 1])
def test_a_cut_sequence_is_refused_instead_of_scored(lm, table, codes, cut):
    flat = FlatCausalLM(lm, table).eval()
    ids, mask, labels = batch(flat, [codes[0]], [0])
    with pytest.raises(ValueError, match="cut"):
        flat(ids[:, :-cut], mask[:, :-cut], labels=labels[:, :-cut], fused_lm_head=True)


def test_a_foreign_prompt_and_left_padding_are_refused(lm, table, codes):
    flat = FlatCausalLM(lm, table).eval()
    ids, mask, labels = batch(flat, [codes[0]], [0])
    foreign = ids.clone()
    foreign[0, 0] = prompt_id(3, K, V)
    with pytest.raises(ValueError, match="prompt in the table"):
        flat(foreign, mask, labels=labels, fused_lm_head=True)
    with pytest.raises(ValueError, match="right end"):
        flat(ids.roll(1, 1), mask.roll(1, 1) * (torch.arange(ids.shape[1]) > 0), labels=labels, fused_lm_head=True)


def test_the_wrapper_shares_the_lm_and_leaves_its_weights_alone(lm, table):
    before = lm.sha256()
    flat = FlatCausalLM(lm, table)
    assert lm.sha256() == before
    assert flat.trunk.lm is lm
    own = {p.data_ptr() for p in lm.parameters()}
    assert {p.data_ptr() for p in flat.parameters()} == own


def test_in_training_mode_the_policy_equals_its_reference(lm, table, codes):
    """MusicGen's dropout is a number, not a module: left on, the first KL would not be 0."""
    flat = FlatCausalLM(lm, table)
    ids, mask, labels = batch(flat, list(codes), [0, 1, 2])
    with torch.no_grad():
        reference = flat.eval()(ids, mask, labels=labels, fused_lm_head=True).log_probs
        attach_lora(lm, r=2, alpha=4)
        policy = flat.train()(ids, mask, labels=labels, fused_lm_head=True).log_probs
    assert torch.equal(policy, reference)


def test_native_heads_undo_trls_patch(lm, table):
    flat = FlatCausalLM(lm, table)
    add_fused_lm_head(flat)
    assert "forward" in vars(flat)
    use_native_heads(flat)
    assert "forward" not in vars(flat)


def test_the_tokenizer_names_every_id(codes):
    tokenizer = make_tokenizer(K, V, 3)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert len(tokenizer) == 2 + K * V + 3
    ids = flatten_codes(codes[:1], V)[0].tolist()
    words = tokenizer.convert_ids_to_tokens(ids)
    assert words[0] == f"c0_{int(codes[0, 0, 0])}"
    assert tokenizer(" ".join(["prompt_2", *words]))["input_ids"] == [prompt_id(2, K, V), *ids]

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from base_models.codec import CodecConfig, MagnitudeCodec
from base_models.errors import UserError
from rlhf import reward_model as rm


class Tower(nn.Module):
    """Stands in for the audio-text space."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4))

    def features_of_latents(self, latents):
        return torch.stack([latents.mean((1, 2)), latents.std((1, 2)), latents[:, 0].mean(1)], 1)

    def sha256(self):
        return "tower"

    def embed_latents(self, latents):
        return nn.functional.normalize(self.features_of_latents(latents) @ self.weight, dim=-1)

    def embed_text(self, prompts):
        return nn.functional.normalize(torch.tensor([[len(p), 1.0, 2.0, 3.0] for p in prompts]), dim=-1)


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    codec = MagnitudeCodec(CodecConfig(width=24, latent_dim=8, encoder_blocks=1, decoder_blocks=1, n_q=2, card=16)).eval()
    for layer in codec.rvq.layers:
        layer._codebook.embed.copy_(torch.randn(layer._codebook.embed.shape))
    return SimpleNamespace(codec=codec, contrastive=Tower(), sha256="a" * 64)


def codes_of(n, seed=0, frames=10):
    return torch.randint(0, 16, (n, 2, frames), generator=torch.Generator().manual_seed(seed))


def world(n_pairs, n_prompts=20, noise=0.0, seed=0, width=12):
    """A table of random features, a taste with an optimum in one of them, and votes on pairs of one prompt."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(2 * n_pairs, width, generator=generator)
    gold = 1.5 * table[:, 0] - (table[:, 1] - 0.5).square()
    first = torch.arange(n_pairs) * 2
    wish = gold[first] - gold[first + 1] + noise * torch.randn(n_pairs, generator=generator)
    chosen = torch.where(wish > 0, first, first + 1)
    prompt = torch.arange(n_pairs) % n_prompts
    pairs = rm.Pairs(chosen, 2 * first + 1 - chosen, torch.ones(n_pairs), torch.ones(n_pairs), prompt)
    return table, pairs, prompt.repeat_interleave(2)


LINEAR = rm.Head("linear", ("all",), 1.0)
KERNEL = rm.Head("kernel", ("all",), 3.0, 1.5)


def inputs_of(head, table, prompt):
    return rm.expand(rm.make_lens(head, {"all": table}, prompt), head, {"all": table})


def accuracy(weights, inputs, pairs):
    score = inputs @ weights
    return (score[pairs.chosen] > score[pairs.rejected]).float().mean().item()


@pytest.mark.parametrize(
    "head", rm.candidates((rm.LATENTS, rm.MAGNITUDES)), ids=lambda head: f"{head.kind}-{len(head.blocks)}-{head.prior}"
)
def test_head_overfits_twenty_pairs(head):
    table, pairs, prompt = world(20, n_prompts=5)
    table = {rm.LATENTS: table[:, :6], rm.MAGNITUDES: table[:, 6:] + 3 * table[:, :6]}
    inputs = rm.expand(rm.make_lens(head, table, prompt), head, table)
    assert accuracy(rm.fit(head, inputs, pairs), inputs, pairs) >= (0.94 if head.prior > 1 else 0.8)  # a cautious prior may leave some


def test_kernel_head_learns_an_optimum_that_a_linear_one_cannot():
    table, pairs, prompt = world(600, width=4)
    seen, held = pairs.index(torch.arange(400)), pairs.index(torch.arange(400, 600))
    reached = {}
    for head in (rm.Head("linear", ("all",), 10.0), KERNEL):
        inputs = inputs_of(head, table, prompt)
        reached[head.kind] = accuracy(rm.fit(head, inputs, seen), inputs, held)
    assert reached["kernel"] > 0.85
    assert reached["kernel"] > reached["linear"] + 0.05


def test_relevance_head_finds_the_three_features_that_matter_among_sixty():
    generator = torch.Generator().manual_seed(5)
    table = torch.randn(1200, 60, generator=generator)
    gold = 1.5 * torch.tanh(table[:, 0]) - (table[:, 1] - 0.5).square() + 0.8 * table[:, 2]
    first = torch.arange(600) * 2
    wish = gold[first] - gold[first + 1] + 0.5 * torch.randn(600, generator=generator)
    chosen = torch.where(wish > 0, first, first + 1)
    prompt = torch.arange(600) % 40
    pairs = rm.Pairs(chosen, 2 * first + 1 - chosen, torch.ones(600), torch.ones(600), prompt)
    seen, held = pairs.index(torch.arange(400)), pairs.index(torch.arange(400, 600))
    reached = {}
    for head in (rm.Head("relevance", ("all",), 2.0, 2.0), rm.Head("kernel", ("all",), 2.0, 1.5), rm.Head("linear", ("all",), 0.6)):
        inputs = inputs_of(head, table, prompt.repeat_interleave(2))
        reached[head.kind] = accuracy(rm.fit(head, inputs, seen), inputs, held)
    assert reached["relevance"] > 0.78
    assert reached["relevance"] > max(reached["kernel"], reached["linear"]) + 0.03


def test_bumps_span_smooth_functions_of_one_feature():
    x = torch.linspace(-3, 3, 61)[:, None]
    made = rm.bumps(x, 2.0)[:, 0]
    for wanted in (torch.sin(x[:, 0]), torch.tanh(x[:, 0]), x[:, 0].square() / 4):
        weights = torch.linalg.lstsq(made, wanted[:, None]).solution
        assert (made @ weights - wanted[:, None]).abs().max() < 0.12
    assert made.square().sum(1).max() < 1.05  # a priori about one wide


def test_soft_labels_of_one_half_teach_nothing():
    table, pairs, prompt = world(50)
    ties = rm.Pairs(pairs.chosen, pairs.rejected, torch.full((50,), 0.5), pairs.weight, pairs.prompt)
    inputs = inputs_of(LINEAR, table, prompt)
    assert rm.fit(LINEAR, inputs, ties).abs().max() < 1e-3
    assert rm.fit(LINEAR, inputs, pairs).abs().max() > 0.1


def test_linear_head_agrees_with_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    table, pairs, prompt = world(200, noise=1.0)
    inputs = inputs_of(LINEAR, table, prompt)
    difference = (inputs[pairs.chosen] - inputs[pairs.rejected]).numpy()
    sign = torch.ones(200)
    sign[::2] = -1
    # scikit-learn minimises C * sum of losses + 1/2 |w|^2; ours is the sum of losses + |w|^2 / (2 prior^2).
    oracle = LogisticRegression(C=LINEAR.prior**2, fit_intercept=False, tol=1e-8)
    oracle.fit(difference * sign[:, None].numpy(), sign.numpy() > 0)
    torch.testing.assert_close(rm.fit(LINEAR, inputs, pairs), torch.tensor(oracle.coef_[0], dtype=torch.float32), atol=2e-3, rtol=1e-2)


def test_kernel_head_is_the_posterior_mode_of_a_gaussian_process():
    """The weights' normal prior is the process' prior: K f^-1 = the likelihood's slope at the mode (Chu and Ghahramani 2005, eq. 6)."""
    table, pairs, prompt = world(30)
    lens = rm.make_lens(KERNEL, {"all": table}, prompt)
    inputs = rm.expand(lens, KERNEL, {"all": table})
    score = (inputs @ rm.fit(KERNEL, inputs, pairs)).double()
    kernel = (inputs @ inputs.T).double()
    slope = torch.zeros(60, dtype=torch.double)
    share = torch.sigmoid(-(score[pairs.chosen] - score[pairs.rejected]))
    slope.index_add_(0, pairs.chosen, share).index_add_(0, pairs.rejected, -share)
    torch.testing.assert_close(score, KERNEL.prior**2 * kernel @ slope, atol=2e-2, rtol=2e-2)
    standard = lens.standard(table)
    torch.testing.assert_close(kernel.float(), torch.exp(-torch.cdist(standard, standard).square() / (2 * 1.5**2)), atol=1e-3, rtol=0)


def test_more_weight_for_all_is_no_more_belief():
    table, pairs, prompt = world(50)
    inputs = inputs_of(LINEAR, table, prompt)
    torch.testing.assert_close(
        rm.fit(LINEAR, inputs, pairs.reweighted(7 * pairs.weight)), rm.fit(LINEAR, inputs, pairs), atol=1e-4, rtol=1e-3
    )


def test_lens_is_one_wide_within_prompts_whatever_the_prompts_differ_by():
    table, _, prompt = world(300, n_prompts=10)
    shifted = table + 50 * torch.randn(10, 12, generator=torch.Generator().manual_seed(1))[prompt]
    lens = rm.make_lens(LINEAR, {"all": shifted}, prompt)
    torch.testing.assert_close(lens.spread, rm.make_lens(LINEAR, {"all": table}, prompt).spread, atol=1e-3, rtol=1e-3)
    standard = rm.make_lens(LINEAR, {"all": table}, prompt).standard(table)
    within = torch.cat([standard[prompt == p] - standard[prompt == p].mean(0) for p in range(10)])
    assert within.square().sum(1).mean().item() == pytest.approx(1, abs=0.05)


def test_blocks_weigh_alike_however_many_features_they_have():
    head = rm.Head("linear", ("many", "few"), 1.0)
    table, _, prompt = world(100, width=30)
    lens = rm.make_lens(head, {"many": table[:, :27], "few": table[:, 27:]}, prompt)
    assert lens.share[:27].square().sum().item() == pytest.approx(0.5)
    assert lens.share.square().sum().item() == pytest.approx(1)


def test_many_clips_are_spanned_by_a_few(monkeypatch):
    table, pairs, prompt = world(200, width=2)
    exact = inputs_of(KERNEL, table, prompt)
    monkeypatch.setattr(rm, "LANDMARKS", 100)
    spanned = inputs_of(KERNEL, table, prompt)
    assert spanned.shape[1] <= 100
    both = [inputs @ rm.fit(KERNEL, inputs, pairs) for inputs in (exact, spanned)]
    assert torch.corrcoef(torch.stack(both))[0, 1] > 0.99


@pytest.mark.parametrize("head", [LINEAR, KERNEL], ids=lambda head: head.kind)
def test_scores_do_not_run_away_outside_of_what_was_heard(head):
    table, pairs, prompt = world(200)
    lens = rm.make_lens(head, {"all": table}, prompt)
    weights = rm.fit(head, rm.expand(lens, head, {"all": table}), pairs)
    far, farther = (rm.expand(lens, head, {"all": distance * torch.ones(1, 12)}) @ weights for distance in (1e3, 1e6))
    torch.testing.assert_close(far, farther)
    if head.kind == "kernel":
        assert far.abs() < 0.5 * (rm.expand(lens, head, {"all": table}) @ weights).std()


def test_bootstrap_draws_whole_prompts():
    _, pairs, _ = world(60, n_prompts=6)
    drawn = rm.bootstrap(pairs, seed=3)
    for prompt in range(6):
        assert len(drawn.weight[pairs.prompt == prompt].unique()) == 1
    assert drawn.weight.sum() == 60
    assert not torch.equal(drawn.weight, rm.bootstrap(pairs, seed=4).weight)


def test_temperature_recovers_the_scale_of_the_noise():
    generator = torch.Generator().manual_seed(0)
    honest = 2 * torch.randn(20_000, generator=generator)
    p = (torch.rand(20_000, generator=generator) < honest.sigmoid()).float()
    pairs = rm.Pairs(*[torch.zeros(20_000, dtype=torch.long)] * 2, p, torch.ones(20_000), torch.zeros(20_000, dtype=torch.long))
    assert rm.best_temperature(3 * honest, pairs) == pytest.approx(3, rel=0.05)


def test_a_disputed_clip_scores_lower_than_an_agreed_one():
    members = torch.tensor([[1.0, 3.0], [1.0, -1.0], [1.0, 1.0]])
    agreed, disputed = rm.pessimistic(members, lam=0.5)
    assert agreed == 1
    assert disputed == pytest.approx(0)
    torch.testing.assert_close(rm.pessimistic(members, 0.0), torch.ones(2))
    torch.testing.assert_close(rm.pessimistic(members[:1], 2.0), members[0])


def test_features_of_a_clip_do_not_depend_on_its_batch(base):
    codes, prompts = codes_of(5), ["a", "bb", "ccc", "dddd", "e"]
    together, alone = rm.features(base, codes, prompts), rm.features(base, codes[2:3], prompts[2:3])
    assert tuple(together) == rm.blocks_of(base) == (rm.LATENTS, rm.MAGNITUDES, rm.DESCRIPTORS, rm.SHARED, rm.FIT)
    for block, rows in together.items():
        torch.testing.assert_close(alone[block][0], rows[2], atol=1e-5, rtol=1e-4)
        assert torch.isfinite(rows).all()


def test_only_the_blocks_asked_for_are_computed(base):
    codes = codes_of(2)
    some = rm.features(base, codes, ["a", "b"], (rm.LATENTS,))
    assert list(some) == [rm.LATENTS]
    torch.testing.assert_close(some[rm.LATENTS], rm.features(base, codes, ["a", "b"])[rm.LATENTS])
    deaf = SimpleNamespace(codec=base.codec, contrastive=None, sha256="c")
    assert rm.blocks_of(deaf) == (rm.LATENTS, rm.MAGNITUDES, rm.DESCRIPTORS)


def test_features_include_the_match_of_prompt_and_sound(base):
    codes = codes_of(1)
    one, other = (rm.features(base, codes, [prompt])[rm.SHARED] for prompt in ("x", "a much longer prompt"))
    assert (one != other).sum() == 1


def test_a_single_frame_has_finite_features(base):
    assert all(torch.isfinite(rows).all() for rows in rm.features(base, codes_of(2, frames=1), ["a", "b"]).values())


@pytest.fixture(scope="module")
def model(base):
    codes = codes_of(60, seed=1)
    table = rm.features(base, codes, ["p"] * 60)
    prompt = torch.arange(60) // 12
    first = torch.arange(0, 60, 2)
    gold = codes[:, 0].float().mean(1)
    chosen = torch.where(gold[first] > gold[first + 1], first, first + 1)
    pairs = rm.Pairs(chosen, 2 * first + 1 - chosen, torch.ones(30), torch.ones(30), prompt[first])
    head = rm.Head("kernel", (rm.LATENTS, rm.SHARED), 2.0)
    lens = rm.make_lens(head, table, prompt)
    members, offsets = rm.fit_ensemble(head, rm.expand(lens, head, table), pairs, 5, seed=0)
    made = rm.RewardModel(base, head, lens, members, offsets, lam=0.5, temperature=0.7)
    made.snapshot_sha256 = "s" * 64
    return made


def test_saved_model_scores_the_same(model, base, tmp_path):
    model.save(tmp_path / "reward")
    loaded = rm.load_reward(tmp_path / "reward", base)
    codes = codes_of(4, seed=9)
    torch.testing.assert_close(loaded.score(codes, ["a"] * 4), model.score(codes, ["a"] * 4), atol=1e-6, rtol=1e-6)
    assert loaded.sha256 == model.sha256
    assert loaded.snapshot_sha256 == "s" * 64


def test_another_base_is_refused(model, base, tmp_path):
    model.save(tmp_path / "reward")
    other = SimpleNamespace(codec=base.codec, contrastive=base.contrastive, sha256="b" * 64)
    with pytest.raises(UserError, match="of base aaaaaaaaaaaa"):
        rm.load_reward(tmp_path / "reward", other)
    blind = SimpleNamespace(codec=base.codec, contrastive=None, sha256=base.sha256)
    with pytest.raises(UserError, match="another audio-text space"):
        rm.load_reward(tmp_path / "reward", blind)


def test_changed_weights_are_refused(model, base, tmp_path):
    from base_models.checkpoint import load_tensors, save_tensors

    model.save(tmp_path / "reward")
    state = load_tensors(tmp_path / "reward" / "model.safetensors")
    save_tensors(tmp_path / "reward" / "model.safetensors", state | {"offsets": state["offsets"] + 1})
    with pytest.raises(UserError, match="changed weights"):
        rm.load_reward(tmp_path / "reward", base)


def test_a_cut_file_is_refused(model, base, tmp_path):
    model.save(tmp_path / "reward")
    file = tmp_path / "reward" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(UserError, match="safetensors"):
        rm.load_reward(tmp_path / "reward", base)


def test_score_asks_for_one_prompt_a_clip(model):
    with pytest.raises(ValueError, match="3 clips and 2 prompts"):
        model.score(codes_of(3), ["a", "b"])


def test_members_differ_and_have_no_offset(model, base):
    scores = model.member_scores(rm.features(base, codes_of(60, seed=1), ["p"] * 60))
    assert scores.std(0).mean() > 1e-3
    torch.testing.assert_close(scores.mean(1), torch.zeros(5), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "blocks", "within"),
    [("linear", (rm.LATENTS, rm.SHARED), 0.02), ("kernel", (rm.LATENTS,), 0.05), ("relevance", (rm.DESCRIPTORS, rm.FIT), 0.5)],
)
def test_slope_is_the_derivative_of_the_score_along_the_latents(base, kind, blocks, within):
    """Descriptors that count (onsets, the strongest bin) are steps: the slope is that of the rest, so their head is held to less."""
    codes, prompts = codes_of(24, frames=40), ["a"] * 24
    head = rm.Head(kind, blocks, 2.0)
    table = rm.features(base, codes, prompts, head.blocks)
    lens = rm.make_lens(head, table, torch.arange(24) // 4)
    width = rm.expand(lens, head, table).shape[1]
    members = torch.randn(3, width, generator=torch.Generator().manual_seed(1)) / width**0.5
    model = rm.RewardModel(base, head, lens, members, torch.zeros(3), lam=0.5, temperature=1.3)
    slope, score = model.slope(codes, prompts)
    torch.testing.assert_close(score, model.score(codes, prompts))
    latents = base.codec.latents(codes)
    step = 0.02 * slope / slope.flatten(1).norm(dim=1)[:, None, None]

    def at(moved):
        with torch.no_grad():
            return model.score_features(rm.features_of_latents(base, moved, prompts, head.blocks))

    measured, told = at(latents + step) - at(latents - step), 2 * (slope * step).sum((1, 2))
    assert float(measured.mean()) == pytest.approx(float(told.mean()), rel=within)

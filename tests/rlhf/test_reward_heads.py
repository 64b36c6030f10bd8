import pytest
import torch

from rlhf import reward_heads as rh
from rlhf.reward_features import LATENTS, MAGNITUDES


def world(n_pairs, n_prompts=20, noise=0.0, seed=0, width=12):
    """A table of random features, a taste with an optimum in one of them, and votes on pairs of one prompt."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(2 * n_pairs, width, generator=generator)
    gold = 1.5 * table[:, 0] - (table[:, 1] - 0.5).square()
    first = torch.arange(n_pairs) * 2
    wish = gold[first] - gold[first + 1] + noise * torch.randn(n_pairs, generator=generator)
    chosen = torch.where(wish > 0, first, first + 1)
    prompt = torch.arange(n_pairs) % n_prompts
    pairs = rh.Pairs(chosen, 2 * first + 1 - chosen, torch.ones(n_pairs), torch.ones(n_pairs), prompt)
    return table, pairs, prompt.repeat_interleave(2)


LINEAR = rh.Head("linear", ("all",), 1.0)
KERNEL = rh.Head("kernel", ("all",), 3.0, 1.5)


def inputs_of(head, table, prompt):
    return rh.expand(rh.make_lens(head, {"all": table}, prompt), head, {"all": table})


def accuracy(weights, inputs, pairs):
    score = inputs @ weights
    return (score[pairs.chosen] > score[pairs.rejected]).float().mean().item()


@pytest.mark.parametrize("head", rh.candidates((LATENTS, MAGNITUDES)), ids=lambda head: f"{head.kind}-{len(head.blocks)}-{head.prior}")
def test_head_overfits_twenty_pairs(head):
    table, pairs, prompt = world(20, n_prompts=5)
    table = {LATENTS: table[:, :6], MAGNITUDES: table[:, 6:] + 3 * table[:, :6]}
    inputs = rh.expand(rh.make_lens(head, table, prompt), head, table)
    assert accuracy(rh.fit(head, inputs, pairs), inputs, pairs) >= (0.94 if head.prior > 1 else 0.8)  # a cautious prior may leave some


def test_kernel_head_learns_an_optimum_that_a_linear_one_cannot():
    table, pairs, prompt = world(600, width=4)
    seen, held = pairs.index(torch.arange(400)), pairs.index(torch.arange(400, 600))
    reached = {}
    for head in (rh.Head("linear", ("all",), 10.0), KERNEL):
        inputs = inputs_of(head, table, prompt)
        reached[head.kind] = accuracy(rh.fit(head, inputs, seen), inputs, held)
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
    pairs = rh.Pairs(chosen, 2 * first + 1 - chosen, torch.ones(600), torch.ones(600), prompt)
    seen, held = pairs.index(torch.arange(400)), pairs.index(torch.arange(400, 600))
    reached = {}
    for head in (rh.Head("relevance", ("all",), 2.0, 2.0), rh.Head("kernel", ("all",), 2.0, 1.5), rh.Head("linear", ("all",), 0.6)):
        inputs = inputs_of(head, table, prompt.repeat_interleave(2))
        reached[head.kind] = accuracy(rh.fit(head, inputs, seen), inputs, held)
    assert reached["relevance"] > 0.78
    assert reached["relevance"] > max(reached["kernel"], reached["linear"]) + 0.03


def test_bumps_span_smooth_functions_of_one_feature():
    x = torch.linspace(-3, 3, 61)[:, None]
    made = rh.bumps(x, 2.0)[:, 0]
    for wanted in (torch.sin(x[:, 0]), torch.tanh(x[:, 0]), x[:, 0].square() / 4):
        weights = torch.linalg.lstsq(made, wanted[:, None]).solution
        assert (made @ weights - wanted[:, None]).abs().max() < 0.12
    assert made.square().sum(1).max() < 1.05  # a priori about one wide


def test_soft_labels_of_one_half_teach_nothing():
    table, pairs, prompt = world(50)
    ties = rh.Pairs(pairs.chosen, pairs.rejected, torch.full((50,), 0.5), pairs.weight, pairs.prompt)
    inputs = inputs_of(LINEAR, table, prompt)
    assert rh.fit(LINEAR, inputs, ties).abs().max() < 1e-3
    assert rh.fit(LINEAR, inputs, pairs).abs().max() > 0.1


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
    torch.testing.assert_close(rh.fit(LINEAR, inputs, pairs), torch.tensor(oracle.coef_[0], dtype=torch.float32), atol=2e-3, rtol=1e-2)


def test_kernel_head_is_the_posterior_mode_of_a_gaussian_process():
    """The weights' normal prior is the process' prior: K f^-1 = the likelihood's slope at the mode (Chu and Ghahramani 2005, eq. 6)."""
    table, pairs, prompt = world(30)
    lens = rh.make_lens(KERNEL, {"all": table}, prompt)
    inputs = rh.expand(lens, KERNEL, {"all": table})
    score = (inputs @ rh.fit(KERNEL, inputs, pairs)).double()
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
        rh.fit(LINEAR, inputs, pairs.reweighted(7 * pairs.weight)), rh.fit(LINEAR, inputs, pairs), atol=1e-4, rtol=1e-3
    )


def test_lens_is_one_wide_within_prompts_whatever_the_prompts_differ_by():
    table, _, prompt = world(300, n_prompts=10)
    shifted = table + 50 * torch.randn(10, 12, generator=torch.Generator().manual_seed(1))[prompt]
    lens = rh.make_lens(LINEAR, {"all": shifted}, prompt)
    torch.testing.assert_close(lens.spread, rh.make_lens(LINEAR, {"all": table}, prompt).spread, atol=1e-3, rtol=1e-3)
    standard = rh.make_lens(LINEAR, {"all": table}, prompt).standard(table)
    within = torch.cat([standard[prompt == p] - standard[prompt == p].mean(0) for p in range(10)])
    assert within.square().sum(1).mean().item() == pytest.approx(1, abs=0.05)


def test_blocks_weigh_alike_however_many_features_they_have():
    head = rh.Head("linear", ("many", "few"), 1.0)
    table, _, prompt = world(100, width=30)
    lens = rh.make_lens(head, {"many": table[:, :27], "few": table[:, 27:]}, prompt)
    assert lens.share[:27].square().sum().item() == pytest.approx(0.5)
    assert lens.share.square().sum().item() == pytest.approx(1)


def test_many_clips_are_spanned_by_a_few(monkeypatch):
    table, pairs, prompt = world(200, width=2)
    exact = inputs_of(KERNEL, table, prompt)
    monkeypatch.setattr(rh, "LANDMARKS", 100)
    spanned = inputs_of(KERNEL, table, prompt)
    assert spanned.shape[1] <= 100
    both = [inputs @ rh.fit(KERNEL, inputs, pairs) for inputs in (exact, spanned)]
    assert torch.corrcoef(torch.stack(both))[0, 1] > 0.99


@pytest.mark.parametrize("head", [LINEAR, KERNEL], ids=lambda head: head.kind)
def test_scores_do_not_run_away_outside_of_what_was_heard(head):
    table, pairs, prompt = world(200)
    lens = rh.make_lens(head, {"all": table}, prompt)
    weights = rh.fit(head, rh.expand(lens, head, {"all": table}), pairs)
    far, farther = (rh.expand(lens, head, {"all": distance * torch.ones(1, 12)}) @ weights for distance in (1e3, 1e6))
    torch.testing.assert_close(far, farther)
    if head.kind == "kernel":
        assert far.abs() < 0.5 * (rh.expand(lens, head, {"all": table}) @ weights).std()


def test_bootstrap_draws_whole_prompts():
    _, pairs, _ = world(60, n_prompts=6)
    drawn = rh.bootstrap(pairs, seed=3)
    for prompt in range(6):
        assert len(drawn.weight[pairs.prompt == prompt].unique()) == 1
    assert drawn.weight.sum() == 60
    assert not torch.equal(drawn.weight, rh.bootstrap(pairs, seed=4).weight)


def test_temperature_recovers_the_scale_of_the_noise():
    generator = torch.Generator().manual_seed(0)
    honest = 2 * torch.randn(20_000, generator=generator)
    p = (torch.rand(20_000, generator=generator) < honest.sigmoid()).float()
    pairs = rh.Pairs(*[torch.zeros(20_000, dtype=torch.long)] * 2, p, torch.ones(20_000), torch.zeros(20_000, dtype=torch.long))
    assert rh.best_temperature(3 * honest, pairs) == pytest.approx(3, rel=0.05)


def noisy_votes(slope: float, n: int, seed: int, per_prompt: int = 8) -> tuple[torch.Tensor, rh.Pairs]:
    """n margins, and votes that follow them with this slope; `per_prompt` of a prompt."""
    generator = torch.Generator().manual_seed(seed)
    margin = torch.randn(n, generator=generator)
    p = (torch.rand(n, generator=generator) < (slope * margin).sigmoid()).float()
    nowhere, prompt = torch.zeros(n, dtype=torch.long), torch.arange(n) // per_prompt
    return margin, rh.Pairs(nowhere, nowhere, p, torch.ones(n), prompt)


def test_evidence_is_a_standard_normal_where_votes_follow_nothing():
    t = torch.tensor([rh.evidence(*noisy_votes(0.0, 400, seed)) for seed in range(300)])
    assert float(t.mean()) == pytest.approx(0, abs=0.2)
    assert float(t.std()) == pytest.approx(1, abs=0.15)
    assert float((t > 2**0.5).float().mean()) == pytest.approx(0.079, abs=0.045)


def test_a_slope_that_could_be_chance_counts_for_nothing_and_a_sure_one_stays():
    idle = [rh.sure_temperature(*noisy_votes(0.0, 400, seed))[0] for seed in range(100)]
    assert sum(temperature < rh.MOST_TEMPERATURE * 0.999 for temperature in idle) <= 15  # P(t > sqrt 2) = .08
    margin, pairs = noisy_votes(1.0, 2000, 0)
    temperature, t = rh.sure_temperature(margin, pairs)
    assert t > 12
    assert temperature == pytest.approx(rh.best_temperature(margin, pairs) / (1 - 2 / t**2))
    assert temperature == pytest.approx(1, rel=0.15)
    assert rh.sure_temperature(-margin, pairs) == (rh.MOST_TEMPERATURE, pytest.approx(-t))  # votes that go against it


def test_votes_that_never_fail_are_the_surest_there_are():
    """Where no slope is too steep, the best one has no error to be told."""
    generator = torch.Generator().manual_seed(0)
    margin = 2 + torch.rand(400, generator=generator)
    nowhere = torch.zeros(400, dtype=torch.long)
    pairs = rh.Pairs(nowhere, nowhere, torch.ones(400), torch.ones(400), torch.arange(400) // 8)
    temperature, t = rh.sure_temperature(margin, pairs)
    assert t > 50
    assert temperature < 0.1
    assert rh.evidence(torch.ones(400), pairs) == float("inf")
    assert rh.sure_temperature(torch.zeros(400), pairs) == (rh.MOST_TEMPERATURE, 0.0)


def test_votes_of_a_prompt_that_repeat_each_other_are_one_observation():
    margin, pairs = noisy_votes(0.5, 200, 1, per_prompt=1)
    again = rh.Pairs(*(torch.cat([x] * 9) for x in (pairs.chosen, pairs.rejected, pairs.p, pairs.weight, pairs.prompt)))
    assert rh.evidence(margin.repeat(9), again) == pytest.approx(rh.evidence(margin, pairs))
    one = rh.Pairs(pairs.chosen, pairs.rejected, pairs.p, pairs.weight, torch.zeros(200, dtype=torch.long))
    assert rh.evidence(margin, one) == 0.0  # nobody knows how prompts differ


def test_a_disputed_clip_scores_lower_than_an_agreed_one():
    members = torch.tensor([[1.0, 3.0], [1.0, -1.0], [1.0, 1.0]])
    agreed, disputed = rh.pessimistic(members, lam=0.5)
    assert agreed == 1
    assert disputed == pytest.approx(0)
    torch.testing.assert_close(rh.pessimistic(members, 0.0), torch.ones(2))
    torch.testing.assert_close(rh.pessimistic(members[:1], 2.0), members[0])

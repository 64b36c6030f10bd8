import json

import pytest
import torch

from rlhf.reward_committee import Committee, committees, read_committee
from rlhf.reward_features import DESCRIPTORS, DETAILS, FIT, LATENTS, MAGNITUDES, SHARED
from rlhf.reward_heads import Head, Pairs, bootstrap, expand, fit, make_lens

LINEAR, KERNEL, OTHER = Head("linear", ("all",), 0.6), Head("kernel", ("all",), 2.0, 1.5), Head("kernel", ("more",), 1.0, 1.0)
TOGETHER = Committee((LINEAR, KERNEL, OTHER))


def world(n_pairs, noise, seed=0):
    """Clips [2 n], a taste with an optimum, noisy votes on pairs of them."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2 * n_pairs, 20, generator=generator)
    gold = 1.2 * rows[:, 0] - (rows[:, 1] - 0.5).square() + rows[:, 2] * rows[:, 3]
    first = torch.arange(n_pairs) * 2
    wish = gold[first] - gold[first + 1] + noise * torch.randn(n_pairs, generator=generator)
    chosen = torch.where(wish > 0, first, first + 1)
    pairs = Pairs(chosen, 2 * first + 1 - chosen, torch.ones(n_pairs), torch.ones(n_pairs), torch.arange(n_pairs) % 20)
    return {"all": rows, "more": rows[:, :6]}, pairs, pairs.prompt.repeat_interleave(2), gold


def seated(committee, table, prompt):
    lenses = {head: make_lens(head, table, prompt) for head in committee.heads}
    return lenses, {head: expand(lens, head, table) for head, lens in lenses.items()}


def test_the_score_is_the_mean_of_what_its_heads_say_alone():
    table, pairs, prompt, _ = world(60, 1.0)
    lenses, of = seated(TOGETHER, table, prompt)
    alone = torch.stack([of[head] @ fit(head, of[head], pairs) for head in TOGETHER.heads]).mean(0)
    torch.testing.assert_close(TOGETHER.scores(of, pairs), alone)
    members, offsets = TOGETHER.ensemble(of, pairs, 3, seed=4)
    inputs = TOGETHER.expand([lenses[head] for head in TOGETHER.heads], table)
    torch.testing.assert_close(inputs, TOGETHER.inputs(of))
    drawn = [bootstrap(pairs, 4000 + member) for member in range(3)]
    expected = torch.stack([torch.stack([of[head] @ fit(head, of[head], draw) for head in TOGETHER.heads]).mean(0) for draw in drawn])
    torch.testing.assert_close(members @ inputs.T, expected, atol=1e-5, rtol=1e-4)
    used = torch.unique(torch.cat([pairs.chosen, pairs.rejected]))
    torch.testing.assert_close(offsets, expected[:, used].mean(1), atol=1e-5, rtol=1e-4)


def test_with_few_noisy_votes_it_foretells_the_taste_better_than_most_of_its_heads():
    gains, beaten = [], []
    for seed in range(6):
        table, pairs, prompt, gold = world(240, 2.5, seed)
        _, of = seated(TOGETHER, table, prompt)
        held = torch.randint(0, len(gold), (2, 3000), generator=torch.Generator().manual_seed(seed))

        def right(score, gold=gold, held=held):
            return float(((score[held[0]] > score[held[1]]) == (gold[held[0]] > gold[held[1]])).float().mean())

        single = [right(of[head] @ fit(head, of[head], pairs)) for head in TOGETHER.heads]
        together = right(TOGETHER.scores(of, pairs))
        gains.append(together - sum(single) / len(single))
        beaten += [together > one for one in single]
    assert sum(gains) / len(gains) > 0.01
    assert sum(beaten) >= 2 / 3 * len(beaten)


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ((LATENTS,), [{LATENTS}]),
        ((LATENTS, MAGNITUDES, DESCRIPTORS), [{DESCRIPTORS}, {LATENTS, MAGNITUDES}, {LATENTS, MAGNITUDES, DESCRIPTORS}]),
        (
            (LATENTS, MAGNITUDES, DESCRIPTORS, DETAILS, SHARED, FIT),
            [
                {DESCRIPTORS, FIT},
                {DESCRIPTORS, DETAILS, FIT},
                {DESCRIPTORS, DETAILS, FIT},
                {LATENTS, MAGNITUDES, SHARED},
                {LATENTS, MAGNITUDES, DESCRIPTORS, DETAILS, SHARED, FIT},
            ],
        ),
    ],
)
def test_votes_choose_among_what_is_heard(blocks, expected):
    asked = committees(blocks)
    assert [set(committee.blocks) for committee in asked] == expected
    assert len(set(asked)) == len(asked)


def test_it_is_read_as_it_was_told():
    for committee in committees((LATENTS, MAGNITUDES, DESCRIPTORS, DETAILS)):
        assert read_committee(json.loads(json.dumps(committee.as_json()))) == committee

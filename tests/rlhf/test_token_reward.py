from types import SimpleNamespace

import pytest
import torch

from adapters.lora import attach_lora
from base_models.errors import UserError
from rlhf.token_reward import TokenTrunk, TrunkShape, trunk_states
from tests.rlhf.reward_toys import speaking

K, V, T, WIDTH = 2, 16, 9, 32
SHAPE = TrunkShape(layers=2, r=4)


def speaker():
    """A tiny LM of three layers whose prompts are told apart by their length."""
    return speaking(SimpleNamespace(), n_q=K, card=V, n_layers=3, dropout=0.3)


def codes_of(n, seed=0):
    return torch.randint(0, V, (n, K, T), generator=torch.Generator().manual_seed(seed))


def opinionated(base, n_members=2):
    """A trunk whose adapters and heads say something."""
    trunk = TokenTrunk(base, SHAPE, n_members, seed=0)
    generator = torch.Generator().manual_seed(1)
    trunk.fill({name: tensor + 0.3 * torch.randn(tensor.shape, generator=generator) for name, tensor in trunk.tensors().items()})
    return trunk


def test_states_are_those_that_transformers_gives_by_itself():
    base, codes = speaker(), codes_of(2)
    cond = base.conditions(["a", "bb"])
    seen = {}

    def spy(module, arguments, keywords):
        return arguments, keywords | {"output_hidden_states": True}

    def catch(module, arguments, output):
        seen["states"] = output.hidden_states

    decoder = base.lm.decoder.model.decoder
    hooks = [decoder.register_forward_pre_hook(spy, with_kwargs=True), decoder.register_forward_hook(catch)]
    middle, last = trunk_states(base.lm, codes, cond)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(middle, seen["states"][2][:, 1:])  # 0 is the input, 2 comes out of the second of three layers
    torch.testing.assert_close(last, base.lm.hidden(codes, cond)[:, 1:])
    assert middle.shape == last.shape == (2, T + K - 2, WIDTH)


def test_a_fresh_trunk_is_the_base_and_has_no_opinion():
    base, codes = speaker(), codes_of(3)
    cond = base.conditions(["a"] * 3)
    trunk = TokenTrunk(base, SHAPE, 1, seed=0)
    own, _ = trunk_states(trunk.lm, codes, cond)
    decoder = base.lm.decoder.model.decoder
    decoder.layers = decoder.layers[:2]
    theirs, _ = trunk_states(base.lm, codes, cond)
    torch.testing.assert_close(own, theirs)
    assert torch.equal(trunk.member_scores(codes, ["a"] * 3), torch.zeros(1, 3))


def test_a_trunk_leaves_its_base_alone():
    base = speaker()
    before, flags = base.lm.sha256(), [parameter.requires_grad for parameter in base.lm.parameters()]
    opinionated(base).member_scores(codes_of(2), ["a", "b"])
    assert base.lm.sha256() == before
    assert [parameter.requires_grad for parameter in base.lm.parameters()] == flags
    assert len(base.lm.decoder.model.decoder.layers) == 3


def test_what_a_policy_learns_moves_no_score():
    """PPO trains an adapter inside the very LM that the trunk was copied from; a trunk read afterwards is the same, too."""
    base, codes = speaker(), codes_of(3)
    trunk = opinionated(base)
    before = trunk.member_scores(codes, ["a"] * 3)
    attach_lora(base.lm, r=4, init_b=True)
    base.lm.train()
    assert torch.equal(trunk.member_scores(codes, ["a"] * 3), before)
    late = TokenTrunk(base, SHAPE, 2, seed=9)
    late.fill(trunk.tensors())
    torch.testing.assert_close(late.member_scores(codes, ["a"] * 3), before)
    assert any(parameter.requires_grad for parameter in base.lm.parameters())


def test_a_clips_score_does_not_depend_on_its_batch_and_does_on_its_prompt():
    trunk, codes = opinionated(speaker()), codes_of(40)
    prompts = ["x" * (1 + row % 4) for row in range(40)]
    together = trunk.member_scores(codes, prompts)
    assert together.shape == (2, 40)
    torch.testing.assert_close(trunk.member_scores(codes[35:36], prompts[35:36])[:, 0], together[:, 35], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(trunk.member_scores(codes[35:36], ["x" * 30])[:, 0], together[:, 35], atol=1e-3)
    assert (together[0] - together[1]).abs().min() > 0


def test_one_prompt_a_clip_and_layers_that_are_there_are_asked_for():
    base = speaker()
    with pytest.raises(ValueError, match="3 clips and 2 prompts"):
        TokenTrunk(base, SHAPE, 1, 0).member_scores(codes_of(3), ["a", "b"])
    with pytest.raises(UserError, match="1 to 3"):
        TokenTrunk(base, TrunkShape(layers=4), 1, 0)

from types import SimpleNamespace

import pytest
import torch

from adapters.lora import attach_lora
from base_models.conditions import Conditions
from base_models.lm import MusicLM, MusicLMConfig
from rlhf.token_reward import lm_statistics, trunk_states

K, V, T, WIDTH = 2, 16, 9, 32


def speaker():
    """A tiny LM whose prompts are told apart by their length."""
    torch.manual_seed(0)
    lm = MusicLM(MusicLMConfig(n_q=K, card=V, d_model=WIDTH, n_layers=3, n_heads=2, d_ff=48, text_dim=4, dropout=0.3)).eval()

    def conditions(prompts, tempo_bpm=None):
        text = torch.tensor([[[len(prompt), 1.0, -1.0, 0.5]] for prompt in prompts])
        return Conditions(text, torch.ones(len(prompts), 1, dtype=torch.bool), torch.full((len(prompts),), float("nan")))

    return SimpleNamespace(lm=lm, conditions=conditions)


def codes_of(n, seed=0):
    return torch.randint(0, V, (n, K, T), generator=torch.Generator().manual_seed(seed))


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


def test_statistics_of_a_clip_do_not_depend_on_its_batch_and_do_on_its_prompt():
    base, codes = speaker(), codes_of(4)
    together = lm_statistics(base, codes, ["a", "bb", "ccc", "dddd"])
    assert together.shape == (4, 4 * WIDTH)
    torch.testing.assert_close(lm_statistics(base, codes[2:3], ["ccc"])[0], together[2], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(lm_statistics(base, codes[2:3], ["a"])[0], together[2], atol=1e-3)


def test_statistics_are_the_bases_own_whatever_the_policy_has_learnt():
    """PPO trains an adapter inside the very LM that is read here, with dropout as it likes."""
    base, codes = speaker(), codes_of(3)
    before = lm_statistics(base, codes, ["a"] * 3)
    attach_lora(base.lm, r=4, init_b=True)
    base.lm.train()
    moved = trunk_states(base.lm.eval(), codes, base.conditions(["a"] * 3))[1]
    base.lm.train()
    assert torch.equal(lm_statistics(base, codes, ["a"] * 3), before)
    assert all(module.training for module in base.lm.modules())
    assert not torch.allclose(moved.mean(1), before[:, 2 * WIDTH : 3 * WIDTH], atol=1e-4)
    assert any(parameter.requires_grad for parameter in base.lm.parameters())


def test_one_prompt_a_clip_is_asked_for():
    with pytest.raises(ValueError, match="3 clips and 2 prompts"):
        lm_statistics(speaker(), codes_of(3), ["a", "b"])

"""Adapters inside the LM: identity at first, exact to switch off, to merge and to take out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from adapters.lora import (
    activate,
    active_adapters,
    adapter_disabled,
    adapter_names,
    adapter_tensors,
    attach_lora,
    lora_layers,
    merged,
    remove_adapter,
    scale_adapter,
    set_adapter_tensors,
    trainable_parameters,
)
from base_models.errors import UserError
from base_models.sampling import generate


def test_a_fresh_adapter_changes_no_bit(tiny):
    before = tiny.logps()
    attach_lora(tiny.lm, r=4, alpha=8)
    assert torch.equal(tiny.logps(), before)


def test_attach_returns_the_lm_itself_with_every_decoder_map_adapted(tiny):
    assert attach_lora(tiny.lm, r=4, alpha=8) is tiny.lm
    per_layer = {"self_attn": 4, "encoder_attn": 4, "fc": 2}
    assert len(lora_layers(tiny.lm)) == 2 * sum(per_layer.values())
    assert not any("lm_heads" in name or "embed" in name for name in lora_layers(tiny.lm))


def test_only_the_new_adapter_has_gradients(tiny):
    attach_lora(tiny.lm, r=4, alpha=8)
    assert len(trainable_parameters(tiny.lm)) == 2 * len(lora_layers(tiny.lm))
    assert all("lora_" in name for name, p in tiny.lm.named_parameters() if p.requires_grad)


def test_switched_off_the_lm_is_bitwise_its_base_and_gradients_come_back(tiny):
    before = tiny.logps()
    attach_lora(tiny.lm, r=4, alpha=8, init_b=True)
    flags = [p.requires_grad for p in tiny.lm.parameters()]
    assert not torch.equal(tiny.logps(), before)
    with adapter_disabled(tiny.lm):
        assert torch.equal(tiny.logps(), before)
    assert [p.requires_grad for p in tiny.lm.parameters()] == flags
    assert not torch.equal(tiny.logps(), before)


def test_the_adapter_is_back_on_after_an_error_inside(tiny):
    attach_lora(tiny.lm, r=4, alpha=8, init_b=True)
    on = tiny.logps()
    with pytest.raises(KeyError), adapter_disabled(tiny.lm):
        raise KeyError("inside")
    assert torch.equal(tiny.logps(), on)


def test_merged_weights_score_alike_and_leave_the_base_bitwise_untouched(tiny):
    attach_lora(tiny.lm, r=4, alpha=8, init_b=True)
    on, state = tiny.logps(), copy.deepcopy(tiny.lm.state_dict())
    with merged(tiny.lm):
        torch.testing.assert_close(tiny.logps(), on, atol=1e-5, rtol=0)
    assert all(torch.equal(state[name], tensor) for name, tensor in tiny.lm.state_dict().items())
    assert torch.equal(tiny.logps(), on)


def test_sampling_hears_the_adapter_and_reports_its_log_probs(tiny):
    attach_lora(tiny.lm, r=4, alpha=8, init_b=True)
    played = generate(tiny.lm, tiny.cond, 5, seeds=[1, 2])
    with torch.no_grad():
        torch.testing.assert_close(played.logps, tiny.lm.logps(played.codes, tiny.cond), atol=1e-4, rtol=0)
    with merged(tiny.lm):
        again = generate(tiny.lm, tiny.cond, 5, seeds=[1, 2])
    assert torch.equal(again.codes, played.codes)


def test_a_scaled_adapter_changes_weights_by_so_much_and_leaves_the_others(tiny):
    base, first = tiny.logps(), attach_lora(tiny.lm, r=4, alpha=8, init_b=True)
    once = {name: layer.get_delta_weight("default").clone() for name, layer in lora_layers(first).items()}
    attach_lora(tiny.lm, r=2, alpha=4, name="other", init_b=True)
    other = adapter_tensors(tiny.lm, "other")
    scale_adapter(tiny.lm, 0.5)
    for name, layer in lora_layers(tiny.lm).items():
        torch.testing.assert_close(layer.get_delta_weight("default"), 0.5 * once[name])
    assert all(torch.equal(tensor, adapter_tensors(tiny.lm, "other")[name]) for name, tensor in other.items())
    scale_adapter(tiny.lm, 0.0)
    activate(tiny.lm, "default")
    assert torch.equal(tiny.logps(), base)


def test_two_named_adapters_add_up(tiny):
    base = copy.deepcopy(tiny.lm)
    attach_lora(tiny.lm, r=4, alpha=8, name="a", init_b=True)
    attach_lora(tiny.lm, r=2, alpha=8, name="b", init_b=True)
    assert active_adapters(tiny.lm) == ["b"]
    activate(tiny.lm, ["a", "b"])
    assert (adapter_names(tiny.lm), active_adapters(tiny.lm)) == (["a", "b"], ["a", "b"])
    with torch.no_grad():
        for name, layer in lora_layers(tiny.lm).items():
            linear = base.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            linear.weight += layer.get_delta_weight("a") + layer.get_delta_weight("b")
        torch.testing.assert_close(tiny.logps(), base.logps(tiny.codes, tiny.cond), atol=1e-5, rtol=0)
    assert trainable_parameters(tiny.lm) == []


def test_a_removed_adapter_leaves_the_others(tiny):
    attach_lora(tiny.lm, r=4, alpha=8, name="a", init_b=True)
    with_a = tiny.logps()
    attach_lora(tiny.lm, r=4, alpha=8, name="b", init_b=True)
    remove_adapter(tiny.lm, "b")
    activate(tiny.lm, "a")
    assert torch.equal(tiny.logps(), with_a)
    remove_adapter(tiny.lm, "a")
    assert adapter_names(tiny.lm) == []


def test_tensors_move_to_another_lm_of_the_same_base(make_tiny):
    one, other = make_tiny(0), make_tiny(0)
    attach_lora(one.lm, r=4, alpha=8, init_b=True)
    attach_lora(other.lm, r=4, alpha=8)
    set_adapter_tensors(other.lm, adapter_tensors(one.lm))
    assert torch.equal(one.logps(), other.logps())


def test_tensors_of_another_rank_and_unknown_names_are_refused(make_tiny):
    one, other = make_tiny(0), make_tiny(0)
    attach_lora(one.lm, r=4, alpha=8)
    attach_lora(other.lm, r=2, alpha=8)
    with pytest.raises(UserError, match="do not fit"):
        set_adapter_tensors(other.lm, adapter_tensors(one.lm))
    with pytest.raises(UserError, match="second adapter"):
        attach_lora(one.lm, r=4, alpha=8)
    with pytest.raises(UserError, match="no adapter"):
        activate(one.lm, "nobody")

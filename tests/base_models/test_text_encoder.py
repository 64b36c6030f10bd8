import pytest
import torch

from base_models.errors import UserError
from base_models.text_encoder import load_text_encoder


@pytest.fixture(scope="module")
def encoder():
    return load_text_encoder()


def test_padding_does_not_change_a_prompt(encoder):
    alone, _ = encoder.encode(["sad piano"])
    encoder._cache.clear()
    states, mask = encoder.encode(["sad piano", "a very fast and happy techno piece with synth bass and drums"])
    n = int(mask[0].sum())
    torch.testing.assert_close(states[0, :n], alone[0], atol=1e-4, rtol=1e-4)
    assert not states[0, n:].any()


def test_meaning_is_near_meaning(encoder):
    a, b, c = encoder.pooled(["sad slow piano", "melancholic piano ballad", "aggressive techno with drums"])
    assert a @ b > a @ c
    torch.testing.assert_close(a.norm(), torch.tensor(1.0))


def test_encoder_stays_frozen_and_in_eval_mode(encoder):
    encoder.train()
    assert not encoder.model.training
    assert not any(p.requires_grad for p in encoder.parameters())


def test_unknown_encoder_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match="text encoder"):
        load_text_encoder(tmp_path)

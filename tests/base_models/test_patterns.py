import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from base_models.patterns import delay, delay_mask, n_steps, undelay


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 9))
def test_delay_then_undelay_returns_the_same_codes(B, K, T):
    codes = torch.randint(0, 7, (B, K, T))
    assert torch.equal(undelay(delay(codes, special=7)), codes)


def test_delay_shifts_each_book_by_its_number():
    steps = delay(torch.tensor([[[1, 2, 3], [4, 5, 6]]]), special=9)
    assert steps.tolist() == [[[1, 2, 3, 9], [9, 4, 5, 6]]]


def test_mask_is_true_exactly_where_a_code_stands():
    codes = torch.zeros((1, 4, 5), dtype=torch.long)
    assert torch.equal(delay(codes, special=1)[0] == 0, delay_mask(4, 5))
    assert delay_mask(4, 5).sum() == 20
    assert delay_mask(4, 5).shape[1] == n_steps(4, 5) == 8


def test_too_few_steps_are_refused():
    with pytest.raises(ValueError, match="at least 4"):
        undelay(torch.zeros((1, 4, 3)))

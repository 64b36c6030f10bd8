import pytest
import torch

from base_models.conditions import Conditions, parse_tempo


@pytest.mark.parametrize(
    ("prompt", "tempo"),
    [
        ("fast techno, 130 BPM", 130.0),
        ("92.5bpm jazz", 92.5),
        ("no tempo", None),
        ("1200 BPM", None),
        ("20 bpm drone", None),
        ("120 bpmx", None),
        ("", None),
    ],
)
def test_tempo_is_read_where_the_prompt_states_one(prompt, tempo):
    assert parse_tempo(prompt) == tempo


def test_index_cuts_padding_that_no_row_needs(tiny_conditions):
    assert tiny_conditions.index([1]).text.shape[1] == 2
    assert tiny_conditions.index([1, 0]).text.shape[1] == 5


def test_repeat_keeps_a_row_and_its_copies_together(tiny_conditions):
    doubled = tiny_conditions.repeat(2)
    assert len(doubled) == 6
    assert torch.equal(doubled.text[0], doubled.text[1])
    assert torch.equal(doubled.text[2], tiny_conditions.text[1])


def test_cat_pads_with_masked_places(tiny_conditions):
    both = Conditions.cat([tiny_conditions.index([1]), tiny_conditions.index([0])])
    assert both.mask.sum(1).tolist() == [2, 5]
    assert not both.text[0, 2:].any()


def test_dropped_rows_say_nothing(tiny_conditions):
    some = tiny_conditions.drop(torch.tensor([True, False, True]))
    assert not some.mask[0].any()
    assert torch.isnan(some.tempo_bpm[[0, 2]]).all()
    assert torch.equal(some.mask[1], tiny_conditions.mask[1])
    assert torch.isnan(tiny_conditions.null().tempo_bpm).all()


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="B, M, D"):
        Conditions(torch.zeros(2, 3, 4), torch.ones(2, 2).bool(), torch.zeros(2))

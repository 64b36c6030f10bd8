import pytest

from base_models.checkpoint import write_json
from rlhf.proof.cells import Cell
from rlhf.proof.left import TRUST, expected, finished, kind_of, seconds_left


def finish(cell, root, seconds):
    write_json(cell.folder(root) / "cell.json", {"label": cell.label})
    write_json(cell.folder(root) / "done.json", {"seconds": seconds})


def test_kinds_leave_out_taste_seed_and_votes():
    assert [kind_of(label) for label in ("ppo/warm/s3/n50", "play/ppo/warm/s3", "outside-gold/warm/s3", "base/trail/s3")] == [
        "ppo",
        "play/ppo",
        "outside-gold",
        "base/trail",
    ]
    unseen = [kind_of(f"unseen/{played}/warm/s3/n50/{end}") for played in ("ppo", "familiar/dpo") for end in ("by-s4", "by-s5", "corpus")]
    assert unseen == ["unseen/by", "unseen/by", "unseen/corpus"] * 2


def test_a_cell_is_expected_to_take_what_others_of_its_kind_took_and_unmeasured_kinds_are_scaled(tmp_path):
    cells = [Cell(f"ppo/warm/s{seed}", ("true",), weight=100) for seed in range(4)]
    sft = Cell("sft/warm/s0", ("true",), weight=10)
    assert expected([*cells, sft], tmp_path)[sft.name] == 10
    for cell, seconds in zip(cells, (150, 200, 900)):
        finish(cell, tmp_path, seconds)
    write_json(cells[0].folder(tmp_path) / "run" / "samples" / "done.json", {"seconds": 1})  # a program's own files are no cells
    assert sorted(finished(tmp_path)) == [("ppo/warm/s0", 150), ("ppo/warm/s1", 200), ("ppo/warm/s2", 900)]
    told = expected([*cells, sft], tmp_path)
    assert told[cells[3].name] == 200
    assert told[sft.name] == pytest.approx(10 * (800 + TRUST) / (400 + TRUST))


def test_time_left_is_shared_work_or_the_longest_chain():
    first = Cell("a", ("true",), weight=60)
    second = Cell("b", ("true",), (first,), weight=30)
    beside = Cell("c", ("true",), weight=20)
    seconds = {cell.name: cell.weight for cell in (first, second, beside)}
    assert seconds_left([first, second, beside], seconds, 1) == 110
    assert seconds_left([first, second, beside], seconds, 2) == 90
    assert seconds_left([], seconds, 2) == 0

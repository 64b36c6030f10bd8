"""From a manifest on disk to pairs with matched gains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import select

from base_models.errors import UserError
from db.schema import Clip, Pair
from db.store import open_store
from feedback_app.campaigns import every_pair, main, measure, read_rows


def test_stored_gains_make_a_pair_equally_loud_without_overs(make_demo: Callable, tmp_path: Path) -> None:
    demo = make_demo(["one", "two"])
    with open_store(demo.url) as store, store.read() as session:
        for pair in session.scalars(select(Pair)):
            x, y = session.get(Clip, pair.clip_x_id), session.get(Clip, pair.clip_y_id)
            for clip in (x, y):
                lufs, peak_dbfs = measure(Path(clip.uri))
                assert (clip.lufs, clip.true_peak_dbfs) == pytest.approx((lufs, peak_dbfs))
            assert x.lufs + pair.gain_x_db == pytest.approx(y.lufs + pair.gain_y_db, abs=0.2)
            assert max(x.true_peak_dbfs + pair.gain_x_db, y.true_peak_dbfs + pair.gain_y_db) <= -0.99


def test_the_command_registers_once_and_says_what_it_did(demo: object, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--db", demo.url, "--name", "d", "--manifest", str(demo.folder / "manifest.jsonl")]
    assert (main(arguments), capsys.readouterr().out) == (0, "campaign d: 8 clips, 4 pairs (4 new)\n")
    assert (main(arguments), capsys.readouterr().out) == (0, "campaign d: 8 clips, 4 pairs (0 new)\n")


def test_the_command_fails_with_2_got_expected_and_remedy(demo: object, capsys: pytest.CaptureFixture) -> None:
    assert main(["--db", demo.url, "--name", "d", "--manifest", str(demo.folder / "missing.jsonl")]) == 2
    error = capsys.readouterr().err
    assert "got" in error
    assert "remedy" in error


def test_a_manifest_that_is_no_json_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "manifest.jsonl").write_text('{"file": "a.wav"}\n\nnot json\n')
    with pytest.raises(UserError, match=r"manifest\.jsonl:3"):
        read_rows(tmp_path / "manifest.jsonl")


def test_every_two_clips_of_a_prompt_can_be_compared():
    rows = [{"prompt_id": p, "sha256": f"{p}{k}"} for p, n in (("a", 4), ("b", 1), ("c", 2)) for k in range(n)]
    pairs = every_pair(rows)
    assert len(pairs) == 6 + 0 + 1
    assert len(set(pairs)) == 7
    assert all(x[0] == y[0] and x != y for x, y in pairs)

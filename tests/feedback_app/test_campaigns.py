"""From a manifest on disk to pairs with matched gains."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from sqlalchemy import func, select

from base_models.errors import UserError
from db.campaigns import SPOILED
from db.schema import Audit, Campaign, Clip, Pair, Prompt
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


def test_the_command_keeps_a_campaign_for_those_who_passed_the_headphone_check(demo: object) -> None:
    arguments = ["--db", demo.url, "--source", str(demo.folder), "--name"]
    assert [main([*arguments, "d", "--require-screen"]), main([*arguments, "e"])] == [0, 0]
    with open_store(demo.url) as store, store.read() as session:
        asked = dict(session.execute(select(Campaign.name, Campaign.require_screen)).all())
    assert asked == {"c": False, "d": True, "e": False}


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


def tone(path: Path, hz: float, seconds: float = 0.5, rate: int = 8000) -> Path:
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * hz * np.arange(int(seconds * rate)) / rate), rate)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """folder(name, system, offset) -> an audiofolder with two prompts."""

    def make(name: str, system: str | None, offset: float = 0.0) -> Path:
        made = tmp_path / name
        made.mkdir()
        rows = []
        for i in range(2):
            tone(made / f"{i}.wav", 220 + 50 * i + offset)
            rows.append({"file_name": f"{i}.wav", "caption": f"prompt {i}"} | ({"system": system} if system else {}))
        (made / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return made

    return make


def count(url: str, table: type) -> int:
    with open_store(url) as store, store.read() as session:
        return session.scalar(select(func.count()).select_from(table)) or 0


def test_two_audio_folders_meet_prompt_by_prompt_with_gold_pairs(folder: Callable, tmp_path: Path, capsys) -> None:
    url = f"sqlite:///{tmp_path / 'v.db'}"
    arguments = ["--db", url, "--name", "two", "--source", str(folder("a", None)), "--source", str(folder("b", "theirs", 7.0))]
    assert main(arguments) == 2
    assert "without 'system'" in capsys.readouterr().err
    arguments += ["--system", "ours", "--system", "theirs", "--gold", "2", "--gold-dir", str(tmp_path / "gold"), "--gold-rate", "0.1"]
    for new in (2, 0):
        assert main(arguments) == 0
        assert capsys.readouterr().out == f"campaign two: 6 clips, 2 pairs ({new} new), 2 gold pairs\n"
    with open_store(url) as store, store.read() as session:
        for pair in session.scalars(select(Pair)):
            x, y = session.get(Clip, pair.clip_x_id), session.get(Clip, pair.clip_y_id)
            better, worse = (x, y) if pair.gold == "x" else (y, x)
            assert (worse.system == SPOILED) == (pair.gold is not None)
            assert better.system != SPOILED


def test_system_names_clips_that_another_campaign_knows_by_another_name(folder: Callable, tmp_path: Path, capsys) -> None:
    url = f"sqlite:///{tmp_path / 'v.db'}"
    sources = ["--db", url, "--source", str(folder("a", "theirs")), "--source", str(folder("b", "ours", 7.0)), "--min-listen-ms", "0"]
    assert main([*sources, "--name", "one"]) == 0
    assert main([*sources, "--name", "two", "--system", "v1", "--system", "v2"]) == 0
    with open_store(url) as store, store.read() as session:
        named = {(pair.campaign_id, *sorted((pair.system_x, pair.system_y))) for pair in session.scalars(select(Pair))}
        assert named == {(1, "ours", "theirs"), (2, "v1", "v2")}
        rater = store.sign_in("ann", store.add_rater("ann")).id
        key = store.next_assignment(rater, "two").assignment_id
        store.submit_vote(rater, key, "tie", idempotency_key=key)
    capsys.readouterr()
    assert main([*sources, "--name", "two"]) == 2
    assert "another name" in capsys.readouterr().err
    assert main([*sources, "--name", "one", "--system", "v1", "--system", "v2"]) == 0
    assert "named anew" in capsys.readouterr().out


def test_a_pairs_file_names_pairs_and_known_answers(demo: object, tmp_path: Path, capsys) -> None:
    rows = read_rows(demo.folder / "manifest.jsonl")
    pairs = tmp_path / "pairs.jsonl"
    lines = [{"a": rows[0]["file"], "b": rows[1]["file"]}, {"a": rows[2]["sha256"], "b": rows[3]["file"], "gold": "b"}]
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["--db", demo.url, "--name", "d", "--source", str(demo.folder), "--pairs", str(pairs)]) == 0
    assert "1 pairs (1 new), 1 gold pairs" in capsys.readouterr().out
    pairs.write_text(json.dumps({"a": rows[0]["file"], "b": rows[1]["file"], "gold": "x"}))
    assert main(["--db", demo.url, "--name", "e", "--source", str(demo.folder), "--pairs", str(pairs)]) == 2


def empty(folder: Path) -> None:
    (folder / "1.wav").write_bytes(b"")


def corrupt(folder: Path) -> None:
    (folder / "1.wav").write_bytes(b"RIFF" + bytes(5000))


def missing(folder: Path) -> None:
    (folder / "1.wav").unlink()


def two_hours(folder: Path) -> None:
    soundfile.write(folder / "1.wav", np.zeros(1000 * 7200, dtype=np.int16), 1000, subtype="PCM_U8")


def outside(folder: Path) -> None:
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "../x.wav", "caption": "p", "system": "s"}))


def no_prompt(folder: Path) -> None:
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "0.wav", "system": "s"}))


def list_row(folder: Path) -> None:
    (folder / "metadata.jsonl").write_text("[1, 2]\n")


@pytest.mark.parametrize("spoil_it", [empty, corrupt, missing, two_hours, outside, no_prompt, list_row])
def test_a_bad_folder_is_an_error_in_words_and_nothing_is_stored(folder: Callable, tmp_path: Path, capsys, spoil_it: Callable) -> None:
    made = folder("a", "ours")
    spoil_it(made)
    url = f"sqlite:///{tmp_path / 'v.db'}"
    assert main(["--db", url, "--name", "x", "--source", str(made), "--source", str(folder("b", "theirs", 9.0))]) == 2
    error = capsys.readouterr().err
    assert "remedy" in error
    assert "Traceback" not in error
    assert [count(url, table) for table in (Campaign, Clip, Pair, Prompt, Audit)] == [0] * 5


@pytest.mark.parametrize(("key", "value"), [("sample_rate", 44100), ("duration_s", 2.0)])
def test_a_row_that_misstates_its_clip_is_refused(demo: object, capsys, key: str, value: float) -> None:
    rows = [row | {key: value} for row in read_rows(demo.folder / "manifest.jsonl")]
    (demo.folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["--db", demo.url, "--name", "d", "--source", str(demo.folder)]) == 2
    assert "as its row says" in capsys.readouterr().err

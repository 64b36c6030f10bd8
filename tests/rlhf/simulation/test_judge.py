import json

import numpy as np
import pytest
import soundfile

from rlhf.simulation import judge, taste


@pytest.fixture
def samples(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for index in range(6):
        wav = 0.1 * rng.normal(size=16_000) if index % 2 else 0.3 * np.sin(np.arange(16_000) * 0.1)
        soundfile.write(tmp_path / f"{index}.wav", wav, 16_000)
        system = "noise" if index % 2 else "sine"
        rows.append({"file": f"{index}.wav", "sha256": str(index), "prompt_id": "p", "prompt": "x", "seed": index, "system": system})
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_judge_scores_every_clip_of_every_manifest(samples):
    manifest, out = samples / "manifest.jsonl", samples / "gold" / "gold.json"
    assert judge.main(["--manifest", str(manifest), "--manifest", str(manifest), "--out", str(out)]) == 0
    told = json.loads(out.read_text())
    assert len(told["clips"]) == 12
    assert told["clips"][1]["gold"] == pytest.approx(taste.score_file(samples / "1.wav"))
    assert told["summary"]["sine"]["n"] == 6
    assert told["summary"]["sine"]["spread_within_prompt"] == pytest.approx(0, abs=1e-6)
    assert told["summary"]["noise"]["spread_within_prompt"] > 0


def test_a_missing_or_damaged_clip_is_an_error_and_writes_nothing(samples, capsys):
    (samples / "2.wav").write_bytes(b"no audio")
    assert judge.main(["--manifest", str(samples / "manifest.jsonl"), "--out", str(samples / "gold.json")]) == 2
    (samples / "2.wav").unlink()
    assert judge.main(["--manifest", str(samples / "manifest.jsonl"), "--out", str(samples / "gold.json")]) == 2
    assert "remedy" in capsys.readouterr().err
    assert not (samples / "gold.json").exists()


def test_another_taste_tells_something_else(samples):
    manifest, out = samples / "manifest.jsonl", samples / "gold.json"
    assert judge.main(["--manifest", str(manifest), "--out", str(out), "--taste", "space"]) == 0
    told = json.loads(out.read_text())["clips"][1]["gold"]
    assert told == pytest.approx(taste.score_file(samples / "1.wav", "space"))
    assert told != pytest.approx(taste.score_file(samples / "1.wav"))

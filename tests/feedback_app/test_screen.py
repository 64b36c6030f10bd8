"""The headphone check: the server draws, plays and counts; what is sent before the answers tells the ear alone."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import soundfile
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import update

from db.schema import Campaign
from db.store import Store
from feedback_app.limits import Buckets
from feedback_app.screen import REST_S, SAMPLE_RATE, TONE_S, TONES, TRIALS, Checks, tones

Take = Callable[..., object]


def levels(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """(level of each tone by ear, correlation between the ears) of a trial."""
    wav, rate = soundfile.read(io.BytesIO(content))
    assert (rate, wav.shape[1]) == (SAMPLE_RATE, 2)
    starts = [round(which * (TONE_S + REST_S) * rate) for which in range(TONES)]
    parts = [wav[start : start + round(TONE_S * rate)] for start in starts]
    return np.array([np.sqrt((part**2).mean()) for part in parts]), np.array([np.corrcoef(part.T)[0, 1] for part in parts])


@pytest.mark.parametrize(("soft", "turned"), [(0, 1), (1, 2), (2, 0)])
def test_one_tone_is_6_db_softer_and_another_in_antiphase(soft: int, turned: int) -> None:
    level, between_ears = levels(tones(soft, turned))
    others = [which for which in range(TONES) if which != soft]
    assert 20 * np.log10(level[soft] / level[others]) == pytest.approx([-6.02] * 2, abs=0.05)
    assert between_ears == pytest.approx([-1.0 if which == turned else 1.0 for which in range(TONES)], abs=0.001)


def test_whoever_hears_the_softest_tone_passes_and_the_server_counts(ada: TestClient) -> None:
    check = ada.get("/api/v1/me/screen").json()
    assert (check["number"], len(check["trials"])) == (0, TRIALS)
    sounds = [ada.get(address) for address in check["trials"]]
    assert {sound.headers["content-type"] for sound in sounds} == {"audio/wav"}
    answers = [int(levels(sound.content)[0].argmin()) for sound in sounds]
    assert ada.post("/api/v1/me/screen", json={"number": 0, "answers": answers}).json() == {"passed": True}
    assert ada.get("/api/v1/me").json()["screen"] == {"passed": True, "right": TRIALS, "trials": TRIALS, "tries": 1}


def test_nothing_but_the_sound_tells_the_answer_before_it_is_given(ada: TestClient) -> None:
    check = ada.get("/api/v1/me/screen")
    assert check.json() == {"number": 0, "trials": [f"/api/v1/me/screen/0/{trial}" for trial in range(TRIALS)]}
    sounds = [ada.get(address) for address in check.json()["trials"]]
    assert len({len(sound.content) for sound in sounds}) == 1
    assert len({str(sorted(sound.headers.items())) for sound in sounds}) == 1
    assert {sound.headers["cache-control"] for sound in sounds} == {"no-store"}


def test_draws_are_even_and_follow_from_the_secret_the_rater_and_the_check() -> None:
    checks = Checks("only for these tests")
    draws = {(r, n, t): checks.draw(r, n, t) for r in range(10) for n in range(50) for t in range(TRIALS)}
    assert all(soft != turned for soft, turned in draws.values())
    counted = Counter(draws.values())
    assert len(counted) == TONES * (TONES - 1)
    assert all(abs(n / len(draws) - 1 / 6) < 0.03 for n in counted.values())
    other = Checks("another secret")
    assert 0.1 < np.mean([other.draw(*key) == drawn for key, drawn in draws.items()]) < 0.25  # no more than chance
    assert all(checks.draw(*key) == drawn for key, drawn in draws.items())


def test_a_check_is_answered_once(ada: TestClient, api: FastAPI, take_check: Take) -> None:
    assert take_check(ada, 4).json() == {"passed": False}
    right = [api.state.checks.draw(1, 0, trial)[0] for trial in range(TRIALS)]
    assert ada.post("/api/v1/me/screen", json={"number": 0, "answers": right}).json() == {"passed": False}  # the first answers stand
    assert ada.get("/api/v1/me").json()["screen"] == {"passed": False, "right": 4, "trials": TRIALS, "tries": 1}
    assert ada.get("/api/v1/me/screen/0/0").status_code == 404
    for number in (2, 7):
        refused = ada.post("/api/v1/me/screen", json={"number": number, "answers": right})
        assert refused.status_code == 409
        assert set(refused.json()["detail"]) == {"got", "expected", "remedy"}
    assert ada.get("/api/v1/me").json()["screen"]["tries"] == 1


@pytest.mark.parametrize(("right", "passed"), [(6, True), (5, True), (4, False)])
def test_the_check_is_stored_with_its_tries_and_locks_nobody_out(ada: TestClient, take_check: Take, right: int, passed: bool) -> None:
    assert ada.get("/api/v1/me").json()["screen"] is None
    for tries in (1, 2):
        assert take_check(ada, right).json() == {"passed": passed}
        assert ada.get("/api/v1/me").json()["screen"] == {"passed": passed, "right": right, "trials": TRIALS, "tries": tries}
    assert ada.get("/api/v1/pairs/next").status_code == 200


def test_a_check_may_be_left_out_and_counts_as_not_passed(ada: TestClient) -> None:
    assert ada.post("/api/v1/me/screen", json={"number": 0, "answers": []}).json() == {"passed": False}
    assert ada.get("/api/v1/me").json()["screen"] == {"passed": False, "right": 0, "trials": 0, "tries": 1}


def test_a_campaign_that_wants_the_check_sends_a_client_there_first(ada: TestClient, store: Store, take_check: Take) -> None:
    with store.write() as session:
        session.execute(update(Campaign).values(require_screen=True))
    for right in (None, 4):
        if right is not None:
            take_check(ada, right)
        refused = ada.get("/api/v1/pairs/next")
        assert (refused.status_code, refused.json()["detail"]["step"]) == (403, "check")
        assert set(refused.json()["detail"]) == {"got", "expected", "remedy", "step"}
    take_check(ada, 6)
    assert ada.get("/api/v1/pairs/next").status_code == 200


@pytest.mark.parametrize("answers", [[0], [0] * 5, [0] * 7, [3] * 6, [-1] * 6, ["first"] * 6, None, {"right": 6}])
def test_answers_that_cannot_be_are_refused_and_spend_no_check(ada: TestClient, answers: object) -> None:
    assert ada.post("/api/v1/me/screen", json={"number": 0, "answers": answers}).status_code == 422
    assert ada.get("/api/v1/me").json()["screen"] is None


def test_a_count_of_the_clients_own_is_not_taken(ada: TestClient) -> None:
    assert ada.post("/api/v1/me/screen", json={"right": 6, "trials": 6}).status_code == 422


@pytest.mark.parametrize("address", ["/api/v1/me/screen/1/0", "/api/v1/me/screen/0/6", "/api/v1/me/screen/0/-1", "/api/v1/me/screen/-1/0"])
def test_a_trial_of_no_open_check_is_404(ada: TestClient, address: str) -> None:
    assert ada.get(address).status_code == 404


def test_whoever_guesses_check_after_check_meets_a_wall(ada: TestClient, api: FastAPI, take_check: Take) -> None:
    api.state.limits.checks = Buckets(per_s=1 / 60, burst=3)
    assert [take_check(ada, 0).status_code for _ in range(4)] == [201, 201, 201, 429]

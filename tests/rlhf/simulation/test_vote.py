import io
import json
import threading

import httpx
import numpy as np
import pytest
import soundfile

from rlhf.simulation import raters, taste, vote
from rlhf.simulation.ears import Ears, played_db, worst_stretch_ms
from tests.rlhf.simulation.piece import pad


def audio(seed):
    rng = np.random.default_rng(seed)
    t = np.arange(16_000) / 16_000
    wav = 0.2 * np.sin(2 * np.pi * (200 + 100 * seed) * t) * np.exp(-2 * (t % 0.5)) + 0.002 * seed * rng.normal(size=len(t))
    buffer = io.BytesIO()
    soundfile.write(buffer, wav, 16_000, format="WAV")
    return buffer.getvalue()


class App:
    """A rating app in one class: every rater gets every pair once; it can fail on purpose."""

    def __init__(self, n_pairs=6, fail_votes=0, min_listen_ms=0):
        self.clips = [audio(seed) for seed in range(2 * n_pairs)]
        self.n_pairs, self.fail_votes, self.min_listen_ms = n_pairs, fail_votes, min_listen_ms
        self.sessions, self.done, self.votes, self.bodies = {}, {}, {}, []
        self.lock = threading.Lock()

    def __call__(self, request):
        with self.lock:
            return self.answer(request)

    def answer(self, request):
        path = request.url.path
        if path == "/api/v1/login":
            body = json.loads(request.content)
            if body["token"] != f"token-{body['handle']}":
                return httpx.Response(401, json={"detail": "unknown rater"})
            self.sessions[f"session-{body['handle']}"] = body["handle"]
            return httpx.Response(200, json={"session": f"session-{body['handle']}"})
        handle = self.sessions.get(request.headers.get("authorization", "").removeprefix("Bearer "))
        if handle is None:
            return httpx.Response(401)
        if path.startswith("/api/v1/audio/"):
            return httpx.Response(200, content=self.clips[int(path.rsplit("/", 1)[1])])
        if path == "/api/v1/pairs/next":
            done = self.done.setdefault(handle, 0)
            if done == self.n_pairs:
                return httpx.Response(204)
            pair = {
                "assignment_id": f"{handle}:{done}",
                "campaign": request.url.params.get("campaign"),
                "prompt": "a tone",
                "audio": {"a": f"/api/v1/audio/{2 * done}", "b": f"/api/v1/audio/{2 * done + 1}"},
                "gain_db": {"a": 0.0, "b": -3.0},
                "duration_s": 1.0,
                "min_listen_ms": self.min_listen_ms,
                "progress": {"done": done, "open": self.n_pairs - done},
            }
            return httpx.Response(200, json=pair)
        body = json.loads(request.content)
        key = request.headers["idempotency-key"]
        duplicate = key in self.votes
        if not duplicate:
            self.votes[key] = (handle, body["choice"])
            self.bodies.append(body)
            self.done[handle] += 1
        if self.fail_votes and not duplicate:
            self.fail_votes -= 1
            return httpx.Response(503)  # stored, but the client does not get to know
        return httpx.Response(200 if duplicate else 201, json={"vote_id": len(self.votes), "duplicate": duplicate})


def accounts(n):
    return [{"handle": f"r{i}", "token": f"token-r{i}"} for i in range(n)]


def run(app, n=3, **kwargs):
    return vote.run("http://app", accounts(n), transport=httpx.MockTransport(app), **kwargs)


def test_everybody_votes_until_no_pair_is_left():
    app = App()
    progress = run(app)
    assert progress.votes == 18
    assert app.done == {"r0": 6, "r1": 6, "r2": 6}


def test_votes_per_rater_is_a_limit():
    app = App()
    assert run(app, votes_per_rater=2).votes == 6


def test_a_vote_that_was_stored_but_not_acknowledged_counts_once():
    app = App(fail_votes=3)
    progress = run(app, n=2)
    assert len(app.votes) == 12
    assert progress.duplicates == 3
    assert progress.retries == 3


def test_the_same_seed_gives_the_same_votes_and_another_seed_others():
    def choices(seed):
        app = App(n_pairs=10)
        run(app, seed=seed)
        return sorted((body["assignment_id"], body["choice"]) for body in app.bodies)

    assert choices(1) == choices(1)
    assert choices(1) != choices(2)


def test_a_clip_is_analysed_once(monkeypatch):
    calls = []
    honest = taste.score_bytes
    monkeypatch.setattr(taste, "score_bytes", lambda data, gain, name: calls.append(gain) or honest(data, gain, name))
    cache = Ears()
    first = cache.score(audio(1), 0.0)
    assert cache.score(audio(1), 0.0) == first
    assert len(calls) == 1
    cache.score(audio(1), -6.0)
    assert len(calls) == 2


def test_the_demanded_listening_time_is_really_waited_for():
    app = App(n_pairs=1, min_listen_ms=120)
    run(app, n=1)
    (body,) = app.bodies
    assert min(body["listen_ms"].values()) >= 120


def test_a_wrong_token_is_an_error_and_not_a_silent_absence():
    with pytest.raises(httpx.HTTPStatusError, match="401"):
        vote.run("http://app", [{"handle": "r0", "token": "no"}], transport=httpx.MockTransport(App()))


def test_a_server_that_stays_away_ends_in_an_error():
    def away(request):
        raise httpx.ConnectError("refused", request=request)

    with pytest.raises(httpx.ConnectError):
        vote.run("http://app", accounts(1), patience_s=0.3, transport=httpx.MockTransport(away))


@pytest.mark.parametrize("content", ["", "[]", '[{"handle": "a"}]', "{"])
def test_a_bad_raters_file_is_refused(tmp_path, capsys, content):
    (tmp_path / "raters.json").write_text(content)
    assert vote.main(["--url", "http://app", "--raters", str(tmp_path / "raters.json")]) == 2
    assert "remedy" in capsys.readouterr().err


# ---- habits that are heard through HTTP ------------------------------------------------------------------------------


def ballots(listener, n=300, gain_b=0.0, first=1, second=2):
    """`n` ballots of one listener on one pair; only the noise differs."""
    pair = {"gain_db": {"a": 0.0, "b": gain_b}, "duration_s": 1.0, "aspects": ["musicality", "sound_quality", "prompt_fit"]}
    ears, sounds = Ears(), {"a": audio(first), "b": audio(second)}
    return [vote.ballot(listener, ears, sounds, pair, 0, index) for index in range(n)]


def share_of_a(told):
    return sum(vote["choice"] == "a" for vote in told) / len(told)


def test_the_louder_side_is_preferred_by_those_who_fall_for_it_alone():
    even, loud = raters.Listener(0.5), raters.Listener(0.5, loudness_bias=0.2)
    assert share_of_a(ballots(loud, gain_b=-6)) > share_of_a(ballots(loud)) + 0.1
    assert share_of_a(ballots(even, gain_b=-6)) == pytest.approx(share_of_a(ballots(even)), abs=0.05)
    assert played_db(audio(1), -6.0) == pytest.approx(played_db(audio(1), 0.0) - 6)


def test_talkative_raters_tell_aspects_confidence_and_marks_that_the_app_takes():
    from feedback_app.api import Ballot

    told = ballots(raters.Listener(0.5, talkative=0.4), first=1, second=6)
    whole = [Ballot(assignment_id="0", listen_ms={"a": 1, "b": 1}, **vote) for vote in told]
    assert 0.3 < sum(bool(vote.aspects) for vote in whole) / len(whole) < 0.5
    assert 0.1 < sum(vote.confidence is not None for vote in whole) / len(whole) < 0.3
    gold = [Ears().score(audio(seed), 0.0) for seed in (1, 6)]
    better = np.mean([vote.aspects["musicality"] for vote in whole if vote.aspects])
    assert np.sign(better) == np.sign(gold[1] - gold[0])
    marks = [mark for vote in whole for mark in vote.marks]
    assert all(0 <= mark.t0_ms < mark.t1_ms <= 1000 for mark in marks)


def test_the_demo_crew_tells_its_choice_and_nothing_else():
    assert all(set(vote) == {"choice"} for vote in ballots(raters.crew(12)[0], n=20))


def test_a_mixture_of_tastes_lies_between_them():
    ears, sound = Ears(), audio(3)
    warm, space = ears.score(sound, 0.0, {"warm": 1.0}), ears.score(sound, 0.0, {"space": 1.0})
    assert ears.score(sound, 0.0, {"warm": 0.25, "space": 0.75}) == pytest.approx(0.25 * warm + 0.75 * space)
    assert ears.score(sound, 0.0) == warm != pytest.approx(space)


def test_the_marked_stretch_is_the_spoiled_one():
    rng = np.random.default_rng(0)
    wav = pad(duration_s=4.0)
    wav[32_000:48_000] = 0.1 * rng.normal(size=16_000)
    buffer = io.BytesIO()
    soundfile.write(buffer, wav, 16_000, format="WAV")
    assert {worst_stretch_ms(buffer.getvalue(), name) for name in taste.TASTES} <= {1500, 2000, 2500}


def test_a_crowd_in_which_nobody_listens_is_refused(tmp_path, capsys):
    (tmp_path / "raters.json").write_text(json.dumps(accounts(2)))
    asked = ["--url", "http://app", "--raters", str(tmp_path / "raters.json"), "--crew", "crowd", "--careless", "1"]
    assert vote.main(asked) == 2
    assert "nobody listens" in capsys.readouterr().err

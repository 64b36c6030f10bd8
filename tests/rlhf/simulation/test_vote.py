import io
import json
import threading

import httpx
import numpy as np
import pytest
import soundfile

from rlhf.simulation import taste, vote


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
    cache = vote.ScoreCache()
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

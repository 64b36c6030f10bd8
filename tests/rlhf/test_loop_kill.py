"""`kill -9` and a full disk in every stage of a round, then the same call again: one champion, no vote lost or doubled, nothing done twice.
And a second round, in which listeners who hear nothing but the clips throw out a challenger that was wrecked by its training.

The base is the shipped one, so that there is something to hear. The loop and the programs that it starts (registration, the rating app, the
trainer) are forked from one process that has loaded everything once, so that twenty calls cost no twenty imports; they run their own code,
and die by a real SIGKILL to all of them at once. That a program which was really started dies with the loop alone is tested by itself.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from base_models.checkpoint import read_json
from base_models.policy import PRETRAINED
from rlhf.loop_report import status
from rlhf.stages import ROOT
from tests.rlhf.ppo_toys import alone

RATER = """
import hashlib, io, json, pathlib, sys, urllib.request, uuid, wave
import numpy as np
url, campaign, accounts, out, how = sys.argv[1:6]
manifests = pathlib.Path(out).glob("rounds/*/heldout/challenger-*/manifest.jsonl")
liked = {json.loads(line)["sha256"] for manifest in manifests for line in manifest.open()}
def unrest(sound):  # how much the spectrum changes from one 25th of a second to the next
    with wave.open(io.BytesIO(sound)) as file:
        x = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768
    frames = x[: len(x) // 640 * 640].reshape(-1, 640) * np.hanning(640)
    spectra = np.abs(np.fft.rfft(frames))
    spectra /= np.linalg.norm(spectra, axis=1, keepdims=True) + 1e-9
    return 1 - (spectra[1:] * spectra[:-1]).sum(1).mean()
def ask(path, token=None, body=None, **headers):
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {}), **headers}
    with urllib.request.urlopen(urllib.request.Request(url + path, data, headers)) as answer:
        return answer.status, answer.read()
for account in json.load(open(accounts)):
    token = json.loads(ask("/api/v1/login", body=account)[1])["session"]
    while (found := ask(f"/api/v1/pairs/next?campaign={campaign}", token))[0] != 204:
        pair = json.loads(found[1])
        sounds = {side: ask(pair["audio"][side], token)[1] for side in "ab"}
        heard = {side: unrest(sound) if how == "ear" else hashlib.sha256(sound).hexdigest() for side, sound in sounds.items()}
        choice = next((side for side, sha in heard.items() if sha in liked), min(heard, key=heard.get))
        vote = {"assignment_id": pair["assignment_id"], "choice": choice, "listen_ms": {"a": 0, "b": 0}}
        ask("/api/v1/votes", token, vote, **{"Idempotency-Key": str(uuid.uuid4())})
"""

RIG = '''
import contextlib, json, os, random, resource, runpy, signal, sqlite3, sys, time
from dataclasses import replace
from pathlib import Path
import torch
torch.set_num_threads(1)
import feedback_app.app, feedback_app.campaigns, rlhf.train_sft
from rlhf import cli, collecting, loop, stages

root, policy, full = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
out, folder = root / "run", root / "run" / "rounds" / "01"
LONG = {"samples": 1.0, "votes": 1.0, "snapshot": 0.1, "train": 1.5, "ab_samples": 1.5, "ab_votes": 1.0, "verdict": 0.1}

def arguments(rounds, lr, how):
    return ["loop", "--prompts", str(root / "train.txt"), "--heldout", str(root / "heldout.txt"), "--policy", policy, "--out", str(out),
            "--rounds", str(rounds), "--duration", "0.6", "--min-listen-ms", "0", "--min-decided", "8", "--min-prompts", "4",
            "--method", "sft",
            "--train", f"--steps 2 --kl-clips 0 --held-out 0 --lr {lr} --r 4 --save-every 1 --one-rater", "--accounts", "2",
            "--raters", f"python {root / 'rater.py'} {{url}} {{campaign}} {{accounts}} {out} {how}"]

def forked(command, stdout=None):
    """One of our programs, forked from here: the interpreter is this one, the code its own."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        if stdout is not None:
            os.dup2(stdout, 1)
        if command[1] == "-m":
            code = sys.modules[command[2]].main(command[3:])
        else:
            sys.argv = command[1:]
            runpy.run_path(command[1], run_name="__main__")
    except SystemExit as ended:
        code = ended.code
    finally:
        sys.stdout.flush()
        os._exit(code or 0)

def together(commands, environment):
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in [forked(command) for command in commands]]

@contextlib.contextmanager
def rating_app(db, port=0):
    read, write = os.pipe()
    pid = forked([sys.executable, "-m", "feedback_app.app", "--db", db, "--port", str(port)], write)
    os.close(write)
    try:
        with open(read) as lines:
            line = lines.readline()
            if "ready at" not in line:
                raise loop.UserError(f"a rating app that did not start: {line!r}", "a line with its address", "see its error above")
            yield stages.RatingApp(line.rsplit(" ", 1)[1].strip(), None)
    finally:
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)

stages.run_together, collecting.rating_app = together, rating_app

@contextlib.contextmanager
def no_room():
    """Nothing more can be written: by a ballast on a small file system, or by a limit that the kernel keeps."""
    if full == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        yield
        return
    ballast = root / "ballast"
    with contextlib.suppress(OSError), open(ballast, "ab", buffering=0) as file:
        while file.write(bytes(1 << 12)):
            pass
    yield

def call(stage="", how="", given=(1, 1e-3, "liked")):
    """A call of the loop; in `stage` the disk is full, or everything is killed at a random moment. Returns (exit code, what it said)."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.setsid()
        os.dup2(write, 1)
        os.dup2(write, 2)
        os.close(read)
        run_stages = stages.run_stages
        def starved(place, plan):
            def work(one):
                def run():
                    with no_room():
                        return one.run()
                return replace(one, run=run) if one.name == stage else one
            run_stages(place, [work(one) for one in plan])
        if how == "full":
            loop.run_stages = starved
        code = 1
        try:
            code = cli.main(arguments(*given))
        finally:
            sys.stdout.flush()
            os._exit(code)
    os.close(write)
    said, at = "", None
    os.set_blocking(read, False)
    while True:
        try:
            part = os.read(read, 1 << 16)
        except BlockingIOError:
            part = None
            time.sleep(0.002)
        if part == b"":
            break
        said += (part or b"").decode(errors="replace")
        if how == "kill" and at is None and any(f"] {WHAT[stage]} ..." in line for line in said.splitlines()):
            at = time.monotonic() + draw.uniform(0, LONG[stage])
        if at is not None and time.monotonic() > at:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            at = float("inf")
    os.close(read)
    status = os.waitpid(pid, 0)[1]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    (root / "ballast").unlink(missing_ok=True)
    return os.waitstatus_to_exitcode(status), said

def stamps():
    return {path.stem: path.read_text() for path in (folder / "stages").glob("*.json")}

def votes():
    if not (out / "encore.db").is_file():
        return {}
    with contextlib.closing(sqlite3.connect(out / "encore.db")) as db, contextlib.suppress(sqlite3.OperationalError):
        rows = db.execute("select v.id, v.choice, a.pair_id, v.rater_id from vote v join assignment a on a.id = v.assignment_id")
        return {row[0]: list(row[1:]) for row in rows}
    return {}

def kept(old, new):
    return all(new.get(key) == value for key, value in old.items())

draw = random.Random(0)
plan = loop.Round(type("L", (), {"cfg": loop.LoopConfig(method="sft")})(), 1, folder).stages()
WHAT = {stage.name: stage.what for stage in plan}
told, before, ballots = [], {}, {}
for stage, how in [(stage, how) for stage in WHAT for how in ("full", "kill")]:
    if stage in before:
        continue  # a kill came too late for its stage
    code, said = call(stage, how)
    now, then = stamps(), votes()
    again = [name for name in before if f"] {WHAT[name]} ..." in said]
    told.append({"stage": stage, "how": how, "code": code, "again": again, "stamps": kept(before, now), "votes": kept(ballots, then)})
    told[-1]["said"] = said if "Traceback" in said else said[-600:]
    before, ballots = now, then
last = call()
told = {"calls": told, "last": last, "stamps": kept(before, stamps()), "votes": sorted(votes().values())}
champion = (out / "champion.json").read_text()
second = call(given=(2, 3.0, "ear"))
print(json.dumps({**told, "second": second, "same_champion": (out / "champion.json").read_text() == champion}))
'''


def interrupted(folder: Path, full: str) -> dict[str, Any]:
    """What the rig tells. full: "limit", or "ballast" where the folder is a small file system."""
    (folder / "train.txt").write_text("sad piano\ncalm folk\ndark rock\n")
    (folder / "heldout.txt").write_text("slow ambient\nfast house\ngloomy piano\ncheerful reggae\n")
    (folder / "rater.py").write_text(RATER)
    environment = {**alone(), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", RIG, str(folder), str(PRETRAINED), full]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("interrupted")
    return {**interrupted(folder, "limit"), "out": folder / "run"}


def stage(told: dict[str, Any], number: int, name: str) -> dict[str, Any]:
    found: dict[str, Any] = read_json(told["out"] / "rounds" / f"{number:02d}" / "stages" / f"{name}.json")
    return found


@pytest.mark.timeout(900)
def test_killed_or_without_disk_in_every_stage_a_round_ends_as_if_nothing_had_been(told):
    kills = [call for call in told["calls"] if call["how"] == "kill" and call["code"] == -signal.SIGKILL]
    assert len(kills) >= 4
    for call in told["calls"]:
        assert call["stamps"], call  # what a stage had left is what it left
        assert call["votes"], call
        assert not call["again"], call
        if call["how"] == "full":
            assert call["code"] == 2, call
            assert "Traceback" not in call["said"], call
            assert "error: got" in call["said"], call
            assert "remedy" in call["said"], call
    assert told["last"][0] == 0, told["last"]
    assert told["stamps"]
    pairs = [tuple(vote[1:]) for vote in told["votes"]]
    assert len(set(pairs)) == len(pairs) == 2 * (3 + 4)  # each pair twice, never by the same rater
    verdict, champion = stage(told, 1, "verdict"), read_json(told["out"] / "champion.json")
    assert verdict["promoted"]
    assert verdict["win_rate"] == 1
    assert champion["round"] == 1
    assert champion["adapter_sha256"] == stage(told, 1, "train")["adapter_sha256"]


def test_listeners_throw_out_a_challenger_that_training_has_wrecked(told):
    """By ear alone: real clips of the shipped base, a learning rate a thousand times too high, votes over HTTP, the stated rule."""
    assert told["second"][0] == 0, told["second"]
    verdict, moved = stage(told, 2, "verdict"), stage(told, 2, "ab_samples")
    assert verdict["decided"] == 8
    assert verdict["win_rate"] < 0.5
    assert not verdict["promoted"]
    assert moved["challenger"]["diversity_ratio"] < 0.9
    assert told["same_champion"]
    assert stage(told, 2, "samples")["adapter_sha256"] == stage(told, 1, "train")["adapter_sha256"]  # the champion played
    assert moved["challenger"]["kl"] > 10 * abs(moved["champion"]["kl"])
    lines = status(told["out"])
    assert "round 1, " in next(line for line in lines if line.startswith("Champion: "))
    rows = [line for line in lines if line.startswith("| ")][2:]
    assert [row.rstrip(" |").rsplit("| ", 1)[1] for row in rows] == ["PROMOTED", "champion stays"]


def test_a_program_that_was_started_ends_when_the_loop_is_killed_alone(tmp_path):
    code = """
import sys
from rlhf.stages import run_together
run_together([[sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)"]], {})
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as loop:
        assert loop.stdout is not None
        child = int(loop.stdout.readline())
        os.kill(child, 0)
        loop.kill()
    if sys.platform != "linux":
        os.kill(child, signal.SIGKILL)
        return
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and Path(f"/proc/{child}").exists() and " Z " not in Path(f"/proc/{child}/stat").read_text():
        time.sleep(0.01)
    assert not Path(f"/proc/{child}").exists() or " Z " in Path(f"/proc/{child}/stat").read_text()

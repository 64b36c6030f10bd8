"""The rating server under load: the real app in a process and on a core of its own, raters over loopback from another core.

    python benchmarks/feedback_load.py                             # all three modes, SQLite
    python benchmarks/feedback_load.py --mode think --db postgresql    # an embedded server; or a URL
    python benchmarks/feedback_load.py --mode think --rival        # the same load on Label Studio's annotation API

A vote is what a rater waits for: the next pair, then the vote. `think`: 200 raters who think for about 6 s between the two;
`closed-50` and `closed-200`: raters who never think. Prints votes/s, waiting times and errors as JSON, and then counts the
database: every acknowledged vote must be there once, and none besides.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import func, select

from benchmarks.feedback_growth import fill_campaign, fresh_url
from db.schema import Assignment, Pair, Vote
from db.store import open_store

ROOT = Path(__file__).resolve().parents[1]
MODES = {"think": (200, 6.0), "closed-50": (50, 0.0), "closed-200": (200, 0.0)}
"""Raters, and their mean seconds of thinking."""
LABEL_STUDIO = "label-studio==1.23.2"


@dataclass
class Tally:
    """What the raters saw: seconds of waiting a vote, errors, and which vote each assignment was told to be."""

    waits_s: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    acknowledged: dict[str, int] = field(default_factory=dict)


class Client:
    """HTTP/1.1 over one kept connection: enough for JSON, and cheap, so that the load does not measure itself."""

    def __init__(self, host: str, port: int, authorization: str) -> None:
        self._at, self._authorization = (host, port), authorization
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def send(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """(status, JSON or None). A connection the server closed between two requests is opened again."""
        if self._streams is None or self._streams[1].is_closing() or self._streams[0].at_eof():
            self._streams = await asyncio.open_connection(*self._at)
        reader, writer = self._streams
        content = b"" if body is None else json.dumps(body).encode()
        lines = [
            f"{method} {path} HTTP/1.1",
            f"Host: {self._at[0]}",
            f"Authorization: {self._authorization}",
            f"Content-Length: {len(content)}",
        ]
        lines += ["Content-Type: application/json"] * (body is not None) + [
            f"{name.replace('_', '-')}: {value}" for name, value in headers.items()
        ]
        writer.write("\r\n".join([*lines, "", ""]).encode() + content)
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        status = int(head.split(" ", 2)[1])
        fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
        if fields.get("transfer-encoding") == "chunked":
            told = b""
            while size := int(await reader.readline(), 16):
                told += (await reader.readexactly(size + 2))[:-2]
            await reader.readline()
        else:
            told = await reader.readexactly(int(fields.get("content-length", 0)))
        return status, json.loads(told) if told else None

    def close(self) -> None:
        if self._streams:
            self._streams[1].close()


async def rate(
    vote: Callable[[], Awaitable[tuple[str, int] | None]], think_s: float, until: float, tally: Tally, rng: random.Random
) -> None:
    """One rater: a vote and some thinking, until the time is over."""
    await asyncio.sleep(rng.uniform(0, max(think_s, 0.2)))  # nobody starts in step
    while time.perf_counter() < until:
        began = time.perf_counter()
        try:
            stored = await vote()
        except (OSError, EOFError, ValueError) as error:
            tally.errors.append(f"{type(error).__name__}: {error}"[:200])
            await asyncio.sleep(0.5)
            continue
        if stored is None:
            return
        tally.waits_s.append(time.perf_counter() - began)
        assert stored[0] not in tally.acknowledged, "one assignment, two votes"
        tally.acknowledged[stored[0]] = stored[1]
        await asyncio.sleep(rng.uniform(0.5, 1.5) * think_s)


def encore_vote(client: Client) -> Callable[[], Awaitable[tuple[str, int] | None]]:
    async def vote() -> tuple[str, int] | None:
        status, pair = await client.send("GET", "/api/v1/pairs/next")
        if status == 204:
            return None
        if status != 200:
            raise ValueError(f"next pair: {status} {pair}")
        body = {"assignment_id": pair["assignment_id"], "choice": random.choice(["a", "b", "tie"]), "listen_ms": {"a": 0, "b": 0}}
        status, told = await client.send("POST", "/api/v1/votes", body, Idempotency_Key=uuid.uuid4().hex)
        if status != 201:
            raise ValueError(f"vote: {status} {told}")
        return pair["assignment_id"], told["vote_id"]

    return vote


async def drive(votes: list[Callable[[], Awaitable[tuple[str, int] | None]]], think_s: float, seconds: float) -> tuple[Tally, float]:
    """All raters at once; what they saw, and the seconds it took."""
    tally, began = Tally(), time.perf_counter()
    await asyncio.gather(*(rate(vote, think_s, began + seconds, tally, random.Random(i)) for i, vote in enumerate(votes)))
    return tally, time.perf_counter() - began


def figures(tally: Tally, seconds: float) -> dict[str, Any]:
    waits = sorted(tally.waits_s)
    at = lambda share: round(1000 * waits[min(len(waits) - 1, int(share * len(waits)))], 1) if waits else None  # noqa: E731
    return {
        "votes": len(waits),
        "votes_per_s": round(len(waits) / seconds, 1),
        "p50_ms": at(0.5),
        "p95_ms": at(0.95),
        "errors": len(tally.errors),
        "first_errors": tally.errors[:3],
    }


@contextmanager
def server(command: list[str], core: int, port: int, environment: dict[str, str], timeout_s: float) -> Iterator[None]:
    """A server in its own process, pinned to a core, from when its port answers until the block ends."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            ["taskset", "-c", str(core), *command], cwd=ROOT, env={**os.environ, **environment}, stdout=log, stderr=log
        )
        try:
            deadline = time.monotonic() + timeout_s
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                except OSError:
                    if process.poll() is not None or time.monotonic() > deadline:
                        log.seek(0)
                        raise RuntimeError(f"got no server on port {port}; expected one:\n{log.read().decode()[-2000:]}") from None
                    time.sleep(0.2)
            yield
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_encore(mode: str, url: str, seconds: float, core: int, folder: Path) -> dict[str, Any]:
    n_raters, think_s = MODES[mode]
    with open_store(url) as store:
        fill_campaign(store, n_pairs=20_000, target_votes=3)
        codes = {name: store.add_rater(name) for name in (f"rater {i}" for i in range(n_raters))}
    port, secret = free_port(), folder / "signing.secret"
    command = [sys.executable, "-m", "feedback_app.app", "--db", url, "--port", str(port), "--secret-file", str(secret)]

    async def load() -> tuple[Tally, float]:
        clients = []
        for name, code in codes.items():
            client = Client("127.0.0.1", port, "")
            status, told = await client.send("POST", "/api/v1/login", {"handle": name, "token": code})
            assert status == 200, told
            client.close()
            clients.append(Client("127.0.0.1", port, f"Bearer {told['session']}"))
        found = await drive([encore_vote(client) for client in clients], think_s, seconds)
        for client in clients:
            client.close()
        return found

    with server(command, core, port, {"OMP_NUM_THREADS": "1"}, timeout_s=120):
        tally, took_s = asyncio.run(load())
    with open_store(url) as store, store.read() as session:
        stored = dict(session.execute(select(Vote.assignment_id, Vote.id)).all())
        n_stored = session.scalar(select(func.count()).select_from(Vote)) or 0
        over = session.scalar(select(func.count()).select_from(Pair).where(Pair.n_open > Pair.target_votes)) or 0
        held = session.scalar(select(func.count()).select_from(Assignment).where(Assignment.status.in_(("leased", "voted")))) or 0
        n_open = session.scalar(select(func.sum(Pair.n_open))) or 0
    lost = sum(stored.get(assignment) != vote for assignment, vote in tally.acknowledged.items())
    unasked = len(stored.keys() - tally.acknowledged.keys())
    counts = {"lost": lost, "doubled": n_stored - len(stored), "stored_unacknowledged": unasked, "pairs_over_target": over}
    return figures(tally, took_s) | counts | {"slots_agree": held == n_open}


def run_label_studio(mode: str, seconds: float, core: int, folder: Path) -> dict[str, Any]:
    """The same raters on Label Studio: each asks for the next task of its labelling queue and posts an annotation to it."""
    n_raters, think_s = MODES[mode]
    venv = ROOT / "runs" / "label-studio-venv"
    program = venv / "bin" / "label-studio"
    if not program.exists():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        subprocess.run([venv / "bin" / "pip", "install", "--quiet", LABEL_STUDIO], check=True, timeout=1800)
    port, token = free_port(), uuid.uuid4().hex
    environment = {
        "LABEL_STUDIO_BASE_DATA_DIR": str(folder / "label-studio"),
        "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
        "LABEL_STUDIO_DISABLE_SIGNUP_WITHOUT_LINK": "true",
        "COLLECT_ANALYTICS": "false",
        "LATEST_VERSION_CHECK": "false",
    }
    command = [str(program), "start", "--no-browser", "--port", str(port), "--internal-host", "127.0.0.1"]
    command += ["--username", "bench@localhost.test", "--password", "benchmark-1", "--user-token", token, "--log-level", "ERROR"]
    config = (
        '<View><Audio name="a" value="$a"/><Audio name="b" value="$b"/><Choices name="choice" toName="a">'
        '<Choice value="a"/><Choice value="b"/><Choice value="tie"/></Choices></View>'
    )

    async def load() -> tuple[Tally, float]:
        owner = Client("127.0.0.1", port, f"Token {token}")
        status, project = await owner.send("POST", "/api/projects", {"title": "pairs", "label_config": config, "maximum_annotations": 3})
        if status != 201:
            raise RuntimeError(f"got {status} {project}; expected a project")
        tasks = [{"data": {"a": f"/a{i}.wav", "b": f"/b{i}.wav"}} for i in range(5000)]
        status, told = await owner.send("POST", f"/api/projects/{project['id']}/import", tasks)
        if status != 201:
            raise RuntimeError(f"got {status} {told}; expected imported tasks")
        status, found = await owner.send("GET", f"/api/tasks?project={project['id']}&page_size=5000&fields=all")
        if status != 200:
            raise RuntimeError(f"got {status} {found}; expected tasks")
        ids = iter([task["id"] for task in found["tasks"]])

        def label(client: Client) -> Callable[[], Awaitable[tuple[str, int] | None]]:
            async def vote() -> tuple[str, int] | None:
                task = next(ids, None)
                if task is None:
                    return None
                status, told = await client.send("GET", f"/api/tasks/{task}")
                if status != 200:
                    raise ValueError(f"task: {status} {told}")
                choice = {
                    "from_name": "choice",
                    "to_name": "a",
                    "type": "choices",
                    "value": {"choices": [random.choice(["a", "b", "tie"])]},
                }
                status, told = await client.send("POST", f"/api/tasks/{task}/annotations", {"result": [choice]})
                if status != 201:
                    raise ValueError(f"annotation: {status} {told}")
                return str(told["id"]), told["id"]

            return vote

        clients = [Client("127.0.0.1", port, f"Token {token}") for _ in range(n_raters)]
        result = await drive([label(client) for client in clients], think_s, seconds)
        for client in [owner, *clients]:
            client.close()
        return result

    with server(command, core, port, environment, timeout_s=300):
        tally, took_s = asyncio.run(load())
    return figures(tally, took_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=MODES, action="append", help="default: all")
    parser.add_argument("--db", default="sqlite", help="sqlite, postgresql (both made for the run), or the URL of an empty database")
    parser.add_argument("--seconds", type=float, default=60.0, help="of load, each mode")
    parser.add_argument("--rival", action="store_true", help=f"also run {LABEL_STUDIO}, installed into runs/label-studio-venv")
    parser.add_argument("--server-core", type=int, default=0)
    parser.add_argument("--load-core", type=int, default=1)
    args = parser.parse_args()
    os.sched_setaffinity(0, {args.load_core})
    report: dict[str, Any] = {}
    for mode in args.mode or MODES:
        with tempfile.TemporaryDirectory() as folder:
            with fresh_url(args.db, Path(folder)) as url:
                ours = run_encore(mode, url, args.seconds, args.server_core, Path(folder))
            report[mode] = {"encore": ours}
            if args.rival:
                theirs = run_label_studio(mode, args.seconds, args.server_core, Path(folder))
                report[mode] |= {"label_studio": theirs}
                if theirs["votes"]:
                    ratios = {
                        "votes_per_s": round(ours["votes_per_s"] / theirs["votes_per_s"], 2),
                        "p95": round(theirs["p95_ms"] / ours["p95_ms"], 2),
                    }
                    report[mode] |= {"times_better": ratios}
        print(json.dumps({mode: report[mode]}, indent=2), flush=True)
    failed = [mode for mode, found in report.items() if found["encore"]["lost"] or found["encore"]["doubled"] or found["encore"]["errors"]]
    if failed:
        sys.exit(f"votes were lost or doubled, or requests failed, in: {', '.join(failed)}")


if __name__ == "__main__":
    main()

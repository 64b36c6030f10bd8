"""Random and mutated requests on every endpoint, as nobody, a rater and an owner.

    python benchmarks/feedback_fuzz.py --requests 10000

Fails on an answer of 500 or more, on a stack trace in a body, when what a rater or nobody is told holds anything of somebody else
(name, access code, session, comment, assignments, audio addresses, invitation), a system's or a file's name, and when somebody else's
vote or lease was touched. Requests are made with these things, too: an assignment, an address, a session that is another's.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fastapi import FastAPI
from fastapi.testclient import TestClient
from httpx import Response
from sqlalchemy import select

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from base_models.audio import write_audio
from db import owners
from db.campaigns import Rules
from db.schema import Assignment, Rater, Vote
from db.store import Store, open_store, token_sha256
from feedback_app.api import create_api
from feedback_app.campaigns import Source, fill_campaign
from feedback_app.limits import Buckets
from feedback_app.owner_api import Premises, add_owner_api

NASTY = [
    None, True, 0, -1, 2**31, 2**63, 1e308, 0.5, "", "a",
    "x" * 3000, "\x00", "\ud800", "../../etc/passwd", "'; drop table vote; --", "${7*7}",
    "<img src=x onerror=1>", "\u202e", [], {}, [[]], {"a": None}, "normal", "open", "skip", "a" * 32, "musicality", float("nan"),
]  # fmt: skip


@dataclass(frozen=True)
class Bystander:
    """Somebody who voted once and holds a pair. `secrets`: what nobody but them and the owners may be told, by what it is."""

    rater_id: int
    secrets: dict[str, str]
    rows: list[tuple]

    @classmethod
    def rate(cls, api: FastAPI) -> Bystander:
        store: Store = api.state.store
        code, client = store.add_rater("someoneelse"), TestClient(api)
        session = client.post("/api/v1/login", json={"handle": "someoneelse", "token": code}).json()["session"]
        voted = client.get("/api/v1/pairs/next").json()
        ballot = {"assignment_id": voted["assignment_id"], "choice": "b", "listen_ms": {"a": 0, "b": 0}, "comment": "a private remark"}
        headers = {"Idempotency-Key": "key-of-someoneelse", "X-Encore-Client": "fuzz"}
        client.post("/api/v1/votes", json=ballot, headers=headers).raise_for_status()
        held = client.get("/api/v1/pairs/next").json()
        secrets = {
            "name": "someoneelse",
            "access code": code,
            "hash of the code": token_sha256(code),
            "session": session,
            "comment": "a private remark",
            "vote's assignment": voted["assignment_id"],
            "assignment": held["assignment_id"],
            "address of A": held["audio"]["a"].rsplit("/", 1)[1],
            "address of B": held["audio"]["b"].rsplit("/", 1)[1],
        }
        with store.read() as db:
            rater_id = db.scalars(select(Rater.id).where(Rater.handle == "someoneelse")).one()
        return cls(rater_id, secrets, rows_of(store, rater_id))

    def told(self, answer: Response) -> set[str]:
        """Which secrets stand in an answer, body or headers."""
        said = answer.text + str(answer.headers)
        return {what for what, secret in self.secrets.items() if secret in said}


def rows_of(store: Store, rater_id: int) -> list[tuple]:
    """A rater's assignments and votes as they are stored."""
    with store.read() as session:
        kept = select(Assignment.id, Assignment.pair_id, Assignment.swapped, Assignment.status, Vote.choice, Vote.comment)
        kept = kept.outerjoin(Vote, Vote.assignment_id == Assignment.id).where(Assignment.rater_id == rater_id)
        return sorted(tuple(row) for row in session.execute(kept))


def build(folder: Path) -> tuple[FastAPI, dict[str, TestClient], Bystander]:
    """A small campaign with telling names behind the API, a client for nobody, a rater and an owner, and somebody else."""
    clips = folder / "tellingname"
    clips.mkdir()
    rows = []
    for i in range(40):
        tone = 0.3 * np.sin(np.arange(1600, dtype=np.float32) * (0.1 + 0.001 * i))
        write_audio(clips / f"tellingname{i}.wav", tone, 8000)
        rows.append({"file_name": f"tellingname{i}.wav", "prompt": f"prompt {i // 2}", "system": f"secretsystem{i % 2}"})
    (clips / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = open_store(f"sqlite:///{folder / 'votes.db'}")
    fill_campaign(store, "fuzz", [Source(str(clips))], Rules(min_listen_ms=0, target_votes=1000))
    store.add_rater("leaver")  # number 1: whom the fuzz may block and erase
    api = create_api(store, "only for this fuzz")
    add_owner_api(api, Premises((str(clips),), folder / "state"))
    for name in ("named", "address", "votes", "changes", "checks"):
        setattr(api.state.limits, name, Buckets(per_s=1e9, burst=1_000_000_000))  # the walls are tested elsewhere
    clients = {}
    for role in ("nobody", "rater", "owner"):
        clients[role] = TestClient(api, raise_server_exceptions=False)
        if role != "nobody":
            store.add_rater(role, role)
            sign_in(api, clients[role], role)
    bystander = Bystander.rate(api)
    link = owners.invite(store, None, None, max_uses=1, note="a note to the owner")
    bystander.secrets.update({"system": "secretsystem", "file": "tellingname", "invitation": link, "its note": "a note to the owner"})
    return api, clients, bystander


def sign_in(api: FastAPI, client: TestClient, handle: str) -> None:
    """Anew: a fuzz ends its own sessions, by withdrawing a consent say."""
    answer = client.post("/api/v1/login", json={"handle": handle, "token": api.state.store.renew_token(handle)})
    client.cookies.clear()
    client.headers["Authorization"] = f"Bearer {answer.json()['session']}"


def value(schema: dict, document: dict, rng: random.Random) -> object:
    """Something that fits a JSON schema, or nearly, or not at all."""
    if rng.random() < 0.06:
        return rng.choice(NASTY)
    if "$ref" in schema:
        return value(document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]], document, rng)
    if "enum" in schema:
        return rng.choice(schema["enum"])
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return value(rng.choice(schema[several]), document, rng)
    kind = schema.get("type")
    if kind == "object":
        known = {name: value(part, document, rng) for name, part in schema.get("properties", {}).items() if rng.random() < 0.9}
        return known | ({"unknown": rng.choice(NASTY)} if rng.random() < 0.05 else {})
    if kind == "array":
        parts = schema.get("prefixItems")
        return [value(p, document, rng) for p in (parts or [schema.get("items", {})] * rng.randrange(4))]
    if kind in ("integer", "number"):
        return rng.choice([schema.get("minimum", 0), schema.get("maximum", 5), 1, 2, rng.randrange(10)])
    if kind == "boolean":
        return rng.random() < 0.5
    return rng.choice(["fuzz", "someone new", "ab12", "".join(chr(rng.randrange(32, 0x3000)) for _ in range(rng.randrange(12)))])


def run(n_requests: int, seed: int, folder: Path) -> tuple[Counter, list[str], set[str]]:
    """Answers counted by (role, status), every breach in words, and which of somebody else's things the owner is told who asks for them."""
    rng = random.Random(seed)
    api, clients, bystander = build(folder)
    theirs = [text for what, text in bystander.secrets.items() if what in ("session", "assignment", "address of A", "address of B")]
    told_owner: set[str] = set()
    document = api.openapi()
    endpoints = [
        (method, path, item[method]) for path, item in document["paths"].items() for method in item if not path.endswith("/logout")
    ]
    counted: Counter = Counter()
    breaches: list[str] = []
    offer: dict = {}
    for i in range(n_requests):
        role = rng.choice(list(clients))
        method, path, about = rng.choice(endpoints)
        for part in about.get("parameters", []):
            if part["in"] == "path":
                filled = rng.choice(["1", "2", "3", "999", "x", "-1", "99999999999999999999", "..%2f", "%00", "first", *theirs])
                path = path.replace("{" + part["name"] + "}", filled)
        query = {
            part["name"]: str(value(part["schema"], document, rng)).encode("utf-8", "replace").decode()
            for part in about.get("parameters", [])
            if part["in"] == "query" and rng.random() < 0.6
        }
        headers = {"Content-Type": "application/json", "Idempotency-Key": f"key-{i % 997:06}"}
        body = None
        if "requestBody" in about:
            schema = about["requestBody"]["content"]["application/json"]["schema"]
            sent = value(schema, document, rng)
            if path.endswith("/votes") and isinstance(sent, dict) and rng.random() < 0.7:
                got = clients[role].get("/api/v1/pairs/next")
                offer = got.json() if got.status_code == 200 else offer
                own = offer.get("assignment_id", "ab")
                sent |= {"assignment_id": rng.choice([own, own, bystander.secrets["assignment"]]), "listen_ms": {"a": 0, "b": 0}}
            body = json.dumps(sent).encode()
            if rng.random() < 0.08:
                cut = rng.randrange(len(body) + 1)
                body = body[:cut] + bytes([rng.randrange(256)]) + body[cut + rng.randrange(3) :]
        if "/raters/3/" in path or (role == "owner" and "/raters/2/" in path and "copy" not in path):
            path = path.replace("/raters/3/", "/raters/1/").replace("/raters/2/", "/raters/1/")  # keep the fuzz's own people
        answer = clients[role].request(method, path, params=query, content=body, headers=headers)
        counted[role, answer.status_code] += 1
        if answer.status_code == 401 and role != "nobody" and not path.endswith("/login"):
            sign_in(api, clients[role], role)
        what = f"{role} {method} {path} {query} {body!r}: {answer.status_code} {answer.text[:200]}"
        if answer.status_code >= 500:
            breaches.append(f"failure: {what}")
        if "Traceback" in answer.text or 'File "' in answer.text:
            breaches.append(f"stack trace: {what}")
        told = bystander.told(answer)
        if role != "owner" and (told or '"rater_id"' in answer.text):
            breaches.append(f"leak of {sorted(told) or 'a rater id'}: {what}")
    sign_in(api, clients["owner"], "owner")
    for path in ("campaigns/1/results", "raters", "invitations", f"raters/{bystander.rater_id}/copy"):
        told_owner |= bystander.told(clients["owner"].get(f"/api/v1/owner/{path}"))
    if rows_of(api.state.store, bystander.rater_id) != bystander.rows:
        breaches.append("somebody else's vote or lease was touched")
    api.state.store.close()
    return counted, breaches, told_owner


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        counted, breaches, _ = run(args.requests, args.seed, Path(folder))
    for (role, status), n in sorted(counted.items()):
        print(f"{role:8} {status} {n:6}")
    for breach in breaches[:20]:
        print(breach, file=sys.stderr)
    print(f"{counted.total()} requests, {len(breaches)} breaches")
    return 1 if breaches else 0


if __name__ == "__main__":
    sys.exit(main())

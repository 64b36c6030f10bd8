"""From a person's votes to what was trained on them, by the hashes in real snapshots, reward models and adapters' manifests."""

# ruff: noqa: F811  (fixtures that come from another folder)
from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapters.library import Manifest, save_adapter, save_mix
from adapters.lora import attach_lora, trainable_parameters
from base_models.errors import UserError
from base_models.policy import load_policy
from db import owners
from db.export import export_snapshot
from db.store import Store
from rlhf.cli import main
from rlhf.lineage import trace
from tests.db.conftest import add_raters, make_rows, sqlite_store, sqlite_url  # noqa: F401


@pytest.fixture
def store(sqlite_store: Store) -> Store:
    return sqlite_store


def made(folder: Path, adapter: bool = False, **manifest: Any) -> None:
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    if adapter:
        (folder / "adapter_config.json").write_text("{}")


def test_what_was_trained_on_a_persons_votes_is_listed_before_and_after_the_person_is_forgotten(
    store: Store,
    make_rows: Callable,
    add_raters: Callable,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    store.create_campaign("c", make_rows(3), tmp_path / "clips", min_listen_ms=0)
    ann, bob, _ = add_raters(3)
    runs, sha = tmp_path / "runs", {}
    for name, rater in (("one", ann), ("two", bob)):
        key = store.next_assignment(rater).assignment_id
        store.submit_vote(rater, key, "a", idempotency_key=key)
        sha[name] = export_snapshot(store, "c", runs / "snapshots", name)["sha256"]
    made(runs / "reward", reward_sha256="r1", snapshot_sha256=sha["one"])
    made(runs / "ppo", adapter=True, adapter_sha256="ppo-hash", reward_sha256="r1")
    made(runs / "dpo", adapter=True, adapter_sha256="dpo-hash", snapshot_sha256=sha["two"])
    made(runs / "mix", adapter=True, adapter_sha256="mix-hash", method="mix", config={"parts": [{"adapter_sha256": "mixed-hash"}]})
    made(runs / "mixed", adapter=True, adapter_sha256="mixed-hash", method="mix", config={"parts": [{"adapter_sha256": "ppo-hash"}]})
    made(runs / "other", adapter=True, adapter_sha256="other-hash", snapshot_sha256="of somebody else")
    (runs / "broken").mkdir()
    (runs / "broken/manifest.json").write_text("{")

    def told(*arguments: str) -> str:
        assert main(["lineage", *arguments, "--runs", str(runs)]) in (None, 0)
        return capsys.readouterr().out

    of_ann = told("--rater", "rater 0", "--db", str(store.url))
    known = ("r1", "ppo-hash", "dpo-hash", "mix-hash", "mixed-hash", "other-hash")
    assert [name for name in known if name in of_ann] == ["r1", "ppo-hash", "dpo-hash", "mix-hash", "mixed-hash"]
    of_bob = told("--rater", "rater 1", "--db", str(store.url))
    assert [name for name in known if name in of_bob] == ["dpo-hash"]
    assert "no frozen snapshot" in told("--rater", "rater 2", "--db", str(store.url))
    forgotten = owners.erase_rater(store, None, ann)
    assert told(*(part for snapshot in forgotten for part in ("--snapshot", snapshot.sha256))) == of_ann
    assert "nothing below" in told("--snapshot", "ab" * 32)


def test_a_mix_is_traced_to_what_each_part_was_made_from(policy_dir: Path, tmp_path: Path) -> None:
    policy, runs = load_policy(policy_dir), tmp_path / "runs"
    attach_lora(policy.lm, 2, 4.0)
    own = {"base_sha256": policy.sha256, "method": "ppo", "licence": "CC0-1.0"}
    one = save_adapter(runs / "one", policy.lm, Manifest(name="one", reward_sha256="r1", **own))
    trainable_parameters(policy.lm)[0].data.add_(1.0)
    two = save_adapter(runs / "two", policy.lm, Manifest(name="two", snapshot_sha256="s2", **own))
    made(runs / "reward", reward_sha256="r1", snapshot_sha256="s1")
    save_mix(runs / "mix", [runs / "one", runs / "two"])
    told = trace(runs / "mix", runs)
    assert [line.split()[0] for line in told] == ["adapter", "adapter", "reward", "snapshot", "adapter", "snapshot", "base"]
    assert one.adapter_sha256 in told[1]
    assert "s1" in told[3]  # of the reward
    assert two.adapter_sha256 in told[4]
    (runs / "two" / "adapter_model.safetensors").write_bytes((runs / "one" / "adapter_model.safetensors").read_bytes())
    with pytest.raises(UserError, match="whose weights hash to"):
        trace(runs / "mix", runs)
    shutil.rmtree(runs / "two")
    assert "not found below" in trace(runs / "mix", runs)[-2]

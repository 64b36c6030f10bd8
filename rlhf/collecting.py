"""Waiting for votes: people's in the browser, or those of any program that votes over HTTP.

    collect(db, "loop", Collecting(serve=True))     # serves the rating page until the campaign has what it wants

The votes are in the database and nowhere else: whoever waits can be stopped and called again, and the server may be somebody else's.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base_models.checkpoint import read_json
from base_models.errors import UserError
from db.export import export_snapshot
from db.store import open_store
from rlhf.stages import accounts_file, python_environment, rating_app

PLACEHOLDERS = ("url", "campaign", "db", "accounts")


@dataclass(frozen=True)
class Collecting:
    """How votes come in, this time: nothing of it is kept."""

    serve: bool = False
    port: int = 7860
    raters: str | None = None
    """A command that votes over HTTP; {url}, {campaign}, {db} and {accounts} are filled in."""
    n_accounts: int = 12
    """Accounts in {accounts}, a JSON file of handle and token."""
    accounts: Path = Path("accounts.json")
    """Where that file is kept."""
    poll_s: float = 5.0


def collect(db: str, campaign: str, how: Collecting) -> dict[str, Any]:
    """Wait until a campaign has the votes that it wants. UserError when a program that votes ends before."""
    votes, wanted = counted(db, campaign)
    if votes < wanted:
        print(f"        campaign {campaign!r}: {votes} of {wanted} votes are there", flush=True)
        if how.raters is not None:
            _filled(how.raters, dict.fromkeys(PLACEHOLDERS, ""))  # a command that cannot be is told before a server is started
            with rating_app(db) as url:
                _let_vote(how, db, url, campaign)
            votes, wanted = counted(db, campaign)
            if votes < wanted:
                got = f"{votes} of {wanted} votes once the raters' command had ended"
                raise UserError(got, "all of them", "raise the number of raters, or call again to let them go on")
        else:
            if not how.serve:
                print(f"        rate at any app on this database: encore app --db {db}", flush=True)
            with rating_app(db, how.port) if how.serve else nullcontext():
                votes = _watch(db, campaign, votes, wanted, how.poll_s)
    return {"votes": votes, "wanted": wanted}


def _watch(db: str, campaign: str, votes: int, wanted: int, poll_s: float) -> int:
    told = votes
    while votes < wanted:
        time.sleep(poll_s)
        votes, wanted = counted(db, campaign)
        if votes != told:
            print(f"        {votes} of {wanted} votes", flush=True)
            told = votes
    return votes


def _let_vote(how: Collecting, db: str, url: str, campaign: str) -> None:
    """Run the raters' command with its placeholders filled in."""
    assert how.raters is not None
    known = {"url": url, "campaign": campaign, "db": db, "accounts": ""}
    if "{accounts}" in how.raters:
        known["accounts"] = str(accounts_file(db, how.accounts, [f"program-{i:02d}" for i in range(how.n_accounts)]))
    code = subprocess.run(_filled(how.raters, known), env=python_environment(), check=False).returncode
    if code:
        raise UserError(f"exit code {code} of {how.raters!r}", "0", "mend what it says above and call again")


def _filled(command: str, known: Mapping[str, str]) -> list[str]:
    """The command's words; `python` is the one that runs this. UserError for other placeholders and for no program."""
    try:
        words = [part.format(**known) for part in shlex.split(command)]
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"--raters {command!r} ({error!r})", f"placeholders of {list(PLACEHOLDERS)}", "correct the command") from error
    if words and words[0] in ("python", "python3"):
        words[0] = sys.executable
    if not words or shutil.which(words[0]) is None:
        raise UserError(f"--raters {command!r}, which is no program", "a program", "correct the command")
    return words


def counted(db: str, campaign: str) -> tuple[int, int]:
    """(votes that are there, votes that are wanted) of a campaign."""
    with open_store(db) as store:
        found = next((c for c in store.stats().campaigns if c.name == campaign), None)
    return (0, 0) if found is None else (found.votes, found.votes_wanted)


def freeze(db: str, campaign: str, folder: Path, name: str) -> dict[str, Any]:
    """A snapshot of a campaign's votes, made once: what comes later belongs to the next round."""
    if not (folder / name / "snapshot.json").is_file():
        with open_store(db) as store:
            export_snapshot(store, campaign, folder, name)
    found = read_json(folder / name / "snapshot.json")
    return {key: found[key] for key in ("sha256", "n_votes", "n_raters", "n_excluded")}

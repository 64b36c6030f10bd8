"""Waiting for votes: people's in the browser, or those of any program that votes over HTTP.

    collect(db, "loop", Collecting(serve=True))     # serves the rating page until the campaign has what it wants

The votes are in the database and nowhere else: whoever waits can be stopped and called again, and the server may be somebody else's.
"""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import select

from base_models.checkpoint import read_json
from base_models.errors import UserError
from db.errors import ConflictError
from db.export import export_snapshot, is_recorded
from db.schema import LATE, Clip
from db.session import parse_url
from db.store import CampaignStats, open_store
from rlhf.stages import accounts_file, minutes, python_environment, rating_app, run_together

PLACEHOLDERS = ("url", "campaign", "db", "accounts")


@dataclass(frozen=True)
class Collecting:
    """How votes come in, this time: nothing of it is kept."""

    serve: bool = False
    port: int = 7860
    people: tuple[str, ...] = ()
    """Who may sign in; whoever is new is told an access code."""
    raters: str | None = None
    """A command that votes over HTTP; {url}, {campaign}, {db} and {accounts} are filled in."""
    n_accounts: int = 12
    """Accounts in {accounts}, a JSON file of handle and token."""
    accounts: Path = Path("accounts.json")
    """Where that file is kept."""
    poll_s: float = 5.0


def admit(db: str, people: Sequence[str]) -> None:
    """Let people sign in. A code is shown once, to whoever is new: the database keeps its hash alone."""
    with open_store(db) as store:
        for name in people:
            try:
                print(f"        sign in as {name} with access code {store.add_rater(name)}", flush=True)
            except ConflictError:
                print(f"        {name} signs in as before; a fresh code: encore owners code {shlex.quote(name)} --db {db}", flush=True)


def collect(db: str, campaign: str, how: Collecting) -> dict[str, Any]:
    """Wait until a campaign has the votes that it wants. UserError when a program that votes ends before."""
    votes, wanted = counted(db, campaign)
    if votes >= wanted:
        return {"votes": votes, "wanted": wanted}
    print(f"        campaign {campaign!r}: {votes} of {wanted} votes are there", flush=True)
    if how.raters is not None:
        _filled(how.raters, dict.fromkeys(PLACEHOLDERS, ""))  # a command that cannot be is told before a server is started
        with rating_app(db) as app:
            _let_vote(how, db, app.url, campaign)
        votes, wanted = counted(db, campaign)
        if votes < wanted:
            got = f"{votes} of {wanted} votes once the raters' command had ended"
            raise UserError(got, "all of them", "raise the number of raters, or call again to let them go on")
    elif how.serve:
        with rating_app(db, how.port) as serving:
            _tell_who_is_missing(db, campaign)
            votes = _watch(db, campaign, votes, how.poll_s, serving.check)
    else:
        print(f"        rate at any app on this database: encore app --db {db}", flush=True)
        _tell_who_is_missing(db, campaign)
        votes = _watch(db, campaign, votes, how.poll_s)
    return {"votes": votes, "wanted": counted(db, campaign)[1]}


def _tell_who_is_missing(db: str, campaign: str) -> None:
    """Nobody hears a pair twice, so that a pair's votes are so many people's: with fewer of them one would wait for ever."""
    found, people = _campaign(db, campaign)
    a_pair = -(-found.votes_wanted // max(1, found.pairs))
    if people < a_pair:
        print(
            f"        {people} of the {a_pair} people who are needed can sign in, as {a_pair} votes a pair are wanted: add --rater NAME, "
            f"or invite some with encore owners invite --db {db}",
            flush=True,
        )
    if found.status != "open":
        print(f"        the campaign is {found.status}: encore owners open {shlex.quote(campaign)} --db {db}", flush=True)


def _watch(db: str, campaign: str, first: int, poll_s: float, check: Callable[[], None] = lambda: None) -> int:
    """Look into the database until all votes are there; says how long that may take at the pace since `first`."""
    began, told = time.monotonic(), first
    while True:
        votes, wanted = counted(db, campaign)
        if votes != told:
            left = (wanted - votes) * (time.monotonic() - began) / max(1, votes - first)
            print(f"        {votes} of {wanted} votes" + (f", about {minutes(left)} left" if votes < wanted else ""), flush=True)
            told = votes
        if votes >= wanted:
            return votes
        time.sleep(poll_s)
        check()


def _let_vote(how: Collecting, db: str, url: str, campaign: str) -> None:
    """Run the raters' command with its placeholders filled in."""
    assert how.raters is not None
    known = {"url": url, "campaign": campaign, "db": db, "accounts": ""}
    if "{accounts}" in how.raters:
        known["accounts"] = str(accounts_file(db, how.accounts, [f"program-{i:02d}" for i in range(how.n_accounts)]))
    [code] = run_together([_filled(how.raters, known)], python_environment())
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


def _campaign(db: str, campaign: str) -> tuple[CampaignStats, int]:
    """A campaign's counts, and how many people can sign in. UserError where the database has no such campaign."""
    with open_store(db) as store:
        stats = store.stats()
    found = next((c for c in stats.campaigns if c.name == campaign), None)
    if found is None:
        raise UserError(
            f"no campaign {campaign!r} in {db}", "the one whose clips were put up", "restore the database, or begin in a new --out"
        )
    return found, stats.raters


def counted(db: str, campaign: str) -> tuple[int, int]:
    """(votes that are there, votes that are wanted) of a campaign. Not those that came after their lease: the pair was given to somebody
    else by then, who is waited for."""
    found, _ = _campaign(db, campaign)
    return found.votes - found.excluded.get(LATE, 0), found.votes_wanted


def database_file(db: str) -> Path | None:
    """The file of an SQLite database; None for one that is kept by a server."""
    url = parse_url(db)
    return Path(url.database) if url.get_backend_name() == "sqlite" and url.database else None


def places(db: str, clip_sha256: str) -> list[str]:
    """Where the database knows a clip to lie; nowhere, if it was not put up."""
    with open_store(db) as store, store.read() as session:
        return list(session.scalars(select(Clip.uri).where(Clip.sha256 == clip_sha256)))


def freeze(db: str, campaign: str, folder: Path, name: str) -> dict[str, Any]:
    """A snapshot of a campaign's votes, made once: what comes later belongs to the next round.

    One that the database does not know was cut off half-way, and nobody has read it: it is made anew, so that whose votes went out is
    always on record.
    """
    place, cut = folder / name, folder / f".cut-{name}"
    with open_store(db) as store:
        if (place / "snapshot.json").is_file() and not is_recorded(store, read_json(place / "snapshot.json")["sha256"]):
            if cut.exists():  # of a call that was cut off here before
                shutil.rmtree(cut)
            place.rename(cut)  # at once no snapshot any more: a kill must leave no half of one
        if not (place / "snapshot.json").is_file():
            export_snapshot(store, campaign, folder, name)
    if cut.exists():
        shutil.rmtree(cut)
    found = read_json(place / "snapshot.json")
    return {key: found[key] for key in ("sha256", "n_votes", "n_raters", "n_excluded")}

"""What an owner does, from the command line on the server: python -m feedback_app.owners COMMAND [--db URL] ...

Each command does what the owner's page does, on the same database, while the server runs; the audit names no actor for it.
Tables go to stdout, with `--json` as JSON; bad input ends with one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from base_models.errors import UserError
from db import owners
from db.campaigns import Rules
from db.errors import ConflictError, StoreError
from db.leaderboard import Leaderboard, leaderboard
from db.quality import Agreement, qualities
from db.schema import ASPECTS, CHOOSERS
from db.session import parse_url
from db.store import Store, open_store

STATUS_OF = {"open": "open", "pause": "paused", "close": "closed"}
RULES = {
    "target_votes": (int, "votes wanted for each pair, each by another person"),
    "min_listen_ms": (int, "listening asked for on each side, milliseconds"),
    "random_floor": (float, "share of informative choices that are drawn uniformly, above 0 to 1"),
    "gold_rate": (float, "share of assignments with a known answer, 0 to .5 together with --repeat-rate"),
    "repeat_rate": (float, "share of assignments heard before, sides turned, 0 to .5 together with --gold-rate"),
}
CHOOSES = "how the next pair is chosen: the least voted first, any that waits, or (informative) where a vote tells most"
SWITCHES = {
    "invited_only": "only for raters who were invited to it",
    "practice": "new raters rehearse first",
    "require_screen": "only for raters who passed the headphone check",
}


def plain(cell: object) -> str:
    """A cell as a terminal may show it: control and bidi characters that somebody put into a name are written out."""
    if cell is None:
        return "–"
    text = f"{cell:%Y-%m-%d %H:%M}" if isinstance(cell, datetime) else str(cell)
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns as wide as their widest cell; numbers to the right."""
    cells = [[plain(cell) for cell in row] for row in rows]
    if not cells:
        return "nothing yet"
    widths = [max(map(len, column)) for column in zip(heads, *cells)]
    right = [all(cell == "–" or cell.rstrip(" %").lstrip("+-").replace(".", "", 1).isdigit() for cell in column) for column in zip(*cells)]
    lines = [
        [cell.rjust(width) if number else cell.ljust(width) for cell, width, number in zip(row, widths, right)] for row in [heads, *cells]
    ]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def share(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.0f} %"


def _open(url: str) -> Store:
    """The store at `url`; one that does not exist is not made, for the name is then a slip."""
    parsed = parse_url(url)
    if parsed.get_backend_name() == "sqlite" and not Path(parsed.database or "").is_file():
        raise UserError(f"no database {parsed.database}", "the one that the server uses", "pass its URL with --db")
    return open_store(url)


def list_campaigns(store: Store, args: argparse.Namespace) -> str:
    rows = owners.campaigns(store)
    heads = ["campaign", "status", "pairs", "gold", "votes", "wanted", "leases", "skips", "not counted"]
    cells = [[row.name, row.status, row.n_pairs, row.n_gold, row.votes, row.votes_wanted, row.leases, row.skips, sum(row.excluded.values())]
             for row in rows]  # fmt: skip
    return _told(args, rows, lambda: table(heads, cells))


def set_status(store: Store, args: argparse.Namespace) -> str:
    status = STATUS_OF[args.command]
    owners.set_status(store, None, owners.campaign_id_of(store, args.campaign), status)
    return f"campaign {plain(args.campaign)}: {status}"


def rules(store: Store, args: argparse.Namespace) -> str:
    changes = {name: value for name in (*RULES, *SWITCHES, "chooser") if (value := getattr(args, name)) is not None}
    if args.no_aspects and args.aspect:
        raise UserError("--no-aspects beside --aspect", "one of them", "drop the other")
    if args.no_aspects or args.aspect:
        changes["aspects"] = tuple(args.aspect)
    found: Rules = owners.change_rules(store, None, owners.campaign_id_of(store, args.campaign), **changes)
    rows = [[name, ", ".join(value) if isinstance(value, list) else value] for name, value in found.columns().items()]
    return _told(args, found, lambda: table(["rule", "value"], rows))


def invite(store: Store, args: argparse.Namespace) -> str:
    try:
        lasts = timedelta(days=args.days)
    except (OverflowError, ValueError) as error:
        raise UserError(f"--days {args.days}", f"more than 0 and at most {owners.MAX_INVITATION_DAYS}", "correct it") from error
    campaign_id = None if args.campaign is None else owners.campaign_id_of(store, args.campaign)
    token = owners.invite(store, None, campaign_id, max_uses=args.people, expires_in=lasts, note=args.note)
    return f"{args.url.rstrip('/')}/#invite={token}"


def list_invitations(store: Store, args: argparse.Namespace) -> str:
    rows = owners.invitations(store)
    cells = [[row.id, row.campaign or "(all)", row.note, f"{row.n_used} of {row.max_uses}", row.expires_at] for row in rows]
    return _told(args, rows, lambda: table(["id", "campaign", "note", "used", "until (UTC)"], cells))


def end_invitation(store: Store, args: argparse.Namespace) -> str:
    owners.end_invitation(store, None, args.id)
    return f"invitation {args.id}: ended"


def list_raters(store: Store, args: argparse.Namespace) -> str:
    rows = owners.raters(store)
    cells = [[row.id, row.handle, row.role, row.status, row.votes, row.created_at] for row in rows]
    return _told(args, rows, lambda: table(["id", "name", "role", "status", "votes", "since (UTC)"], cells))


def access_code(store: Store, handle: str, role: str) -> str:
    """A fresh access code for a person of this role, who is made if need be. Raises ConflictError for a name of the other role."""
    known = {row.handle: row for row in owners.raters(store)}.get(handle)
    if known is not None and known.role != role:
        raise ConflictError(f"{handle!r}, who is no {role}", f"a name of a {role}", "choose another name")
    if known is not None and known.status != "active":
        raise ConflictError(f"{handle!r}, who is {known.status}", "somebody active, or a new name", "unblock them, or choose another name")
    code = store.add_rater(handle, role) if known is None else store.renew_token(handle)
    rater_id = owners.rater_id_of(store, handle)
    with store.write() as session:
        owners.record(session, None, "rater.code", rater_id=rater_id, role=role)
    return code


def code(store: Store, args: argparse.Namespace) -> str:
    return access_code(store, args.name, args.role)


def block(store: Store, args: argparse.Namespace) -> str:
    owners.set_blocked(store, None, owners.rater_id_of(store, args.name), args.command == "block")
    return f"{plain(args.name)}: {'blocked' if args.command == 'block' else 'active'}"


def copy(store: Store, args: argparse.Namespace) -> str:
    """The copy goes to stdout, or to a new file that its owner alone can read."""
    rater_id = owners.rater_id_of(store, args.name)
    if args.out is not None and args.out.exists():
        raise UserError(f"{args.out}, which exists", "the name of a new file", "choose another --out")
    text = json.dumps(owners.export_rater(store, None, rater_id), indent=2)
    if args.out is None:
        return text
    with os.fdopen(os.open(args.out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text + "\n")
    return f"{args.out}: everything held about {plain(args.name)}"


def erase(store: Store, args: argparse.Namespace) -> str:
    rater_id = owners.rater_id_of(store, args.name)
    if not args.yes:
        raise UserError(f"erase {args.name!r}, which cannot be undone", "--yes", "say it again with --yes")
    found = owners.erase_rater(store, None, rater_id, args.votes)
    kept = "the votes are kept without a name" if args.votes == "anonymise" else "the votes are removed"
    if not found:
        return f"forgotten; {kept}; no frozen snapshot holds them"
    return f"forgotten; {kept}; frozen snapshots that hold them:\n" + "\n".join(f"  {s.name}  {s.sha256}  {s.n_votes} votes" for s in found)


def show_audit(store: Store, args: argparse.Namespace) -> str:
    if not 1 <= args.n <= 100_000:
        raise UserError(f"-n {args.n}", "1 to 100000 entries", "correct it")
    rows = owners.audit(store, args.n)
    cells = [[row.at, row.actor or "(command line)", row.action, json.dumps(row.detail)] for row in rows]
    return _told(args, rows, lambda: table(["at (UTC)", "who", "what", "detail"], cells))


def show_leaderboard(store: Store, args: argparse.Namespace) -> str:
    board = leaderboard(store, args.campaign, args.aspect, args.tag)
    return _told(args, board, lambda: _board(board))


def _board(board: Leaderboard) -> str:
    heads = ["system", "strength", "95 % interval", "won", "lost", "tied", "both bad", "against the next"]
    cells = []
    for row in board.standings:
        if row.separate is None:
            gap = None
        elif row.separate:
            gap = "apart"
        else:
            gap = "no number of votes would do" if row.votes_needed is None else f"{row.votes_needed} more votes to tell"
        interval = None if row.ci is None else f"{row.ci[0]:+.2f} to {row.ci[1]:+.2f}"
        cells.append([row.system, f"{row.strength:+.2f}", interval, row.wins, row.losses, row.ties, row.both_bad, gap])
    excluded = ", ".join(f"{plain(reason)} {n}" for reason, n in board.excluded.items()) or "none"
    lines = [
        table(heads, cells),
        "",
        f"{board.n_votes} votes of {board.n_raters} raters rank, {board.n_both_bad} say both bad; not counted: {excluded}",
    ]
    if board.agreement is not None:
        lines.append(_agreement(board.agreement, board.alpha))
    if not board.connected:
        lines.append("not all systems have met, if only by way of third ones: strengths of different groups cannot be compared")
    return "\n".join(lines)


def _agreement(found: Agreement, alpha: float | None) -> str:
    told = f"two raters agree in {share(found.rate)} of {found.n} couples; ceiling for a reward model {share(found.ceiling)}"
    return told + ("" if alpha is None else f"; Krippendorff's alpha {alpha:.2f}")


def show_quality(store: Store, args: argparse.Namespace) -> str:
    rows = sorted(qualities(store, args.campaign).values(), key=lambda quality: quality.rater_id)
    heads = ["name", "status", "votes", "gold right", "repeats alike", "side A", "heard", "reliability"]
    cells = [
        [row.handle, row.status, row.n_votes, share(row.gold_accuracy), share(row.repeat_agreement), share(row.left_share),
         share(row.coverage), None if row.reliability is None else f"{row.reliability:.2f}"]
        for row in rows
    ]  # fmt: skip
    return _told(args, rows, lambda: table(heads, cells))


def _told(args: argparse.Namespace, found: Any, in_words: Callable[[], str]) -> str:
    if not args.json:
        return in_words()
    rows = [dataclasses.asdict(row) for row in found] if isinstance(found, list) else dataclasses.asdict(found)
    return json.dumps(rows, indent=2, default=lambda value: value.isoformat())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m feedback_app.owners", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")

    def command(name: str, run: Callable[[Store, argparse.Namespace], str], text: str, shows: bool = False) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
        made.set_defaults(run=run)
        made.add_argument("--db", default="sqlite:///runs/demo/encore.db", metavar="URL", help="database URL; default %(default)s")
        if shows:
            made.add_argument("--json", action="store_true", help="print JSON, for programs; default: a table")
        return made

    campaign, person = "the campaign's name", "the person's name, as raters sign in with it"
    command("campaigns", list_campaigns, "every campaign and how far it is", shows=True)
    for name, text in (("open", "hand out its pairs again"), ("pause", "hand out no more for now"), ("close", "hand out no more")):
        command(name, set_status, f"{name} a campaign: {text}").add_argument("campaign", help=campaign)

    p = command("rules", rules, "show a campaign's rules, or change those that are named, for pairs handed out from then on", shows=True)
    p.add_argument("campaign", help=campaign)
    for rule, (kind, text) in RULES.items():
        p.add_argument(f"--{rule.replace('_', '-')}", type=kind, help=f"{text}; default: as it is")
    p.add_argument("--chooser", choices=CHOOSERS, help=f"{CHOOSES}; default: as it is")
    p.add_argument("--aspect", action="append", choices=ASPECTS, default=[], help="ask for these alone beside the vote; repeatable")
    p.add_argument("--no-aspects", action="store_true", help="ask for the vote alone")
    for rule, text in SWITCHES.items():
        p.add_argument(f"--{rule.replace('_', '-')}", action=argparse.BooleanOptionalAction, help=text)

    p = command("invite", invite, "print a link that lets people in; it is shown this once")
    p.add_argument("--campaign", help="the campaign they are invited to; default: all that are open to everybody")
    p.add_argument("--people", type=int, default=1, metavar="N", help="how many may use the link; default %(default)s")
    p.add_argument("--days", type=float, default=14.0, help="how long it lasts, days; default %(default)s")
    p.add_argument("--note", metavar="TEXT", help="whom it is for, told to owners alone")
    p.add_argument("--url", default="http://127.0.0.1:7860", help="the rating page's address, as the invited reach it; default %(default)s")
    command("invitations", list_invitations, "every invitation, newest first", shows=True)
    command("end-invitation", end_invitation, "let nobody else in by a link").add_argument(
        "id", type=int, help="the invitation's number, as `invitations` lists it"
    )

    command("raters", list_raters, "everybody, with how many votes are stored of each", shows=True)
    p = command("code", code, "print a fresh access code for a person, who is made if need be; an old one ends")
    p.add_argument("name", help=person)
    p.add_argument("--role", choices=["rater", "owner"], default="rater", help="what a person who is new may do; default %(default)s")
    command("block", block, "end a person's access; the votes stay and are not counted").add_argument("name", help=person)
    command("unblock", block, "give access back").add_argument("name", help=person)
    p = command("copy", copy, "everything held about a person, as JSON")
    p.add_argument("name", help=person)
    p.add_argument("--out", type=Path, metavar="FILE", help="a new file; default: stdout")
    p = command("erase", erase, "forget a person, for good")
    p.add_argument("name", help=person)
    kept = "keep the votes without a name, or remove them; default %(default)s"
    p.add_argument("--votes", choices=["anonymise", "remove"], default="anonymise", help=kept)
    p.add_argument("--yes", action="store_true", help="needed: it cannot be undone")

    p = command("leaderboard", show_leaderboard, "the campaign's board, by Davidson's model", shows=True)
    p.add_argument("campaign", help=campaign)
    p.add_argument("--aspect", choices=ASPECTS, help="rank by this aspect instead of the vote")
    p.add_argument("--tag", help="only pairs of this tag: genre:NAME or split:NAME")
    command("quality", show_quality, "how far each rater of a campaign can be relied on", shows=True).add_argument(
        "campaign", help=campaign
    )
    p = command("audit", show_audit, "what owners did, newest first", shows=True)
    p.add_argument("-n", type=int, default=50, metavar="N", help="how many entries, 1 to 100,000; default %(default)s")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        with _open(args.db) as store:
            print(args.run(store, args))
    except (UserError, StoreError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        got = f"{error.filename or 'the output'}: {error.strerror or error}"
        print(f"error: {UserError(got, 'a place that can be written', 'choose another')}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The rating app: python -m feedback_app.app --db sqlite:///runs/demo/encore.db --port 7860

The Gradio page at / and the JSON API under /api/v1, one process, no torch. Votes go straight to the API: Gradio's own
queue never sees them.
"""

from __future__ import annotations

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import: it is read there

import argparse
import errno
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import gradio as gr
import uvicorn
from fastapi import FastAPI
from fastapi.responses import RedirectResponse

from base_models.errors import UserError
from db.errors import StoreError
from db.session import parse_url
from db.store import Store, open_store
from feedback_app.api import create_api
from feedback_app.auth import load_or_make_secret, secret_path
from feedback_app.owner_api import Premises, add_owner_api
from feedback_app.owners import access_code
from feedback_app.pages import owner
from feedback_app.pages.rate import CSS, HEAD, THEME, build_page


def create_app(db_url: str, secret: str | None = None, premises: Premises | None = None, consent_of_everyone: bool = False) -> FastAPI:
    """The whole application over the database at `db_url`, which is made or migrated if need be.

    Args:
        secret: signs sessions and audio addresses; default: the one beside the SQLite file, made if need be.
        premises: what owners may touch on this server; default: no clips, and the SQLite file's folder for their files.
        consent_of_everyone: as in `create_api`.
    Raises: StoreError or UserError when the database or the secret cannot be had.
    """
    store = open_store(db_url)
    signed_with = secret or load_or_make_secret(secret_path(db_url))
    return _assemble(store, signed_with, premises or Premises((), state_dir(db_url)), consent_of_everyone)


def state_dir(db_url: str) -> Path | None:
    """Where the server keeps files of its own: beside an SQLite file; None for a database server."""
    url = parse_url(db_url)
    return Path(url.database).parent if url.get_backend_name() == "sqlite" and url.database else None


def _assemble(store: Store, secret: str, premises: Premises, consent_of_everyone: bool) -> FastAPI:
    app = create_api(store, secret, consent_of_everyone)
    add_owner_api(app, premises)
    app.add_api_route("/owner", lambda: RedirectResponse("/owner/"), include_in_schema=False)
    # "/" takes every address that nobody took before it.
    for path, page, css in (("/owner", owner.build_page(), owner.CSS), ("/", build_page(), CSS)):
        gr.mount_gradio_app(
            app,
            page,
            path=path,
            css=css,
            head=owner.HEAD if path == "/owner" else HEAD,
            theme=THEME,
            footer_links=[],
            run_history=False,
            mcp_server=False,
            max_file_size="1kb",
            show_error=False,
            ssr_mode=False,
            pwa=False,
        )
    return app


class _Server(uvicorn.Server):
    """uvicorn that says one line when it is ready."""

    def __init__(self, config: uvicorn.Config, ready: str) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            print(self._ready, flush=True)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises UserError when the port cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(f"host {host!r}: {error}", "an address of this machine", "pass another --host") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except (OSError, OverflowError) as error:
        listener.close()
        taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        got = f"port {port} on {host}, which is in use" if taken else f"{host}:{port} ({error})"
        raise UserError(got, "a free port", f"stop the other program, or pass --port {port + 1}") from error
    return listener


def serve(app: FastAPI, listener: socket.socket) -> None:
    """Serves until interrupted."""
    host, port = listener.getsockname()[:2]
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=5)
    _Server(config, f"Encore rating app ready at http://{host}:{port}").run(sockets=[listener])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m feedback_app.app", description=__doc__.split(":")[0])
    kinds = "database URL, SQLite or PostgreSQL; default %(default)s"
    parser.add_argument("--db", default="sqlite:///runs/demo/encore.db", metavar="URL", help=kinds)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default %(default)s")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on; 0 takes a free one; default %(default)s")
    secret = "file of the secret that signs sessions and audio addresses, made if need be; default: beside the SQLite file"
    parser.add_argument("--secret-file", type=Path, metavar="FILE", help=secret)
    fresh = "make sure this rater exists and print a fresh access code, which ends an old one; repeatable"
    parser.add_argument("--rater", metavar="NAME", action="append", default=[], help=fresh)
    parser.add_argument("--owner", metavar="NAME", help="make sure this owner exists and print a fresh access code; sign in at /owner")
    roots = "where owners may find clips, a folder or any fsspec address; repeatable; default: nowhere"
    parser.add_argument("--data-root", metavar="DIR", action="append", default=[], help=roots)
    parser.add_argument("--state-dir", type=Path, metavar="DIR", help="where snapshots and gold clips go; default: beside the SQLite file")
    parser.add_argument(
        "--consent-of-everyone", action="store_true", help="ask raters added by hand for consent too, not only those who came by invitation"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        with listen(args.host, args.port) as listener:
            secret = load_or_make_secret(args.secret_file or secret_path(args.db))
            store = open_store(args.db)
            for name in dict.fromkeys(args.rater):  # a second code of one name would end the first
                print(f"Sign in as {name} with access code {access_code(store, name, 'rater')}", flush=True)
            if args.owner:
                print(f"Sign in at /owner as {args.owner} with access code {access_code(store, args.owner, 'owner')}", flush=True)
            premises = Premises(tuple(args.data_root), args.state_dir or state_dir(args.db))
            serve(_assemble(store, secret, premises, args.consent_of_everyone), listener)
    except (UserError, StoreError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

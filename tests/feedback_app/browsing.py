"""A real Chromium, visitors in it, and what a test needs to set up and to look up around them."""

from __future__ import annotations

import copy
import hashlib
import shutil
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
from playwright.sync_api import Browser, Error, Page, Playwright, sync_playwright
from sqlalchemy import select, update

from db.people import record_screen, screens_taken
from db.schema import Assignment, Campaign, Invitation, Pair, Rater, Vote, utc_now
from db.store import open_store
from feedback_app.auth import load_or_make_secret, secret_path
from feedback_app.screen import TRIALS, Checks

HOSTILE = '<img src=x onerror="window.pwned=1"> ${window.pwned=2} {{window.pwned=3}} `${window.pwned=4}` <b>bold</b> \u202egnol\u202c'
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
PATIENCE_MS = 120_000


@pytest.fixture(scope="module")
def playwright() -> Iterator[Playwright]:
    with sync_playwright() as running:
        yield running


@pytest.fixture(scope="module")
def browser(playwright: Playwright) -> Iterator[Browser]:
    """The machine's Chromium, else Playwright's own, else a failure that says what to install."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = next(filter(None, map(shutil.which, names)), None)
    try:
        launched = playwright.chromium.launch(executable_path=path, args=FLAGS, timeout=PATIENCE_MS)
    except Error as error:
        pytest.fail(f"no Chromium: apt-get install chromium, or: playwright install --with-deps chromium\n{error}")
    yield launched
    launched.close()


class Visit:
    """One visitor's page, and all that it asked for."""

    def __init__(self, browser: Browser, url: str, **options: object) -> None:
        self.url = url
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(PATIENCE_MS)
        self.requests: list[str] = []
        self.answers: list[object] = []
        self.errors: list[str] = []
        self.page = self._open()

    def _open(self) -> Page:
        page = self.context.new_page()
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("response", lambda answer: self.answers.append(answer))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.goto(self.url)
        return page

    def second_tab(self) -> Visit:
        """The same browser's other tab; its requests and errors are this one's too."""
        other = copy.copy(self)
        other.page = self._open()
        return other

    def sign_in(self, name: str, code: str, then: str = "rate") -> None:
        self.page.get_by_label("Your name").fill(name)
        self.page.get_by_label("Access code").fill(code)
        self.page.get_by_role("button", name="Sign in").click()
        self.at(then)

    def at(self, view: str) -> None:
        self.page.wait_for_selector(f"main.encore[data-view={view}]")

    def prompt(self) -> str:
        return self.page.locator(".prompt").inner_text()

    def listen_by_keyboard(self, length: str = "0:04") -> None:
        """Space, until A has been heard enough; X, until B has; then all votes are open."""
        self.page.wait_for_function(f"document.querySelector('.time').textContent.endsWith('{length}')")
        self.page.keyboard.press("Space")
        self.page.wait_for_selector(".lane.a.enough")
        self.page.keyboard.press("x")
        self.page.wait_for_selector(".lane.b.on")
        while not self.page.locator(".lane.b.enough").count():
            if not self.page.locator(".play.playing").count():
                self.page.keyboard.press("Space")  # the clip ended first
            self.page.wait_for_timeout(100)
        self.page.wait_for_selector("main.encore.ready")


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Visit]]:
    visits: list[Visit] = []

    def make(url: str, **options: object) -> Visit:
        visits.append(Visit(browser, url, **options))
        return visits[-1]

    yield make
    for made in visits:
        made.context.close()


def add_listener(demo: object, handle: str = "ada", right: int = 6) -> str:
    """A rater who has the headphone check behind them, with so many of 6 right; returns the access code."""
    code = demo.add_rater(handle)
    with open_store(demo.url) as store:
        with store.read() as session:
            rater_id = session.scalars(select(Rater.id).where(Rater.handle == handle)).one()
        record_screen(store, rater_id, right, 6)
    return code


def softest(demo: object, handle: str) -> list[str]:
    """The keys that answer this rater's open headphone check right: known to whoever has the server's secret."""
    with open_store(demo.url) as store:
        with store.read() as session:
            rater_id = session.scalars(select(Rater.id).where(Rater.handle == handle)).one()
        number = screens_taken(store, rater_id)
    checks = Checks(load_or_make_secret(secret_path(demo.url)))
    return [str(checks.draw(rater_id, number, trial)[0] + 1) for trial in range(TRIALS)]


def set_up(demo: object, **rules: object) -> str:
    """Gives the campaign these rules and an invitation for one; returns its token."""
    token = "a-token-that-nobody-guesses"
    with open_store(demo.url) as store, store.write() as session:
        if rules:
            session.execute(update(Campaign).values(**rules))
        digest = hashlib.sha256(token.encode()).hexdigest()
        campaign_id = session.scalars(select(Campaign.id)).one()
        expires_at = utc_now() + timedelta(days=1)
        session.add(Invitation(token_sha256=digest, campaign_id=campaign_id, max_uses=1, expires_at=expires_at))
    return token


@pytest.fixture
def hostile_demo(make_demo: Callable) -> object:
    return make_demo([HOSTILE] * 3, min_listen_ms=600, seconds=4.0)


def votes_of(url: str) -> list:
    with open_store(url) as store, store.read() as session:
        rows = select(Vote, Assignment, Pair).join(Assignment, Assignment.id == Vote.assignment_id)
        return session.execute(rows.join(Pair, Pair.id == Assignment.pair_id).order_by(Vote.id)).all()

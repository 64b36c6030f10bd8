"""The page in a real Chromium: a person signs in, listens, votes by keyboard, and the row is in the database."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, Error, Page, Playwright, expect, sync_playwright
from sqlalchemy import select

from db.schema import Assignment, Pair, Vote
from db.store import open_store

HOSTILE = '<img src=x onerror="window.pwned=1"> ${window.pwned=2} {{window.pwned=3}} <b>bold</b>'
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
        self.page: Page = self.context.new_page()
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(url)

    def sign_in(self, name: str, code: str) -> None:
        self.page.get_by_label("Your name").fill(name)
        self.page.get_by_label("Access code").fill(code)
        self.page.get_by_role("button", name="Sign in").click()
        self.at("rate")

    def at(self, view: str) -> None:
        self.page.wait_for_selector(f"main.encore[data-view={view}]")

    def prompt(self) -> str:
        return self.page.locator(".prompt").inner_text()

    def listen_by_keyboard(self) -> None:
        """Space, until A has been heard enough; X, until B has; then all votes are open."""
        self.page.wait_for_function("document.querySelector('.time').textContent.endsWith('0:04')")
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


@pytest.fixture
def hostile_demo(make_demo: Callable) -> object:
    return make_demo([HOSTILE] * 3, min_listen_ms=600, seconds=4.0)


def votes_of(url: str) -> list:
    with open_store(url) as store, store.read() as session:
        rows = select(Vote, Assignment, Pair).join(Assignment, Assignment.id == Vote.assignment_id)
        return session.execute(rows.join(Pair, Pair.id == Assignment.pair_id).order_by(Vote.id)).all()


def test_a_vote_by_keyboard_is_in_the_database_and_nobody_else_is_asked(
    hostile_demo: object, start_server: Callable, visit: Callable[..., Visit]
) -> None:
    code = hostile_demo.add_rater("ada")
    server = start_server(hostile_demo)
    ada = visit(server.url)
    ada.at("signin")
    ada.sign_in("ada", code)

    assert ada.prompt() == HOSTILE
    assert ada.page.locator(".prompt *").count() == 0
    expect(ada.page.locator(".count")).to_have_text("0 rated · 3 to go")
    ada.page.wait_for_function("document.querySelector('.time').textContent.endsWith('0:04')")
    ada.page.keyboard.press("2")  # too early: says what is missing, sends nothing
    expect(ada.page.locator(".status")).to_have_text("First listen to 0.6 s more of A and 0.6 s more of B.")
    assert votes_of(hostile_demo.url) == []

    ada.listen_by_keyboard()
    ada.page.keyboard.press("2")
    expect(ada.page.locator(".count")).to_have_text("1 rated · 2 to go", timeout=PATIENCE_MS)
    ((vote, assignment, _pair),) = votes_of(hostile_demo.url)
    assert (vote.choice, assignment.status) == ("b", "voted")
    assert min(vote.listen_a_ms, vote.listen_b_ms) >= 600
    assert {"play", "switch", "pause"} <= {event[1] for event in vote.events}

    assert ada.page.evaluate("window.pwned") is None
    assert ada.page.evaluate("localStorage.getItem('encore.outbox.ada')") == "[]"
    assert {url for url in ada.requests if not url.startswith((server.url, "data:", "blob:"))} == set()
    assert not any("gradio_api" in url or "secret" in url or "telling" in url for url in ada.requests)
    assert ada.errors == []


def test_a_vote_without_connection_or_session_waits_and_is_stored_once(
    hostile_demo: object, start_server: Callable, visit: Callable[..., Visit]
) -> None:
    code = hostile_demo.add_rater("ada")
    server = start_server(hostile_demo)
    ada = visit(server.url)
    ada.sign_in("ada", code)

    ada.listen_by_keyboard()
    ada.context.set_offline(True)
    ada.page.keyboard.press("1")
    expect(ada.page.locator(".status")).to_contain_text("safe on this device", timeout=PATIENCE_MS)
    assert votes_of(hostile_demo.url) == []
    ada.context.set_offline(False)
    expect(ada.page.locator(".count")).to_have_text("1 rated · 2 to go", timeout=PATIENCE_MS)

    ada.listen_by_keyboard()
    ada.context.clear_cookies()
    ada.page.keyboard.press("4")
    ada.at("signin")
    expect(ada.page.locator(".problem")).to_contain_text("Your vote is kept")
    ada.sign_in("ada", code)
    expect(ada.page.locator(".count")).to_have_text("2 rated · 1 to go", timeout=PATIENCE_MS)
    assert [vote.choice for vote, _, _ in votes_of(hostile_demo.url)] == ["a", "both_bad"]


def test_a_phone_of_390_pixels_shows_it_all_without_sideways_scroll(
    hostile_demo: object, start_server: Callable, visit: Callable[..., Visit]
) -> None:
    code = hostile_demo.add_rater("ada")
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    ada = visit(start_server(hostile_demo).url, **phone)
    ada.sign_in("ada", code)
    assert ada.page.evaluate("document.documentElement.scrollWidth") <= 390
    boxes = [button.bounding_box() for button in ada.page.locator(".votes button, .lane .side, .controls button").all()]
    assert len(boxes) == 9
    assert all(box["height"] >= 44 and box["x"] >= 0 and box["x"] + box["width"] <= 390 for box in boxes)


def test_every_control_has_a_name(hostile_demo: object, start_server: Callable, visit: Callable[..., Visit]) -> None:
    code = hostile_demo.add_rater("ada")
    ada = visit(start_server(hostile_demo).url)
    ada.sign_in("ada", code)
    for role, name in [
        ("button", "Hear A"), ("button", "Hear B"), ("button", "Play"), ("button", "Switch"), ("button", "Loop"),
        ("button", "A is better"), ("button", "B is better"), ("button", "Equally good"), ("button", "Both bad"),
        ("button", "Skip this pair"), ("button", "Sign out"), ("slider", "Playhead"), ("progressbar", "Pairs rated"),
        ("group", "Your vote"), ("status", None),
    ]:  # fmt: skip
        expect(ada.page.locator("main.encore").get_by_role(role, name=name)).to_have_count(1)

"""The owner's page in a real Chromium: signed in, a campaign looked at, paused and frozen, a link made; and nobody else is asked."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from playwright.sync_api import Page, expect, sync_playwright
from sqlalchemy import func, select, update

from db.schema import Campaign, Invitation, Pair, Prompt
from db.store import Store, open_store

HOSTILE = "<img src=x onerror=window.pwned=1> ${window.pwned=2}"


@contextmanager
def owner_at(url: str, code: str) -> Iterator[Page]:
    """The page on a phone, with boss signed in; no error was thrown and no other host was asked when it is left."""
    path = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"])
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.set_default_timeout(60_000)
        page.clock.install()
        asked: list[str] = []
        errors: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if "SyntaxError" in message.text else None)
        page.goto(f"{url}/owner")
        page.get_by_label("Your name").fill("boss")
        page.get_by_label("Access code").fill(code)
        page.get_by_role("button", name="Sign in").click()
        yield page
        assert errors == []
        assert {one for one in asked if not one.startswith((url, "data:", "blob:"))} == set()
        browser.close()


def vote(store: Store, rater_id: int, n: int) -> None:
    for _ in range(n):
        key = store.next_assignment(rater_id).assignment_id
        side = next(side for side in "ab" if "dpo" in store.audio_file(key, side, rater_id).uri)
        store.submit_vote(rater_id, key, side, idempotency_key=key)


def test_an_owner_pauses_a_campaign_and_invites_and_no_name_runs_as_code(demo: object, start_server: Callable) -> None:
    with open_store(demo.url) as store:
        code = store.add_rater("boss", "owner")
        store.add_rater(HOSTILE[:64])
        with store.write() as session:
            session.get(Campaign, 1).name = HOSTILE
    server = start_server(demo)
    with owner_at(server.url, code) as page:
        page.locator("button.campaign").click()
        expect(page.locator(".head h1")).to_have_text(HOSTILE)
        page.get_by_role("button", name="Pause").click()
        expect(page.locator(".head .lead")).to_contain_text("paused")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.get_by_role("button", name="People").click()
        page.get_by_role("button", name="Make a link").click()
        expect(page.locator(".link input")).to_have_value(re.compile(rf"^{re.escape(server.url)}/#invite=[\w-]{{24}}$"))
        page.get_by_role("button", name="Audit").click()
        expect(page.locator(".entries")).to_contain_text("campaign status")
        assert page.evaluate("window.pwned") is None
    with open_store(demo.url) as store, store.read() as session:
        assert session.get(Campaign, 1).status == "paused"
        assert session.scalar(select(func.count()).select_from(Invitation)) == 1


def test_the_board_is_narrowed_renewed_while_it_is_looked_at_and_frozen(demo: object, start_server: Callable) -> None:
    with open_store(demo.url) as store:
        code = store.add_rater("boss", "owner")
        rater = store.sign_in("ada", store.add_rater("ada"))
        with store.write() as session:
            for name in (Pair.system_x, Pair.system_y):
                session.execute(update(Pair).where(name == "secret-dpo").values({name: HOSTILE}))
            session.execute(update(Prompt).where(Prompt.key == "p0").values(split="heldout"))
        vote(store, rater.id, 3)
        server = start_server(demo)
        with owner_at(server.url, code) as page:
            page.locator("button.campaign").click()
            first = page.locator(".standings li").first
            expect(first.locator("b")).to_have_text(f"1. {HOSTILE}")
            expect(first).to_contain_text("3 won, 0 lost")
            plots = ["Rating, with 95 % intervals", "Who beat whom", "Votes over time", "Agreement", "Kept, but not counted", "Raters"]
            expect(page.locator(".plots h2")).to_have_text(plots)
            expect(page.locator(".matrix [role=cell]")).to_have_count(4)
            expect(page.locator(".days i")).to_have_count(1)
            assert page.evaluate("[...document.querySelectorAll('.plots .card')].every((card) => card.scrollWidth <= card.clientWidth)")
            page.locator("summary", has_text="Rules").click()
            page.locator(".change [name=target_votes]").fill("7")
            vote(store, rater.id, 1)
            page.clock.fast_forward(16_000)
            expect(first).to_contain_text("4 won, 0 lost")
            page.locator(".narrow [name=tag]").select_option("split:heldout")
            expect(first).to_contain_text("1 won, 0 lost")
            page.locator(".narrow [name=aspect]").select_option("musicality")
            expect(page.locator(".plots")).to_contain_text("No vote ranks two systems yet.")
            expect(page.locator(".change [name=target_votes]")).to_have_value("7")  # what is being typed stays
            page.locator("summary", has_text="Snapshots").click()
            for name in ("first", "second"):
                page.locator(".freeze input").fill(name)
                page.get_by_role("button", name="Freeze the votes").click()
                expect(page.locator(".made tbody tr")).to_have_count(1 if name == "first" else 2)
            with page.expect_download() as download:
                page.locator(".made tr", has_text="first").get_by_role("link").click()
            with zipfile.ZipFile(download.value.path()) as packed:
                sha256 = json.loads(packed.read("first/snapshot.json"))["sha256"]
            expect(page.locator(".made tr", has_text="first").locator("code")).to_have_attribute("title", sha256)
            assert page.evaluate("document.documentElement.scrollWidth") <= 390
            assert page.evaluate("window.pwned") is None

"""The owner's page in a real Chromium: signed in, looked at, a campaign paused, a link made; and nobody else is asked."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable

from playwright.sync_api import expect, sync_playwright
from sqlalchemy import func, select

from db.schema import Campaign, Invitation
from db.store import open_store

HOSTILE = "<img src=x onerror=window.pwned=1> ${window.pwned=2}"


def test_an_owner_pauses_a_campaign_and_invites_and_no_name_runs_as_code(demo: object, start_server: Callable) -> None:
    with open_store(demo.url) as store:
        code = store.add_rater("boss", "owner")
        store.add_rater(HOSTILE[:64])
        with store.write() as session:
            session.get(Campaign, 1).name = HOSTILE
    server = start_server(demo)
    path = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"])
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.set_default_timeout(60_000)
        asked, errors = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"{server.url}/owner")
        page.get_by_label("Your name").fill("boss")
        page.get_by_label("Access code").fill(code)
        page.get_by_role("button", name="Sign in").click()
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
        assert errors == []
        assert {url for url in asked if not url.startswith((server.url, "data:", "blob:"))} == set()
        browser.close()
    with open_store(demo.url) as store, store.read() as session:
        assert session.get(Campaign, 1).status == "paused"
        assert session.scalar(select(func.count()).select_from(Invitation)) == 1

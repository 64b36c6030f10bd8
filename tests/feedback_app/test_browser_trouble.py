"""What the page does when something comes between: a server that goes, a consent that is withdrawn, another person, a check that is due."""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import urlsplit

from playwright.sync_api import Route, expect
from sqlalchemy import select

from db.schema import Consent, Invitation, Rater
from db.store import open_store
from tests.feedback_app.browsing import PATIENCE_MS, Visit, add_listener, set_up, softest, votes_of


def test_a_server_that_dies_with_a_vote_in_hand_stores_it_once_and_the_page_says_so(
    hostile_demo: object, start_server: Callable, visit: Callable[..., Visit]
) -> None:
    code = add_listener(hostile_demo)
    server = start_server(hostile_demo)
    ada = visit(server.url)
    ada.sign_in("ada", code)
    ada.listen_by_keyboard()

    def lose_the_answer(route: Route) -> None:
        assert route.fetch().status == 201
        server.process.kill()
        server.process.wait()
        route.abort()

    ada.page.route("**/api/v1/votes", lose_the_answer, times=1)
    ada.page.keyboard.press("1")
    expect(ada.page.locator(".status")).to_have_text(
        "No connection. Your vote is safe on this device and will be sent.", timeout=PATIENCE_MS
    )
    assert [vote.choice for vote, _, _ in votes_of(hostile_demo.url)] == ["a"]
    start_server(hostile_demo, port=urlsplit(server.url).port)
    expect(ada.page.locator(".count")).to_have_text("1 rated · 2 to go", timeout=PATIENCE_MS)
    assert [vote.choice for vote, _, _ in votes_of(hostile_demo.url)] == ["a"]
    assert ada.page.evaluate("localStorage.getItem('encore.outbox.ada')") == "[]"
    assert ada.errors == []


def test_while_one_side_loads_more_slowly_the_page_shows_both_alike(
    hostile_demo: object, start_server: Callable, visit: Callable[..., Visit]
) -> None:
    """A system whose clips come late must not be known by it: no side can be played or looks ready before both can."""
    code = add_listener(hostile_demo)
    ada = visit(start_server(hostile_demo).url)
    held: list[Route] = []
    ada.page.route("**/api/v1/audio/*", lambda route: held.append(route))
    ada.sign_in("ada", code)
    lanes = """[...document.querySelectorAll('.lane')].map(
        (lane) => lane.querySelector('.heard').textContent + lane.querySelector('canvas').toDataURL())"""
    blank = ada.page.evaluate(lanes)
    for _ in range(100):
        if len(held) == 2:
            break
        ada.page.wait_for_timeout(50)
    first, late = held
    first.continue_()
    ada.page.wait_for_timeout(300)
    for key in ("Space", "x", "Space", "x"):
        ada.page.keyboard.press(key)
    expect(ada.page.locator(".status")).to_have_text("Loading both pieces…")
    assert ada.page.evaluate("document.querySelector('main.encore').player.playing") is False
    shown = ada.page.evaluate(lanes)
    assert (shown[0], shown[1]) == (blank[0], blank[1])
    late.continue_()
    ada.page.wait_for_function("document.querySelector('main.encore').player.buffers !== null")
    assert ada.errors == []


def test_a_clip_that_is_gone_is_told_and_the_pair_can_be_skipped(
    hostile_demo: object, start_server: Callable, visit: Callable[..., Visit]
) -> None:
    code = add_listener(hostile_demo)
    server = start_server(hostile_demo)
    clips = {path: path.read_bytes() for path in hostile_demo.folder.glob("*.wav")}
    for path in clips:
        path.unlink()
    ada = visit(server.url)
    ada.sign_in("ada", code)
    told = "The audio could not be loaded (audio 410). Reload the page, or skip this pair."
    expect(ada.page.locator(".status")).to_have_text(told)
    ada.page.keyboard.press("1")  # nothing was heard: no vote
    expect(ada.page.locator(".status")).to_have_text(told)
    for path, content in clips.items():
        path.write_bytes(content)
    ada.page.get_by_role("button", name="Skip this pair").click()
    expect(ada.page.locator(".count")).to_have_text("0 rated · 2 to go", timeout=PATIENCE_MS)
    ada.page.wait_for_function("document.querySelector('main.encore').player.buffers !== null")
    assert votes_of(hostile_demo.url) == []
    assert ada.errors == []


def test_whoever_withdraws_consent_is_handed_no_pair_until_they_agree_again(
    hostile_demo: object, start_server: Callable, visit: Callable[..., Visit]
) -> None:
    code = add_listener(hostile_demo)
    ada = visit(start_server(hostile_demo).url)
    ada.sign_in("ada", code)
    ada.listen_by_keyboard()
    ada.page.keyboard.press("1")
    expect(ada.page.locator(".count")).to_have_text("1 rated · 2 to go", timeout=PATIENCE_MS)

    ada.page.get_by_text("Menu").click()
    ada.page.get_by_role("button", name="Consent", exact=True).click()
    ada.page.get_by_role("button", name="Withdraw my consent").click()
    ada.at("refused")
    expect(ada.page.locator(".refused-text")).to_contain_text("The answers you gave so far stay as they are")
    ada.page.keyboard.press("1")  # the pair on the table is out of reach
    ada.page.reload()
    ada.at("signin")
    ada.sign_in("ada", code, then="consent")
    n_asked = len(ada.requests)
    ada.page.get_by_role("button", name="I agree").click()
    ada.at("rate")
    assert any("/api/v1/pairs/next" in url for url in ada.requests[n_asked:])
    assert [vote.choice for vote, _, _ in votes_of(hostile_demo.url)] == ["a"]
    with open_store(hostile_demo.url) as store, store.read() as session:
        assert session.scalars(select(Consent.accepted).order_by(Consent.id)).all() == [False, True]
    assert ada.errors == []


def test_when_somebody_else_signs_in_in_another_tab_each_vote_stays_its_own_persons(
    hostile_demo: object, start_server: Callable, visit: Callable[..., Visit]
) -> None:
    codes = {name: add_listener(hostile_demo, name) for name in ("ada", "eve")}
    ada = visit(start_server(hostile_demo).url)
    ada.sign_in("ada", codes["ada"])
    ada.listen_by_keyboard()
    eve = ada.second_tab()
    eve.at("rate")
    eve.page.get_by_role("button", name="Sign out").click()
    eve.at("signin")
    eve.sign_in("eve", codes["eve"])

    for tab, name, key in [(ada, "ada", "1"), (eve, "eve", "2")]:  # each time the cookie is the other's
        tab.page.bring_to_front()
        if tab is eve:
            tab.listen_by_keyboard()
        tab.page.keyboard.press(key)
        tab.at("signin")
        expect(tab.page.locator(".view-signin .problem")).to_contain_text("Somebody else signed in in another tab.")
        assert len(votes_of(hostile_demo.url)) == "12".index(key)
        tab.sign_in(name, codes[name])
        expect(tab.page.locator(".count")).to_have_text("1 rated · 2 to go", timeout=PATIENCE_MS)
    with open_store(hostile_demo.url) as store, store.read() as session:
        handles = dict(session.execute(select(Rater.id, Rater.handle)).all())
    assert [(handles[vote.rater_id], vote.choice) for vote, _, _ in votes_of(hostile_demo.url)] == [("ada", "a"), ("eve", "b")]
    assert ada.errors == []


def test_a_campaign_that_wants_the_headphone_check_leads_back_to_it_until_it_is_passed(
    make_demo: Callable, start_server: Callable, visit: Callable[..., Visit]
) -> None:
    demo = make_demo(["calm"], seconds=4.0)
    set_up(demo, require_screen=True)
    code = add_listener(demo, right=4)
    ada = visit(start_server(demo).url)
    ada.sign_in("ada", code, then="check")
    expect(ada.page.locator(".due")).to_have_text("The pairs that wait for you need headphones. Pass this check to get them.")
    ada.page.get_by_role("button", name="I cannot do this now").click()
    expect(ada.page.locator(".found .lead")).to_contain_text("The pairs that wait need headphones")
    ada.page.get_by_role("button", name="Try again").click()
    expect(ada.page.locator(".level")).to_be_visible()
    ada.page.keyboard.press("Enter")
    for n, key in enumerate(softest(demo, "ada"), start=1):
        expect(ada.page.locator(".nth")).to_have_text(f"{n} of 6")
        ada.page.keyboard.press(key)  # not before the tones were played
        ada.page.keyboard.press("Space")
        ada.page.wait_for_timeout(60)
        ada.page.keyboard.press(key)
    expect(ada.page.locator(".found .lead")).to_have_text("Your headphones work well.")
    ada.page.get_by_role("button", name=re.compile("Go on")).locator("visible=true").click()
    ada.at("rate")
    expect(ada.page.locator(".prompt")).to_have_text("calm")
    assert ada.errors == []


def test_a_newcomer_whose_answers_are_lost_joins_once_and_gets_the_code_after_a_refresh(
    make_demo: Callable, start_server: Callable, visit: Callable[..., Visit]
) -> None:
    demo = make_demo(["calm"], seconds=4.0)
    token = set_up(demo, invited_only=True)
    eve = visit(f"{start_server(demo).url}/#invite={token}")
    eve.at("consent")
    eve.page.get_by_role("button", name="I agree").click()
    eve.at("join")

    def lose_the_answer(route: Route) -> None:
        assert route.fetch().status == 201
        eve.context.clear_cookies()  # a browser that lost the answer lost its cookie with it
        route.abort()

    eve.page.route("**/api/v1/join", lose_the_answer, times=2)
    eve.page.get_by_label("Your new name").fill("eve")
    for _ in range(2):
        eve.page.get_by_role("button", name="Join").click()
        expect(eve.page.locator(".view-join .problem")).to_contain_text("you will join only once")
        eve.page.locator(".view-join .problem").evaluate("problem => { problem.textContent = ''; }")
    eve.page.reload()
    eve.at("code")
    code = eve.page.locator(".code code").inner_text()
    with open_store(demo.url) as store:
        assert store.sign_in("eve", code) is not None
        with store.read() as session:
            assert session.scalars(select(Rater.handle)).all() == ["eve"]
            assert session.scalars(select(Invitation.n_used)).all() == [1]
    eve.page.get_by_role("button", name="I have kept it").click()
    eve.at("guide")
    assert eve.errors == []

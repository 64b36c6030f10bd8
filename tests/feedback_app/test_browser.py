"""The page in a real Chromium: a person signs in, listens, votes by keyboard, and the row is in the database."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.resources import files
from statistics import median

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect
from sqlalchemy import func, select

from db.schema import Consent, Rater, SpanMark, VoteAspect
from db.store import open_store
from tests.feedback_app.browsing import HOSTILE, PATIENCE_MS, Visit, add_listener, set_up, softest, votes_of


def test_a_vote_by_keyboard_is_in_the_database_and_nobody_else_is_asked(
    hostile_demo: object, start_server: Callable, visit: Callable[..., Visit]
) -> None:
    code = add_listener(hostile_demo)
    server = start_server(hostile_demo)
    ada = visit(server.url)
    ada.at("signin")
    ada.sign_in("ada", code)

    assert ada.prompt() == HOSTILE
    assert ada.page.locator(".prompt bdi *").count() == 0
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
    code = add_listener(hostile_demo)
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
    expect(ada.page.locator(".view-signin .problem")).to_contain_text("Your vote is kept")
    ada.sign_in("ada", code)
    expect(ada.page.locator(".count")).to_have_text("2 rated · 1 to go", timeout=PATIENCE_MS)
    assert [vote.choice for vote, _, _ in votes_of(hostile_demo.url)] == ["a", "both_bad"]


def test_a_phone_of_390_pixels_shows_it_all_without_sideways_scroll(
    hostile_demo: object, start_server: Callable, visit: Callable[..., Visit]
) -> None:
    code = add_listener(hostile_demo)
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    ada = visit(start_server(hostile_demo).url, **phone)
    ada.sign_in("ada", code)
    assert ada.page.evaluate("document.documentElement.scrollWidth") <= 390
    boxes = [button.bounding_box() for button in ada.page.locator(".votes button, .lane .side, .controls button").all()]
    assert len(boxes) == 10
    assert all(box["height"] >= 44 and box["x"] >= 0 and box["x"] + box["width"] <= 390 for box in boxes)
    ada.page.wait_for_function("document.querySelector('main.encore').player.buffers !== null")
    ada.page.evaluate("document.querySelector('main.encore').player.addMark('b', 2.4, 3.5)")
    deck = ada.page.locator(".deck").bounding_box()
    for part in ada.page.locator(".marks li > *").all():
        box = part.bounding_box()
        assert box["x"] >= deck["x"]
        assert box["x"] + box["width"] <= deck["x"] + deck["width"]
    ada.page.get_by_text("Menu").click()
    ada.page.get_by_role("button", name="Guide").click()
    ada.at("guide")
    expect(ada.page.locator(".keys")).to_be_hidden()  # nobody presses them here
    assert ada.page.evaluate("document.documentElement.scrollWidth") <= 390


def test_every_control_has_a_name(hostile_demo: object, start_server: Callable, visit: Callable[..., Visit]) -> None:
    code = add_listener(hostile_demo)
    ada = visit(start_server(hostile_demo).url)
    ada.sign_in("ada", code)
    for role, name in [
        ("button", "Hear A"), ("button", "Hear B"), ("button", "Play"), ("button", "Switch"), ("button", "Loop"), ("button", "Bad here"),
        ("button", "A is better"), ("button", "B is better"), ("button", "Equally good"), ("button", "Both bad"),
        ("button", "Skip this pair"), ("button", "Sign out"), ("slider", "Playhead"), ("progressbar", "Pairs rated"),
        ("group", "Your vote"), ("status", None),
    ]:  # fmt: skip
        expect(ada.page.locator("main.encore").get_by_role(role, name=name)).to_have_count(1)


def test_by_keyboard_alone_from_the_invitation_to_the_third_vote(
    make_demo: Callable, start_server: Callable, visit: Callable[..., Visit]
) -> None:
    demo = make_demo([HOSTILE] * 4, min_listen_ms=300, seconds=4.0)
    token = set_up(demo, practice=True, invited_only=True, aspects=["musicality"])
    server = start_server(demo)
    eve = visit(f"{server.url}/?invite={token}")
    keys = eve.page.keyboard
    eve.at("consent")
    assert token not in eve.page.url
    eve.page.reload()
    eve.at("consent")  # a refresh goes on where it stopped

    def press_button(name: str) -> None:
        """Walks to a button with Tab, as somebody without a pointer does."""
        for _ in range(30):
            keys.press("Tab")
            if eve.page.evaluate("document.activeElement.textContent").startswith(name):
                return keys.press("Enter")
        raise AssertionError(f"no way to {name} by Tab")

    press_button("No, thank you")
    eve.at("refused")
    with open_store(demo.url) as store, store.read() as session:
        assert session.scalar(select(func.count()).select_from(Rater)) == 0
        assert session.scalar(select(func.count()).select_from(Consent)) == 0
    press_button("Read it again")
    eve.at("consent")
    press_button("I agree")
    eve.at("join")
    keys.type("eve 1234 xlm")
    keys.press("Enter")
    eve.at("code")
    press_button("I have kept it")
    eve.at("guide")
    press_button("Go on")
    eve.at("check")
    keys.press("Space")
    keys.press("Enter")
    for n, key in enumerate(softest(demo, "eve 1234 xlm"), start=1):
        expect(eve.page.locator(".nth")).to_have_text(f"{n} of 6")
        keys.press("Space")
        eve.page.wait_for_timeout(60)
        keys.press(key)
    eve.page.wait_for_selector(".view-check .found:not([hidden]) .onward:focus")
    keys.press("Enter")

    for answer, other in [("1", "2"), ("2", "1")]:  # the rehearsal: a wrong answer is told, a right one leads on
        eve.at("rate")
        expect(eve.page.locator(".rehearsing")).to_be_visible()
        eve.listen_by_keyboard("0:05")
        keys.press(other)
        expect(eve.page.locator(".status")).to_contain_text("Listen once more")
        keys.press(answer)
        eve.page.wait_for_function("!document.querySelector('main.encore').classList.contains('ready')")
    expect(eve.page.locator(".rehearsing")).to_be_hidden()
    assert votes_of(demo.url) == []

    for n in range(3):
        eve.listen_by_keyboard()
        keys.press("1")
        expect(eve.page.locator(".count")).to_have_text(f"{n + 1} rated · {3 - n} to go", timeout=PATIENCE_MS)
    assert [vote.choice for vote, _, _ in votes_of(demo.url)] == ["a"] * 3
    with open_store(demo.url) as store, store.read() as session:
        rater = session.scalars(select(Rater)).one()
        assert (rater.handle, rater.screen["right"], rater.screen["trials"]) == ("eve 1234 xlm", 6, 6)
        assert rater.practised_at is not None
        assert session.scalars(select(Consent.accepted)).all() == [True]
    assert eve.errors == []


def test_aspects_marks_and_coverage_outlive_a_refresh_and_reach_the_database(
    make_demo: Callable, start_server: Callable, visit: Callable[..., Visit]
) -> None:
    demo = make_demo(["calm"], min_listen_ms=300, seconds=4.0)
    set_up(demo, aspects=["prompt_fit", "sound_quality"])
    code = add_listener(demo)
    ada = visit(start_server(demo).url)
    ada.sign_in("ada", code)
    ada.page.wait_for_function("document.querySelector('.time').textContent.endsWith('0:04')")
    ada.page.keyboard.press("m")
    expect(ada.page.locator(".status")).to_contain_text("Play first")
    ada.page.keyboard.press("Space")
    ada.page.wait_for_function("document.querySelector('main.encore').player.now() > 0.4")
    ada.page.keyboard.press("m")
    ada.page.wait_for_timeout(300)
    ada.page.keyboard.press("m")
    ada.page.keyboard.press("x")
    ada.page.wait_for_selector(".lane.b.enough")
    ada.page.keyboard.press("Space")
    box = ada.page.locator(".lane.b .track").bounding_box()
    for action, share in [("move", 0.25), ("down", 0.25), ("move", 0.5), ("up", 0.5)]:
        if action == "move":
            ada.page.mouse.move(box["x"] + share * box["width"], box["y"] + 20, steps=4)
        else:
            getattr(ada.page.mouse, action)()
    expect(ada.page.locator(".marks li")).to_have_count(2)
    ada.page.locator(".marks select").nth(1).select_option("noise")
    ada.page.locator(".aspect label", has_text="B much").nth(1).click()
    ada.page.locator(".sure label", has_text="Fairly sure").click()
    comment = ada.page.get_by_label("What made the difference?")
    comment.fill("")
    comment.press_sequentially("x1m2 ")  # typing steers nothing
    assert votes_of(demo.url) == []
    expect(ada.page.locator(".lane.b.on")).to_have_count(1)

    ada.page.reload()
    ada.page.wait_for_selector("main.encore.ready")
    expect(ada.page.locator(".marks li")).to_have_count(2)
    expect(ada.page.get_by_label("What made the difference?")).to_have_value("x1m2")
    ada.page.keyboard.press("2")
    ada.at("done")
    expect(ada.page.locator(".deeds")).to_contain_text("You gave 1 answer. It waits for the next snapshot")
    ((vote, _, _),) = votes_of(demo.url)
    assert (vote.choice, vote.comment, vote.confidence, len(vote.ui_version)) == ("b", "x1m2", 2, 12)
    assert abs(vote.client_ms / 1000 - vote.created_at.timestamp()) < 60
    assert vote.coverage_a == pytest.approx(vote.listen_a_ms / 4000, abs=0.01)
    with open_store(demo.url) as store, store.read() as session:
        assert [(row.aspect, row.score) for row in session.scalars(select(VoteAspect))] == [("sound_quality", 2)]
        first, second = session.scalars(select(SpanMark).order_by(SpanMark.id)).all()
    assert (first.side, first.tag) == ("a", "bad")
    assert 400 <= first.t0_ms < first.t1_ms < 3000
    assert (second.side, second.tag) == ("b", "noise")
    assert (second.t0_ms, second.t1_ms) == pytest.approx((1000, 2000), abs=40)
    assert ada.errors == []


def test_of_two_tabs_the_first_vote_stands_and_the_second_tab_says_so(
    hostile_demo: object, start_server: Callable, visit: Callable[..., Visit]
) -> None:
    code = add_listener(hostile_demo)
    server = start_server(hostile_demo)
    ada = visit(server.url)
    ada.sign_in("ada", code)
    other = ada.second_tab()
    other.at("rate")
    other.listen_by_keyboard()
    ada.page.bring_to_front()
    ada.listen_by_keyboard()
    ada.page.keyboard.press("1")
    expect(ada.page.locator(".count")).to_have_text("1 rated · 2 to go", timeout=PATIENCE_MS)
    other.page.bring_to_front()
    other.page.keyboard.press("2")
    expect(other.page.locator(".status")).to_have_text("You had answered that pair already. The first answer stands.", timeout=PATIENCE_MS)
    assert [vote.choice for vote, _, _ in votes_of(hostile_demo.url)] == ["a"]


@pytest.fixture
def player_page(browser: Browser) -> Iterator[Page]:
    """An empty page with the real player on it, and no server."""
    page = browser.new_page()
    page.add_script_tag(content=(files("feedback_app.pages") / "player.js").read_text())
    yield page
    page.close()


def test_both_sides_run_on_one_clock_to_the_sample(player_page: Page) -> None:
    heard = player_page.evaluate(
        """async () => {
          const [rate, n] = [48000, 24000];
          const player = new Player(() => {});
          const context = player.context = new OfflineAudioContext(1, n, rate);
          const side = (sign) => {
            const buffer = context.createBuffer(1, n, rate);
            buffer.getChannelData(0).forEach((_, i, data) => { data[i] = sign * (i + 1) / n; });
            return buffer;
          };
          player.take({ a: side(1), b: side(-1) }, { a: 0, b: 0 });
          player.begin();
          const turns = [0.1, 0.2, 0.205, 0.3]; // the third comes in the midst of the second
          turns.forEach((at, i) => context.suspend(at).then(() => { player.switchTo(i % 2 ? 'a' : 'b'); context.resume(); }));
          const out = (await context.startRendering()).getChannelData(0);
          const start = Math.round(0.02 * rate);
          const at = (seconds) => Math.round(out[Math.round(seconds * rate)] * n) - Math.sign(out[Math.round(seconds * rate)]);
          return [0.09, 0.15, 0.25, 0.4].map((s) => [at(s), Math.round(s * rate) - start]);
        }"""
    )
    for (got, index), sign in zip(heard, (1, -1, -1, 1), strict=True):
        assert abs(sign * got - index) <= 1, heard


def test_a_region_goes_round_to_the_sample_after_a_seek_and_both_sides_stay_together(player_page: Page) -> None:
    heard = player_page.evaluate(
        """async () => {
          const [rate, n] = [48000, 48000];
          const player = new Player(() => {});
          const context = player.context = new OfflineAudioContext(1, n, rate);
          const side = (sign) => {
            const buffer = context.createBuffer(1, n, rate);
            buffer.getChannelData(0).forEach((_, i, data) => { data[i] = sign * (i + 1) / n; });
            return buffer;
          };
          player.take({ a: side(1), b: side(-1) }, { a: 0, b: 0 });
          await player.seek(0.5);
          await player.loopEdge('in');
          await player.seek(0.75);
          await player.loopEdge('out');
          const region = player.loop;
          player.begin();
          context.suspend(0.6).then(() => { player.switchTo('b'); context.resume(); });
          const out = (await context.startRendering()).getChannelData(0);
          player.tick();
          const at = (seconds) => { const x = out[Math.round(seconds * rate)]; return Math.sign(x) * (Math.round(Math.abs(x) * n) - 1); };
          const places = [0.1, 0.3, 0.5, 0.7, 0.9].map((s) => [at(s), Math.round(s * rate) - Math.round(0.02 * rate)]);
          const heard = player.heardMs;
          player.stop();
          await player.loopOver(0.5, 0.6);
          return { region, places, heard, loop: player.loop };
        }"""
    )
    assert heard["region"] == [0.5, 0.75]
    for (got, since), sign in zip(heard["places"], (1, 1, 1, -1, -1), strict=True):
        assert abs(sign * got - (24_000 + since % 12_000)) <= 1, heard
    assert heard["heard"]["a"] == pytest.approx(580, abs=5)  # round after round is booked to the side that sounded
    assert heard["heard"]["b"] == pytest.approx(400, abs=5)
    assert heard["loop"] is None  # too short to be one


def test_a_turn_keeps_the_power_of_both_sides_together_within_a_decibel(player_page: Page) -> None:
    # A sounds on the left alone and B on the right alone, both constant: what comes out is the two gains.
    gains = player_page.evaluate(
        """async () => {
          const [rate, n] = [48000, 24000];
          const player = new Player(() => {});
          const context = player.context = new OfflineAudioContext(2, n, rate);
          const side = (channel) => {
            const buffer = context.createBuffer(2, n, rate);
            buffer.getChannelData(channel).fill(1);
            return buffer;
          };
          player.take({ a: side(0), b: side(1) }, { a: 0, b: 0 });
          player.begin();
          const turns = [0.1, 0.2, 0.205, 0.3]; // the third comes in the midst of the second
          turns.forEach((at, i) => context.suspend(at).then(() => { player.switchTo(i % 2 ? 'a' : 'b'); context.resume(); }));
          const out = await context.startRendering();
          return [0, 1].map((channel) => Array.from(out.getChannelData(channel)));
        }"""
    )
    a, b = np.asarray(gains)[:, 2400:]  # the fade from silence is over
    power_db = 10 * np.log10(a**2 + b**2)
    between = (a > 0.05) & (b > 0.05)
    print(f"power through four turns: {power_db.min():+.3f} to {power_db.max():+.3f} dB, {between.sum()} samples in between")
    assert np.abs(power_db).max() <= 1.0
    assert 3 * 480 <= between.sum() <= 4 * 580  # each lasts 12 ms, 576 samples; the broken-off one less
    settled = [round(0.05 * k * 48000) - 2400 for k in (1.5, 3, 5, 8)]
    assert a[settled] == pytest.approx([1, 0, 0, 1], abs=1e-6)
    assert b[settled] == pytest.approx([0, 1, 1, 0], abs=1e-6)


def test_the_next_pair_is_ready_soon_after_a_vote_and_nothing_names_a_system(
    make_demo: Callable, start_server: Callable, visit: Callable[..., Visit], record_property: Callable
) -> None:
    """From the key to both clips decoded: 400 ms at the median of seven votes, so that one hiccup of a busy machine decides nothing."""
    demo = make_demo([HOSTILE] * 8, min_listen_ms=100, seconds=4.0)
    code = add_listener(demo)
    server = start_server(demo)
    ada = visit(server.url)
    ada.sign_in("ada", code)
    took_ms = []
    for _ in range(7):
        ada.listen_by_keyboard()
        took_ms.append(
            ada.page.evaluate(
                """async () => {
                  const main = document.querySelector('main.encore');
                  const before = main.player.buffers;
                  const from = performance.now();
                  document.dispatchEvent(new KeyboardEvent('keydown', { key: '1' }));
                  while (!main.player.buffers || main.player.buffers === before) await new Promise((done) => setTimeout(done, 2));
                  return performance.now() - from;
                }"""
            )
        )
    record_property("vote_to_next_pair_ms", [round(ms) for ms in took_ms])
    print(f"vote to next pair ready: median {median(took_ms):.0f} ms of {[round(ms) for ms in took_ms]}")
    assert len(votes_of(demo.url)) == 7
    assert median(took_ms) <= 400
    said = [ada.page.content(), *ada.requests]
    said += [str(answer.headers) for answer in ada.answers]
    said.append(ada.page.evaluate("JSON.stringify([{ ...localStorage }, { ...sessionStorage }, document.cookie])"))
    assert len(said) > 10
    text = " ".join(said)
    for secret in ("secret-base", "secret-dpo", "telling-name", ".wav"):
        assert secret not in text, secret
    assert {url for url in ada.requests if not url.startswith((server.url, "data:", "blob:"))} == set()

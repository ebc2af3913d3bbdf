"""The page in a real browser: Debian's Chromium, by playwright."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx2 as httpx
import pytest

from serving.canned import Canned, canned_app
from serving.live import KEY, NAME, Live, listening, live_server, tiny_checkpoint

pytest.importorskip("playwright.sync_api", reason="the page is tested by playwright, which is not here")
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="the page is tested in chromium, which is not here")

PROMPT = "aaab & bccd\n100 %"
TOKENS = 8
EXPERTS = [f"expert-{number}" for number in range(64)]
ROUTED = [
    (b"SELECT", {"sql": 0.9, "json": 0.1}),
    (b" every", {"sql": 0.7, "json": 0.3}),
    (b" thing", {"sql": 0.8, "base": 0.2}),
    (b" as {", {"json": 0.6, "sql": 0.4}),
    (b'"keys"}', {"json": 1.0}),
]
NEW = {"answer": "new", "skill": "sql", "p": 0.0042, "score": 9.0, "nearest": [{"skill": "sql", "score": 9.0}]}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("served"), taught=True, granularity="sequence")
    with live_server(folder) as served:
        yield served


@pytest.fixture
def opened(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Open the page of a server, by its URL or by what it is to say; nothing on it may go wrong unseen."""
    wrong: list[str] = []
    with ExitStack() as stack:

        def open_page(server: Canned | str, fragment: str = "", **context: Any) -> Page:
            url = stack.enter_context(listening(canned_app(server))) if isinstance(server, Canned) else server
            page = browser.new_context(**context).new_page()
            stack.callback(page.context.close)
            page.set_default_timeout(10_000)
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
            page.goto(f"{url}/{fragment}")
            return page

        yield open_page
    told = "Failed to load resource"  # what the browser itself says of an error that the page shows
    assert not [each for each in wrong if not each.startswith(told)]


def ask(page: Page, prompt: str = PROMPT) -> Locator:
    """Ask and wait; the answers of that turn."""
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.keyboard.press("Enter")
    answers = page.locator(".turn").last.locator(".answer")
    page.get_by_role("button", name="Send").wait_for()
    return answers


def limit(page: Page, tokens: int) -> None:
    """Set how long answers may be."""
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Max tokens").fill(str(tokens))


def said(live: Live, model: str) -> tuple[str, list[dict[str, Any]]]:
    """What the server answers: the text as the page shows it, and the routing of its tokens."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": TOKENS, "routing": True}
    choice = httpx.post(f"{live.url}/v1/completions", json=body, verify=False).json()["choices"][0]
    return choice["text"].lstrip(), choice["routing"]


def test_an_answer_shows_who_wrote_what(live: Live, opened: Callable[..., Page]):
    page = opened(live.url)
    limit(page, TOKENS)
    answer = ask(page)
    text, routing = said(live, NAME)
    assert text
    assert answer.locator(".text").text_content() == text
    tokens = answer.locator(".token")
    top, weight = routing[0]["expert"], routing[0]["weights"][routing[0]["expert"]]  # one routing for all of them
    expected = page.locator("#totals .expert").filter(has_text=top).locator(".swatch").get_attribute("data-colour")
    colours = tokens.evaluate_all("all => [...new Set(all.map((each) => each.dataset.colour))]")
    assert colours == [expected]
    background = tokens.first.evaluate("token => getComputedStyle(token).backgroundColor")
    assert float(background.rsplit(" ", 1)[-1].rstrip(")")) == pytest.approx(0.5 * weight, abs=0.01)
    assert answer.locator("[data-label]").get_attribute("data-label") == top
    expect(answer.locator(".loads li").first).to_contain_text(top)
    expect(page.locator(f"#totals li:has-text('{top}') b")).not_to_have_text("0")
    expect(page.locator(".badge")).to_be_visible()  # it was taught something


def test_experts_are_chosen_and_compared(live: Live, opened: Callable[..., Page]):
    page = opened(live.url)
    page.get_by_role("radio", name="law").check()
    limit(page, TOKENS)
    answer = ask(page)
    assert answer.locator(".text").text_content() == said(live, f"{NAME}:law")[0]
    assert set(answer.locator("[data-label]").evaluate_all("all => all.map((each) => each.dataset.label)")) <= {"law"}
    page.get_by_label("Side by side").check()
    page.get_by_role("group", name="Second").get_by_role("radio", name="base").check()
    answers = ask(page)
    expect(answers).to_have_count(2)
    assert [answers.nth(side).locator(".text").text_content() for side in (0, 1)] == [
        said(live, f"{NAME}:{expert}")[0] for expert in ("law", "base")
    ]
    base = answers.nth(1).locator(".token").evaluate_all("all => [...new Set(all.map((each) => each.dataset.colour))]")
    assert base == ["base"]

    link = page.locator(".turn").last.get_by_role("link", name="Copy link").get_attribute("href")
    shared = opened(live.url, link)
    expect(shared.get_by_label("Prompt", exact=True)).to_have_value(PROMPT)
    expect(shared.get_by_role("group", name="First").get_by_role("radio", name="law")).to_be_checked()
    expect(shared.get_by_role("group", name="Second").get_by_role("radio", name="base")).to_be_checked()
    expect(shared.locator(".turn")).to_have_count(0)  # nothing is asked by opening a link
    shared.evaluate(f"location.hash = 'prompt=x&model={NAME}:gone'")
    expect(shared.get_by_role("alert")).to_contain_text(f"{NAME}:gone, which is not served here")


def test_a_key_is_asked_for(opened: Callable[..., Page]):
    page = opened(Canned(key=KEY))
    field = page.get_by_role("textbox", name="API key")
    field.fill("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_contain_text("the API key is missing or wrong.")
    field.fill(KEY)
    page.keyboard.press("Enter")
    expect(page.get_by_label("Prompt", exact=True)).to_be_visible()
    page.reload()
    expect(page.get_by_label("Prompt", exact=True)).to_be_visible()  # it is known until the tab is closed


def test_all_weights_by_pointer_and_by_keyboard(opened: Callable[..., Page]):
    page = opened(Canned(answer=ROUTED))
    answer = ask(page)
    assert [label.get_attribute("data-label") for label in answer.locator("[data-label]").all()] == ["sql", "json"]
    tip, tokens = page.get_by_role("tooltip"), answer.locator(".token")
    tokens.nth(1).hover()
    expect(tip).to_have_text(re.compile(r"^␣every\s*sql\s*0.70\s*json\s*0.30$"))
    page.keyboard.press("Escape")
    expect(tip).to_be_hidden()
    answer.locator(".token[tabindex='0']").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(2)).to_be_focused()
    expect(tip).to_contain_text("base0.20")
    assert tokens.nth(2).get_attribute("aria-describedby") == tip.get_attribute("id")
    page.keyboard.press("End")
    expect(tokens.last).to_be_focused()
    assert answer.locator(".token[tabindex='0']").count() == 1  # one stop of the Tab key, however many tokens
    answer.get_by_text("Weights as a table").click()
    row = answer.get_by_role("row").nth(1)
    expect(row).to_have_text(re.compile(r"SELECT every thing\s*3\s*sql 0.80, json 0.13, base 0.07"))


def test_characters_over_several_tokens_are_one_span(opened: Callable[..., Page]):
    face, some = "🙂".encode(), {"sql": 0.6, "json": 0.4}
    pieces = [b"  ", face[:1], face[1:3], face[3:], b"\xff", "é".encode(), b"\xe2\x82", b"x", b"", b"\xe2"]
    answer = ask(opened(Canned(answer=[(part, {"json": 1.0} if part == b"\xe2\x82" else some) for part in pieces])))
    face_colour, _, x_colour = (span.get_attribute("data-colour") for span in answer.locator(".token").all())
    assert x_colour == face_colour  # sql's: what was broken before it is no part of it
    assert [span.text_content() for span in answer.locator(".token").all()] == ["🙂", "é", "x"]
    expect(answer.locator("header")).to_contain_text(f"{len(pieces)} tokens")


def test_a_conversation_goes_on(opened: Callable[..., Page]):
    canned = Canned(answer=[(b"\n Fine.", {"sql": 1.0})])
    page = opened(canned)
    ask(page, "How?")
    page.get_by_label("Side by side").check()
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Seed").fill("7")
    ask(page, "And then?")
    history = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "\n Fine."}]
    first, *both = canned.asked
    assert first == {"model": "demo", "routing": True, "max_tokens": 256, "stream": True, "messages": history[:1]}
    for body in both:
        assert body["messages"] == [*history, {"role": "user", "content": "And then?"}]
        assert (body["temperature"], body["seed"]) == (0.5, 7)
    page.get_by_role("button", name="New conversation").click()
    ask(page, "Anew.")
    expect(page.locator(".badge")).to_have_count(0)  # it was taught nothing
    assert canned.asked[-1]["messages"] == [{"role": "user", "content": "Anew."}]


def test_what_is_shown_while_it_answers(opened: Callable[..., Page]):
    canned = Canned(answer=ROUTED * 100, pause=0.05)
    page = opened(canned)
    page.get_by_label("Prompt", exact=True).fill("long")
    page.keyboard.press("Enter")
    expect(page.locator(".token").nth(3)).to_be_visible()  # as it comes, with its load
    expect(page.locator(".loads li").first).to_contain_text("sql")
    expect(page.locator("#status")).to_have_text("Answering.")  # readers of the screen are not told every token
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".answer header")).to_contain_text("stopped")


def test_stopping_frees_the_slot(live: Live, opened: Callable[..., Page], monkeypatch: pytest.MonkeyPatch):
    engine, worker = live.service.engine, live.service.worker
    step, before = engine.step, worker.cancelled
    monkeypatch.setattr(engine, "eos", frozenset())
    monkeypatch.setattr(engine, "step", lambda: (time.sleep(0.03), step())[1])
    page = opened(live.url)
    limit(page, 180)
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.keyboard.press("Enter")
    page.locator(".token").nth(2).wait_for()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".answer header")).to_contain_text("stopped")
    deadline = time.monotonic() + 10
    while worker.open_answers:
        assert time.monotonic() < deadline, "the server goes on"
        time.sleep(0.01)
    assert worker.cancelled == before + 1


def test_errors_are_shown(opened: Callable[..., Page]):
    canned = Canned(answer=ROUTED, breaks_after=2)
    page = opened(canned)
    answer = ask(page)
    expect(answer.get_by_role("alert")).to_contain_text("The answer broke off")
    expect(answer.locator(".token")).to_have_count(2)
    canned.refusal = "a prompt of 9 tokens is too long."
    expect(ask(page).get_by_role("alert")).to_have_text(canned.refusal)


def test_novelty(opened: Callable[..., Page]):
    canned = Canned(answer=ROUTED, novelty="preparing")
    page = opened(canned)
    ask(page)
    badge = page.locator(".badge")
    expect(badge).to_have_text("novelty: preparing")
    canned.new = NEW
    expect(badge).to_have_text("this looks like none of my skills, p = 0.0042")
    badge.hover()
    expect(page.get_by_role("tooltip")).to_contain_text("sql9.00")
    canned.new = NEW | {"answer": "known"}
    ask(page)
    expect(badge.last).to_have_text("known: sql")


def test_64_experts(opened: Callable[..., Page]):
    many = Canned(experts=EXPERTS, answer=[(b"x", dict.fromkeys(EXPERTS, 1 / 64))], written={"expert-40": 9.0})
    page = opened(many, viewport={"width": 390, "height": 800})
    page.get_by_text("Experts", exact=True).click()
    totals = page.locator("#totals li")
    expect(totals).to_have_count(8)
    expect(totals.first).to_contain_text("expert-40")  # the largest first
    page.get_by_role("button", name="Show all").click()
    expect(totals).to_have_count(65)
    expect(totals.first).to_contain_text("expert-40")
    looks = page.locator("#totals .swatch").evaluate_all("all => all.map(({dataset: d}) => d.colour + d.pattern)")
    assert len(set(looks)) == 7 * 4 + 1
    page.get_by_text("Experts", exact=True).click()
    search = page.get_by_role("combobox", name="Expert")
    search.fill("T-3")
    expect(page.get_by_role("option")).to_have_count(11)
    for key in ("ArrowDown", "ArrowUp", "ArrowUp", "Enter"):
        page.keyboard.press(key)
    expect(search).to_have_value("expert-39")
    expect(page.get_by_role("radio", checked=True)).to_have_count(0)
    answer = ask(page)
    assert many.asked[0]["model"] == "demo:expert-39"
    answer.locator(".token").hover()
    expect(page.locator("#tip li")).to_have_count(64)
    expect(answer.locator(".loads li").last).to_contain_text("59 others")
    assert page.evaluate("document.documentElement.scrollWidth") == 390  # nothing is cut off


def violations(page: Page) -> list[str]:
    """What axe-core finds that is serious or critical."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-core is not here").Axe()
    found = axe.run(page).response["violations"]
    return [f"{each['id']}: {each['nodes'][0]['html']}" for each in found if each["impact"] in ("serious", "critical")]


def test_accessibility(opened: Callable[..., Page]):
    hues = [(name.encode() + b" ", {name: 1.0}) for name in (*EXPERTS[:8], "base")]
    page = opened(Canned(experts=EXPERTS[:8], answer=hues, novelty="ready", new=NEW), color_scheme="light")
    page.get_by_label("Side by side").check()
    page.get_by_role("button", name="Settings").click()
    answers = ask(page)
    answers.first.get_by_text("Weights as a table").click()
    answers.last.locator(".token").first.focus()
    assert not violations(page)
    page.get_by_role("button", name="Dark").click()
    answers.last.locator(".token").first.focus()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(19, 21, 23)"
    assert not violations(page)
    page.reload()
    expect(page.get_by_role("button", name="Light")).to_be_visible()  # the choice is kept


@pytest.mark.slow
def test_accessibility_with_64_experts(opened: Callable[..., Page]):
    many = Canned(experts=EXPERTS, answer=[(b"x", dict.fromkeys(EXPERTS, 1 / 64))], key=KEY)
    for scheme in ("light", "dark"):
        page = opened(many, color_scheme=scheme, viewport={"width": 390, "height": 800})
        page.get_by_role("textbox", name="API key").wait_for()
        assert not violations(page)
        page.get_by_role("textbox", name="API key").fill(KEY)
        page.keyboard.press("Enter")
        page.get_by_role("combobox", name="Expert").wait_for()
        assert not violations(page)
        ask(page).locator(".token").click()
        assert not violations(page)
        page.get_by_role("combobox", name="Expert").click()
        assert not violations(page)


@pytest.mark.slow
def test_2000_tokens_stay_smooth(opened: Callable[..., Page]):
    page = opened(Canned(answer=[(b" word", weights) for _ in range(400) for _, weights in ROUTED]))
    page.evaluate(
        """() => { window.gaps = []; let before = performance.now();
        const frame = (now) => { gaps.push(now - before); before = now; requestAnimationFrame(frame); };
        requestAnimationFrame(frame); }"""
    )
    answer = ask(page)
    expect(answer.locator(".token")).to_have_count(2000)
    assert max(page.evaluate("gaps")) < 500

"""The report as a reader meets it: in a real browser, offline, in light and dark, on a phone, on paper."""

from __future__ import annotations

import pytest

from stillroom.evaluation import write_report

from .browser import Browser
from .sample import HOSTILE, item, items, run_report

N = 24


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_report(tmp_path_factory.mktemp("report"), run_report(N))


@pytest.fixture(scope="module")
def browser():
    with Browser() as opened:
        yield opened


@pytest.fixture(autouse=True)
def fresh(browser):
    browser.requests.clear()
    browser.console.clear()
    browser.media()
    browser.resize(1200)


SHOWN = """
[...document.querySelectorAll('#items > article')].filter(card => card.offsetHeight)
  .map(card => card.querySelector('.id').textContent)
"""
SET = """
((name, value) => {
  const element = document.forms[0].elements[name];
  element.value = value;
  element.dispatchEvent(new Event('input', {bubbles: true}));
})
"""
STICKS_OUT = """
[...document.querySelectorAll('h1, h2, p, .tile, article, .answer')]
  .filter(element => element.getBoundingClientRect().right > innerWidth + 1).length
"""


def visible_cards(browser) -> list[str]:
    return browser.run(SHOWN)


def test_headline_and_charts_are_visible_and_nothing_is_asked_of_any_network(browser, page):
    browser.open(page)
    headline = browser.run("document.querySelector('h1').innerText")
    assert headline.startswith("The student closes 67% of the gap to its teacher (95% interval ")
    assert "0.50 against 0.75, from 0.00, on 24 held-out items" in headline
    assert browser.run("document.querySelector('h1').getBoundingClientRect().top") < 400
    assert browser.run("document.querySelectorAll('svg.chart').length") > 10
    assert browser.run("[...document.querySelectorAll('svg.chart')].every(s => s.getBoundingClientRect().width > 50)")
    assert [url for url in browser.requests if not url.startswith(("file:", "data:"))] == []
    assert browser.console == []


def test_filters_narrow_the_items_and_say_how_many(browser, page):
    browser.open(page)
    assert len(visible_cards(browser)) == 10
    browser.run(f"{SET}('who', 'teacher')")
    assert len(visible_cards(browser)) == 6
    assert browser.run("document.getElementById('shown').textContent") == "6 of 6 (24 in all)"
    browser.run(f"{SET}('category', 'simple')")
    assert len(visible_cards(browser)) == 3
    browser.run(f"{SET}('q', 'city14')")
    assert visible_cards(browser) == ["item-14"]
    assert "q=city14" in browser.run("location.hash")
    browser.run("document.forms[0].reset()")
    browser.run("new Promise(done => setTimeout(done, 20))")
    browser.run("document.getElementById('more').click()")
    assert len(visible_cards(browser)) == N
    assert browser.console == []


def test_a_shared_address_opens_with_its_filter(browser, page):
    browser.open("/dev/null")
    browser.open(page, "#who=both&category=multiple")
    assert browser.run("document.forms[0].elements.who.value") == "both"
    assert len(visible_cards(browser)) == 6
    browser.open("/dev/null")
    browser.open(page, "#speed")  # an anchor is no filter
    assert len(visible_cards(browser)) == 10


def test_dark_mode_is_dark_and_light_mode_light(browser, page):
    browser.open(page)
    light = "getComputedStyle(document.body)"
    brightness = {}
    for scheme in ("light", "dark"):
        browser.media(prefers_color_scheme=scheme)
        for what in ("backgroundColor", "color"):
            channels = browser.run(f"{light}.{what}.match(/\\d+/g).slice(0, 3).map(Number)")
            brightness[scheme, what] = sum(channels) / 3
    assert brightness["light", "backgroundColor"] > 230 > 80 > brightness["light", "color"]
    assert brightness["dark", "backgroundColor"] < 40 < 180 < brightness["dark", "color"]


@pytest.mark.parametrize("width", [360, 390, 768, 1200])
def test_nothing_sticks_out_sideways(browser, page, width):
    browser.resize(width)
    browser.open(page)
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run(STICKS_OUT) == 0


def test_without_javascript_every_item_is_there_and_no_dead_control_is_shown(browser, page):
    browser.scripting(False)
    try:
        browser.open(page)
        root = browser.call("DOM.getDocument", depth=0)["root"]["nodeId"]
        cards = browser.call("DOM.querySelectorAll", nodeId=root, selector="#items > article:not([hidden])")["nodeIds"]
        assert len(cards) == N
        form = browser.call("DOM.querySelector", nodeId=root, selector="form[hidden]")["nodeId"]
        assert form
    finally:
        browser.scripting(True)


def test_on_paper_controls_are_gone(browser, page):
    browser.open(page)
    browser.media(media="print")
    assert browser.run("getComputedStyle(document.querySelector('form')).display") == "none"
    assert browser.run("getComputedStyle(document.querySelector('nav')).display") == "none"


def test_hostile_prompts_and_answers_are_inert_text(browser, tmp_path):
    examples = (*items(3), item(4, question=HOSTILE), item(5, question="q" * 200_000))
    wrong = {"student": HOSTILE, "base": "z" * 300_000, "teacher": f'[weather_1(city="{HOSTILE[:20]}")]'}
    page = write_report(tmp_path, run_report(examples=examples, **wrong))
    browser.open(page)
    assert browser.run("window.pwned === undefined")
    assert browser.run("document.scripts.length") == 1
    assert browser.run("document.images.length") == 0
    assert browser.run("document.body.innerText.includes('<script>window.pwned = 1</script>')")
    assert "49" not in browser.run("document.querySelector('#items').innerText.split('{{')[1].slice(0, 12)")
    assert browser.run("document.body.innerText.includes('more characters')")
    assert page.stat().st_size < 400_000
    assert browser.console == []


def test_a_script_that_slipped_in_would_not_run(browser, page, tmp_path):
    slipped = tmp_path / "slipped.html"
    text = page.read_text(encoding="utf-8")
    evil = (
        "<script>window.pwned = 1</script><img src='data:,' onerror='window.pwned = 1'><style>body{color:red}</style>"
    )
    slipped.write_text(text.replace("<main>", f"<main>{evil}"), encoding="utf-8")
    browser.open(slipped)
    assert browser.run("window.pwned === undefined")
    assert any("Content Security Policy" in line for line in browser.console)

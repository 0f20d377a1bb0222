"""The report in a real browser: no errors, no requests, the keyboard reaches everything, filters filter, numbers hold.

Needs Chromium and its driver (Debian: chromium, chromium-driver). `pytest -m browser` runs these.
"""

from __future__ import annotations

import base64
import functools
import http.server
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kdpipe.pipeline.project import Project
from kdpipe.report.writing import write_comparison, write_report
from kdpipe.results.comparison import compare
from kdpipe.results.contender import read_contender
from kdpipe.results.visible_text import visible
from tests.reports import NASTY, page_of, story
from tests.worlds import load_tiny, run_near

pytestmark = pytest.mark.browser
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)
WHOLE = {"kind": "kd", "kd": {"term": "jsd", "beta": 1.0, "support": "vocabulary"}}
WIDE, PHONE = (1200, 900), (360, 740)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A browser of its own profile, whose console and requests are written down."""
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        if os.environ.get("CI"):
            pytest.fail(
                "chromium and chromedriver are not installed: apt-get install chromium chromium-driver"
            )
        pytest.skip("chromium and chromedriver are not installed")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=Service(chromedriver))
    yield found
    found.quit()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("browser")
    return run_near(load_tiny(folder, rounds=2, train__objective=WHOLE), folder / "out")


@pytest.fixture(scope="module")
def pages(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reports of a run and of one whose completions are nasty and of every kind, and a comparison."""
    folder = tmp_path_factory.mktemp("pages")
    write_report(project, folder / "run.html", commands=["kdpipe run recipe.yaml"])
    (folder / "nasty.html").write_text(page_of(project, story()), encoding="utf-8")
    own = read_contender(project.run)
    others = [replace(own, seed=seed, settings={**own.settings, "student.x": "1"}) for seed in (1, 2)]
    title, commands = "one against another", ["kdpipe compare a b"]
    write_comparison(
        folder / "comparison.html", compare([own, *others]), project.workspace, title=title, commands=commands
    )
    return folder


class Page:
    """An opened page: what its script returns, what it logged, and which keys are pressed."""

    def __init__(self, driver: Any, address: str, size: tuple[int, int], scheme: str) -> None:
        self.driver = driver
        for log in ("browser", "performance"):
            driver.get_log(log)
        width, height = size
        phone = width < 600
        self.cdp(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=phone,
        )
        self.cdp(
            "Emulation.setEmulatedMedia",
            media="",
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )
        self.cdp("Emulation.setFocusEmulationEnabled", enabled=True)  # a window behind others has no focus
        driver.get(address)

    def cdp(self, command: str, **parameters: Any) -> Any:
        return self.driver.execute_cdp_cmd(command, parameters)

    def js(self, expression: str, *args: Any) -> Any:
        return self.driver.execute_script(f"return {expression}", *args)

    def press(self, *keys: str) -> None:
        from selenium.webdriver import ActionChains, Keys

        for key in keys:
            ActionChains(self.driver).send_keys(vars(Keys).get(key, key)).perform()

    def click(self, selector: str) -> None:
        self.js("document.querySelector(arguments[0]).click()", selector)

    def focused(self) -> dict[str, Any]:
        found: dict[str, Any] = self.js(
            "(() => { const a = document.activeElement; return {tag: a.tagName.toLowerCase(), id: a.id, "
            "text: a.textContent, filter: a.dataset.filter, at: a.dataset.at, chart: a.dataset.chart}; })()"
        )
        return found

    def tab_to(self, wanted: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        """Presses Tab until `wanted` has the focus; returns what had it on the way."""
        way = []
        for _ in range(80):
            self.press("TAB")
            way.append(self.focused())
            if wanted(way[-1]):
                return way
        pytest.fail(f"Tab does not lead there: {way}")

    def data(self) -> Any:
        return json.loads(self.js("document.getElementById('token-data').textContent"))

    def shown(self) -> list[str]:
        """The ids of the completions that are shown."""
        found: list[str] = self.js(
            "[...document.querySelectorAll('article .head b')].map((one) => one.textContent)"
        )
        return found

    def show_all(self) -> None:
        """Presses "Show more" until there is no more."""
        while self.js("!document.getElementById('more').hidden"):
            self.click("#more")

    def tip(self) -> dict[str, list[str]] | None:
        """The rows of the tooltip by their first cell, or None when it is hidden."""
        rows: list[list[str]] | None = self.js(
            "(() => { const tip = document.getElementById('tip'); return tip.hidden ? null : "
            "[...tip.querySelectorAll('tr')].map((row) => [...row.cells].map((cell) => cell.textContent)); })()"
        )
        return None if rows is None else {row[0]: row[1:] for row in rows}

    def logged(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Addresses of everything that was asked for over the network or from the disk."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]


@pytest.fixture
def open_page(driver: Any, pages: Path) -> Callable[..., Page]:
    def open_it(name: str = "run.html", size: tuple[int, int] = WIDE, scheme: str = "light") -> Page:
        return Page(driver, f"file://{pages / name}", size, scheme)

    return open_it


def number(text: str) -> float:
    return float(text.replace("\u2212", "-"))


# ---------------------------------------------------------------------------------------- quiet and alone


@pytest.mark.parametrize("name", ["run.html", "nasty.html", "comparison.html"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_logs_nothing_and_asks_for_nothing_but_itself(
    open_page: Callable[..., Page], pages: Path, name: str, scheme: str
) -> None:
    page = open_page(name, scheme=scheme)
    for at in range(page.js("document.querySelectorAll('#sets button').length")):
        page.js("document.querySelectorAll('#sets button')[arguments[0]].click()", at)
        page.show_all()
        page.js("document.querySelectorAll('.tok[data-at]').forEach((one) => one.focus())")
        page.js("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert page.logged() == []
    assert page.requests() == [f"file://{pages / name}"]


def test_a_served_page_asks_the_server_for_nothing_more(driver: Any, pages: Path) -> None:
    asked: list[str] = []

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            asked.append(self.path)

        def log_error(self, *args: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(pages)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        page = Page(driver, f"http://127.0.0.1:{server.server_port}/run.html", WIDE, "light")
        assert page.shown()
        # A browser looks for an icon by itself, whatever a page says; the policy lets none be shown.
        assert set(asked) <= {"/run.html", "/favicon.ico"}
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_nasty_texts_do_nothing_and_stand_there_as_they_are(open_page: Callable[..., Page]) -> None:
    page = open_page("nasty.html")
    page.show_all()
    assert page.js("typeof window.hit") == "undefined"
    assert page.js("document.querySelectorAll('#viewer img, #viewer svg, #viewer script').length") == 0
    questions = page.js("[...document.querySelectorAll('article .q')].map((one) => one.textContent)")
    assert set(questions) == {visible(text) for text in NASTY}
    assert page.js("document.querySelectorAll('article').length") == len(NASTY)
    assert page.js("getComputedStyle(document.body).display") == "block"


def test_a_script_that_slipped_in_would_not_run(driver: Any, pages: Path) -> None:
    path = pages / "slipped.html"
    text = (pages / "run.html").read_text(encoding="utf-8")
    slipped = '<script>window.hit=1</script><img src="x" onerror="window.hit=2">'
    path.write_text(text.replace("<main", f"{slipped}<main", 1), encoding="utf-8")
    page = Page(driver, f"file://{path}", WIDE, "light")
    assert page.js("typeof window.hit") == "undefined"
    assert page.shown()
    assert any("Content Security Policy" in line for line in page.logged())


# ------------------------------------------------------------------------------------------- keyboard


def test_tab_reaches_controls_filters_charts_and_tokens_in_their_order(
    open_page: Callable[..., Page],
) -> None:
    page = open_page("nasty.html")
    way = page.tab_to(lambda one: one["at"] is not None)
    charts = [one["chart"] for one in way if one["chart"]]
    assert charts[:2] == ["reverse-kl", "accuracy"]
    names = [one["id"] or one["filter"] for one in way]
    wanted = ["theme", "all", "right", "wrong", "truncated", "flipped", "sort", "search"]
    assert [name for name in names if name in wanted] == wanted
    assert [one["text"] for one in way if one["text"] in ("Held out", "Training", "Graded")] == [
        "Held out",
        "Training",
        "Graded",
    ]


def test_arrow_keys_move_between_tokens_and_tab_leaves_them(open_page: Callable[..., Page]) -> None:
    page = open_page("nasty.html")
    page.js("document.querySelector('.tok[tabindex=\"0\"]').focus()")
    page.press("HOME")
    assert page.focused()["at"] == "0"
    page.press("ARROW_RIGHT", "ARROW_RIGHT")
    assert page.focused()["at"] == "2"
    page.press("ARROW_RIGHT")
    assert page.focused()["at"] == "2"
    page.press("ARROW_LEFT")
    assert page.focused()["at"] == "1"
    page.press("TAB")
    assert page.focused()["tag"] == "summary"
    page.press("ESCAPE")
    assert page.tip() is None


def test_arrow_keys_read_all_charts_at_a_round(open_page: Callable[..., Page]) -> None:
    page = open_page()
    page.js("document.querySelector('svg[data-chart=length]').focus()")
    page.press("END")
    outputs = "[...document.querySelectorAll('figure output')].map((one) => one.textContent)"
    last = page.js(outputs)
    assert all(text.startswith("round 2: ") for text in last)
    page.press("ARROW_LEFT")
    before = page.js(outputs)
    assert all(text.startswith("round 1: ") for text in before)
    readouts = json.loads(page.js("document.getElementById('chart-data').textContent"))
    at = page.js(
        "pictures = [...document.querySelectorAll('svg[data-chart]')].map((one) => one.dataset.chart)"
    )
    [[_, rounds, shown]] = readouts["length"]
    assert before[at.index("length")] == f"round 1: {shown[rounds.index(1)]}"
    page.press("TAB")
    page.js("document.activeElement.blur()")
    assert set(page.js(outputs)) == {""}


# ---------------------------------------------------------------------------------------- what it shows


@pytest.mark.parametrize("name", ["right", "wrong", "truncated", "flipped"])
def test_a_filter_pressed_by_key_shows_just_those(open_page: Callable[..., Page], name: str) -> None:
    page = open_page("nasty.html")
    items = page.data()["sets"][0]["items"]
    wanted = {
        "right": lambda item: item["ok"],
        "wrong": lambda item: not item["ok"],
        "truncated": lambda item: item["cut"],
        "flipped": lambda item: item["was"] != item["is"],
    }[name]
    expected = {item["id"] for item in items if wanted(item)}
    assert 0 < len(expected) < len(items) == len(NASTY)
    page.tab_to(lambda one: one["filter"] == name)
    page.press("SPACE")
    assert page.js("document.activeElement.getAttribute('aria-pressed')") == "true"
    assert page.js("document.activeElement.querySelector('.number').textContent") == str(len(expected))
    page.show_all()
    assert sorted(page.shown()) == sorted(expected)


def test_flipped_cannot_be_asked_of_completions_without_pairs(open_page: Callable[..., Page]) -> None:
    page = open_page("nasty.html")
    page.js("document.querySelectorAll('#sets button')[1].click()")
    assert page.js("document.querySelector('[data-filter=flipped]').disabled") is True


def test_search_and_order_change_what_is_shown(open_page: Callable[..., Page]) -> None:
    page = open_page("nasty.html")
    page.js("document.getElementById('search').focus()")
    page.press(*"p/11")
    assert page.shown() == ["p/11"]
    page.press(*["BACKSPACE"] * 4)
    assert len(page.shown()) == 12
    assert page.shown()[0] == f"p/{len(NASTY) - 1}"  # the largest disagreement
    page.js("document.getElementById('sort').focus()")
    page.press("END")
    assert page.shown() == [f"p/{number}" for number in range(12)]


def test_the_tip_of_a_focused_token_has_its_numbers(open_page: Callable[..., Page], project: Project) -> None:
    import pyarrow.parquet as pq

    page = open_page()
    page.js("document.querySelectorAll('#sets button')[1].click()")
    entry = project.store.entry(project.plan.step("rollout@2")).folder
    rows = {
        (row["prompt_id"], row["sample"]): row
        for row in pq.read_table(entry / "rollouts.parquet").to_pylist()
    }
    entry = project.store.entry(project.plan.step("teacher-score@2")).folder
    scores = {
        (row["prompt_id"], row["sample"]): row for row in pq.read_table(entry / "scores.parquet").to_pylist()
    }
    for card in range(3):
        item = page.js(
            "document.querySelectorAll('article')[arguments[0]].querySelector('.head b').textContent", card
        )
        prompt_id, _, sample = item.partition(" #")
        key = (prompt_id, int(sample or 0))
        page.js("document.querySelectorAll('article')[arguments[0]].querySelector('.tok').focus()", card)
        count = len(rows[key]["completion_token_ids"])
        for at in range(count):
            tip = page.tip()
            assert tip is not None
            student, teacher = rows[key]["sampler_logprobs"][at], scores[key]["teacher_logprobs"][at]
            assert number(tip["student"][0]) == pytest.approx(student, abs=6e-5)
            assert number(tip["teacher"][0]) == pytest.approx(teacher, abs=6e-5)
            assert number(tip["student \u2212 teacher"][0]) == pytest.approx(student - teacher, abs=1.1e-4)
            alternatives = [number(cells[0]) for name, cells in tip.items() if len(cells) == 2][-5:]
            assert alternatives == sorted(alternatives, reverse=True)
            page.press("ARROW_RIGHT")


def test_a_token_that_is_not_scorable_says_so_and_has_no_shade(open_page: Callable[..., Page]) -> None:
    page = open_page("nasty.html")
    page.js("document.querySelectorAll('article .tok')[2].focus()")
    assert page.js("document.activeElement.dataset.at") == "2"
    assert "not scorable" in page.js("document.getElementById('tip').textContent")
    assert "teacher" not in (page.tip() or {})
    assert page.js("document.activeElement.className") == "tok none"


def test_the_shade_of_a_token_is_that_of_its_number(open_page: Callable[..., Page]) -> None:
    page = open_page("nasty.html")
    classes = page.js("[...document.querySelectorAll('.tok[data-at=\"1\"]')].map((one) => one.className)")
    ids = page.shown()
    for name, found in zip(ids, classes, strict=True):
        gap = -1.5 - (-0.5 - int(name.removeprefix("p/")))
        level = sum(abs(gap) >= edge for edge in (0.1, 0.5, 1.5, 4))
        assert found == f"tok {'p' if gap > 0 else 'n'}{level}"


# ----------------------------------------------------------------------------- themes, widths and paper


def test_both_themes_follow_the_system_and_the_button_turns_them(open_page: Callable[..., Page]) -> None:
    grounds = {}
    for scheme in ("light", "dark"):
        page = open_page(scheme=scheme)
        grounds[scheme] = page.js("getComputedStyle(document.body).backgroundColor")
    assert grounds["light"] != grounds["dark"]
    page.tab_to(lambda one: one["id"] == "theme")
    page.press("ENTER")
    assert page.js("getComputedStyle(document.body).backgroundColor") == grounds["light"]
    page.press("ENTER")
    assert page.js("getComputedStyle(document.body).backgroundColor") == grounds["dark"]


CONTRAST = """
(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgb = (colour) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const linear = (v) => v / 255 <= .04045 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4;
  const light = (c) => { const f = c.slice(0, 3).map(linear);
    return .2126 * f[0] + .7152 * f[1] + .0722 * f[2]; };
  const ground = (node) => { for (; node; node = node.parentElement) {
    const c = rgb(getComputedStyle(node).backgroundColor); if (c[3] > 250) return c; } return [255, 255, 255, 255]; };
  const low = [];
  const all = 'p, h1, h2, h3, h4, td, th, li, b, span, button:not(:disabled), .verdict, summary, dt, dd, text';
  document.querySelectorAll(all).forEach((node) => {
    if (!node.textContent.trim() || !node.getClientRects().length) return;
    const style = getComputedStyle(node);
    const isSvg = node.namespaceURI.includes('svg');
    const a = light(rgb(isSvg ? style.fill : style.color)), b = light(ground(node));
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    const name = node.className.baseVal ?? node.className;
    if (ratio < 4.5) low.push([node.tagName, name, node.textContent.slice(0, 20), ratio.toFixed(2)].join(' '));
  });
  return [...new Set(low)];
})()
"""


@pytest.mark.parametrize("name", ["nasty.html", "comparison.html"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_enough_contrast(open_page: Callable[..., Page], name: str, scheme: str) -> None:
    page = open_page(name, scheme=scheme)
    assert page.js(CONTRAST.strip()) == []


@pytest.mark.parametrize("name", ["run.html", "nasty.html", "comparison.html"])
@pytest.mark.parametrize("size", [PHONE, WIDE])
def test_no_width_scrolls_sideways(open_page: Callable[..., Page], name: str, size: tuple[int, int]) -> None:
    page = open_page(name, size)
    page.js("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    for at in range(max(1, page.js("document.querySelectorAll('#sets button').length"))):
        page.js("document.querySelectorAll('#sets button')[arguments[0]]?.click()", at)
        wide = page.js(
            "[document.documentElement.scrollWidth, document.documentElement.clientWidth, innerWidth]"
        )
        assert wide[0] <= wide[1] <= wide[2] == size[0]


SHOWN = """
(() => [...document.querySelectorAll('.stacked td:not(:empty)')].map((cell) => {
  const box = cell.getBoundingClientRect();
  return [cell.textContent, cell.dataset.column ?? null, getComputedStyle(cell, '::before').content,
    box.width > 0 && box.height > 0 && box.left >= 0 && box.right <= innerWidth
      && cell.scrollWidth <= cell.clientWidth];
}))()
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    ("name", "some"),
    [
        ("run.html", {"accuracy", "95% interval", "truncated", "p99", "tokens"}),
        ("comparison.html", {"accuracy", "held-out reverse KL", "points", "nats", "seeds", "seed"}),
    ],
)
def test_a_phone_shows_every_cell_of_every_table_with_its_column(
    open_page: Callable[..., Page], name: str, some: set[str], scheme: str
) -> None:
    page = open_page(name, (390, 844), scheme)
    cells = page.js(SHOWN.strip())
    assert len(cells) > 30
    assert [cell for cell in cells if not cell[3]] == []
    assert {column for _, column, _, _ in cells} >= some
    assert all(written == f'"{column}"' for _, column, written, _ in cells if column)


@pytest.mark.parametrize("size", [PHONE, WIDE])
def test_tables_are_tables_to_a_screen_reader_at_every_width(
    open_page: Callable[..., Page], size: tuple[int, int]
) -> None:
    page = open_page("run.html", size)
    page.cdp("Accessibility.enable")
    nodes = page.cdp("Accessibility.getFullAXTree")["nodes"]
    roles = [node["role"]["value"] for node in nodes if not node["ignored"]]
    assert roles.count("table") == page.js("document.querySelectorAll('.stacked').length") == 3
    assert roles.count("rowheader") == page.js("document.querySelectorAll('.stacked tbody tr').length")


def test_what_words_mean_is_told_where_they_stand_by_keyboard_and_touch(
    open_page: Callable[..., Page],
) -> None:
    page = open_page("run.html", PHONE)
    for section in ("verdict", "headroom", "curves", "mismatch"):
        page.js("document.querySelector(arguments[0]).focus()", f"#{section} .terms summary")
        assert not page.js("document.querySelector(arguments[0]).open", f"#{section} .terms")
        page.press("ENTER")
        assert page.js("document.querySelector(arguments[0]).open", f"#{section} .terms")
    words = page.js("[...document.querySelectorAll('.terms dt')].map((one) => one.textContent)")
    assert {"reverse KL", "headroom", "gate", "a control acts on", "truncated"} <= set(words)


def test_the_tip_stays_on_a_phones_screen(open_page: Callable[..., Page]) -> None:
    page = open_page("nasty.html", PHONE)
    for at in range(3):
        page.js(
            "(() => { const one = document.querySelectorAll('article .tok')[arguments[0]]; "
            "one.scrollIntoView({block: 'center'}); one.focus({preventScroll: true}); })()",
            at,
        )
        box = page.js("document.getElementById('tip').getBoundingClientRect().toJSON()")
        assert box["left"] >= 0
        assert box["right"] <= PHONE[0]


def test_it_prints_without_its_controls_in_light(open_page: Callable[..., Page]) -> None:
    page = open_page(scheme="dark")
    page.cdp("Emulation.setEmulatedMedia", media="print", features=[])
    assert page.js("getComputedStyle(document.querySelector('.controls')).display") == "none"
    assert page.js("getComputedStyle(document.getElementById('theme')).display") == "none"
    assert page.js("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    paper = base64.b64decode(page.cdp("Page.printToPDF", printBackground=True)["data"])
    assert paper.startswith(b"%PDF-")
    assert page.js("[...document.querySelectorAll('details.print')].every((one) => one.open)") is True

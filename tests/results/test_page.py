"""The report's page in a real browser: filters, figures, tables, and what a keyboard and a screen reader need."""

from __future__ import annotations

import csv
import io
import itertools
from importlib.metadata import files
from pathlib import Path
from typing import Any

import pytest
from everything import cell, fill, landscape, simplecil
from pages import AXE, CONTRAST, Page
from places import ROOT

from zeroflow.results import Store, figures, load
from zeroflow.results.report import write_report
from zeroflow.results.rows import failure
from zeroflow.results.summary import summary

pytestmark = pytest.mark.slow  # a real browser

QUICK = ROOT / "results" / "adapters"


# In a real browser


@pytest.fixture(scope="module")
def quick_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(QUICK, tmp_path_factory.mktemp("quick") / "report.html")


@pytest.fixture(scope="module")
def full_file(full: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(full, tmp_path_factory.mktemp("full") / "report.html")


@pytest.fixture
def quick(browser: Any, quick_file: Path) -> Page:
    return Page(browser, quick_file)


def test_the_page_opens_without_errors_and_without_a_network(quick: Page) -> None:
    assert quick.run("return document.querySelectorAll('section:not([hidden]) .figure .main-svg').length") > 10
    assert quick.run("return performance.getEntriesByType('resource').length") == 0
    assert quick.complaints() == []


def test_a_filter_changes_every_figure_and_table(quick: Page) -> None:
    title = "All settings beside each other"
    # With several data sets the one with most cells is chosen.
    assert len(quick.lines("summary")) == 10 == len(quick.seen(title)) and len(quick.lines("cells")) == 20
    quick.click("#filters button[data-key=optimizer][data-value=zo-sgd]")
    rows = ["simplecil - -", "aper-adapter zo-sgd 8", "aper-adapter zo-sgd 1", "ease zo-sgd 1"]
    named = ["aper-adapter zo-sgd q=1", "aper-adapter zo-sgd q=8", "ease zo-sgd q=1", "simplecil"]
    assert quick.lines("summary") == rows, "the best first"
    assert len(quick.lines("cells")) == 6
    for each in (title, "Accuracy along the stream", "Accuracy on the last task", "What it costs", "The whole grid"):
        assert quick.seen(each) == named, each
    # What trains nothing has no step whose memory could be beside theirs.
    assert quick.seen("Accuracy against memory") == ["Pareto front", *named[:-1]]
    shown = quick.run(
        "return document.querySelector(`#${arguments[0]} .plot`).data.filter((t) => t.visible !== false).map((t) => [t.x, t.y])",
        quick.figure("Accuracy against memory"),
    )
    (memory, front), points = shown[0], [(x, y) for (x,), (y,) in shown[1:]]
    beaten = {p for p in points if any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in points)}
    assert list(zip(memory, front, strict=True)) == sorted(set(points) - beaten), "of what the filter leaves"
    assert set(
        quick.run("return [...document.querySelectorAll('section:not([hidden]) select option')].map((o) => o.text)")
    ) == set(named)
    effects = quick.run(
        "return document.querySelector(`#${arguments[0]} .plot`).data[0].y",
        quick.figure("What one change does, ours beside the paper's"),
    )
    assert effects == ["ease: zo-sgd - fo-sgd", "aper-adapter: zo-sgd - fo-sgd", "aper-adapter, zo-sgd: q = 8 - q = 1"]

    quick.click("#filters button[data-key=queries][data-value='8']")
    assert quick.lines("summary") == ["simplecil - -", "aper-adapter zo-sgd 8"]
    quick.click("#keep-baseline")
    assert quick.seen(title) == ["aper-adapter zo-sgd q=8"]
    points = quick.run(
        "return document.querySelector(`#${arguments[0]} .plot`).data[0].x", quick.figure("Accuracy against queries")
    )
    assert points == [8], "a line loses the points that do not pass"
    quick.click("#filters button[data-key=method][data-value=ease]")
    assert quick.lines("summary") == []
    assert (
        quick.run("return document.querySelector('section:not([hidden]) .figure .note').textContent")
        == "Nothing here passes the filters."
    )
    quick.click("#clear")
    assert len(quick.lines("summary")) == 11, "of both data sets"
    quick.wait_drawn()
    assert quick.complaints() == []


def test_the_data_set_is_a_filter_too(quick: Page) -> None:
    headings = "return [...document.querySelectorAll('section:not([hidden]) h2')].map((h) => h.textContent)"
    told = "return [...document.querySelectorAll('.findings li:not([hidden])')].map((item) => item.textContent.split(':')[0])"
    assert quick.run(headings) == ["Figures: quickdraw100-marker"]
    assert quick.run(told) == ["quickdraw100-marker"]
    quick.click("#filters button[data-value=quickdraw100]")
    assert quick.run(told) == ["quickdraw100", "quickdraw100-marker"]
    assert quick.run(headings) == ["Figures: quickdraw100", "Figures: quickdraw100-marker"]
    quick.click("#filters button[data-value=quickdraw100-marker]")
    assert quick.run(headings) == ["Figures: quickdraw100"] and quick.lines("summary") == ["simplecil - -"]


def test_the_theme_follows_the_system_and_the_switch(browser: Any, quick_file: Path) -> None:
    ground = "return getComputedStyle(document.body).backgroundColor"
    letters = "return document.querySelector('section:not([hidden]) .plot')._fullLayout.font.color"
    page = Page(browser, quick_file, theme="dark")
    assert (page.run(ground), page.run(letters)) == ("rgb(23, 25, 28)", "#e6e6e6")
    page = Page(browser, quick_file, theme="light")
    assert (page.run(ground), page.run(letters)) == ("rgb(255, 255, 255)", "#222")
    page.click("#theme")
    page.wait("document.querySelector('section:not([hidden]) .plot')._fullLayout.font.color === '#e6e6e6'")
    assert page.run(ground) == "rgb(23, 25, 28)"
    assert "#000000" not in page.run(
        "return JSON.stringify(document.querySelector('section:not([hidden]) .plot').data)"
    )
    assert page.complaints() == []


def test_a_click_on_a_heading_sorts(quick: Page) -> None:
    avg = quick.run(
        "return [...document.querySelectorAll('table[data-table=summary] th')].findIndex((h) => h.textContent === 'Avg')"
    )
    column = f"return [...document.querySelectorAll('table[data-table=summary] tbody tr')].map((r) => parseFloat(r.cells[{avg}].textContent))"
    button = f"table[data-table=summary] th:nth-child({avg + 1}) button"
    quick.click("#clear")
    best = quick.run(column)
    assert best == sorted(best, reverse=True)
    quick.click("#filters button[data-value=quickdraw100-marker]")
    shown = column.replace("tbody tr'", "tbody tr:not([hidden])'")
    assert quick.run(shown) == sorted(quick.run(shown), reverse=True), "the best first"
    quick.click(button)
    assert quick.run(column) == sorted(best)
    quick.click(button)
    assert quick.run(column) == sorted(best, reverse=True)


SUMMARY = "table[data-table=summary]"


def test_typing_leaves_the_lines_with_these_words(quick: Page) -> None:
    place = quick.driver.find_element("css selector", ".sheet:has(table[data-table=summary]) input")
    place.send_keys("EASE zo")
    assert quick.lines("summary") == ["ease zo-sgd 1", "ease zo-adam 1"]
    assert quick.run(f"return document.querySelector('.sheet:has({SUMMARY}) .count').textContent") == "2 of 11 lines"


def test_the_seeds_of_a_line_open_and_close(quick: Page) -> None:
    seeds = f"return [...document.querySelectorAll('{SUMMARY} tr.seed:not([hidden])')].map((r) => r.innerText.split(/\\s+/).filter(Boolean))"
    place = quick.driver.find_element("css selector", f"{SUMMARY} tbody tr:not([hidden]) button")
    count = int(place.text)
    assert count > 1 and quick.run(seeds) == []
    place.send_keys("\n")
    opened = quick.run(seeds)
    assert [line[:2] for line in opened] == [["seed", str(seed)] for seed in range(count)]
    table = seeds_of_the_best(QUICK)
    assert [float(line[3]) for line in opened] == pytest.approx(table, abs=0.005)
    assert place.get_attribute("aria-expanded") == "true"
    place.send_keys("\n")
    assert quick.run(seeds) == [] and place.get_attribute("aria-expanded") == "false"


def seeds_of_the_best(results: Path) -> list[float]:
    """Avg of each seed of the best row of several seeds, of the embedded data set."""
    trials = load(results, "trials")
    rows = [r for r in summary(trials) if r.config["dataset"] == "quickdraw100-marker" and r.avg and r.seeds > 1]
    best = max(rows, key=lambda row: row.avg.mean if row.avg else 0.0)
    values = dict(zip(trials["cell_id"].to_pylist(), trials["avg"].to_pylist(), strict=True))
    return [values[each] for each in best.cells]


def test_what_is_shown_of_a_table_is_exported(quick: Page) -> None:
    quick.run("window.made = []; URL.createObjectURL = (blob) => { window.made.push(blob); return '#'; }")
    quick.click("#filters button[data-key=optimizer][data-value=zo-sgd]")
    for kind in ("csv", "latex"):
        quick.click(f".sheet:has({SUMMARY}) [data-export={kind}]")
    written, latex = quick.driver.execute_async_script(
        "const end = arguments[0]; Promise.all(window.made.map((blob) => blob.text())).then(end)"
    )
    rows = list(csv.DictReader(io.StringIO(written)))
    assert [row["method"] for row in rows] == ["simplecil", "aper-adapter", "aper-adapter", "ease"]
    assert rows[0]["optimizer"] == "" and float(rows[1]["Avg"]) > 40
    assert float(rows[2]["Avg ±"]) > 0 and float(rows[2]["forwards"]) > 100
    assert latex.count(r" \\") == 1 + len(rows) and latex.count(r"\begin{") == latex.count(r"\end{") == 2
    assert "$\\pm$" in latex and "zo-sgd & 8" in latex


def test_the_first_columns_stay_in_sight(browser: Any, quick_file: Path) -> None:
    page = Page(browser, quick_file, width=380)
    place = f"document.querySelector('{SUMMARY} tbody tr:not([hidden]) th:nth-child(2)').getBoundingClientRect().left"
    window = f"document.querySelector('{SUMMARY}').parentNode"
    before = page.run(f"return {place}")
    assert page.run(f"{window}.scrollLeft = 300; return {window}.scrollLeft") == 300
    assert page.run(f"return {place}") == pytest.approx(before, abs=2)


def test_a_figure_of_many_settings_shows_the_best_until_all_are_asked_for(
    browser: Any, store: Store, tmp_path: Path
) -> None:
    rates = [0.01 * (1 + i) for i in range(12)]
    fill(
        store,
        simplecil(50.0),
        *(cell(60.0 + i, lr=lr, optimizer=o) for o in ("zo-sgd", "zo-adam") for i, lr in enumerate(rates)),
    )
    page = Page(browser, write_report(store, tmp_path / "report.html"))
    title = "All settings beside each other"
    assert page.seen(title) == ["ease zo-adam lr=0.12", "ease zo-sgd lr=0.12", "simplecil"]
    place = f"#{page.figure(title)}"
    assert note(page, place) == "2 of 24 settings: of each method and optimizer the one with the best Avg."
    page.click(f"{place} button.all")
    assert len(page.seen(title)) == 25
    page.click(f"{place} button.all")
    assert len(page.seen(title)) == 3 and page.complaints() == []


def note(page: Page, place: str) -> str:
    return str(page.run(f"return document.querySelector('{place} .note').textContent"))


def test_the_best_of_what_passes_the_filters_are_shown_and_the_front_is_no_setting(
    browser: Any, store: Store, tmp_path: Path
) -> None:
    """28 lines of two numbers of queries: the best four at one query are the worst at 16."""
    names = [(method, name) for method in ("finetune", "replay", "lwf", "l2-sp") for name in OPTIMIZERS]
    levels = {pair: 30.0 + number for number, pair in enumerate(names)}
    fill(store, simplecil(50.0))
    for (method, name), level in levels.items():
        fill(
            store, *(cell(level if q == 1 else 99.0 - level, method=method, optimizer=name, queries=q) for q in (1, 16))
        )
    page = Page(browser, write_report(store, tmp_path / "report.html"))
    work, memory = f"#{page.figure('Accuracy against work')}", f"#{page.figure('Accuracy against memory')}"
    page.click("#filters button[data-key=queries][data-value='1']")
    best = sorted(levels, key=lambda pair: -levels[pair])[:24]
    assert note(page, work) == "24 of 28 settings: those with the best Avg."
    seen = page.seen("Accuracy against work")
    assert {f"{method} {name}" for method, name in best} <= set(seen) and len(seen) == 25
    assert note(page, memory).startswith("24 of 28 settings") and "Pareto front" in page.seen("Accuracy against memory")


# What a keyboard and a screen reader need


OPTIMIZERS = ("zo-sgd", "zo-adam", "zo-rge", "zo-scd", "zo-sgd-sign", "zo-adam-sign", "zo-fzoo")
"""Seven that take queries."""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out_from_its_ground(browser: Any, quick_file: Path, theme: str) -> None:
    page = Page(browser, quick_file, theme=theme)
    page.click("#filters button[data-key=optimizer][data-value=zo-sgd]")
    assert page.run(CONTRAST) == []


@pytest.mark.parametrize("width", [380, 1400])
def test_everything_to_press_has_a_name_and_every_table_its_headings(browser: Any, full_file: Path, width: int) -> None:
    page = Page(browser, full_file, width=width)
    assert page.run("return document.documentElement.scrollWidth") <= width
    controls = "[...document.querySelectorAll('button, input, select')]"
    shown = page.run(f"return {controls}.filter((e) => e.checkVisibility()).slice(0, 40)")
    assert len(shown) > 20 and all(control.accessible_name for control in shown)
    nothing = {
        "headings without scope": "th:not([scope])",
        "what is pressed and no button": "[onclick], div[role=button], a:not([href])",
        "boxes that a keyboard cannot scroll": ".wide:not([tabindex='0'])",
        "boxes without a name": "[role=region]:not([aria-label]):not([aria-labelledby])",
    }
    for what, selector in nothing.items():
        assert page.run(f'return document.querySelectorAll("{selector}").length') == 0, what
    identities = page.run("return [...document.querySelectorAll('body [id]:not(svg [id])')].map((e) => e.id)")
    assert len(identities) == len(set(identities))
    levels = page.run("return [...document.querySelectorAll('h1, h2, h3, h4')].map((h) => Number(h.tagName[1]))")
    assert levels[0] == 1 and all(after - before <= 1 for before, after in itertools.pairwise(levels))
    small = page.run(
        "return [...document.querySelectorAll('button')].filter((b) => b.offsetParent && b.getBoundingClientRect().height < 24)"
        ".map((b) => b.textContent)"
    )
    assert small == [], "of WCAG 2.2, 2.5.8"


@pytest.mark.parametrize(("theme", "width"), [("light", 1400), ("dark", 380)])
def test_axe_finds_nothing_serious(browser: Any, quick_file: Path, theme: str, width: int) -> None:
    (script,) = [file for file in files("axe-core-python") or () if file.name == "axe.min.js"]
    page = Page(browser, quick_file, theme=theme, width=width)
    page.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    page.run(script.read_text())
    browser.set_script_timeout(120)
    assert browser.execute_async_script(AXE) == []


def test_a_keyboard_reaches_everything_and_shows_where_it_is(quick: Page) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    reached = []
    for _ in range(30):
        ActionChains(quick.driver).send_keys(Keys.TAB).perform()
        own = "const e = document.activeElement; return [e.textContent.trim() || e.id || e.type, getComputedStyle(e).outlineStyle]"
        name, outline = quick.run(own)
        assert outline == "solid", name
        reached.append(name)
    assert reached[0] == "Skip to the results" and {"light / dark", "zo-sgd", "clear", "search", "CSV", "LaTeX"} <= set(
        reached
    )


def test_the_heat_map_is_of_the_setting_that_is_chosen(quick: Page) -> None:
    place = quick.figure("Accuracy per task")
    shown = f"return document.querySelector('#{place} .plot').data.filter((t) => t.visible).map((t) => t.name)"
    assert quick.run(shown) == ["quickdraw100-marker ease fo-sgd"] or quick.run(shown) == ["ease fo-sgd"], (
        "the best Avg"
    )
    quick.run(
        f"const s = document.querySelector('#{place} select'); s.value = [...s.options].find((o) => o.text === 'simplecil').value;"
        "s.dispatchEvent(new Event('change'))"
    )
    assert quick.run(shown) == ["simplecil"]


def test_trajectories_play(browser: Any, full_file: Path) -> None:
    page = Page(browser, full_file)
    place = page.figure("Two parameters: both tasks at once")
    length = f"document.querySelector('#{place} .plot').data.at(-1).x.length"
    assert page.run(f"return {length}") == 21
    page.run(f"document.querySelector('#{place} .updatemenu-button').dispatchEvent(new MouseEvent('click'))")
    page.wait(f"{length} < 10")
    page.wait(f"{length} === 21")
    page.click("#filters button[data-value=forward-grad]")
    names = f"return document.querySelector('#{place} .plot').data.filter((t) => t.meta && t.visible !== false).map((t) => t.name)"
    assert page.run(names) == ["forward-grad q=1"]
    assert page.complaints() == []


def test_a_narrow_page_does_not_scroll_sideways(browser: Any, full_file: Path) -> None:
    page = Page(browser, full_file, width=380)
    assert page.run("return document.documentElement.scrollWidth") <= 380
    assert page.run("return document.getElementById('filters').open") is False
    assert page.complaints() == []


@pytest.mark.parametrize("kind", ["empty", "failures", "one", "landscape"])
def test_odd_stores_open_without_errors(browser: Any, tmp_path: Path, kind: str) -> None:
    store = Store(tmp_path / "results")
    if kind == "failures":
        store.write_failure(failure(cell().config, "MemoryError", "out of memory", "", 3))
    if kind == "one":
        fill(store, simplecil())
    if kind == "landscape":
        store.write_landscape(*landscape())
    page = Page(browser, write_report(store, tmp_path / "report.html"))
    before = page.run("return getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.run("return getComputedStyle(document.body).backgroundColor") != before
    assert page.complaints() == []


def test_an_animation_on_the_page_shows_what_was_reached_by_each_step(
    browser: Any, full: Store, full_file: Path
) -> None:
    page = Page(browser, full_file)
    surface, runs = figures.surfaces(full.load("surfaces"))[0], figures.trajectories(full.load("trajectories"))
    moving = figures.animate_trajectories(surface, runs, objective="both")
    plot = "[...document.querySelectorAll('.plot')].find((p) => p._transitionData?._frames.length)"
    for frame in (moving.frames[3], moving.frames[-1]):
        page.run(
            f"window.moved = 0; Plotly.animate({plot}, [arguments[0]], {{mode: 'immediate', transition: {{duration: 0}}, "
            "frame: {duration: 0, redraw: false}}).then(() => { window.moved = 1; })",
            frame.name,
        )
        page.wait("window.moved === 1")
        for number, trace in zip(frame.traces, frame.data, strict=True):
            assert page.run(f"return {plot}.data[arguments[0]].x.length", number) == len(trace.x)
    assert page.complaints() == []


def test_paper_shows_every_line_and_column_and_which_filters_are_on(browser: Any, tmp_path: Path) -> None:
    store = Store(tmp_path / "many")
    fill(store, simplecil(), *(cell(70 + seed / 10, epochs=1 + seed) for seed in range(40)))
    page = Page(browser, write_report(store, tmp_path / "report.html"))
    cut = (
        "return [...document.querySelectorAll('.wide')].filter((e) => e.querySelector('table') && e.checkVisibility() && "
        "(e.scrollHeight > e.clientHeight + 1 || getComputedStyle(e).overflowX != 'visible')).length"
    )
    seen = "return [...document.querySelectorAll('#filters button')].filter((e) => e.checkVisibility()).map((e) => e.textContent)"
    assert page.run(cut) > 0, "on a screen long tables scroll"
    page.run("document.querySelector('#filters button[data-key=method][data-value=ease]').click()")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert page.run(cut) == 0 and page.run(seen) == ["ease"]
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})

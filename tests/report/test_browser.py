"""The page in a real Chromium, opened from disk: what it shows is what `load_run` reads.

pytest -m browser -n 0 tests/report
"""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.make_runs import make_run

from normfree.heads import range_shares
from normfree.records import RunWriter
from normfree.report import build, write
from normfree.runs import Run, load_run

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(shutil.which("chromedriver") is None, reason="needs Chromium and chromedriver"),
]

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--window-size=1400,1000",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(executable_path=shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def address(runs: list[Run], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write(build(runs), path)
    return path.as_uri()


@pytest.fixture
def page(browser: Any, address: str) -> Any:
    return opened(browser, address)


def opened(browser: Any, address: str, width: int = 1400) -> Any:
    """The page at this width, once its figures are drawn, and without anything on the console."""
    from selenium.webdriver.support.ui import WebDriverWait

    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(address)
    ready = "return document.documentElement.dataset.ready === 'yes'"
    WebDriverWait(browser, 10).until(lambda driver: driver.execute_script(ready))
    assert browser.get_log("browser") == []
    return browser


def press(page: Any, selector: str, *keys: str) -> None:
    page.find_element("css selector", selector).send_keys(*keys)
    page.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")


def choose(page: Any, selector: str, value: str) -> None:
    from selenium.webdriver.support.ui import Select

    Select(page.find_element("css selector", selector)).select_by_value(value)


def cells(page: Any, selector: str) -> np.ndarray:
    """The numbers of a map of heads, (n_layer, n_head), as the page holds them."""
    script = (
        "return [...document.querySelectorAll(arguments[0] + ' td[data-layer]')]"
        ".map(c => [+c.dataset.layer, +c.dataset.head, c.dataset.value, c.className])"
    )
    found = page.execute_script(script, selector)
    shape = (1 + max(c[0] for c in found), 1 + max(c[1] for c in found))
    values = np.full(shape, math.inf)
    for layer, head, text, look in found:
        values[layer, head] = float(text)
        assert (look == "nan") == math.isnan(values[layer, head])
    return values


def at(run: Run, step: int, name: str = "probe_attn_entropy") -> np.ndarray:
    """The newest record at or before a step, (n_layer, n_head)."""
    steps, values = run.array(name)
    return values[np.flatnonzero(steps <= step)[-1]].astype(np.float64)


def fault_words(page: Any) -> str:
    return page.find_element("id", "fault-plots").text


def shown_step(page: Any) -> int:
    return int(page.execute_script("return document.getElementById('step-value').textContent").split()[-1])


# ----------------------------------------------------------------------------------------------------------- numbers


def test_the_slider_moves_by_keyboard_and_every_cell_is_the_records(page: Any, runs: list[Run]) -> None:
    from selenium.webdriver.common.keys import Keys

    union = sorted({int(s) for run in runs for s in run.probe_entropy_steps})
    moves: list[tuple[list[str], int]] = [
        ([], union[-1]),
        ([Keys.ARROW_LEFT], union[-2]),
        ([Keys.HOME], union[0]),
        ([Keys.ARROW_RIGHT] * 7, union[7]),
    ]
    for keys, step in moves:
        press(page, "#step", *keys)
        assert shown_step(page) == step
        assert page.find_element("id", "step").get_attribute("aria-valuetext") == f"step {step}"
        for i, run in enumerate(runs):
            np.testing.assert_array_equal(cells(page, f"[data-panel='{i}']"), at(run, step))


def test_the_training_batch_is_another_source(page: Any, runs: list[Run]) -> None:
    page.find_element("css selector", "input[name=source][value=train]").click()
    np.testing.assert_array_equal(cells(page, "[data-panel='0']"), at(runs[0], 10**9, "attn_entropy"))
    assert (at(runs[0], 10**9, "attn_entropy") != at(runs[0], 10**9)).any()


def test_the_difference_is_second_minus_first(page: Any, runs: list[Run]) -> None:
    from selenium.webdriver.common.keys import Keys

    for keys, back in (([], 1), ([Keys.HOME], 30)):
        press(page, "#step", *keys)
        step = int(runs[0].probe_entropy_steps[-back])
        np.testing.assert_array_equal(cells(page, "#diff-map"), at(runs[1], step) - at(runs[0], step))
    assert page.find_element("css selector", "#diff-map figcaption").text == "lost minus clean"


def test_runs_of_another_shape_get_a_sentence_instead_of_a_difference(page: Any) -> None:
    choose(page, "#diff-b", "2")
    text = page.find_element("id", "diff-plot").text
    assert "T = 128" in text
    assert "T = 64" in text
    assert page.find_elements("id", "diff-map") == []
    choose(page, "#diff-b", "0")
    assert "two different runs" in page.find_element("id", "diff-plot").text


def test_ranges_are_those_of_heads(page: Any, runs: list[Run]) -> None:
    script = (
        "return [...document.querySelectorAll(`[data-range='${arguments[0]}'] [data-share]`)]"
        ".map(p => [p.dataset.rangeName, +p.dataset.share])"
    )
    for i, run in enumerate(runs):
        expected = range_shares(run.probe_entropy[-1], run.config.data.seq_len or 0)
        names = ("[0, 1/4)", "[1/4, 1/2)", "[1/2, 3/4)", "[3/4, 1]", "NaN")
        shares = dict(zip(names, (*expected.shares, expected.nan_share), strict=True))
        assert dict(page.execute_script(script, i)) == {name: share for name, share in shares.items() if share}


def test_arrow_keys_read_the_exact_loss(page: Any, runs: list[Run]) -> None:
    from selenium.webdriver.common.keys import Keys

    press(page, "#loss-plot svg", Keys.HOME, Keys.ARROW_RIGHT)
    rows = page.execute_script("return [...document.querySelectorAll('.tip .row b')].map(b => b.textContent)")
    steps, values = runs[0].series("train/loss")
    assert page.find_element("css selector", ".tip .head").text == f"step {steps[1]}"
    assert float(rows[0]) == float(f"{values[1]:.7g}")


def test_arrow_keys_read_a_head(page: Any, runs: list[Run]) -> None:
    from selenium.webdriver.common.keys import Keys

    press(page, "[data-panel='1'] td[data-layer='0'][data-head='0']", Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    rows = page.execute_script("return [...document.querySelectorAll('.tip .row b')].map(b => b.textContent)")
    value = at(runs[1], 10**9)[1, 1]
    assert rows[:2] == ["1", "1"]
    assert float(rows[2].removesuffix(" nats")) == float(f"{value:.7g}")


# ------------------------------------------------------------------------------------------------------ what is said


def test_the_lost_run_is_visibly_lost(page: Any) -> None:
    assert len(page.find_elements("css selector", "#loss-plot path.lost")) == 1
    timelines = page.find_elements("css selector", "[data-timeline]")
    assert [t.get_attribute("data-timeline") for t in timelines] == ["1"]
    assert "blocks.3.mlp.fc" in timelines[0].find_element("css selector", "text.first").text
    assert "step 200, layer 3, feed-forward hidden layer (16 elements)" in timelines[0].text
    choose(page, "#fault-kind", "nan")
    assert "First record with NaN: step 200, layer 3, feed-forward hidden layer (12 elements)" in fault_words(page)
    assert "no NaN and no Inf in 30 records" in page.find_element("id", "fault-clean").text


def test_the_cross_stands_at_the_step_of_the_status(browser: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 2, 3, status="diverged", steps=(0, 5, 10))
    writer = RunWriter(run.directory)
    writer.status(last_step=20)
    writer.close()
    write(build([load_run(run.directory)]), tmp_path / "report.html")
    page = opened(browser, (tmp_path / "report.html").as_uri())
    places = (
        "const box = (s) => document.querySelector('#loss-plot ' + s).getBBox();"
        "const [cross, line] = [box('path.lost'), box('path.line')];"
        "return [cross.x + cross.width / 2, line.x, line.x + line.width]"
    )
    cross, first, last = page.execute_script(places)
    assert cross - first == pytest.approx(2 * (last - first), abs=1)
    title = page.execute_script("return document.querySelector('#loss-plot path.lost title').textContent")
    assert title.endswith(": lost at step 20")


def test_steps_between_records_do_not_look_as_if_they_had_nan(browser: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 2, 3, nan_from=20, steps=(0, 10, 20))
    write(build([load_run(run.directory)]), tmp_path / "report.html")
    page = opened(browser, (tmp_path / "report.html").as_uri())
    boxes = (
        "return [...document.querySelectorAll('#fault-plots path.bad, #fault-plots path.clean')]"
        ".map(p => p.getBBox()).filter(b => b.width).map(b => [b.x, b.width])"
    )
    (start, whole), *bad = page.execute_script(boxes)
    assert bad
    for left, width in bad:  # about step 20, of a row from 0 to 20
        assert left + width == pytest.approx(start + whole, abs=1)
        assert width < whole / 20
    columns = page.find_element("css selector", "#fault-plots path.clean").get_attribute("d")
    assert columns.count("M") == 3


def test_unchecking_a_run_takes_it_out_of_everything(page: Any) -> None:
    page.find_element("css selector", "#picker summary").click()
    page.find_element("css selector", "#picker input[value='1']").click()
    assert page.find_element("id", "picked").text == "2 of 3"
    assert page.find_elements("css selector", "[data-panel='1'], [data-timeline], #loss-plot path.lost") == []
    visible = page.execute_script("return [...document.querySelectorAll('[data-run=\"1\"]')].some(n => n.offsetParent)")
    assert not visible
    page.find_element("css selector", "#picker button[value=none]").click()
    assert "No run is chosen" in page.find_element("id", "heat-plots").text
    assert page.get_log("browser") == []


def test_a_hostile_name_is_text(page: Any) -> None:
    assert page.title == "normfree report"
    assert page.find_elements("css selector", "img") == []
    names = page.execute_script("return [...document.querySelectorAll('#heat-plots .name')].map(n => n.textContent)")
    assert names[2].startswith("</script><img src=x")


# ------------------------------------------------------------------------------------------------------------ layout


@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_never_scrolls_sideways(browser: Any, address: str, width: int) -> None:
    page = opened(browser, address, width)
    page.execute_script("document.querySelectorAll('details.more').forEach(d => { d.open = true; })")
    inside, window = page.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert (inside, window) == (width, width)
    size = "return parseFloat(getComputedStyle(document.querySelector(arguments[0])).fontSize)"
    assert page.execute_script(size, "p") >= 15
    assert page.execute_script(size, ".chart text") >= 11
    outside = (
        "return [...document.querySelectorAll('main h2, main p, main svg.chart, main table.heat, main select')]"
        ".filter(n => n.getBoundingClientRect().right > innerWidth + 0.5).map(n => n.outerHTML.slice(0, 80))"
    )
    assert page.execute_script(outside) == []


def test_nothing_is_asked_of_a_network(browser: Any, address: str) -> None:
    browser.get_log("performance")  # what the browser did on its own as it started
    page = opened(browser, address)
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert urls[0] == address
    assert [url for url in urls[1:] if not url.startswith("data:")] == []


def test_every_control_and_figure_has_a_name(page: Any) -> None:
    nameless = (
        "return [...document.querySelectorAll('input, select, button, svg[tabindex], table.heat')]"
        ".filter(n => !(n.getAttribute('aria-label') || n.closest('label') || n.textContent.trim()))"
        ".map(n => n.outerHTML.slice(0, 80))"
    )
    assert page.execute_script(nameless) == []


@pytest.mark.parametrize("make", [{"steps": ()}, {"steps": (500,)}, {"probe": False, "nan_from": 300}, {"seq_len": 1}])
def test_sparse_runs_are_drawn_without_an_error(browser: Any, tmp_path: Path, make: dict[str, Any]) -> None:
    run = make_run(tmp_path / "run", 2, 3, **make)
    write(build([load_run(run.directory)]), tmp_path / "report.html")
    page = opened(browser, (tmp_path / "report.html").as_uri())
    assert "needs two runs" in page.find_element("id", "diff-plot").text
    assert "No run recorded a snapshot" in page.find_element("id", "snapshot-body").text


def test_a_real_run_that_went_bad_is_drawn(browser: Any, tmp_path: Path) -> None:
    run = load_run(next((Path(__file__).parents[2] / "experiments" / "results" / "softmax_only").iterdir()))
    write(build([run]), tmp_path / "report.html")
    page = opened(browser, (tmp_path / "report.html").as_uri())
    np.testing.assert_array_equal(cells(page, "[data-panel='0']"), at(run, 10**9))
    steps, counts = run.array("inf_count")
    record = int(np.flatnonzero(counts.any(axis=(1, 2)))[0])
    assert f"First record with NaN or Inf: step {steps[record]}, layer 5, " in fault_words(page)
    assert f"({counts[record, 0, 5]:,} elements)" in fault_words(page)
    choose(page, "#fault-kind", "nan")
    assert "No NaN in any record" in fault_words(page)

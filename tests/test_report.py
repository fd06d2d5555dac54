"""The pictures, and the report in a real headless Chromium driven over its debugging pipe."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import time
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.container import ErrorbarContainer
from PIL import Image

from compofa.errors import SearchError
from compofa.networks.families import subnet_from_config
from compofa.networks.families.mobilenet_v3 import MOBILENET_V3
from compofa.plots import literal_text
from compofa.space.subnet import Subnet
from nas.report.data import COLORS, FoundRow, Measured, ReportData, Series, si
from nas.report.figure import draw, write_plot
from nas.report.html import TEMPLATE, write_report
from nas.search.evolution import Points
from nas.search.search import Found

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
NASTY = "</script><img src=x onerror=\"document.title='broken'\">&\u2028{{data}}\\1"


def config(seed):
    rng = np.random.default_rng(seed)
    stages = tuple(((3, int(rng.choice([3, 4, 6]))),) * int(rng.integers(2, 5)) for _ in range(5))
    r = int(rng.choice([160, 192, 224]))
    return Subnet(r, stages, format=MOBILENET_V3.config_format).to_config()


def make_series(name, seed, cloud=500):
    rng = np.random.default_rng(seed)
    costs = np.sort(rng.uniform(10, 60, 25))
    accuracies = 70 + seed + 8 * np.log(costs / 10)
    random_costs = rng.uniform(12, 60, cloud)
    random = 69 + 8 * np.log(random_costs / 10) - rng.gamma(2, 0.8, cloud)
    configs, band = tuple(map(config, range(25))), (accuracies - 0.6, accuracies + 0.4)
    return Series(name, costs, accuracies, configs, random_costs, random, band)


def make_data(name="CompOFA", cloud=500):
    series = (make_series(name, 1, cloud), make_series("OFA", 2, cloud))
    first = series[0]
    found = tuple(
        FoundRow(name, budget, first.front_costs[row], first.front_accuracies[row],
                 first.front_configs[row], {"MACs": "231M"},
                 (first.front_accuracies[row] - 0.6, first.front_accuracies[row] + 0.4),
                 Measured(first.front_accuracies[row] - below, 0.7))
        for budget, row, below in ((20.0, 4, 1.5), (35.0, 11, 0.9))
    )  # fmt: skip
    return ReportData("CompOFA on note10", "Latency", "ms", "within 2 %", "Predicted top-1", "%",
                      "MAE 0.05 points", series, found, ("Tables: measured.",))  # fmt: skip


@pytest.fixture(scope="module")
def data():
    return make_data()


def test_found_subnets_that_beat_the_front_join_it():
    space = MOBILENET_V3.compound_space()
    genes = space.enumerate_genes()[[0, 100, 242]].astype(np.uint8)
    front = Points(genes[[0, 2]], np.array([70.0, 74.0]), np.array([[10.0], [30.0]]))
    results = [
        Found(20.0, space.decode(genes[1]), 73.0, 19.0, 9, False, False),
        Found(40.0, space.decode(genes[1]), 73.5, 31.0, 9, False, False),
    ]
    series = Series.from_points("x", space, front, front, results)
    assert series.front_costs.tolist() == [10.0, 19.0, 30.0]
    assert series.front_accuracies.tolist() == [70.0, 73.0, 74.0]
    assert [subnet_from_config(config) for config in series.front_configs] == [
        space.decode(row) for row in genes
    ]


def test_png_is_an_image_with_both_colours(data, tmp_path):
    write_plot(data, tmp_path / "front.png")
    with Image.open(tmp_path / "front.png") as image:
        assert image.width > 1000 and image.height > 800
        colours = {tuple(pixel) for pixel in np.asarray(image.convert("RGB")).reshape(-1, 3)[::7]}
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= colours


def test_svg_holds_title_units_and_errors_and_repeats(data, tmp_path):
    write_plot(data, tmp_path / "a.svg")
    write_plot(data, tmp_path / "b.svg")
    first = (tmp_path / "a.svg").read_bytes()
    assert first == (tmp_path / "b.svg").read_bytes()
    comments = re.findall(r"<!-- (.*?) -->", first.decode())
    assert {"CompOFA on note10", "Latency (ms)", "Predicted top-1 (%)"} <= set(comments)
    assert any("within 2 %" in text and "MAE 0.05" in text for text in comments)


def artists(data):
    with literal_text():
        figure = draw(data)
    return figure, figure.axes[0]


def test_the_figure_has_bands_and_error_bars_and_says_what_they_are(data):
    figure, axes = artists(data)
    bands = [each for each in axes.collections if isinstance(each, PolyCollection)]
    for series, band in zip(data.series, bands, strict=False):
        reached = band.get_paths()[0].get_extents()
        assert (reached.y0, reached.y1) == pytest.approx(
            (series.front_band[0].min(), series.front_band[1].max())
        )
    (bars,) = (each for each in axes.containers if isinstance(each, ErrorbarContainer))
    assert bars[0].get_xydata().tolist() == [[row.cost, row.measured.value] for row in data.found]
    ends = [segment[:, 1].tolist() for segment in bars[2][0].get_segments()]
    assert ends == [pytest.approx(row.measured.ends) for row in data.found]
    low, high = axes.get_ylim()
    assert all(low < end < high for pair in ends for end in pair)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {"measured ± standard error", "90 % interval"} <= set(legend)
    caption = " ".join(text.get_text() for text in figure.texts).replace("\n", " ")
    assert "90 % prediction intervals" in caption and "standard error" in caption


def test_the_figure_has_no_more_of_a_wide_band_than_fits(data):
    first = data.series[0]
    wide = replace(first, front_band=(first.front_accuracies - 50, first.front_accuracies + 50))
    (low, high), before = (
        artists(replace(data, series=(each, data.series[1])))[1].get_ylim()
        for each in (wide, first)
    )
    assert before[1] - before[0] < high - low < 2 * (before[1] - before[0])


def test_error_bars_end_at_100_percent():
    assert Measured(99.5, 0.7).ends == (98.8, 100) and Measured(98.0).ends == (98, 98)
    assert Measured(98.061, 0.74).text(2) == "98.06 ± 0.74" and Measured(3.0).text(1) == "3.0"


def test_notes_and_missing_fronts_are_in_figure_and_page(data, tmp_path):
    bare = replace(
        data.series[1], front_costs=np.zeros(0), front_accuracies=np.zeros(0), front_configs=(),
        front_band=None, no_front="no front is shown: not trained",
    )  # fmt: skip
    noted = replace(data, series=(data.series[0], bare), notes=("30 validation images: few",))
    figure, axes = artists(noted)
    assert any("30 validation images" in text.get_text() for text in figure.texts)
    assert "OFA: no front" in [text.get_text() for text in figure.legends[0].get_texts()]
    assert not [line for line in axes.lines if line.get_color() == COLORS[1]]
    write_report(noted, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text("utf-8")
    assert '<p class="note">30 validation images: few</p>' in text
    assert '"no_front":"no front is shown: not trained"' in text


def test_costs_that_are_counts_have_prefixes_on_the_axis(data, tmp_path):
    def millions(series):
        return replace(series, costs=series.costs * 2e5, front_costs=series.front_costs * 2e5)

    found = tuple(replace(row, cost=row.cost * 2e5, budget=2e6) for row in data.found)
    counted = replace(
        data, series=tuple(map(millions, data.series)), found=found, cost_name="MACs",
        cost_unit="MACs",
    )  # fmt: skip
    assert counted.cost_label == "MACs"
    _, axes = artists(counted)
    ticks = axes.xaxis.get_major_formatter()
    assert [ticks(value) for value in (2e6, 1e7)] == ["2M", "10M"]
    write_report(counted, tmp_path / "report.html")
    assert "<span>2M</span>" in (tmp_path / "report.html").read_text("utf-8")


def test_the_table_has_what_was_predicted_and_measured(data, tmp_path):
    write_report(data, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text("utf-8")
    heads = re.findall(r"<th [^>]*>(.*?)</th>", text)
    assert heads == [
        "Network", "Budget (ms)", "Latency (ms)", "Predicted top-1 (%)", "90 % interval (%)",
        "Measured top-1 (%)", "MACs", "Subnet",
    ]  # fmt: skip
    row = data.found[0]
    cells = re.findall(r"<td [^>]*><span>(.*?)</span>", text, re.DOTALL)[: len(heads)]
    low, high = row.interval
    assert cells[:7] == [
        "CompOFA", "20", si(row.cost, 5), f"{row.accuracy:.2f}", f"{low:.2f} to {high:.2f}",
        row.measured.text(2), "231M",
    ]  # fmt: skip


def test_the_policy_allows_the_own_style_and_script_alone(data, tmp_path):
    write_report(data, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text("utf-8")
    (policy,) = re.findall(r'Content-Security-Policy"\s+content="([^"]*)"', text)
    wanted = ["default-src 'none'"]
    for tag in ("style", "script"):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        wanted.append(f"{tag}-src 'sha256-{digest}'")
    assert policy.split("; ") == wanted


def test_plot_of_another_format_is_refused(data, tmp_path):
    with pytest.raises(SearchError, match=r"\.png or \.svg.*front\.bmp"):
        write_plot(data, tmp_path / "front.bmp")


def test_plot_without_random_subnets_and_found_ones(tmp_path):
    bare = Series("x", np.array([1.0, 2.0]), np.array([1.0, 2.0]), (config(0), config(1)),
                  np.zeros(0), np.zeros(0))  # fmt: skip
    data = ReportData("t", "c", "ms", "e", "a", "%", "e", (bare,), ())
    write_plot(data, tmp_path / "bare.png")
    write_report(data, tmp_path / "bare.html")
    assert "No budgets were given." in (tmp_path / "bare.html").read_text()


class Scripts(HTMLParser):
    def __init__(self):
        super().__init__()
        self.inside, self.scripts, self.images = False, [], 0

    def handle_starttag(self, tag, attrs):
        if tag == "script":
            self.inside = True
            self.scripts.append("")
        self.images += tag == "img"

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "script"

    def handle_data(self, data):
        if self.inside:
            self.scripts[-1] += data


def test_report_cannot_be_broken_out_of(tmp_path):
    write_report(make_data(NASTY), tmp_path / "report.html")
    parser = Scripts()
    parser.feed((tmp_path / "report.html").read_text())
    assert len(parser.scripts) == 2 and parser.images == 0
    assert json.loads(parser.scripts[0])["series"][0]["name"] == NASTY


def test_report_names_no_other_file():
    text = TEMPLATE.read_text()
    assert not re.search(r"https?:|//\w+\.|<link|src=|@import|url\(", text)


def test_report_refuses_numbers_that_are_not_finite(tmp_path):
    row = FoundRow("CompOFA", 20.0, 19.0, float("nan"), config(0))
    data = make_data()
    with pytest.raises(SearchError, match="finite"):
        write_report(ReportData(**{**vars(data), "found": (row,)}), tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_found_subnets_of_an_unknown_series_are_refused(data):
    row = FoundRow("other", 20.0, 19.0, 70.0, config(0))
    with pytest.raises(SearchError, match="'other'"):
        ReportData(**{**vars(data), "found": (row,)})


class Chromium:
    """A page in headless Chromium; commands go through --remote-debugging-pipe (fds 3 and 4)."""

    FLAGS = (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--remote-debugging-pipe", "--window-size=1200,1000",
    )  # fmt: skip

    def __init__(self, folder):
        to_browser, write_end = os.pipe()
        read_end, from_browser = os.pipe()
        relay = 'exec "$@" 3<&"$IN" 4>&"$OUT"'
        command = [BROWSER, *self.FLAGS, f"--user-data-dir={folder / 'profile'}"]
        self.process = subprocess.Popen(
            ["bash", "-c", relay, "-", *command], stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, pass_fds=(to_browser, from_browser),
            env={**os.environ, "IN": str(to_browser), "OUT": str(from_browser)},
        )  # fmt: skip
        os.close(to_browser)
        os.close(from_browser)
        self.write_end, self.read_end, self.buffer, self.count = write_end, read_end, b"", 0
        self.session, self.errors, self.requests = None, [], []

    def open(self, url):
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self(f"{domain}.enable")
        self("Page.navigate", url=url)
        self.until("document.documentElement?.dataset.ready === '1'")

    def __call__(self, method, **params):
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write_end, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]
            if answer.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.errors.append(answer["params"])
            if answer.get("method") == "Network.requestWillBeSent":
                self.requests.append(answer["params"]["request"]["url"])

    def receive(self):
        while b"\0" not in self.buffer:
            part = os.read(self.read_end, 1 << 20)
            assert part, "the browser closed its pipe"
            self.buffer += part
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def run(self, script):
        answer = self("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, script):
        deadline = time.monotonic() + 30
        while not self.run(script):
            assert time.monotonic() < deadline, script
            time.sleep(0.02)

    def mouse(self, kind, x, y, **more):
        self("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def close(self):
        self.process.terminate()
        self.process.wait(20)
        os.close(self.write_end)
        os.close(self.read_end)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    if BROWSER is None:
        pytest.skip("needs Chromium (Debian: apt install chromium)")
    folder = tmp_path_factory.mktemp("browser")
    report = folder / "report.html"
    write_report(make_data(cloud=10_000), report)
    browser = Chromium(folder)
    try:
        browser.open(report.as_uri())
        yield browser
    finally:
        browser.close()


def screen(page, cost, accuracy):
    """Return the place of a point of the plot on the screen."""
    return page.run(
        f"(b => [b.left + toX({cost}), b.top + toY({accuracy})])(canvas.getBoundingClientRect())"
    )


def test_page_loads_without_errors_and_asks_for_nothing_else(page):
    assert page.run("marks.length") == 2 * 25 + 2 + 2 * 10_000
    assert page.errors == []
    assert len([url for url in page.requests if not url.startswith(("data:", "blob:"))]) == 1


def test_hovering_shows_the_subnet(page):
    series = make_data().series[1]
    page.mouse("mouseMoved", *screen(page, series.front_costs[20], series.front_accuracies[20]))
    assert page.run("tip.style.display") == "block"
    shown = page.run("tip.innerText")
    kernels = " ".join(map(str, series.front_configs[20]["ks"]))
    assert "OFA, front" in shown and f"ks: {kernels}" in shown
    page.mouse("mouseMoved", *screen(page, 11, 60 + 8 * np.log(6)))
    box = page.run("(b => [b.right + 30, b.top])(canvas.getBoundingClientRect())")
    page.mouse("mouseMoved", *box)
    assert page.run("tip.style.display") == "none"


def test_slider_picks_the_best_within_the_budget_and_saves_it(page, tmp_path):
    page("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    low, high = page.run("reach")
    page.run("slider.value = 400; slider.dispatchEvent(new Event('input'))")
    budget = page.run("limit")
    assert budget == pytest.approx(low + 0.4 * (high - low), rel=1e-4)
    for place, series in enumerate(make_data().series):
        best = np.flatnonzero(series.front_costs <= budget).max()
        box = f"document.querySelectorAll('.pick')[{place}]"
        assert f"{series.front_costs[best]:.5g} ms" in page.run(f"{box}.innerText")
        buttons = page.run(f"{box}.querySelectorAll('button').length")
        assert buttons == 2 - place, "of the first, one is measured and a better one predicted"
        x, y = page.run(
            f"(b => [b.left + b.width / 2, b.top + b.height / 2])"
            f"([...{box}.querySelectorAll('button')].at(-1).getBoundingClientRect())"
        )
        page.mouse("mousePressed", x, y, button="left", clickCount=1)
        page.mouse("mouseReleased", x, y, button="left", clickCount=1)
        predicted = "_predicted" if buttons == 2 else ""
        path = tmp_path / f"{series.name}{predicted}_{budget:g}ms.json"
        deadline = time.monotonic() + 20
        while not path.exists():
            assert time.monotonic() < deadline, list(tmp_path.iterdir())
            time.sleep(0.02)
        assert json.loads(path.read_text()) == series.front_configs[best]
        assert (
            subnet_from_config(json.loads(path.read_text())).to_config()
            == (series.front_configs[best])
        )


def test_budget_below_every_subnet_says_the_least(page):
    page.run("number.value = 1; number.dispatchEvent(new Event('input'))")
    text = page.run("picks.innerText")
    assert text.count("No subnet: the least is") == 2
    assert page.run("picks.querySelectorAll('button').length") == 0


def test_dragging_zooms_and_double_click_resets(page):
    whole = page.run("view.x")
    page.mouse("mousePressed", *screen(page, 20, 72), button="left", clickCount=1)
    page.mouse("mouseMoved", *screen(page, 30, 78), button="left")
    page.mouse("mouseReleased", *screen(page, 30, 78), button="left", clickCount=1)
    assert page.run("view.x") == pytest.approx([20, 30], abs=0.2)
    x, y = screen(page, 25, 75)
    for count in (1, 2):
        page.mouse("mousePressed", x, y, button="left", clickCount=count)
        page.mouse("mouseReleased", x, y, button="left", clickCount=count)
    assert page.run("view.x") == pytest.approx(whole)
    assert page.errors == []


def key(page, name, code=0, text=""):
    for kind in ("keyDown", "keyUp"):
        more = {"text": text} if text and kind == "keyDown" else {}
        page("Input.dispatchKeyEvent", type=kind, key=name, windowsVirtualKeyCode=code, **more)


def test_the_plot_is_walked_by_keyboard(page):
    data = make_data()
    page.run("reset(); stage.focus()")
    assert page.run("document.activeElement.id") == "stage"
    key(page, "ArrowRight", 39)
    assert page.run("[current.kind, current.x]") == ["found", pytest.approx(data.found[0].cost)]
    key(page, "ArrowRight", 39)
    assert page.run("current.x") == pytest.approx(data.found[1].cost)
    said = page.run("$('said').textContent")
    assert data.found[1].measured.text(2) in said and "predicted" in said
    key(page, "Enter", 13)
    assert page.run("limit") == data.found[1].budget
    key(page, "ArrowDown", 40)
    key(page, "End", 35)
    assert page.run("[current.kind, current.series, current.x]") == [
        "front", 0, pytest.approx(data.series[0].front_costs[-1]),
    ]  # fmt: skip
    key(page, "Enter", 13)
    assert page.run("limit") == pytest.approx(data.series[0].front_costs[-1])
    key(page, "+", 187, "+")
    assert page.run("view.x[1] - view.x[0] < whole.x[1] - whole.x[0]")
    assert page.run("tip.style.display") == "block" and not page.run("$('reset').disabled")
    key(page, "Escape", 27)
    assert page.run("view === whole && current === null && tip.style.display === 'none'")
    assert page.run("$('reset').disabled")
    key(page, "Tab", 9)
    assert page.run("document.activeElement.id") != "stage", "the plot is no trap"


def test_the_focus_is_visible(page):
    page.run("stage.blur()")
    page.run("$('number').focus()")
    key(page, "a", 65)  # of the keyboard, so that focus is shown
    page.run("stage.focus()")
    assert page.run("parseFloat(getComputedStyle(stage).outlineWidth)") >= 2


def test_what_was_measured_is_the_headline(page):
    data = make_data()
    page.run("budget(36)")
    box = page.run("picks.querySelector('.pick').innerText")
    assert box.index(f"{data.found[1].measured.text(2)} % measured") < box.index("predicted")
    assert page.run("[...picks.querySelectorAll('.pick')[1].children].some(e => /measured/.test("
                    "e.innerText))") is False  # fmt: skip


def test_the_button_shows_everything_again(page):
    page.run("zoom(.5)")
    x, y = page.run("(b => [b.left + b.width / 2, b.top + b.height / 2])"
                    "($('reset').getBoundingClientRect())")  # fmt: skip
    for kind in ("mousePressed", "mouseReleased"):
        page.mouse(kind, x, y, button="left", clickCount=1)
    assert page.run("view === whole")


OVERFLOW = """(edge => [...document.querySelectorAll('td')].filter(cell =>
  cell.getBoundingClientRect().right > edge + 1).length)
  (document.querySelector('.scroll').getBoundingClientRect().right)"""


def test_the_printed_table_is_whole(page):
    page("Emulation.setEmulatedMedia", media="print")
    page("Emulation.setDeviceMetricsOverride", width=794, height=1123, deviceScaleFactor=1,
         mobile=False)  # fmt: skip
    assert page.run(OVERFLOW) == 0
    assert page.run("getComputedStyle($('reset')).display") == "none"
    page("Emulation.setEmulatedMedia", media="")
    page("Emulation.clearDeviceMetricsOverride")


def test_legend_marks_are_printed(page):
    assert page.run("$('legend').children.length") == page.run(
        "$('legend').querySelectorAll('li > svg > *').length && "
        "[...$('legend').children].filter(item => item.querySelector('svg > *')).length"
    )
    assert page.run("getComputedStyle($('legend').querySelector('svg > *')).backgroundColor") == (
        "rgba(0, 0, 0, 0)"
    )


@pytest.mark.parametrize("width", [1440, 390])
def test_every_column_is_inside_the_card(page, width):
    phone = width < 500
    page("Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1,
         mobile=phone)  # fmt: skip
    page.until(f"innerWidth <= {width} && size.width > 0")
    assert page.run(OVERFLOW) == 0
    assert page.run("document.documentElement.scrollWidth <= innerWidth")
    shown = page.run(
        "[...document.querySelectorAll('td')].every(c => c.offsetWidth && c.offsetHeight)"
    )
    assert shown
    if phone:
        heads = page.run("[...document.querySelectorAll('tbody tr:first-child td')].map("
                         "c => getComputedStyle(c, '::before').content)")  # fmt: skip
        assert '"Measured top-1 (%)"' in heads and len(heads) == 8
    page("Emulation.clearDeviceMetricsOverride")


def test_a_tap_shows_the_subnet(page):
    page("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1,
         mobile=True)  # fmt: skip
    page("Emulation.setTouchEmulationEnabled", enabled=True)
    page.run("reset(); scrollTo(0, 0); canvas.scrollIntoView(); draw()")
    row = make_data().found[1]
    x, y = screen(page, row.cost, row.accuracy)
    page("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x + 3, "y": y - 3}])
    page("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    page.until("tip.style.display === 'block'")
    shown = page.run("tip.innerText")
    assert "found for 35 ms" in shown and row.measured.text(2) in shown and "ks:" in shown
    box = page.run("(t => [t.left >= 0, t.right <= innerWidth])(tip.getBoundingClientRect())")
    assert box == [True, True]
    page("Emulation.setTouchEmulationEnabled", enabled=False)
    page("Emulation.clearDeviceMetricsOverride")
    assert page.errors == []

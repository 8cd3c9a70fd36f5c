"""The page in a real browser: Chromium, headless, without a network."""

import io
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from qdiff.evaluation.page import write_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PHONE = {"width": 390, "height": 844}
DESKTOP = {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def page_file(evaluated):
    folder, report = evaluated
    return write_page(report, folder)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the dev extra")
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser, path, viewport=DESKTOP, **options):
    """The page, and all that it complained of or asked the network for."""
    page, noise = browser.new_page(viewport=viewport, **options), []
    page.on("console", lambda message: noise.append(message.text))
    page.on("pageerror", lambda error: noise.append(str(error)))
    page.on("request", lambda request: request.url.startswith("data:") or noise.append(request.url))
    page.goto(path.as_uri())
    noise.remove(path.as_uri())
    yield page, noise
    page.close()


def screenshot(element):
    return np.asarray(Image.open(io.BytesIO(element.screenshot())).convert("RGB")).astype(int)


def sides(shown, before, after):
    """Where the screenshot shows the picture before (True), after (False) or neither (None), along a row of blocks.

    The pictures are 8 x 8 blocks of one colour: their middles can be looked up in a screenshot of any size. The row is
    clear of the handle in the middle and of the names at the bottom.
    """
    found = []
    for column in range(8):
        height, width = shown.shape[:2]
        pixel = shown[int(height * 1.5 / 8), int(width * (column + 0.5) / 8)]
        matches = [np.abs(pixel - picture[1 * 16 + 8, column * 16 + 8]).max() <= 1 for picture in (before, after)]
        assert matches.count(True) <= 1, "the fixture's pictures must differ everywhere"
        found.append(matches[0] if any(matches) else None)
    return found


def pair_pictures(evaluated, candidate):
    folder, report = evaluated
    pair = min((pair for pair in report.pairs if pair["candidate"] == candidate), key=lambda pair: pair["psnr_db"])
    return [np.asarray(Image.open(folder / pair[f"{role}_png"])).astype(int) for role in ("reference", "candidate")]


def test_the_slider_is_dragged_and_shows_before_on_its_left_and_after_on_its_right(browser, page_file, evaluated):
    before, after = pair_pictures(evaluated, "w4a8")
    with opened(browser, page_file) as (page, noise):
        pair = page.locator(".compare").first
        pair.scroll_into_view_if_needed()
        assert sides(screenshot(pair), before, after) == [True] * 4 + [False] * 4
        box = pair.bounding_box()
        middle = box["y"] + box["height"] / 2
        page.mouse.move(box["x"] + box["width"] / 2, middle)
        page.mouse.down()
        for share in (0.4, 0.25):
            page.mouse.move(box["x"] + share * box["width"], middle, steps=4)
            value = float(pair.locator("input").input_value())
            # The line is under the pointer, not somewhere beside it.
            assert value == pytest.approx(100 * share, abs=1)
        assert sides(screenshot(pair), before, after) == [True] * 2 + [False] * 6
        page.mouse.up()
        assert noise == []


def test_the_slider_moves_with_the_keyboard(browser, page_file, evaluated):
    before, after = pair_pictures(evaluated, "w4a8")
    with opened(browser, page_file) as (page, _):
        pair = page.locator(".compare").first
        pair.locator("input").focus()
        page.keyboard.press("End")
        assert sides(screenshot(pair), before, after) == [True] * 8
        assert pair.locator("input").get_attribute("aria-valuetext") == "100 %"
        page.keyboard.press("Home")
        # The line itself is at the edge, in no block's middle.
        assert sides(screenshot(pair), before, after) == [False] * 8
        for _ in range(5):
            page.keyboard.press("ArrowRight")
        assert float(pair.locator("input").input_value()) > 0


@pytest.mark.parametrize("viewport", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_nothing_is_wider_than_the_screen(browser, page_file, viewport):
    with opened(browser, page_file, viewport) as (page, noise):
        assert page.evaluate("document.documentElement.scrollWidth") == viewport["width"]
        outside = """width => [...document.querySelectorAll("main *")].filter(element => {
            const box = element.getBoundingClientRect();
            return box.width > 0 && box.right > width + 1 && !element.closest(".compare, thead, svg, li");
        }).map(element => element.outerHTML.slice(0, 80))"""
        assert page.evaluate(outside, viewport["width"]) == []
        assert noise == []


@pytest.mark.parametrize(("scheme", "shade"), [("light", "rgb(255, 255, 255)"), ("dark", "rgb(30, 34, 39)")])
def test_it_follows_the_system_and_every_text_can_be_read(browser, page_file, scheme, shade):
    """WCAG's contrast ratio of 4.5 for every text on a plain background."""
    with opened(browser, page_file, color_scheme=scheme) as (page, _):
        assert page.evaluate("getComputedStyle(document.querySelector('section')).backgroundColor") == shade
        assert page.evaluate(POOR_CONTRAST) == []


POOR_CONTRAST = """() => {
    const parts = colour => colour.match(/[\\d.]+/g).map(Number);
    const linear = c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    const luminance = rgb => rgb.slice(0, 3).map(c => linear(c / 255))
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = element => {
        for (; element; element = element.parentElement) {
            const colour = parts(getComputedStyle(element).backgroundColor);
            if (colour.length === 3 || colour[3] === 1) return colour;
        }
        return [255, 255, 255];
    };
    const found = [];
    for (const element of document.querySelectorAll("main *:not(svg *):not(.compare *)")) {
        const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
        if (!own || element.tagName === "SCRIPT") continue;
        const [a, b] = [getComputedStyle(element).color, null].map((c, i) => luminance(i ? behind(element) : parts(c)));
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (ratio < 4.5) found.push(ratio.toFixed(1) + " " + element.textContent.slice(0, 40));
    }
    return found;
}"""


def test_a_cell_of_the_heat_map_is_read_by_pointer_and_by_keyboard(browser, page_file, evaluated):
    _, report = evaluated
    table = report.tables["layer-error/w4a8"]
    first = f"{100 * table['values'][0][0]:.3g}"
    with opened(browser, page_file) as (page, noise):
        heat = page.locator(".heat").first
        cells, output = heat.locator(".cells"), heat.locator("output")
        cells.scroll_into_view_if_needed()
        cells.hover(position={"x": 2, "y": 2})
        assert output.text_content().startswith(first)
        assert "conv_in · timestep 951" in output.text_content()
        cells.focus()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowRight")
        assert "time_embedding.linear_1 · timestep 901" in output.text_content()
        assert noise == []

"""The page of the explorer in a real browser: every tab once, in the width of a telephone."""

import importlib.util
import os
import shutil
import socket
from contextlib import contextmanager

import pytest

from tests.parts import trained_run

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

if importlib.util.find_spec("gradio") is None:  # to import it takes every test process seconds
    pytest.skip("gradio is not installed: pip install -e '.[explore]'", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("there is no chromium", allow_module_level=True)
QUIET = ("quic", "background-networking", "component-update", "sync", "gpu")  # what of Chromium would call the network
WIDTH = 390
PRESSED = {
    "Walk": ("Walk", 14),
    "Nearest": ("Find", 24),
    "Score": ("Score", 3),
}
"""of a tab, its button and how many pictures that shows"""


@contextmanager
def served(folder):
    """The address of the page, with the run of that folder. No other lies under checkpoints/."""
    from pipelines.explorer.page import Page

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    blocks = Page(str(folder), "cpu").serve("127.0.0.1", port, wait=False)
    yield f"http://127.0.0.1:{port}/"
    blocks.close()


@contextmanager
def opened(address):
    """The page in a browser as wide as a telephone."""
    arguments = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in QUIET)]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = browser.new_page(viewport={"width": WIDTH, "height": 800})
        page.set_default_timeout(120_000)
        errors, requests = [], []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address)
        page.locator(".strip img:visible").first.wait_for()
        yield page
        assert page.evaluate("document.documentElement.scrollWidth") <= WIDTH
        assert not errors
        assert [url for url in requests if not url.startswith((address, "data:", "blob:"))] == []
        browser.close()


def tab(page, name: str) -> None:
    """Those that the width has no room for are in a menu."""
    shown = page.get_by_role("tab", name=name, exact=True).locator("visible=true")
    if not shown.count():
        page.locator(".overflow-menu > button").click()
        shown = page.locator(".overflow-dropdown button", has_text=name)
    shown.first.click()


def test_every_tab_answers_without_an_error_and_without_a_network(run, small_data, tmp_path, monkeypatch):
    """The run's prior is told labels."""
    monkeypatch.chdir(tmp_path)
    with served(run.folder) as address, opened(address) as page:
        pictures = page.locator(".strip img:visible")
        playwright.expect(pictures).to_have_count(4 * 16, timeout=120_000)
        (tmp_path / "checkpoints" / "later").mkdir(parents=True)
        (tmp_path / "checkpoints" / "later" / "config.json").touch()
        page.get_by_label("Run").click()
        playwright.expect(page.get_by_role("option", name="later")).to_be_visible()
        page.keyboard.press("Escape")
        page.get_by_label("Seed").fill("1")
        before = pictures.first.get_attribute("src")
        page.get_by_role("button", name="Draw", exact=True).click()
        page.wait_for_function("before => document.querySelector('.strip img').src != before", arg=before)
        tab(page, "Plane")
        playwright.expect(page.locator(".sentence:visible")).to_contain_text("choose the run mnist5k-2d")
        tab(page, "Walk")
        playwright.expect(page.get_by_label("To: held-out image")).to_have_value("119")  # the last of small_data
        for name, (button, count) in PRESSED.items():
            tab(page, name)
            page.get_by_role("button", name=button, exact=True).click()
            playwright.expect(pictures).to_have_count(count, timeout=120_000)


def test_what_is_painted_over_is_drawn_anew(run, small_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with served(run.folder) as address, opened(address) as page:
        tab(page, "Complete")
        page.get_by_role("button", name="Draw the painted part").click()
        playwright.expect(page.locator(".sentence:visible")).to_contain_text("there is no picture to complete")
        page.get_by_role("button", name="Load", exact=True).click()
        playwright.expect(page.locator(".sentence:visible")).to_have_count(0)
        canvas = page.locator("canvas:visible").first.bounding_box()
        x, y = canvas["x"] + canvas["width"] / 2, canvas["y"] + canvas["height"] / 2
        page.mouse.move(x - 30, y)
        page.mouse.down()
        page.mouse.move(x + 30, y, steps=5)
        page.mouse.up()
        page.get_by_role("button", name="Draw the painted part").click()
        playwright.expect(page.locator(".strip img:visible")).to_have_count(1 + 8)


def test_a_click_on_the_plane_is_decoded(small_data, tmp_path, monkeypatch):
    flat = trained_run(tmp_path, "mnist5k-2d")
    monkeypatch.chdir(tmp_path)
    with served(flat.folder) as address, opened(address) as page:
        tab(page, "Plane")
        plane = page.get_by_role("tabpanel").locator("img:visible").first
        plane.wait_for()
        place = plane.bounding_box()
        page.mouse.click(place["x"] + place["width"] / 3, place["y"] + place["height"] / 3)
        playwright.expect(page.locator(".strip img:visible")).to_have_count(1)
        playwright.expect(page.locator(".heading:visible")).to_contain_text("z = (")

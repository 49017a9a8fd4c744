"""The page in a real browser: draw, recover, train, report and compare, by mouse and by keys, at two widths.

It needs the extra "ui", Playwright and a Chromium of this machine. SPMHUB_SCREENSHOTS names a folder for pictures of
its states.
"""

import os
import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason='needs pip install "spm-hub[ui]"')
pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")

from playwright import sync_api as playwright

from spm_hub.models.base_choice import BaseChoice
from spm_hub.page.layout import Page, free_port, launch_options
from spm_hub.page.lessons import School
from spm_hub.page.studio import Studio
from spm_hub.serving.requests import Limits

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ROOT = Path(__file__).resolve().parents[2]
WAIT = 180_000

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium on this machine"),
]


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    folder = tmp_path_factory.mktemp("registry")
    for part in ("adapters", "manifests"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("recipes", "schema.json"))
    return folder


@pytest.fixture(scope="module")
def address(registry):
    bases = {name: BaseChoice(name) for name in ("sketchbook", "sketchbook-chalk")}
    studio = Studio(bases, Limits(64, steps=50, prompt=200), registry=registry)
    blocks = Page(studio, School(studio), steps=4).make()
    _, url, _ = blocks.launch(
        server_name="127.0.0.1", server_port=free_port("127.0.0.1"), prevent_thread_lock=True, quiet=True,
        **launch_options(),
    )  # fmt: skip
    yield url
    blocks.close(verbose=False)
    studio.close()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[1280, 400])
def page(request, address, browser):
    complaints = []
    page = browser.new_page(viewport={"width": request.param, "height": 900})
    page.set_default_timeout(WAIT)
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda one: None if one.failure == "net::ERR_ABORTED" else complaints.append(one.url))
    page.goto(address)
    page.get_by_role("button", name="Draw", exact=True).wait_for()
    page.complaints = complaints
    yield page
    page.close()


def look(page, name):
    if folder := os.environ.get("SPMHUB_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}-{page.viewport_size['width']}.png", full_page=True)


def says(page, element, words):
    playwright.expect(page.locator(f"#{element}")).to_contain_text(re.compile(words), timeout=WAIT)


def pixels(page, element):
    return page.locator(f"#{element} img").get_attribute("src")


def fits(page):
    """Whether nothing is wider than the window."""
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_draw_recover_and_errors(page):
    page.locator("#recover-snoopy").wait_for()
    look(page, "start")
    assert fits(page)
    page.locator("#prompt textarea").fill("mickey on the beach")
    page.locator("#erasers input").click()
    page.get_by_role("option", name="mickey").click()
    page.keyboard.press("Escape")
    page.locator("#recover-mickey").wait_for()
    page.locator("#prompt textarea").press("Enter")
    says(page, "said", "drawn, from the same noise")
    says(page, "why", r"mickey\s*1\.00")
    erased = pixels(page, "with")
    assert erased != pixels(page, "without")
    look(page, "drawn")
    assert fits(page)
    page.locator("#recover-mickey").click()
    playwright.expect(page.locator("#recover-mickey")).to_have_count(0)
    page.locator("#draw").click()
    says(page, "why", "snoopy")
    playwright.expect(page.locator("#why")).not_to_contain_text(re.compile(r"mickey\s*\d"), timeout=WAIT)
    says(page, "said", "drawn, from the same noise")
    assert pixels(page, "with") != erased
    look(page, "recovered")
    page.locator("#prompt textarea").fill(" ")
    page.locator("#draw").click()
    says(page, "said", "the prompt is empty")
    look(page, "error")
    assert page.complaints == []


def test_a_strength_of_none_draws_as_the_model_does(page):
    page.locator("#prompt textarea").fill("snoopy")
    slider = page.locator("#strength-snoopy input[type=range]")
    slider.focus()
    page.keyboard.press("Home")
    page.wait_for_timeout(500)
    page.locator("#draw").click()
    says(page, "why", r"snoopy\s*1\.00\s*0\.00")
    says(page, "said", "drawn, from the same noise")
    playwright.expect(page.locator("#with img")).to_be_visible()
    look(page, "strength")
    assert page.complaints == []


def test_train_report_and_compare(page, registry):
    concept = {1280: "church", 400: "parachute"}[page.viewport_size["width"]]
    page.get_by_role("tab", name="Train").click()
    page.locator("#concept textarea, #concept input").first.fill(concept)
    page.locator("#train").click()
    says(page, "trained", f"{concept} is computed; it is chosen")
    assert (registry / "adapters" / f"{concept}.safetensors").is_file()
    page.locator("#pictures img").nth(1).wait_for()
    look(page, "trained")
    assert fits(page)
    page.locator("#train").click()
    says(page, "trained", f"there is an eraser {concept} already")
    page.get_by_role("tab", name="Draw").click()
    page.locator("#prompt textarea").fill(concept)
    page.locator("#draw").click()
    says(page, "why", rf"{concept}\s*1\.00")
    says(page, "said", "drawn, from the same noise")
    look(page, "applied")
    page.get_by_role("tab", name="Report").click()
    page.locator("#read").click()
    says(page, "report-text", "Measured")
    look(page, "report")
    assert fits(page)
    page.get_by_role("tab", name="Compare").click()
    page.locator("#compare").click()
    says(page, "compared-said", "drawn, from the same noise")
    says(page, "compared-why", r"cosine -?\d\.\d{3}")
    look(page, "compared")
    assert fits(page)
    assert page.complaints == []

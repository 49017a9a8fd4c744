"""The page in a real browser: draw, recover, train, report and compare, by mouse and by keys, at two widths.

It needs the extra "ui", Playwright and a Chromium of this machine. SPMHUB_SCREENSHOTS names a folder for pictures of
its states.
"""

import contextlib
import io
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from pico import pico_eraser
from PIL import Image

pytest.importorskip("gradio", reason='needs pip install "spm-hub[ui]"')
pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")

from playwright import sync_api as playwright

from spm_hub.models.base_choice import BaseChoice
from spm_hub.models.loading import load_pipeline
from spm_hub.page.layout import Page, free_port, launch_options
from spm_hub.page.lessons import School
from spm_hub.page.studio import Studio
from spm_hub.registry.registry import Registry
from spm_hub.serving.requests import Limits

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ROOT = Path(__file__).resolve().parents[2]
WAIT = 120_000
MANY = 100
MODULE = "mid_block.attentions.0.transformer_blocks.0.ff.net.2"
LISTEN = """() => {
    window.told = [];
    const said = document.querySelector("#said");
    const listen = () => told.push(said.innerText.trim());
    new MutationObserver(listen).observe(said, {subtree: true, childList: true, characterData: true});
}"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium on this machine"),
]


@contextlib.contextmanager
def served(registry, steps=4):
    bases = {name: BaseChoice(name) for name in ("sketchbook", "sketchbook-chalk")}
    studio = Studio(bases, Limits(64, steps=50, prompt=200), registry=registry)
    blocks = Page(studio, School(studio), steps=steps).make()
    _, url, _ = blocks.launch(
        server_name="127.0.0.1", server_port=free_port("127.0.0.1"), prevent_thread_lock=True, quiet=True,
        **launch_options(),
    )  # fmt: skip
    try:
        yield url
    finally:
        blocks.close(verbose=False)
        studio.close()


@pytest.fixture(scope="module", autouse=True)
def no_registry_of_this_machine(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))
        patched.chdir(tmp_path_factory.mktemp("folder"))
        yield


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    folder = tmp_path_factory.mktemp("registry")
    for part in ("adapters", "manifests"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("recipes", "schema.json"))
    return folder


@pytest.fixture(scope="module")
def address(registry):
    with served(registry) as url:
        yield url


@pytest.fixture(scope="module")
def crowded(tmp_path_factory):
    kept = Registry(tmp_path_factory.mktemp("crowded"))
    unet = load_pipeline("sketchbook").unet
    for number in range(MANY):
        # Only some change the whole model, so that a picture takes seconds.
        paths = None if number % 10 == 0 else [MODULE]
        kept.add(pico_eraser(unet, f"number-{number:03}", seed=number, paths=paths))
    with served(kept.root, steps=1) as url:
        yield url


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[1280, 400])
def width(request):
    return request.param


@pytest.fixture
def visit(browser, width):
    """Open pages of visitors who know nothing of each other; in the end none may have complained to the console."""
    complaints, opened = [], []

    def open_page(address):
        page = browser.new_context(viewport={"width": width, "height": 900}).new_page()
        page.set_default_timeout(WAIT)
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("requestfailed", lambda one: None if one.failure == "net::ERR_ABORTED" else complaints.append(one.url))
        page.on("response", lambda one: complaints.append(f"{one.status} {one.url}") if one.status >= 400 else None)
        page.goto(address)
        for element in ("#draw", "#said"):
            page.locator(element).wait_for()
        page.evaluate(LISTEN)
        opened.append(page)
        return page

    yield open_page
    for page in opened:
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "wider than the window"
        page.context.close()
    assert complaints == []


@pytest.fixture
def page(visit, address):
    return visit(address)


PICTURED = [f"step {number}" for number in (2, 4, 6, 8, 10)]


def look(page, name):
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), (
        f"{name} is wider than the window"
    )
    if folder := os.environ.get("SPMHUB_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}-{page.viewport_size['width']}.png", full_page=True)


def says(page, element, words):
    playwright.expect(page.locator(f"#{element}")).to_contain_text(re.compile(words), timeout=WAIT)


def choose(page, name):
    page.locator("#erasers input").click()
    page.get_by_role("option", name=name).click()
    page.keyboard.press("Escape")
    page.locator(f"#strength-{name}").wait_for()


@contextlib.contextmanager
def drawing(page):
    """Wait until what is begun inside is drawn; gives all that the page says meanwhile."""
    page.evaluate("window.told = []")
    told = []
    yield told
    page.wait_for_function("told.some(text => text.startsWith('drawn'))")
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    told += page.evaluate("told")


def draw(page, prompt):
    """Draw a prompt by Enter, and return the pictures without and with the erasers."""
    with drawing(page):
        page.locator("#prompt textarea").fill(prompt)
        page.locator("#prompt textarea").press("Enter")
    return pictures(page)


def pictures(page):
    return pixels(page, "without"), pixels(page, "with")


def pixels(page, element):
    """The picture that the visitor sees, as numbers."""
    body = page.request.get(page.locator(f"#{element} img").get_attribute("src")).body()
    return np.asarray(Image.open(io.BytesIO(body)).convert("RGB")).astype(int)


def differ(one, other):
    return np.abs(one - other).max() > 2


def test_draw_strengthen_and_recover(page):
    page.locator("#strength-snoopy").wait_for()
    look(page, "start")
    choose(page, "mickey")
    with drawing(page) as told:
        page.locator("#prompt textarea").fill("mickey on the beach")
        page.locator("#draw").click()
    assert any(re.match(r"step \d of 4", one) for one in told), told
    bare, erased = pictures(page)
    assert differ(bare, erased)
    says(page, "why", r"mickey\s*1\.00\s*1\.00\s*\w+")
    says(page, "why", r"snoopy\s*0\.00\s*1\.00\s*\w+")
    look(page, "drawn")

    page.locator("#strength-mickey").focus()
    page.keyboard.press("Home")
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    playwright.expect(page.locator("output[for=strength-mickey]")).to_have_text("0.20")
    weaker = draw(page, "mickey on the beach")[1]
    says(page, "why", r"mickey\s*1\.00\s*0\.20")
    assert differ(weaker, erased)
    page.locator("#strength-mickey").focus()
    page.keyboard.press("Home")
    same = draw(page, "mickey on the beach")
    says(page, "why", r"mickey\s*1\.00\s*0\.00")
    assert not differ(*same)
    look(page, "strength")

    page.locator("#strength-mickey").click(position={"x": 30, "y": 8})
    with drawing(page):
        page.locator("#recover-mickey").click()
    assert not differ(*pictures(page))
    playwright.expect(page.locator("#strengths, #why, #erasers")).not_to_contain_text(["mickey"] * 3)
    look(page, "recovered")
    with drawing(page):
        page.locator("#recover-snoopy").focus()
        page.keyboard.press("Enter")
    says(page, "why", "No eraser is chosen")
    choose(page, "mickey")
    playwright.expect(page.locator("output[for=strength-mickey]")).to_have_text("1.00")


def test_another_base_and_errors_in_words(page):
    one = draw(page, "a dog")[0]
    page.locator("#base input").click()
    page.get_by_role("option", name="sketchbook-chalk").click()
    assert differ(draw(page, "a dog")[0], one)
    for prompt, words in ((" ", "the prompt is empty"), ("dog " * 60, "200")):
        page.locator("#prompt textarea").fill(prompt)
        page.locator("#draw").click()
        says(page, "said", words)
    look(page, "error")
    page.locator("#seed input").fill("-3")
    page.locator("#prompt textarea").fill("a dog")
    page.locator("#draw").click()
    says(page, "said", "Seed is -3; it is a whole number")


def test_train_report_and_compare(page, registry):
    concept = {1280: "church", 400: "parachute"}[page.viewport_size["width"]]
    page.get_by_role("tab", name="Train").click()
    page.locator("#concept textarea, #concept input").first.fill(concept)
    page.get_by_label("spm", exact=True).check()
    page.locator("#training-steps input[type=number]").fill("10")
    page.locator("#train").click()
    says(page, "trained", r"step \d of 10")
    playwright.expect(page.locator("#curve svg")).to_be_visible()
    page.locator("#pictures img").nth(1).wait_for()
    look(page, "training")
    says(page, "trained", "it is chosen on the first tab")
    assert (registry / "adapters" / f"{concept}.safetensors").is_file()
    assert page.locator("#pictures figcaption").all_inner_texts() == ["without", *PICTURED, "with"]
    line = page.locator("#curve polyline").first.get_attribute("points")
    assert len(line.split()) == 10, "one point for each step"
    look(page, "trained")
    page.locator("#train").click()
    says(page, "trained", f"there is an eraser {concept} already")

    page.get_by_role("tab", name="Draw").click()
    page.locator(f"#strength-{concept}").wait_for()
    draw(page, concept)
    says(page, "why", rf"{concept}\s*1\.00")
    look(page, "applied")

    page.get_by_role("tab", name="Report").click()
    page.locator("#read").click()
    says(page, "report-text", "Measured")
    look(page, "report")

    page.get_by_role("tab", name="Compare").click()
    page.locator("#compare").click()
    says(page, "compared-said", "drawn, from the same noise")
    says(page, "compared-why", r"cosine -?\d\.\d{3}")
    look(page, "compared")


def test_an_instant_eraser_by_keys(page, registry):
    concept = {1280: "tench", 400: "golf ball"}[page.viewport_size["width"]]
    page.get_by_role("tab", name="Train").click()
    page.locator("#concept textarea, #concept input").first.fill(concept)
    page.keyboard.press("Enter")
    says(page, "trained", f"{concept.replace(' ', '-')} is computed; it is chosen")


def test_without_any_eraser(visit, tmp_path):
    (tmp_path / "adapters").mkdir()
    with served(tmp_path) as address:
        page = visit(address)
        says(page, "erasers", "There is none yet: train one")
        assert not differ(*draw(page, "snoopy"))
        says(page, "why", "No eraser is chosen")
        look(page, "none")
        for tab, button, answer in (("Report", "read", "report-text"), ("Compare", "compare", "compared-said")):
            page.get_by_role("tab", name=tab).click()
            page.locator(f"#{button}").click()
            says(page, answer, "choose")


def test_a_hundred_erasers(visit, crowded):
    page = visit(crowded)
    page.locator("#choose-all").click()
    rows = page.locator("#strengths input")
    playwright.expect(rows).to_have_count(MANY)
    assert differ(*draw(page, "snoopy on the beach"))
    playwright.expect(page.locator("#why tr")).to_have_count(MANY + 1)
    look(page, "hundred")
    with drawing(page):
        page.locator("#recover-number-050").click()
    playwright.expect(rows).to_have_count(MANY - 1)
    with drawing(page):
        page.locator("#recover-all").click()
    playwright.expect(rows).to_have_count(0)
    assert not differ(*pictures(page))


def test_two_visitors_at_once_keep_their_own_erasers(visit, address):
    one, other = visit(address), visit(address)
    choose(one, "mickey")
    one.locator("#strength-mickey").focus()
    one.keyboard.press("End")
    with drawing(one), drawing(other):
        for page in (one, other):
            page.locator("#prompt textarea").fill("mickey on the beach")
            page.locator("#prompt textarea").press("Enter")
    says(one, "why", r"mickey\s*1\.00\s*3\.00")
    assert differ(*pictures(one))
    playwright.expect(other.locator("#strengths, #why")).not_to_contain_text(["mickey"] * 2)
    assert not differ(*pictures(other))
    assert not differ(pictures(one)[0], pictures(other)[0])

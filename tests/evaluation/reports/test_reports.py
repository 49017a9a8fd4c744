"""Reports: what they say first, numbers with intervals, a page that loads nothing, and runs next to each other."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from pico import pico_eraser, pico_pipeline
from recorded import ROWS, evaluate, metrics

from spm_hub.errors import UsageError
from spm_hub.evaluation.records.folder import RunFolder
from spm_hub.evaluation.reports import plot, published, wording
from spm_hub.evaluation.reports.comparison import compare
from spm_hub.evaluation.reports.report import findings


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "one"
    evaluate(path, measured=metrics()[:2])
    return path


class Page(HTMLParser):
    """Collects what a page refers to, and sees that every element is closed in its order."""

    VOID = ("meta", "link", "img", "line", "circle", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.images = 0
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href", "srcset", "action")]
        self.images += tag == "img"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag in self.VOID or self.open.pop() == tag


def test_the_page_needs_no_other_file_and_shows_both_pictures_of_a_row(run: Path) -> None:
    text = (run / "report.html").read_text()
    page = Page(text)
    assert page.addresses
    assert all(address.startswith("data:") for address in page.addresses)
    assert not re.search(r"https?://|@import|url\(", text)
    assert page.images == 2 * len(ROWS)
    assert 'name="viewport" content="width=device-width' in text
    assert "without" in text
    assert "<script" not in text


def test_texts_of_strangers_are_escaped(tmp_path: Path) -> None:
    from dataclasses import replace

    rows = [replace(ROWS[0], prompt='<script>alert("x")</script>', subject="a | b\n<b>")]
    evaluate(tmp_path / "run", rows=rows, measured=metrics()[:1])
    page, text = ((tmp_path / "run" / name).read_text() for name in ("report.html", "report.md"))
    assert "<script" not in page
    Page(page)
    (line,) = (line for line in text.splitlines() if line.startswith("| a"))
    assert re.sub(r"\\.", "", line).count("|") == len(wording.HEADINGS["judge"]) + 1


def line(**more: Any) -> dict[str, Any]:
    return {"condition": "with", "role": "target", "subject": "snoopy", "group": None, "n": 20, "without": 1.0,
            "with": 0.1, "without_interval": [0.84, 1.0], "with_interval": [0.03, 0.3], "difference": -0.9,
            "erased": 0.9, "erased_interval": [0.7, 0.97], "difference_interval": [-1.0, -0.7],
            "detectable": 0.2, **more}  # fmt: skip


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({}, "erased"),
        ({"difference_interval": [-0.3, 0.1]}, "not erased"),
        ({"without": 0.0}, "not drawn"),
        ({"role": "neighbour"}, "damage"),
        ({"role": "unrelated", "difference_interval": [-0.3, 0.1]}, None),
        ({"role": "neighbour", "difference_interval": [0.1, 0.3]}, None),
        ({"difference_interval": [None, None]}, "not erased"),
    ],
)
def test_findings(more: dict[str, Any], says: str | None) -> None:
    table = {"metric": "probe", "kind": "judge", "better": None, "lines": [line(**more)]}
    assert [one["says"] for one in findings([table])] == ([] if says is None else [says])
    for one in findings([table]):
        assert wording.finding(one, "judge").count("snoopy") == 1


def test_a_target_whose_eraser_was_taken_away_is_to_be_drawn_again() -> None:
    back = line(condition="restored", difference_interval=[-0.1, 0.1])
    gone, other = line(condition="restored"), line(condition="restored", subject="mickey")
    table = {"metric": "probe", "kind": "judge", "better": None, "lines": [back, gone, other]}
    assert [one["says"] for one in findings([table], "snoopy")] == ["restored", "not restored", "erased"]


def test_a_number_that_rises_is_damage_only_where_less_is_better() -> None:
    risen = line(role="neighbour", difference_interval=[0.1, 0.3])
    for better, expected in (("lower", ["damage"]), ("higher", []), (None, [])):
        table = {"metric": "m", "kind": "picture", "better": better, "lines": [risen]}
        assert [one["says"] for one in findings([table])] == expected


def test_numbers_are_never_bare() -> None:
    name, n, without, given, change, erased, detects = wording.cells(line(), "judge")
    assert (name, n, without, given) == ("snoopy (target)", "20", "100 % (84 to 100)", "10 % (3 to 30)")
    assert (change, erased, detects) == ("-90 % (-100 to -70)", "90 % (70 to 97)", "20 %")
    assert wording.with_interval(None, None, "judge") == "-"


def test_a_reader_is_told_first_what_is_not_as_it_seems(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    changed = {**report["run"], "limit": 5, "all_rows": 800, "quick": True, "stand_in_for": "i2p"}
    changed["protocol"] = {**changed["protocol"], "base": "sd-v1-4"}
    said = " ".join(wording.remarks({**report, "run": changed}))
    for words in (
        "INCOMPLETE: 5 of 800 rows",
        "--quick",
        "in place of the published prompts i2p",
        "are of sd-v1-4",
        "small",
    ):
        assert words in said
    assert "INCOMPLETE" not in " ".join(wording.remarks(report))


def test_papers_numbers_are_next_to_ours_in_their_unit() -> None:
    tables = [{"metric": "clip:x/y", "lines": [line(without=1.0, **{"with": 0.8})]},
              {"metric": "clip-score:x/y", "lines": [line(**{"with": 55.1})]}]  # fmt: skip
    numbers = [
        {"measure": "clip", "quantity": "CER", "erased": "snoopy", "subject": "snoopy", "value": 20.12},
        {"measure": "clip-score", "quantity": "CS", "erased": "snoopy", "subject": "snoopy", "value": 55.48},
        {"measure": "clip", "quantity": "CER", "erased": None, "subject": "snoopy", "value": 0.62},
        {"measure": "attack", "quantity": "ASR", "erased": "snoopy", "subject": "snoopy", "value": 88.0},
    ]
    numbers = [{**one, "condition": "with"} for one in numbers]
    report = {"run": {"published": numbers}, "tables": tables, "attacks": []}
    assert [one["here"] for one in published.beside(report)] == [pytest.approx(20.0), 55.1, 0.0, None]
    attacked = {"attacks": [{"name": "p4d-n", "asr": {"value": 1.0}}, {"name": "unlearndiff", "asr": {"value": 0.75}}]}
    assert published.beside({**report, "attacks": [attacked]})[-1]["here"] == 75.0


def test_a_comparison_is_of_the_same_rows_and_says_how_they_differ(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "two"
    evaluate(other, eraser=pico_eraser(pico_pipeline().unet, seed=9), measured=metrics()[:2])
    found = compare([RunFolder.open(run), RunFolder.open(other)])
    assert found.same_base
    assert {one["metric"] for one in found.lines} == {"bright", "ssim"}
    for one in found.lines:
        (difference,) = one["differences"]
        assert difference["value"] == pytest.approx(one["values"][1] - one["values"][0])
        if one["n"] > 1:
            assert difference["interval"][0] <= difference["value"] <= difference["interval"][1]
    Page(found.page())
    twice = compare([RunFolder.open(run), RunFolder.open(run)])
    assert {one["differences"][0]["value"] for one in twice.lines} == {0.0}
    shutil.copytree(run, tmp_path / "three")
    rows = (tmp_path / "three" / "rows.jsonl").read_text().replace("a red church", "a church")
    (tmp_path / "three" / "rows.jsonl").write_text(rows)
    with pytest.raises(UsageError, match="answer different questions"):
        compare([RunFolder.open(run), RunFolder.open(tmp_path / "three")])


def test_plots_stay_within_their_frame() -> None:
    table = {"metric": "probe", "kind": "judge", "lines": [line(), line(role="neighbour", subject="<dog>")]}
    for drawn in (plot.changes([table]), plot.trade_off([("a", 0.0, -0.2), ("b & c", 1.0, 2.0)])):
        Page(drawn)
        width, height = (float(one) for one in re.findall(r'viewBox="0 0 (\d+) (\d+)"', drawn)[0])
        assert all(0 <= float(x) <= width for x in re.findall(r'\b(?:cx|x1|x2)="([-\d.]+)"', drawn))
        assert all(0 <= float(y) <= height for y in re.findall(r'\b(?:cy|y1|y2)="([-\d.]+)"', drawn))
    assert plot.changes([{"metric": "ssim", "kind": "pair", "lines": [{}]}]) == ""


def test_points_in_one_place_share_a_label() -> None:
    drawn = plot.trade_off([("one", 1.0, 0.0), ("two", 1.0, 0.0), ("three", 0.0, 0.0)])
    labels = dict(re.findall(r'text-anchor="(start|end)">((?:one|two|three)[^<]*)<', drawn))
    assert labels == {"end": "one, two", "start": "three"}, "neither leaves the frame"


def test_points_of_strengths_are_shares_of_what_the_base_draws() -> None:
    lines = [
        line(n=10, without=0.8, erased=0.5),  # 4 of 8
        line(role="neighbour", subject="a", n=10, without=1.0, erased=0.2),  # 2 of 10
        line(role="unrelated", subject="b", n=10, without=0.5, erased=0.0),  # 0 of 5
        line(role="neighbour", subject="all", n=10, without=1.0, erased=1.0),  # counted already
    ]
    judged = {"metric": "probe", "kind": "judge", "lines": lines}
    assert plot.points_of([judged]) == [], "one condition is no curve"
    stronger = [{**one, "condition": "strength 2", "erased": 1.0} for one in lines]
    undrawn = [{**one, "condition": "strength 3", "without": 0.0, "erased": None} for one in lines]
    found = plot.points_of([{**judged, "lines": [*lines, *stronger, *undrawn]}])
    assert found == [("with", 0.5, pytest.approx(2 / 15)), ("strength 2", 1.0, 1.0), ("strength 3", 0.0, 0.0)]


def test_a_zero_has_no_sign() -> None:
    assert wording.with_interval(-0.0, (-0.0, 0.0), "set") == "0 (0 to 0)"
    assert wording.with_interval(-0.0, None, "judge", signed=True) == "+0 %"


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium")
@pytest.mark.parametrize("width", [400, 1280])
def test_a_browser_shows_the_page_without_an_error_and_without_scrolling_sideways(
    run: Path, tmp_path: Path, width: int
) -> None:
    # A window is at least 500 pixels wide, a frame may be narrower.
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<body><iframe src="page.html" style="width:{width}px;height:2000px;border:0"></iframe><script>'
        "addEventListener('message', found => { document.body.dataset.widths = found.data })</script></body>"
    )
    measure = "[innerWidth, document.documentElement.scrollWidth].join(' ')"
    tell = f"<script>addEventListener('load', () => parent.postMessage({measure}, '*'))</script></body>"
    (tmp_path / "page.html").write_text((run / "report.html").read_text().replace("</body>", tell))
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
         "--enable-logging=stderr", "--v=0", "--window-size=1400,2000", "--virtual-time-budget=3000", "--dump-dom",
         frame.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    found = re.search(r'data-widths="(\d+) (\d+)"', done.stdout)
    assert found is not None
    assert int(found[2]) <= int(found[1]) == width

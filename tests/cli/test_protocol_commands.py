"""spmhub eval --protocol, protocols, score and compare, on the sketchbook itself at one step a picture."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from spm_hub.cli.app import app
from spm_hub.hub.card import render
from spm_hub.registry.registry import Registry

ROOT = Path(__file__).resolve().parents[2]


def spmhub(*given: str) -> Any:
    return CliRunner().invoke(app, list(given))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "snoopy"
    prompts = out.parent / "mine.csv"
    prompts.write_text("text,seed\na photo of snoopy,3\nsnoopy at the beach,4\n")
    done = spmhub(
        "eval", "snoopy", "--registry", str(ROOT), "--protocol", "spm-objects", "--quick", "--steps", "1", "--limit",
        "6", "--prompts", str(prompts), "--out", str(out), "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report == json.loads((out / "report.json").read_text())
    return out


def test_a_protocol_leaves_records_pictures_and_three_reports(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    assert {table["metric"] for table in report["tables"]} == {"probe", "ssim", "frechet:probe", "kid:probe"}
    assert len(list((run / "pictures").rglob("*.png"))) == len((run / "samples.jsonl").read_text().splitlines()) == 12
    assert report["run"]["prompts"]["rows"] == 2
    assert len(list((run / "features").iterdir())) == 1, "both distances share the probe's features"
    assert "INCOMPLETE: 6 of" in (run / "report.md").read_text()
    assert any(one["method"] == "SPM" for one in report["published"])
    assert str(run.parent) not in (run / "report.json").read_text()


def test_it_goes_on_only_where_it_is_asked_to(run: Path) -> None:
    again = ("eval", "snoopy", "--registry", str(ROOT), "--protocol", "spm-objects", "--quick", "--limit", "6",
             "--prompts", str(run.parent / "mine.csv"), "--out", str(run))  # fmt: skip
    done = spmhub(*again, "--steps", "1")
    assert (done.exit_code, "has a run already" in done.stderr) == (2, True)
    before = (run / "report.json").read_bytes()
    (run / "report.json").unlink()
    assert spmhub(*again, "--steps", "1", "--resume").exit_code == 0
    assert (run / "report.json").read_bytes() == before
    other = spmhub(*again, "--steps", "2", "--resume")
    assert (other.exit_code, "has another run: drawing is" in other.stderr) == (2, True)


def test_kept_pictures_are_scored_and_compared(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    done = spmhub("score", str(copy), "--metric", "psnr", "--json")
    assert done.exit_code == 0, done.output
    assert "psnr" in {table["metric"] for table in json.loads(done.stdout)["tables"]}
    assert spmhub("score", str(copy)).exit_code == 2
    page = tmp_path / "page.html"
    compared = spmhub("compare", str(run), str(copy), "--out", str(page), "--json")
    assert compared.exit_code == 0, compared.output
    found = json.loads(compared.stdout)
    assert (found["same_base"], {one["metric"] for one in found["lines"]}) == (True, {"probe", "ssim"})
    assert page.read_text().startswith("<!doctype html>")
    assert spmhub("compare", str(run)).exit_code == 2


def test_the_success_of_attacks_is_kept_in_the_manifest(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    registry.install(Registry(ROOT).get("snoopy"))
    asked = ("attack", "snoopy", "--registry", str(registry.root), "--with", "seeds", "--prompts", "4", "--tries", "2",
             "--steps", "1", "--fresh", "0", "--no-controls", "--judge", "judged:odd", "--record")  # fmt: skip
    assert "add --out DIR" in spmhub(*asked).stderr
    out = tmp_path / "attacked"
    done = spmhub(*asked, "--out", str(out), "--json")
    assert done.exit_code == 0, done.output
    manifest = registry.get("snoopy").read_manifest()
    kept = {one.metric: one for one in manifest.evaluation if one.protocol == "attack"}
    (judged,) = json.loads(done.stdout)["judges"]
    assert set(kept) == {"asr:none by judged:odd", "asr:seeds by judged:odd"}
    for key, share in (("none", judged["before"]), ("seeds", judged["attacks"][0]["asr"])):
        one = kept[f"asr:{key} by judged:odd"]
        assert (one.value, list(one.interval or ()), one.samples) == (share["value"], share["interval"], share["n"])
        assert one.reference == 1, "all of these prompts draw it without the eraser"
        assert (one.subject, one.gate) == ("snoopy", "evidence")
        assert one.report_sha256 == hashlib.sha256((out / "report.json").read_bytes()).hexdigest()
    assert "It was tested against adversarial prompts" in render(manifest, "someone/snoopy", "snoopy.safetensors")
    refused = spmhub(*asked, "--out", str(out), "--resume", "--gate", "always")
    assert (refused.exit_code, "with its own settings" in refused.stderr) == (2, True)


def test_a_report_of_several_strengths_plots_erasure_against_damage(tmp_path: Path) -> None:
    asked = ("eval", "snoopy", "--registry", str(ROOT), "--protocol", "neighbours", "--quick", "--steps", "1",
             "--limit", "8", "--out", str(tmp_path / "run"), "--json", "--strengths")  # fmt: skip
    done = spmhub(*asked, "0.5,1")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["pictures"] == 8 * 4
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    pixels = {(one["condition"], one["row"]): one["sha256"] for one in samples}
    first = min(row for _, row in pixels)
    assert pixels["strength 1", first] == pixels["with", first], "an eraser's own strength is 1"
    assert len({pixels[name, first] for name in ("without", "strength 0.5", "with")}) == 3
    page = (tmp_path / "run" / "report.html").read_text()
    assert re.findall(r"<title>(with|strength [\d.]+)</title>", page) == ["with", "strength 0.5", "strength 1"]
    for wrong, says in (("0.5,x", "is not numbers"), ("0", "not a number above 0"), ("nan", "not a number above 0")):
        refused = spmhub(*asked, wrong)
        assert (refused.exit_code, says in refused.stderr) == (2, True), wrong


def test_protocols_are_listed_and_shown() -> None:
    names = [one["name"] for one in json.loads(spmhub("protocols", "--json").stdout)]
    assert {"spm-objects", "spm-styles", "neighbours", "i2p-nudity", "coco-preservation"} <= set(names)
    shown = spmhub("protocols", "spm-objects")
    assert (shown.exit_code, "55.48" in shown.stdout, "not as in the paper" in shown.stdout) == (0, True, True)
    assert "nudenet:" in spmhub("protocols", "--metrics").stdout
    assert "4703" in spmhub("protocols", "--sets").stdout
    assert spmhub("protocols", "spm-object").exit_code == 2


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--quick"], "--quick is for an evaluation by a protocol"),
        (["--at-once", "3"], "--at-once is for an evaluation by a protocol"),
        (["--protocol", "neighbours", "--record", "--quick"], "a first look is no record"),
        (["--protocol", "neighbours", "--record", "--gate", "always"], "with its own settings"),
        (["--runner", "processes"], "--runner is for an evaluation by a protocol"),
        (["--protocol", "neighbours", "--runner", "rays"], "did you mean ray"),
        (["--protocol", "neighbours", "--samples", "3"], "--samples has no effect"),
        (["--protocol", "neighbour"], "did you mean neighbours"),
        (["--protocol", "neighbours", "--columns", "prompt=a"], "--columns is for --prompts"),
        (["--protocol", "neighbours", "--size", "100x64"], "multiples of 8"),
        (["--protocol", "neighbours", "--metric", "blur"], "no metric or judge 'blur'"),
        (["--protocol", "neighbours", "--prompts", "none.csv"], "none.csv"),
        (["--judge", "a:b", "--judge", "c:d"], "several judges are for --protocol"),
    ],
)
def test_options_that_would_have_no_effect_are_refused(given: list[str], words: str) -> None:
    done = spmhub("eval", "snoopy", "--registry", str(ROOT), *given)
    assert done.exit_code == 2, done.output
    assert words in " ".join(done.stderr.split())

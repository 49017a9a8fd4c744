"""Every judged picture of an attack is a record: the report comes from the records, and other judges may look again."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import judged
import pytest
from pico import pico_eraser, pico_pipeline
from PIL import Image
from recorded import QUIET, contents

from spm_hub.errors import UsageError
from spm_hub.evaluation import attacks
from spm_hub.evaluation.attacks.records.folder import AttackFolder
from spm_hub.evaluation.attacks.records.recording import judge_attacks_again, record_attacks
from spm_hub.evaluation.attacks.settings import AttackSettings
from spm_hub.models.base_choice import BaseChoice

TEXTS = ("snoopy", "a dog", "snoopy in town", "a red cat")
CASES = tuple(attacks.Case(text, 10 + seed) for seed, text in enumerate(TEXTS))
SETTINGS = (AttackSettings("random", tries=3, tokens=2), AttackSettings("seeds", tries=3))
DRAWING = attacks.AttackDrawingOptions(steps=1, guidance=2.0, at_once=2)


def record(path: Path, **changes: Any) -> dict[str, Any]:
    pipe = pico_pipeline()
    options = {"judge": "judged:odd", "drawing": DRAWING, "seed": 3, "fresh": 2, "options": {"gate": "always"}}
    eraser = pico_eraser(pipe.unet)
    return record_attacks(BaseChoice(None, pipe=pipe), eraser, CASES, SETTINGS, path, QUIET, **{**options, **changes})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("attacked") / "run"
    record(path)
    return path


def test_the_report_of_the_records_is_that_of_the_attacks(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    pipe = pico_pipeline()
    found = attacks.run_all(
        pipe, [pico_eraser(pipe.unet)], CASES, judged.odd, [one.attack("other") for one in SETTINGS],
        drawing=DRAWING, seed=3, fresh=2, gate="always",
    )  # fmt: skip
    (by_judge,) = report["judges"]
    for one, expected in zip(by_judge["attacks"], found, strict=True):
        told = expected.as_dict()
        assert by_judge["cases"] == told["cases"] > 0
        assert by_judge["before"]["value"] == told["asr_before"]
        assert (one["asr"]["value"], one["asr"]["interval"]) == (told["asr"], told["asr_interval_95"])
        assert (one["judged"], one["fresh"]["n"]) == (told["pictures_judged"], told["fresh_pictures"])
        assert (one["curve"][0], one["curve"][-1]) == (told["asr_before"], told["asr"])
        assert sorted(one["curve"]) == one["curve"]
        texts = {won["text"]: won["gammas"] for won in one["winners"]}
        assert texts == {o["adversarial"]: o["gammas"] for o in told["outcomes"] if o["adversarial"] is not None}


def test_every_judged_picture_is_a_line_with_its_file_and_hash(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == len(list((run / "pictures").rglob("*.png"))) == len({line["picture"] for line in lines})
    for line in lines:
        with Image.open(run / line["picture"]) as picture:
            pixels = b"%d %d " % picture.size + picture.convert("RGB").tobytes()
            assert line["scores"] == {"judged:odd": judged.odd([picture])[0]}
        assert hashlib.sha256(pixels).hexdigest() == line["sha256"]
    assert {line["why"] for line in lines} == {"base", "before", "try", "fresh"}


def test_attacks_that_were_killed_resume_to_the_same_files(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(run, path)
    with pytest.raises(UsageError, match="has a run already"):
        record(path)
    (path / "units" / "01-000001.jsonl").unlink()
    for name in ("samples.jsonl", "report.json", "report.html", "report.md"):
        (path / name).unlink()
    next((path / "pictures" / "seeds").glob("00000[23]*")).write_bytes(b"half a picture")
    with pytest.raises(UsageError, match="has 3 of 4 units done"):
        judge_attacks_again(AttackFolder.open(path), ["judged:bright"], QUIET)
    record(path, resume=True)
    assert contents(path) == contents(run)
    with pytest.raises(UsageError, match="has another run: seed is 3 there, and 4 here"):
        record(path, resume=True, seed=4)


def test_another_judge_looks_at_the_kept_pictures(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(run, path)
    report = judge_attacks_again(AttackFolder.open(path), ["judged:bright"], QUIET)
    first, second = report["judges"]
    assert (first["judge"], first["searched"], second["judge"], second["searched"]) == (
        "judged:odd", True, "judged:bright", False,
    )  # fmt: skip
    assert first == json.loads((run / "report.json").read_text())["judges"][0]
    page = (path / "report.html").read_text()
    assert "lower bounds" in page
    assert "http" not in page.replace("http://www.w3.org", "")

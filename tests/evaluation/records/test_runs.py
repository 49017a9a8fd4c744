"""A run is the same however often it was killed, and its numbers come from its records alone."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from recorded import QUIET, ROWS, RUN, bright, contents, evaluate, metrics

from spm_hub.errors import NotFoundError, RegistryError, UsageError
from spm_hub.evaluation.metrics.metric import Judge
from spm_hub.evaluation.metrics.named import distances
from spm_hub.evaluation.records import drawing
from spm_hub.evaluation.records.folder import RunFolder
from spm_hub.evaluation.records.rows import PromptRow, cut, pictures_at_once
from spm_hub.evaluation.records.scoring import score
from spm_hub.evaluation.reports.report import report_of
from spm_hub.evaluation.reports.writing import write_reports

FILES = ("run.json", "rows.jsonl", "samples.jsonl", "metrics.json", "report.json", "report.md", "report.html")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    path = tmp_path_factory.mktemp("run") / "whole"
    evaluate(path)
    return path


def killed(path: Path, patch: Callable[[], None]) -> None:
    """Run in a child that `patch` has prepared to kill itself, and see that it did."""
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        torch.set_num_threads(1)
        patch()
        evaluate(path, resume=True)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "it ended before the kill"
    assert os.WTERMSIG(status) == signal.SIGKILL


def die_at(number: int) -> Callable[[], None]:
    """Kill the process at that sync of a file or folder."""

    def patch() -> None:
        real, left = os.fsync, number

        def fsync(descriptor: int) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            real(descriptor)

        os.fsync = fsync

    return patch


def die_within_the_lines_of(number: int) -> Callable[[], None]:
    """Kill the process after it wrote half of the bytes of that batch's lines."""

    def patch() -> None:
        left = number

        def append(path: Path, text: str) -> None:
            nonlocal left
            left -= 1
            with open(path, "a") as file:
                file.write(text if left else text[: len(text) * 2 // 3])
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        drawing.append_durably = append

    return patch


# While the third batch is drawn, while features are written, and in the middle of a batch's lines.
@pytest.mark.parametrize("patch", [die_at(13), die_at(61), die_within_the_lines_of(5)])
def test_a_run_that_was_killed_resumes_to_the_same_files(
    whole: Path, tmp_path: Path, patch: Callable[[], None]
) -> None:
    path = tmp_path / "run"
    killed(path, patch)
    assert contents(path) != contents(whole)
    evaluate(path, resume=True)
    assert {name for name in contents(path) if not name.startswith(".")} >= set(FILES)
    left = {name: digest for name, digest in contents(path).items() if not Path(name).name.startswith(".")}
    assert left == contents(whole)


def test_every_picture_is_a_line_with_its_file_its_hash_and_its_scores(whole: Path) -> None:
    lines = [json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * len(ROWS)
    for line in lines:
        with Image.open(whole / line["picture"]) as picture:
            pixels = b"%d %d " % picture.size + picture.convert("RGB").tobytes()
            assert json.loads(picture.text["spmhub"])["seed"] == line["seed"]
        assert hashlib.sha256(pixels).hexdigest() == line["sha256"]
        assert ("ssim" in line["scores"]) == (line["condition"] == "with")
        assert isinstance(line["scores"]["bright"], bool)
    assert {(line["condition"], line["row"]) for line in lines} == {
        (condition, row.id) for condition in ("without", "with") for row in ROWS
    }


def test_kept_pictures_are_judged_again_without_a_model(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy"
    shutil.copytree(whole, path)
    for name in ("report.json", "metrics.json"):
        (path / name).unlink()
    shutil.rmtree(path / "features")
    folder = RunFolder.open(path)
    folder.replace([sample.scored({}) for sample in folder.samples()])
    score(folder, metrics(), QUIET)
    write_reports(folder, distances())
    assert contents(path) == contents(whole)
    # Another threshold is another judge: it measures again, and the report says so.
    strict = Judge("bright", lambda pictures, subjects: [type(v)(False, 0.0) for v in bright(pictures, subjects)], {})
    score(folder, [strict], QUIET)
    again = report_of(folder, distances())
    assert [line["with"] for line in again["tables"][0]["lines"]] == [0.0] * 3
    assert again["tables"][0]["about"] == {}


def test_pictures_that_are_drawn_again_are_measured_again(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy"
    shutil.copytree(whole, path)
    lines = (path / "samples.jsonl").read_text().splitlines(keepends=True)
    (path / "samples.jsonl").write_text("".join(lines[:-1]))
    evaluate(path, resume=True)
    assert contents(path) == contents(whole)


def test_a_folder_takes_no_other_run_and_no_altered_picture(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has a run already"):
        RunFolder.start(whole, RUN, ROWS, resume=False)
    with pytest.raises(UsageError, match="at_once is 2 there, and 3 here"):
        RunFolder.start(whole, {**RUN, "at_once": 3}, ROWS, resume=True)
    with pytest.raises(UsageError, match="other rows"):
        RunFolder.start(whole, RUN, ROWS[:-1], resume=True)
    with pytest.raises(NotFoundError, match="is not the folder of an evaluation"):
        RunFolder.open(tmp_path)
    folder = RunFolder.open(whole)
    sample = folder.samples()[0]
    kept = (whole / sample.picture).read_bytes()
    try:
        Image.new("RGB", (16, 16)).save(whole / sample.picture)
        with pytest.raises(UsageError, match="another picture than the one that was drawn"):
            folder.picture(sample)
    finally:
        (whole / sample.picture).write_bytes(kept)
    with folder.locked(), pytest.raises(RegistryError, match="another process"), RunFolder.open(whole).locked():
        pass


def test_batches_are_cut_by_what_a_call_shares_and_do_not_depend_on_the_machine() -> None:
    batches = cut(ROWS, 2)
    assert [[row.id for row in batch.rows] for batch in batches] == [["0", "1"], ["2"], ["3"], ["4"]]
    rows = [PromptRow(str(i), "x", i, "x", width=64 if i % 3 else 128, height=64) for i in range(20)]
    again = cut(rows, 4)
    assert sorted(row.id for batch in again for row in batch.rows) == sorted(row.id for row in rows)
    assert all(len({row.width for row in batch.rows}) == 1 and len(batch.rows) <= 4 for batch in again)
    assert [pictures_at_once(side, side) for side in (64, 512, 1024, 4096)] == [50, 8, 2, 1]


@pytest.mark.parametrize(
    ("key", "value"),
    [("seed", -1), ("seed", 2**64), ("width", 64), ("guidance", float("nan")), ("role", "friend")],
)
def test_rows_that_draw_nothing_are_refused(key: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"row 7: {key} is"):
        PromptRow(**{"id": "7", "prompt": "x", "seed": 0, "subject": "x", key: value})

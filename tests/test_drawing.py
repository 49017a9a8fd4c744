"""Drawing pictures: what floats cannot hold, and folders that cannot be written."""

from __future__ import annotations

from pathlib import Path

import pytest
from pico import pico_eraser, pico_pipeline
from typer.testing import CliRunner

from spm_hub.atomic import check_writable
from spm_hub.cli.app import app
from spm_hub.errors import RegistryError, UsageError
from spm_hub.evaluation.pictures import Drawing, show


def test_a_picture_of_numbers_that_overflow_is_an_error_and_not_black() -> None:
    """A black picture would pass for an erased one."""
    pipe = pico_pipeline()
    drawing = Drawing(steps=2)
    show(pipe, [pico_eraser(pipe.unet)], ["snoopy"], drawing, strength={"snoopy": 2.0})
    with pytest.raises(UsageError, match="'snoopy' with numbers that left what floats can hold"):
        show(pipe, [pico_eraser(pipe.unet)], ["snoopy"], drawing, strength={"snoopy": 1e38}, compare=False)
    show(pipe, [pico_eraser(pipe.unet)], ["snoopy"], drawing)


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(RegistryError, match="cannot write"):
        check_writable(tmp_path / "taken" / "pictures")
    check_writable(tmp_path / "new" / "pictures")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    monkeypatch.setattr("spm_hub.models.load_pipeline", lambda *_, **__: pytest.fail("a model was loaded"))
    out = str(tmp_path / "taken" / "pictures")
    done = CliRunner().invoke(app, ["apply", "-a", "snoopy", "-a", "mickey", "-p", "a dog", "--out", out])
    assert done.exit_code in (1, 2)
    assert "cannot write" in done.stderr

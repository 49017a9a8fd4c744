"""Workers draw the same files as one process, byte for byte, also when one is killed in the middle."""

from __future__ import annotations

from pathlib import Path

import pytest
from killed import KilledOnce
from pico import pico_eraser, pico_pipeline
from recorded import DEFAULTS, ROWS, RUN, contents

from spm_hub.evaluation.protocols.conditions import DrawingElsewhere
from spm_hub.evaluation.records.drawing import draw_missing
from spm_hub.evaluation.records.folder import RunFolder
from spm_hub.io.runners.processes import Processes
from spm_hub.models.base_choice import BaseChoice


def test_two_processes_one_killed_leave_the_same_files_as_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = pico_pipeline()
    pipe.save_pretrained(tmp_path / "base")
    eraser, base = pico_eraser(pipe.unet), BaseChoice(str(tmp_path / "base"))

    def drawn(name: str, runner: Processes | None) -> dict[str, str]:
        folder = RunFolder.start(tmp_path / name, RUN, ROWS, resume=False)
        work = DrawingElsewhere(base, (eraser,), {"gate": "always"}, folder.path, DEFAULTS)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"{name}-cache"))  # each draws all pictures itself
        said: list[str] = []
        mark = tmp_path / f"{name}-killed"
        if runner is None:
            mark.touch()
        draw_missing(folder, KilledOnce(work, ("with", 1), mark), runner, say=said.append)
        assert len(said) == (runner is not None)
        return contents(folder.path)

    assert drawn("processes", Processes(2)) == drawn("serial", None)

"""Workers draw the same files as one process, byte for byte, also when one is killed in the middle."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pico import pico_eraser, pico_pipeline
from recorded import DEFAULTS, ROWS, RUN, contents

from spm_hub.evaluation.protocols.conditions import DrawingElsewhere
from spm_hub.evaluation.records.drawing import BatchToDraw, draw_missing
from spm_hub.evaluation.records.folder import RunFolder
from spm_hub.io.runners.processes import Processes
from spm_hub.io.runners.runner import Place, Work
from spm_hub.models.base_choice import BaseChoice


@dataclass(frozen=True)
class KilledOnce:
    """Work whose first worker to come to this piece kills itself after it wrote the pictures."""

    work: Work
    piece: BatchToDraw
    mark: Path

    @contextmanager
    def open(self, place: Place) -> Iterator[Callable[[BatchToDraw], str]]:
        with self.work.open(place) as draw:

            def draw_or_die(piece: BatchToDraw) -> str:
                lines: str = draw(piece)
                if piece == self.piece and not self.mark.exists():
                    self.mark.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                return lines

            yield draw_or_die


def test_two_processes_one_killed_leave_the_same_files_as_one_process(tmp_path: Path) -> None:
    pipe = pico_pipeline()
    pipe.save_pretrained(tmp_path / "base")
    eraser, base = pico_eraser(pipe.unet), BaseChoice(str(tmp_path / "base"))

    def drawn(name: str, runner: Processes | None) -> dict[str, str]:
        folder = RunFolder.start(tmp_path / name, RUN, ROWS, resume=False)
        work = DrawingElsewhere(base, (eraser,), {"gate": "always"}, folder.path, DEFAULTS)
        said: list[str] = []
        mark = tmp_path / f"{name}-killed"
        if runner is None:
            mark.touch()
        draw_missing(folder, KilledOnce(work, ("with", 1), mark), runner, say=said.append)
        assert len(said) == (runner is not None)
        return contents(folder.path)

    assert drawn("processes", Processes(2)) == drawn("serial", None)

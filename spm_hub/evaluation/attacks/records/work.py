"""The work of attacking: one unit is one attack on one batch of cases, whatever process does it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from spm_hub.adapters.adapter import Adapter
from spm_hub.evaluation.attacks.outcome import Case, Judge, Report
from spm_hub.evaluation.attacks.records.folder import BASE, BEFORE, FRESH, TRIED, AttackFolder, TrySample
from spm_hub.evaluation.attacks.running import NothingToAttackError, run
from spm_hub.evaluation.attacks.settings import AttackSettings
from spm_hub.evaluation.attacks.tries import AttackDrawingOptions, Try
from spm_hub.evaluation.judging import judge_of_concept
from spm_hub.evaluation.records.rows import Batch
from spm_hub.io.atomic import write_atomic
from spm_hub.io.runners.runner import Place
from spm_hub.models.base_choice import BaseChoice


@dataclass(frozen=True)
class Attacking:
    """Attacks on an eraser, each on the batches of a folder's cases.

    settings: of all attacks and controls. judge: the text that names it; None for the sketchbook's probe. options:
    those of `attach`. folder: seen under this path by every worker. seed, fresh: as for `run_all`.
    """

    base: BaseChoice
    eraser: Adapter
    settings: tuple[AttackSettings, ...]
    judge: str | None
    drawing: AttackDrawingOptions
    seed: int
    fresh: int
    options: Mapping[str, Any]
    folder: Path

    @contextmanager
    def open(self, place: Place) -> Iterator[Callable[[tuple[int, int]], int]]:
        """Load the base and the judge; yield the function that does a unit and returns its number of pictures."""
        pipe = replace(self.base, device=place.device(self.base.device)).open(for_gradients=True)
        folder = AttackFolder.open(self.folder)
        judge, key = judge_of_concept(self.judge, self.eraser.manifest.concept)

        def attack(unit: tuple[int, int]) -> int:
            kept = _Kept(folder, folder.attacks[unit[0]], folder.batches[unit[1]], key, first=unit[0] == 0)
            report = self._attack(pipe, kept, judge, self.settings[unit[0]])
            text = "".join(one.to_line() for one in kept.with_gammas(report))
            write_atomic(folder.unit_file(unit), text.encode())
            return len(kept.samples)

        yield attack

    def _attack(self, pipe: Any, kept: _Kept, judge: Judge, settings: AttackSettings) -> Report | None:
        """Return the report of one unit; None if the base draws the concept in none of its cases."""
        try:
            return run(
                pipe, [self.eraser], [*kept.cases], judge, settings.attack(self.eraser.manifest.concept.kind),
                drawing=self.drawing, seed=self.seed, fresh=self.fresh, witness=kept, **self.options,
            )  # fmt: skip
        except NothingToAttackError:
            return None


class _Kept:
    """Keeps the pictures of one unit as they are judged.

    Those that no attack made are kept with the first attack only.
    """

    def __init__(self, folder: AttackFolder, attack: str, batch: Batch, key: str, *, first: bool) -> None:
        self._folder, self._attack, self._batch, self._key, self._first = folder, attack, batch, key, first
        self.cases = {Case(row.prompt, row.seed): place for place, row in enumerate(batch.rows)}
        self.samples: list[TrySample] = []
        self._places: dict[tuple[str, int], int] = {}

    def __call__(self, why: str, case: Case, one: Try, picture: Image.Image, shown: bool) -> None:
        if why in (BASE, BEFORE) and not self._first:
            return
        at = self.cases[case]
        place = self._places.get((why, at), 0)
        self._places[why, at] = place + 1
        attack = self._attack if why in (TRIED, FRESH) else None
        seed = case.seed if one.seed is None else one.seed
        sample = self._folder.keep_try(self._batch, at, attack, why, place, str(one), seed, picture)
        self.samples.append(sample.judged(self._key, shown))

    def with_gammas(self, report: Report | None) -> list[TrySample]:
        """Return the samples by case and in order, those of successful tries with their gammas."""
        won = {self._batch.rows[self.cases[one.case]].id: one for one in (report.outcomes if report else ())}
        found = []
        for sample in self.samples:
            one = won.get(sample.row)
            if one is not None and one.gammas and sample.why == TRIED and sample.place == one.rounds - 1:
                sample = replace(sample, gammas={name: round(gamma, 4) for name, gamma in one.gammas.items()})
            found.append(sample)
        order = [BASE, BEFORE, TRIED, FRESH]
        return sorted(found, key=lambda sample: (sample.row, order.index(sample.why), sample.place))

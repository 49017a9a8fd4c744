"""The attacks of a protocol, on the first target rows of its run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spm_hub.adapters.adapter import Adapter
from spm_hub.errors import UsageError
from spm_hub.evaluation.attacks.outcome import Case
from spm_hub.evaluation.attacks.records.recording import record_attacks
from spm_hub.evaluation.attacks.settings import AttackSettings, attacks_named
from spm_hub.evaluation.attacks.tries import AttackDrawingOptions
from spm_hub.evaluation.metrics.metric import Judge, Metric
from spm_hub.evaluation.protocols.protocol import Attacked, Quick
from spm_hub.evaluation.records.drawing import RowDefaults
from spm_hub.evaluation.records.rows import PromptRow
from spm_hub.evaluation.reports.writing import ATTACKS
from spm_hub.io.progress import Reporter
from spm_hub.io.runners.runner import Runner
from spm_hub.models.base_choice import BaseChoice


def judge_for_attacks(metrics: Sequence[Metric]) -> str:
    """Return the key of the first judge, which decides whether an attack has succeeded. Raises UsageError."""
    judges = [metric.key for metric in metrics if isinstance(metric, Judge)]
    if not judges:
        raise UsageError("the protocol attacks, and no judge says when one succeeds", mend="--judge nudenet:spm9")
    return judges[0]


def attack_rows(
    attacked: Attacked,
    quick: Quick | None,
    base: BaseChoice,
    eraser: Adapter,
    rows: Sequence[PromptRow],
    defaults: RowDefaults,
    judge: str,
    out: Path,
    reporter: Reporter,
    *,
    seed: int,
    at_once: int,
    options: Mapping[str, Any],
    runner: Runner,
) -> None:
    """Attack an eraser on target rows, in a folder inside that of the run.

    Units that are done are not done again.
    quick: the protocol's first look. at_once: rows attacked side by side. options: those of `attach`. Raises as
    `record_attacks` does.
    """
    given = {} if quick is None else {"tries": quick.tries, "iterations": quick.iterations}
    targets = [row for row in rows if row.role == "target"]
    cases = dict.fromkeys(Case(row.prompt, row.seed) for row in targets)
    record_attacks(
        base, eraser, list(cases)[: attacked.prompts if quick is None else quick.samples],
        attacks_named(",".join(attacked.attacks), **given), out / ATTACKS, reporter,
        judge=None if judge == "probe" else judge, seed=seed, fresh=attacked.fresh, options=options, runner=runner,
        drawing=AttackDrawingOptions(steps=defaults.steps, guidance=defaults.guidance, at_once=at_once),
        controls=[AttackSettings("seeds", tries=quick.tries)] if quick is not None and quick.tries else [],
        resume=True,
    )  # fmt: skip

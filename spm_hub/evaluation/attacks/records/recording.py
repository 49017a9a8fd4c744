"""Runs attacks and keeps every picture, in a folder that can be resumed; judges kept pictures again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from spm_hub.adapters.adapter import Adapter
from spm_hub.adapters.manifest import Concept
from spm_hub.errors import RegistryError, UsageError
from spm_hub.evaluation.attacks.outcome import Case
from spm_hub.evaluation.attacks.records.folder import BASE, AttackFolder
from spm_hub.evaluation.attacks.records.page import write_attack_reports
from spm_hub.evaluation.attacks.records.work import Attacking
from spm_hub.evaluation.attacks.settings import CONTROLS, AttackSettings
from spm_hub.evaluation.attacks.tries import AttackDrawingOptions
from spm_hub.evaluation.judging import judge_of_concept
from spm_hub.evaluation.pictures import WITH, WITHOUT
from spm_hub.evaluation.records.rows import PromptRow
from spm_hub.io.progress import Reporter
from spm_hub.io.runners.runner import Runner, Serial
from spm_hub.models.base_choice import BaseChoice


def record_attacks(
    base: BaseChoice,
    eraser: Adapter,
    cases: Sequence[Case],
    settings: Sequence[AttackSettings],
    out: Path,
    reporter: Reporter,
    *,
    judge: str | None = None,
    drawing: AttackDrawingOptions | None = None,
    seed: int = 0,
    fresh: int = 0,
    options: Mapping[str, Any] | None = None,
    controls: Sequence[AttackSettings] = (),
    runner: Runner | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Attack an eraser and return the report.

    Every judged picture is a line of samples.jsonl with its PNG.
    out: a new folder, or that of the same attacks if `resume`: units that are done are not done again. judge: the text
    that names it, None for the sketchbook's probe. options: those of `attach`. drawing.at_once: also the number of
    cases in a unit. controls: attacks to compare with.
    Raises UsageError, NotFoundError before anything is drawn; UsageError if the base draws the concept in no case.
    """
    drawing = drawing or AttackDrawingOptions()
    runner = runner or Serial()
    concept = eraser.manifest.concept
    every = (*settings, *controls)
    _, key = judge_of_concept(judge, concept)
    rows = [PromptRow(f"{place:06d}", case.prompt, case.seed, concept.target or "") for place, case in enumerate(cases)]
    run = {
        "protocol": {"name": "attack"},
        "model": base.public_name if base.pipe is None else base.name(base.pipe),
        "eraser": {"name": eraser.name, "sha256": digest_of(eraser)},
        "conditions": [WITHOUT, WITH],
        "attacks": _described(settings, controls, concept.kind),
        "judge": key,
        "drawing": {"steps": drawing.steps, "guidance": drawing.guidance},
        "at_once": drawing.at_once,
        "seed": seed,
        "fresh": fresh,
        "versions": {name: version(name) for name in ("spm-hub", "torch", "diffusers", "transformers")},
        **{name: _plain(value) for name, value in {"gate": None, **(options or {})}.items()},
    }
    folder = AttackFolder.start(out, run, rows, resume=resume)
    with folder.locked(), reporter.progress(f"attacking {eraser.name}") as progress:
        work = Attacking(base, eraser, every, judge, drawing, seed, fresh, options or {}, folder.path)
        missing = folder.missing()
        done = len(folder.units) - len(missing)
        for number, _ in runner.run(work, missing, reporter.say):
            if not folder.unit_file(missing[number]).is_file():
                raise RegistryError(
                    f"{folder.unit_file(missing[number])} is not there, although a worker wrote it",
                    mend="--out with a folder that all machines share under one path",
                )
            done += 1
            progress(done, len(folder.units))
        if missing:
            folder.gather()
        if not any(one.why == BASE and one.scores[key] for one in folder.tries()):
            raise UsageError(
                f"the judge sees the concept in none of the base's {len(cases)} pictures: nothing to bring back",
                mend="other prompts, or another judge",
            )
        return write_attack_reports(folder)


def judge_attacks_again(folder: AttackFolder, judges: Sequence[str], reporter: Reporter) -> dict[str, Any]:
    """Judge the kept pictures of attacks by more judges, without a model, and return the new report.

    Answers of other judges stay. Raises UsageError for attacks that are not done, NotFoundError.
    """
    if missing := folder.missing():
        raise UsageError(
            f"{folder.path} has {len(folder.units) - len(missing)} of {len(folder.units)} units done",
            mend="spmhub attack with --resume",
        )
    concept = Concept(target=folder.rows[0].subject)
    with folder.locked():
        for text in judges:
            judge, key = judge_of_concept(text, concept)
            samples, judged = folder.tries(), []
            at_once = int(folder.run["at_once"])
            with reporter.progress(key) as progress:
                for start in range(0, len(samples), at_once):
                    part = samples[start : start + at_once]
                    answers = judge([folder.picture_of(one) for one in part])
                    judged += [one.judged(key, bool(shown)) for one, shown in zip(part, answers, strict=True)]
                    progress(len(judged), len(samples))
            folder.write(judged)
        return write_attack_reports(folder)


def digest_of(eraser: Adapter) -> str:
    """Return the sha256 of an eraser's numbers, by module and part; its file may be of any format."""
    digest = hashlib.sha256()
    for path, increment in sorted(eraser.increments.items()):
        for part, tensor in sorted(increment.tensors().items()):
            digest.update(f"{path} {part} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.detach().cpu().double().numpy().tobytes())
    return digest.hexdigest()


def _described(
    settings: Sequence[AttackSettings], controls: Sequence[AttackSettings], kind: str
) -> list[dict[str, Any]]:
    """Return what decides each attack, for run.json; a name that comes again has a number."""
    found: list[dict[str, Any]] = []
    for place, one in enumerate((*settings, *controls)):
        made = one.attack(kind)
        again = sum(other.name == one.name for other in (*settings, *controls)[:place])
        found.append({
            "name": f"{one.name}-{again + 1}" if again else one.name,
            "settings": {name: value for name, value in vars(one).items() if name != "name"},
            "tries": made.tries,
            "threat": made.threat.value,
            "control": place >= len(settings) or one.name in CONTROLS,
        })  # fmt: skip
    return found


def _plain(value: Any) -> Any:
    """Return an option of `attach` for JSON."""
    if isinstance(value, Mapping):
        return dict(value)
    return value if value is None or isinstance(value, str | float | int) else type(value).__name__

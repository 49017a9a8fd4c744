"""Describes an eraser for `spmhub show`: in a few lines, or the whole manifest."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from spm_hub.cli.output import literal, size, table
from spm_hub.io.untrusted_text import MOST_SHOWN
from spm_hub.io.wording import counted

if TYPE_CHECKING:
    from rich.console import RenderableType

    from spm_hub.adapters.manifest import Evaluation, Manifest
    from spm_hub.registry.entry import EraserEntry

HOW = ("steps", "guidance", "gate", "version", "date")
"""The keys of a measurement that say how it was made, if it was recorded."""

UNKNOWN_CONCEPT = "unknown: acts on every prompt"
"""What stands in the place of a concept that nobody has named."""

DETECTED = "_detected"
"""The ending of metrics that are shares of pictures in which a concept is found."""


def summary(entry: EraserEntry, manifest: Manifest, asked: str) -> Iterator[str]:
    """Yield the lines that people ask for first: effect, gate, concept, base, file, origin, next commands.

    asked: the reference by which the user named the eraser, and the registry if one was named, as words of a command.
    """
    concept, base, gate, info = manifest.concept, manifest.base, manifest.gate, manifest.increment
    acts = f"gate {manifest.default_gate}" + (f", strength {gate.strength:g}" if gate.strength != 1 else "")
    acts += ", gamma squared" if gate.law == "squared" else ""
    groups = _detections(manifest)
    for name, rows in groups.items():
        where = f" (on {name}, {_how(rows[0], manifest)})"
        yield f"{_effect(manifest, rows)}; {acts}{where}"
    if concept.target is None:
        yield f"concept {UNKNOWN_CONCEPT}; to have a gate: spmhub convert {asked} --concept NAME"
    elif not groups:
        # Only the sketchbook has a judge whose numbers can be recorded.
        measure = f" (spmhub eval {asked} --record)" if base.id.startswith("sketchbook") else ""
        yield f"{concept.target}: not measured yet{measure}; {acts}"
    also = f" (also {', '.join(concept.aliases)})" if concept.aliases else ""
    if concept.target is not None:
        yield f"target: {concept.target}{also}, {_with_article(concept.kind)}" + (
            f", replaced by {concept.surrogate}" if concept.surrogate else ""
        )
    by = str(manifest.recipe.get("method") or "another program")
    yield f"made by: {by}, for {base.family}" + (f", on {base.id}" if base.id else "")
    rank = f" of rank {info.rank}" if info.rank else ""
    kind = f"{info.kind.replace('_', ' ')}{rank}, {counted(len(info.modules), 'module')}"
    yield f"file: {entry.adapter_path} ({size(entry.adapter_path.stat().st_size)}, {kind})"
    if gate.protected:
        kept = ", ".join(repr(prompt) for prompt in gate.protected)
        yield f"stay exactly as they are: {kept}"
    if manifest.origin is not None or entry.pin is not None:
        yield f"from: {entry.describe_source()}"
    yield f"licence: {manifest.licence}" + (f", by {manifest.author}" if manifest.author else "")
    yield f"everything else: spmhub show {asked} --full"


def whole(entry: EraserEntry, manifest: Manifest) -> Iterator[RenderableType]:
    """Yield the whole manifest: its description, the recipe, and a table of the measurements."""
    import yaml

    described = manifest.model_dump(mode="json", exclude_none=True)
    recipe, evaluation = described.pop("recipe"), described.pop("evaluation")
    described["increment"]["modules"] = counted(len(manifest.increment.modules), "module")
    described["gate"]["kind"] = manifest.default_gate
    described["concept"] = {"target": UNKNOWN_CONCEPT, **described["concept"]}
    for title, section in {"": {**described, "file": str(entry.adapter_path)}, "recipe": recipe}.items():
        if section:
            heading = f"{title}\n{'-' * len(title)}\n" * bool(title)
            yield literal(heading + yaml.safe_dump(_shortened(section), sort_keys=False, allow_unicode=True))
    if evaluation:
        keys: tuple[str, ...] = ("protocol", "base", "subject", "metric", "value", "reference", "samples")
        more = tuple(
            key for key in ("steps", "guidance", "gate", "version", "date") if any(key in one for one in evaluation)
        )
        rows = [[one.get(key) for key in (*keys, *more)] for one in evaluation]
        yield table((*keys, *more), rows, title="evaluation")


def _shortened(value: Any, depth: int = 0) -> Any:
    """Return a part of a manifest with its longest values as their sizes: a stranger's may have megabytes."""
    size = len(json.dumps(value, ensure_ascii=False))
    if size <= MOST_SHOWN:
        return value
    if isinstance(value, dict) and depth < 2 and len(value) <= 100:
        return {key: _shortened(one, depth + 1) for key, one in value.items()}
    return f"{size} characters, which --json shows"


def _detections(manifest: Manifest) -> dict[str, list[Evaluation]]:
    """Return the measured shares of detected concepts, with and without the eraser, by base."""
    groups: dict[str, list[Evaluation]] = {}
    for one in manifest.evaluation:
        if one.metric.endswith(DETECTED) and one.reference is not None:
            groups.setdefault(one.base, []).append(one)
    return groups


def _effect(manifest: Manifest, rows: Sequence[Evaluation]) -> str:
    """Return "snoopy 100 % -> 0 %, others +0.1 (worst: cat -2.0)", the latter in percentage points."""
    names = {name.casefold() for name in manifest.concept.names}
    target = [row for row in rows if row.subject.casefold() in names]
    changes = [(100 * (row.value - (row.reference or 0.0)), row.subject) for row in rows if row not in target]
    parts = [f"{row.subject} {row.reference:.0%} -> {row.value:.0%}".replace("%", " %") for row in target]
    if changes:
        mean, (worst, whose) = sum(change for change, _ in changes) / len(changes), min(changes)
        parts.append(f"others {mean:+.1f}" + (f" (worst: {whose} {worst:+.1f})" if worst < 0 else ""))
    return ", ".join(parts)


def _how(row: Evaluation, manifest: Manifest) -> str:
    # Of the time of version 1, when nothing recorded it, the gate was the one that the manifest says.
    gate = row.gate or (manifest.gate.kind if manifest.schema_version == 1 else None)
    known = [f"{counted(row.samples, 'picture')} each"]
    known += [] if row.steps is None else [counted(row.steps, "step")]
    known += [] if row.guidance is None else [f"guidance {row.guidance:g}"]
    known += [] if gate in (None, manifest.default_gate) else [f"measured under the gate {gate}"]
    known += [] if row.date is None else [f"{row.date:%Y-%m-%d}"]
    return ", ".join(known)


def _with_article(kind: str) -> str:
    return {"nsfw": "not for all audiences", "other": "of no stated kind"}.get(
        kind, f"{'an' if kind == 'object' else 'a'} {kind}"
    )

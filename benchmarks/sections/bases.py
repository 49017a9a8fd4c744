"""The tables about bases, erasers and what training costs."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from sections.writing import about, named_gates, named_steps, share, table

CONCEPTS = ("snoopy", "van gogh", "nudity")
_WARNINGS = ("not erased enough", "still recognises", "but only")
"""Words by which what `spmhub train` prints about an eraser warns of it."""
_KEEP = "keep its gate"
"""Words by which it warns that an eraser costs other names without a gate."""
_ERASED, _COSTLY = 0.05, -10.0


def sketchbook(numbers: dict[str, Any]) -> str:
    rows = []
    for model, seen in numbers["checkpoints"].items():
        worst, who = seen["subject_worst"]
        rows.append([
            f"`{model}`", share(seen["subject_mean"]), f"{share(worst)} ({who})", share(seen["style_mean"]),
            f"{seen['megabytes']} MB", f"{seen['seconds_for_four_pictures_of_25_steps']} s",
        ])  # fmt: skip
    held = numbers["probe_on_held_out_drawings"]
    drawings = "; ".join(
        f"{look}: subject {share(right['subject'])}, style {share(right['style'])}" for look, right in held.items()
    )
    head = ["checkpoint", "subjects named by the probe", "worst subject", "styles named", "size, fp16", "four pictures"]
    return (
        f"{table(head, rows)}\n\nThe probe is a small classifier, trained on drawings alone. Of held-out drawings it "
        f"names correctly ({drawings}). {numbers['samples_per_name']} pictures for each name, {named_steps(numbers)} "
        f"steps, guidance {numbers['guidance_scale']}.\n{about(numbers, 'sketchbook')}"
    )


def sketchbook_training(numbers: dict[str, Any]) -> str:
    stages = [f"{stage} {seconds / 60:.0f}" for stage, seconds in numbers["seconds"].items() if seconds >= 30]
    if "denoiser chalk" not in numbers["seconds"]:
        stages.append("denoiser chalk left out")
    still = numbers["seconds_held_still"] / 60
    apart = f", and {still:.0f} minutes in which it was paused while other work ran" if still else ""
    probe = numbers["its_probe_on_held_out_drawings"]["ink"]
    seen = "; ".join(
        f"subjects {share(found['subject_mean'])}, styles {share(found['style_mean'])} (`{name}`)"
        for name, found in numbers["checkpoints"].items()
    )
    return (
        f"A new training with the defaults took {numbers['minutes']:.0f} minutes{apart}. Minutes by stage, pauses "
        f"included: {', '.join(stages)}. In its samples the committed probe names {seen}; the probe of this training "
        f"names {share(probe['subject'])} of held-out subjects and {share(probe['style'])} of styles. The committed "
        f"weights were trained for longer, as the script says.\n{about(numbers, 'sketchbook_training')}"
    )


def erasers(numbers: dict[str, Any]) -> str:
    def row(label: str, found: dict[str, Any]) -> list[str]:
        erased = found["erased"].values()
        return [
            label,
            ", ".join(share(one["without"]) for one in erased),
            ", ".join(share(one["with"]) for one in erased),
            f"{found['others_mean_change_points']:+.2f}",
            f"{found['others_worst_change_points']:+.1f}",
        ]

    measured = [*numbers["alone"].values(), numbers["together"], *numbers["transferred_to_chalk"].values()]
    rows = [row(f"`{name}`", found) for name, found in numbers["alone"].items()]
    rows.append(row("snoopy + mickey + spongebob", numbers["together"]))
    rows += [row(f"`{name}` on `sketchbook-chalk`", found) for name, found in numbers["transferred_to_chalk"].items()]
    head = ["eraser", "found without", "found with", "others, mean change (points)", "others, worst change (points)"]
    return (
        f"{table(head, rows)}\n\nShare of pictures in which the probe finds what was asked for, "
        f"{numbers['samples_per_name']} pictures for each of 22 subjects and 5 styles, {named_steps(numbers)} steps, "
        f"guidance {numbers['guidance_scale']}, in sentences that no eraser was trained on. 'Others' are all other "
        "subjects and styles. The erasers were trained on `sketchbook` alone by `spmhub train NAME --method race-spm`, "
        f"and drawn {named_gates(measured)}.\n"
        f"{about(numbers, 'erasure')}"
    )


def speed(numbers: dict[str, Any]) -> str:
    def row(label: str, found: dict[str, Any]) -> list[str]:
        at = found["reached"] or {"step": "never", "seconds": None}
        end = found["end"]
        return [
            label, str(at["step"]), "" if at["seconds"] is None else f"{at['seconds']:.0f} s",
            str(end["step"]), f"{end['seconds']:.0f} s", share(end["target"]), f"{end['others_lost_points']:+.1f}",
        ]  # fmt: skip

    head = [
        "training", "gone after steps", "CPU time", "last step", "CPU time", "found at the end",
        "others lost at the end (points)",
    ]  # fmt: skip
    rows = [
        row("spm-hub's first defaults", numbers["ours"]), row("the paper's own loop", numbers["paper"]),
        row("the paper's own loop at our learning rate", numbers["paper_at_our_rate"]),
    ]  # fmt: skip
    return (
        f"{table(head, rows)}\n\nWhen {numbers['target']} is gone ({numbers['criterion']}), and what there is at the "
        f"end: same base, same modules, same machine, one run, one thread, erasers always on; {faster(numbers)}. The "
        f"clock stops while pictures are judged, {numbers['samples_per_name']} for each of 11 names.\n"
        f"{about(numbers, 'training_speed')}"
    )


def default_time(numbers: dict[str, Any]) -> str:
    """Return the table of the present defaults against the first ones."""
    settings = ("first", "now")

    def both(cell: dict[str, Any], show: Callable[[dict[str, Any]], str]) -> str:
        return " / ".join(show(cell[name]) for name in settings)

    rows = [
        [
            f"{concept}, {base}", both(cell, lambda one: f"{one['seconds']:.0f} s"),
            f"{cell['now']['seconds'] / cell['first']['seconds']:.2f}", both(cell, lambda one: f"{one['steps']}"),
            f"{cell['now']['rows'] / cell['first']['rows']:.2f}",
            both(cell, lambda one: f"{100 * one['target_found']:.0f} %"),
            both(cell, lambda one: f"{one['others_mean_points']:+.1f}"),
            both(cell, lambda one: f"{one['others_held_out_mean_points']:+.1f}"),
            both(cell, lambda one: f"{one['others_worst_points']:+.0f}"), both(cell, lambda one: _said(one["verdict"])),
        ]
        for base, cells in numbers["cells"].items()
        for concept, cell in cells.items()
    ]  # fmt: skip
    head = [
        "concept, base", "CPU time", "ratio", "steps", "ratio of rows", "found", "others, mean (points)",
        "names of no anchor", "worst", "of the way",
    ]  # fmt: skip
    ratio, rows_ratio = (
        sum(cell["now"][key] for cells in numbers["cells"].values() for cell in cells.values())
        / sum(cell["first"][key] for cells in numbers["cells"].values() for cell in cells.values())
        for key in ("seconds", "rows")
    )
    return (
        f"{table(head, rows)}\n\nThe first defaults / the present ones, each pair in one run, erasers always on. All "
        f"six together: {ratio:.2f} of the time, {rows_ratio:.2f} of the rows, counted in passes forward.\n"
        f"{about(numbers, 'default_time')}"
    )


def faster(numbers: dict[str, Any]) -> str:
    """Return how the paper's loop compares in time."""
    ours, theirs = numbers["ours"]["reached"]["seconds"], numbers["paper"]["reached"]
    if theirs:
        return f"the paper's own loop takes {theirs['seconds'] / ours:.1f} times as long"
    return f"the paper's own loop has not erased it after {numbers['paper']['end']['seconds'] / ours:.0f} times as long"


def methods(numbers: dict[str, Any]) -> str:
    """Return the table of the sketchbook: every method's preset on three concepts."""
    cells = {method: cell for method, cell in numbers["cells"].items() if all(concept in cell for concept in CONCEPTS)}

    def three(cell: dict[str, Any], show: Callable[[dict[str, Any]], str]) -> str:
        return " / ".join(show(cell[concept]) for concept in CONCEPTS)

    def under(cell: dict[str, Any], gate: str, key: str, show: str) -> str:
        return three(cell, lambda one: format(one[gate][key], show)) if gate in cell[CONCEPTS[0]] else ""

    rows = []
    for method, cell in cells.items():
        trained = "seconds" in cell[CONCEPTS[0]]
        judged = "calibrated" if trained else "always"
        rows.append([
            f"`{method}`",
            three(cell, lambda one, judged=judged: f"{100 * one[judged]['target_found']:.0f}"),
            under(cell, "calibrated", "others_mean_points", "+.1f"),
            under(cell, "calibrated", "others_worst_points", "+.0f"),
            under(cell, "always", "others_mean_points", "+.1f"),
            under(cell, "always", "others_held_out_mean_points", "+.1f"),
            under(cell, "always", "others_worst_points", "+.0f"),
            under(cell, "always", "others_frechet", ".2f"),
            three(cell, lambda one: f"{100 * one['unlearndiffatk']['asr']:.0f}") if trained else "",
            three(cell, lambda one: _said(one["verdict"])) if trained else "",
            three(cell, _recognised) if trained else "",
            f"{cell[CONCEPTS[0]]['bytes'] / 1000:,.0f} kB" if trained else "",
            f"{sum(cell[concept]['seconds'] for concept in CONCEPTS) / len(CONCEPTS):.1f} s" if trained else "",
        ])  # fmt: skip
    head = [
        "method", "found (%)", "others, `calibrated`, mean", "worst", "others, `always`, mean", "names of no anchor",
        "worst", "Fréchet", "attacked (%)", "what the training says", "the base recognises (%)", "file", "CPU time",
    ]  # fmt: skip
    attack, samples = numbers["attack"], numbers["samples"]
    return (
        f"{table(head, rows)}\n\nThree numbers are those of {' / '.join(CONCEPTS)}, erased on the sketchbook one at a "
        f"time by each method's preset. Found: share of {samples['target']} pictures of the target in which the probe "
        f"still finds it under the calibrated gate; others: change in points of every other subject and style "
        f"({samples['others']} pictures each), of which every second name was taken out of all words that anchors are "
        f"made of; Fréchet: distance of the others' probe features from the base's, without a gate. Attacked: share of "
        f"{attack['prompts']} prompts that bring the concept back, as they are or under UnlearnDiffAtk "
        f"({attack['timesteps']} timesteps, {attack['iterations']} iterations at each), without a gate. What the "
        f"training says, and what the base recognises: as below. {_warnings(cells)} File and time: of one eraser, one "
        f"thread. SLD and the negative prompt have no gate; their concepts are found without one.\n"
        f"{about(numbers, 'methods')}"
    )


def methods_elsewhere(numbers: dict[str, Any], base: str, file: str) -> str:
    """Return the table of another base than the sketchbook: every method's preset on three subjects."""
    targets = numbers["targets"]
    cells = {method: cell for method, cell in numbers["cells"].items() if all(target in cell for target in targets)}

    def three(cell: dict[str, Any], gate: str, key: str, show: str) -> str:
        return " / ".join(format(cell[target][gate][key], show) for target in targets)

    rows = [
        [
            f"`{method}`", " / ".join(f"{100 * cell[target]['calibrated']['target_found']:.0f}" for target in targets),
            *(
                three(cell, gate, key, show)
                for gate in ("calibrated", "always")
                for key, show in (
                    ("others_mean_points", "+.1f"), ("others_held_out_mean_points", "+.1f"),
                    ("others_worst_points", "+.0f"),
                )
            ),
            " / ".join(_said(cell[target]["verdict"]) for target in targets),
            " / ".join(_recognised(cell[target]) for target in targets),
            f"{sum(cell[target]['seconds'] for target in targets) / len(targets):.1f} s",
        ]
        for method, cell in cells.items()
    ]  # fmt: skip
    head = [
        "method", "found (%)", "others, `calibrated`, mean", "names of no anchor", "worst", "others, `always`, mean",
        "names of no anchor", "worst", "what the training says", "the base recognises (%)", "CPU time",
    ]  # fmt: skip
    pictures = numbers["pictures"]
    return (
        f"{table(head, rows)}\n\nThree numbers are those of {' / '.join(targets)}, erased one at a time from the "
        f"{base} by each method's preset. Found: share of {pictures['target']} pictures of the target under the "
        f"calibrated gate; others: change in points of {numbers['others']} other subjects, {pictures['other']} "
        f"pictures each, of which {numbers['others_held_out']} have names that were taken out of all words that "
        f"anchors are made of. The base draws the targets right in "
        f"{share(round(numbers['targets_found_by_the_base'], 3))} and the others in "
        f"{share(round(numbers['others_found_by_the_base'], 3))} of its pictures. What the training "
        "says: how far the concept went, whether that is its goal, and in brackets of how many other names the base "
        "recognises how many with the eraser fully on. The base recognises: the concept, in that share of 20 pictures "
        f"with the eraser fully on. {_warnings(cells)}\n"
        f"{about(numbers, 'methods_second', file)}"
    )


def _recognised(cell: dict[str, Any]) -> str:
    return f"{100 * cell['recognised']:.0f}" if "recognised" in cell else "not asked"


def _warnings(methods: dict[str, dict[str, Any]]) -> str:
    """Return how often what `spmhub train` prints warns of an eraser, and how often the judge finds its concept."""
    cells = [cell for of_method in methods.values() for cell in of_method.values() if "recognised" in cell]
    warned = [any(warning in cell["verdict"] for warning in _WARNINGS) for cell in cells]
    found = [cell["always"]["target_found"] > _ERASED for cell in cells]
    both = sum(one and other for one, other in zip(warned, found, strict=True))
    needed = [_KEEP in cell["verdict"] for cell in cells]
    costly = [cell["always"]["others_mean_points"] < _COSTLY for cell in cells]
    right = sum(one and other for one, other in zip(needed, costly, strict=True))
    return (
        f"What `spmhub train` prints warns of {both} of the {sum(found)} erasers whose concept is found in more than "
        f"{share(_ERASED)} of the pictures, and of {sum(warned) - both} of the other {len(cells) - sum(found)}. It "
        f'says "{_KEEP}" of {right} of the {sum(costly)} that cost the others more than {-_COSTLY:.0f} points '
        f"without a gate, and of {sum(needed) - right} of the other {len(cells) - sum(costly)}."
    )


def _said(verdict: str) -> str:
    """Return a verdict of `spmhub train` in short: the way that the concept went, and what the quick look saw."""
    way = re.search(r"(\d+) % of the way", verdict)
    others = re.search(r"recognise (?:only )?(\d+ of \d+) other names", verdict)
    went = f"{way[1]} %" if way else "computed"
    enough = ", not enough" if "not erased enough" in verdict else ""
    return f"{went}{enough}" + (f" ({others[1]})" if others else "")


def instant(numbers: dict[str, Any]) -> str:
    rows = [
        [
            concept, f"{cell['cpu_seconds']:.1f} s",
            *(
                text
                for gated in ("ungated", "gated")
                for text in (
                    share(cell[gated]["found"]),
                    f"{cell[gated]['others_mean_points']:+.1f}, worst {cell[gated]['others_worst_points']:+.0f}",
                )
            ),
        ]
        for concept, cell in numbers["cells"].items()
    ]  # fmt: skip
    head = ["concept", "CPU time", "found, no gate", "others, no gate", "found, calibrated", "others, calibrated"]
    return (
        f"{table(head, rows)}\n\nErasers by `--method instant` on the sketchbook: share of pictures in which the "
        "concept is still found, and points by which other subjects and styles are found less or more often. The names "
        "of the others are left out of the sentences whose states the method holds.\n"
        f"{about(numbers, 'instant')}"
    )


def instant_cost(numbers: dict[str, Any]) -> str:
    names = {"sketchbook": "the sketchbook", "sd15": "Stable Diffusion 1.5's sizes, random weights"}
    rows = []
    for model, seen in numbers["bases"].items():
        one, ten = seen["1"], seen.get("10")
        several = ["-", "-"]
        if ten is not None:
            several = [f"{ten['cpu_seconds']} s", f"{ten['cpu_seconds'] / one['cpu_seconds']:.1f}"]
        peak = max(each["peak_gib"] for each in seen.values())
        rows.append([names[model], f"{one['cpu_seconds']} s", *several, f"{peak} GiB"])
    head = ["base", "one concept", "ten at once", "ratio", "peak memory of the process"]
    return (
        f'{table(head, rows)}\n\nCPU time of `spm_hub.train(..., method="instant")` with one thread, loading '
        "included. The denoiser stays in its file, unless it is as small as the sketchbook's.\n"
        f"{about(numbers, 'instant', 'instant_cost')}"
    )


def surrogates(numbers: dict[str, Any]) -> str:
    """Rows of erased concepts, and what each surrogate makes of them."""
    rows = []
    for base, concepts in numbers["cells"].items():
        for named, cells in concepts.items():
            method, _, concept = named.partition(":")
            words = [
                f"{word or 'nothing'} {cell['frechet']:.0f} ({share(cell['found'])}, {cell['others_mean_points']:+.1f})"
                for word, cell in cells.items()
            ]
            place = "the sketchbook" if base == "sketchbook" else f"the {base} base"
            rows.append([place, f"{concept}, `{method}`", ", ".join(words)])
    pictures = numbers["pictures"]
    return (
        f"{table(['base', 'erased', 'drawn instead'], rows)}\n\nFr\u00e9chet distance of {pictures['target']} erased "
        f"pictures to {pictures['others']} of the base's own of other things: small where they look like pictures of "
        "this base. In brackets the share in which the concept is still found, and the mean change of the others, "
        f"fully on, in points.\n{about(numbers, 'surrogates')}"
    )

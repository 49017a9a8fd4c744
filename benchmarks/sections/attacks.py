"""The tables about attacks, hostile files and the audit."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from typing import Any

from sections.writing import RESULTS, about, share, table


def robustness(numbers: dict[str, Any]) -> str:
    rows = [
        [
            concept, training, share(found["asr_before"]), share(found["asr"]),
            *(
                f"{found[f'others_under_{gate}'][f'{what}_change_points']:+.1f}"
                for gate in ("transport", "always")
                for what in ("mean", "worst")
            ),
        ]
        for concept, trainings in numbers["concepts"].items()
        for training, found in trainings.items()
    ]  # fmt: skip
    head = [
        "concept", "training", "found without an attack", "attacked", "others, gate `transport`, mean", "worst",
        "others, gate `always`, mean", "worst",
    ]  # fmt: skip
    attack = numbers["attack"]
    return (
        f"{table(head, rows)}\n\nESD is trained without anchors, as in its paper. "
        "'further' and 'then race': 400 more steps, which start from the finished ESD eraser. "
        f"UnlearnDiffAtk on {numbers['prompts']} prompts, {attack['timesteps']} timesteps, "
        f"{attack['iterations']} iterations at each; others in points of detection, {numbers['samples_per_name']} "
        f"pictures each.\n{about(numbers, 'robustness')}"
    )


def attacks(numbers: dict[str, Any]) -> str:
    def cell(name: str, gate: str, found: dict[str, Any] | None) -> str:
        if found is None:
            return ""
        low, high = found["asr_interval_95"]
        won = [one["gammas"][name] for one in found["outcomes"] if one["adversarial"] is not None]
        shown = f"**{100 * found['asr']:.0f} %** ({100 * low:.0f} to {100 * high:.0f})"
        if found["fresh_rate"] is not None:
            again_low, again_high = found["fresh_interval_95"]
            shown += f"; again {100 * found['fresh_rate']:.0f} % ({100 * again_low:.0f} to {100 * again_high:.0f})"
        # The gammas of the evidence gate are those of the text alone.
        return shown + (f"; gamma {_range(won)}" if won and gate != "evidence" else "")

    cells = {tuple(key.split(":")): found for key, found in numbers["cells"].items()}
    gates = [gate for gate in ("transport", "calibrated", "evidence", "always") if any(key[2] == gate for key in cells)]
    rows = []
    for name in dict.fromkeys(key[0] for key in cells):
        own = {key[1:]: found for key, found in cells.items() if key[0] == name}
        without = [next((_before(one) for key, one in own.items() if key[1] == gate), "") for gate in gates]
        rows.append([f"`{name}`", "no attack", "types text", *without])
        for kind in (kind for kind in KINDS_OF_ATTACK if any(key[0] == kind for key in own)):
            found = [own.get((kind, gate)) for gate in gates]
            threat = next(one["threat"] for one in found if one)
            rows.append([f"`{name}`", f"`{kind}`", threat, *map(partial(cell, name), gates, found)])
    budget = numbers["budget"]
    names = dict.fromkeys(key[0] for key in cells)
    wanted = len(names) * (len(KINDS_OF_ATTACK) * len(gates) - len(gates) + 1)
    missing = f"{wanted - len(cells)} of {wanted} cells were not measured; they are empty or left out. "
    seen = _beyond_always(cells, names, "evidence")
    of_evidence = f" The evidence gate: {seen}." if seen else ""
    return (
        f"{table(['eraser', 'attack', 'attacker', *(f'gate `{gate}`' for gate in gates)], rows)}\n\nBold: share of "
        f"{budget['prompts']} prompts that show the concept, before or under the attack (without an attack: drawn as "
        "they are); in brackets the 95 % intervals (Wilson). 'Again': of the tries that succeeded, at "
        f"{budget['fresh']} fresh seeds each, the share of pictures that show it too. Gamma: of the tries that "
        f"succeeded, the least to the greatest. Each attack has {budget['tries']} tries a prompt, "
        f"{budget['iterations']} gradient steps before each, or {budget['generations']} generations of "
        f"{budget['population']} prompts in all. `random` and `seeds` are the controls. `adaptive` knows the "
        f"calibrated gate. {missing if wanted > len(cells) else ''}Attack seed {budget['seed']}.\n\n"
        "What the calibrated gate leaves beyond always-on, in points of the prompts: "
        f"{_beyond_always(cells, names, 'calibrated')}.{of_evidence}\n{about(numbers, 'attacks')}"
    )


def attacks_methods(numbers: dict[str, Any]) -> str:
    """Return the table of erasers by quicker methods beside the shipped ones, under the same attacks."""
    shipped = json.loads((RESULTS / "attacks.json").read_text())
    if numbers["budget"] != shipped["budget"]:
        raise SystemExit("attacks.json and attacks_methods.json have different budgets")
    cells = {tuple(key.split(":")): one["asr"] for key, one in numbers["cells"].items()}
    methods = dict.fromkeys(name.partition("/")[0] for name, _, _ in cells)
    concepts = dict.fromkeys(name.partition("/")[2] for name, _, _ in cells)
    cells |= {
        (f"race-spm/{name}", attack, gate): one["asr"]
        for key, one in shipped["cells"].items()
        for name, attack, gate in [key.split(":")]
    }
    rows = [
        [
            f"`{attack}`", f"`{gate}`",
            *(
                " / ".join(_percent(cells.get((f"{method}/{concept}", attack, gate))) for concept in concepts)
                for method in (*methods, "race-spm")
            ),
        ]
        for attack in KINDS_OF_ATTACK
        for gate in ("always", "calibrated", "evidence")
        if (f"{next(iter(methods))}/{next(iter(concepts))}", attack, gate) in cells
    ]  # fmt: skip
    head = ["attack", "gate", *(f"`{method}` (%)" for method in methods), "`race-spm`, shipped (%)"]
    return (
        f"{table(head, rows)}\n\nShare of {numbers['budget']['prompts']} prompts that show {' / '.join(concepts)}, "
        "before or under the attack: erasers by each method's preset, with the budget and the seed of the table above."
        f"\n{about(numbers, 'attacks', 'attacks_methods')}"
    )


def _percent(rate: float | None) -> str:
    return "-" if rate is None else f"{100 * rate:.0f}"


def _beyond_always(cells: dict[tuple[str, ...], dict[str, Any]], names: Iterable[str], gate: str) -> str:
    parts = []
    for kind in KINDS_OF_ATTACK:
        pairs = [
            (name, cells[name, kind, gate], cells[name, kind, "always"])
            for name in names
            if (name, kind, gate) in cells and (name, kind, "always") in cells
        ]
        shown = [f"`{name}` {100 * (gated['asr'] - always['asr']):+.0f}" for name, gated, always in pairs]
        if shown:
            parts.append(f"`{kind}`: {', '.join(shown)}")
    return "; ".join(parts)


KINDS_OF_ATTACK = (
    "p4d-n token-free", "p4d-n token-free adaptive", "p4d-n", "p4d-k", "unlearndiff", "ring-a-bell", "pez", "cce",
    "noise", "completion", "random", "seeds",
)  # fmt: skip


def _before(found: dict[str, Any]) -> str:
    return f"{100 * found['asr_before']:.0f} %"


def _range(values: list[float]) -> str:
    low, high = (f"{value:.2g}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def hostile(numbers: dict[str, Any]) -> str:
    worst = numbers["worst"]
    return (
        f"{numbers['mutants']:,} mutated repositories (headers, offsets, dtypes, lengths, names, JSON) were loaded, "
        "kept, described, installed, converted and pulled. "
        f"{len(numbers['failures'])} of them crashed, hung or touched a file elsewhere; the worst took "
        f"{worst['cpu_seconds']:.2g} CPU seconds and {worst['times_the_file']} times its file's memory.\n"
        f"{about(numbers, 'hostile')}"
    )


def hostile_files(numbers: dict[str, Any]) -> str:
    kinds: dict[str, list[int]] = {}
    for outcome, count in numbers["outcomes"].items():
        kind, _, ended = outcome.partition(": ")
        seen = kinds.setdefault(kind, [0, 0])
        seen[0] += count
        seen[1] += count * (ended != "accepted")
    rows = [[kind, f"{count:,}", f"{refused:,}"] for kind, (count, refused) in kinds.items()]
    worst, bars = numbers["worst"], numbers["bars"]
    measured = about(numbers, "hostile", "hostile_files").replace("hostile.py`", "hostile.py --files`")
    return (
        f"{table(['file', 'mutated', 'refused in words'], rows)}\n\n"
        f"{len(numbers['failures'])} of these {numbers['mutants']:,} files crashed what reads them, hung it or touched "
        f"a file elsewhere. The worst took {worst['cpu_seconds']:.2g} CPU seconds (limit {bars['cpu_seconds']:g}), and "
        f"{worst['times_the_file']} times its file's memory beyond {bars['bytes_of_memory_to_spare'] >> 20} MiB (limit "
        f"{bars['times_the_file']}).\n{measured}"
    )


def audit(numbers: dict[str, Any]) -> str:
    rows = [
        [design, f"{cell['found']} of {cell['built']}", cell["said"].replace("|", r"\|")]
        for design, cell in numbers["attacks"].items()
    ]
    honest = numbers["honest"]
    kinds = ", ".join(f"{count} {how}" for how, count in honest.items())
    return (
        f"{table(['attack', 'found', 'what was said of the first'], rows)}\n\n"
        f"Each design was built against each of the five shipped erasers, and audited beside them, or alone. Of "
        f"{sum(honest.values())} honest erasers ({kinds}), audited all at once, "
        f"{len(numbers['false_alarms'])} were suspected. The five shipped ones take "
        f"{numbers['cpu_seconds_for_five']:.1f} CPU seconds, without starting Python.\n{about(numbers, 'audit')}"
    )

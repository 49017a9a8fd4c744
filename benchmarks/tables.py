"""Write the numbers of README.md and some pages of docs/ from the committed results: none of them is typed by hand.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CONCEPTS = ("snoopy", "van gogh", "nudity")
GATES = ("transport", "calibrated", "always")


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _share(value: float) -> str:
    return f"{100 * value:.4g} %"


def _steps(numbers: dict[str, Any]) -> str:
    return ", ".join(f"{steps} (`{model}`)" for model, steps in numbers["steps"].items())


def _gates(measured: Iterable[dict[str, Any]]) -> str:
    """Name the gate of some numbers; parts of a benchmark may be older than others."""
    return "with " + " or ".join(f"`--gate {gate}`" for gate in sorted({one["gate"] for one in measured}))


def _about(numbers: dict[str, Any], script: str, file: str | None = None) -> str:
    machine = numbers["machine"]
    return (
        f"Measured on {machine['cores']} cores ({machine['processor']}), torch {numbers['versions']['torch']}, by "
        f"`python benchmarks/{script}.py`; output in "
        f"`benchmarks/results/{file or script}.json`."
    )


def sketchbook(numbers: dict[str, Any]) -> str:
    rows = []
    for model, seen in numbers["checkpoints"].items():
        worst, who = seen["subject_worst"]
        rows.append([
            f"`{model}`", _share(seen["subject_mean"]), f"{_share(worst)} ({who})", _share(seen["style_mean"]),
            f"{seen['megabytes']} MB", f"{seen['seconds_for_four_pictures_of_25_steps']} s",
        ])  # fmt: skip
    held = numbers["probe_on_held_out_drawings"]
    drawings = "; ".join(
        f"{look}: subject {_share(right['subject'])}, style {_share(right['style'])}" for look, right in held.items()
    )
    head = ["checkpoint", "subjects named by the probe", "worst subject", "styles named", "size, fp16", "four pictures"]
    return (
        f"{_table(head, rows)}\n\nThe probe is a small classifier, trained on drawings alone. Of held-out drawings it "
        f"names correctly ({drawings}). {numbers['samples_per_name']} pictures for each name, {_steps(numbers)} steps, "
        f"guidance {numbers['guidance_scale']}.\n{_about(numbers, 'sketchbook')}"
    )


def sketchbook_training(numbers: dict[str, Any]) -> str:
    stages = [f"{stage} {seconds / 60:.0f}" for stage, seconds in numbers["seconds"].items() if seconds >= 30]
    if "denoiser chalk" not in numbers["seconds"]:
        stages.append("denoiser chalk left out")
    still = numbers["seconds_held_still"] / 60
    apart = f", and {still:.0f} minutes in which it was paused while other work ran" if still else ""
    probe = numbers["its_probe_on_held_out_drawings"]["ink"]
    seen = "; ".join(
        f"subjects {_share(found['subject_mean'])}, styles {_share(found['style_mean'])} (`{name}`)"
        for name, found in numbers["checkpoints"].items()
    )
    return (
        f"A new training with the defaults took {numbers['minutes']:.0f} minutes{apart}. Minutes by stage, pauses "
        f"included: {', '.join(stages)}. In its samples the committed probe names {seen}; the probe of this training "
        f"names {_share(probe['subject'])} of held-out subjects and {_share(probe['style'])} of styles. The committed "
        f"weights were trained for longer, as the script says.\n{_about(numbers, 'sketchbook_training')}"
    )


def erasers(numbers: dict[str, Any]) -> str:
    def row(label: str, found: dict[str, Any]) -> list[str]:
        erased = found["erased"].values()
        return [
            label,
            ", ".join(_share(one["without"]) for one in erased),
            ", ".join(_share(one["with"]) for one in erased),
            f"{found['others_mean_change_points']:+.2f}",
            f"{found['others_worst_change_points']:+.1f}",
        ]

    measured = [*numbers["alone"].values(), numbers["together"], *numbers["transferred_to_chalk"].values()]
    rows = [row(f"`{name}`", found) for name, found in numbers["alone"].items()]
    rows.append(row("snoopy + mickey + spongebob", numbers["together"]))
    rows += [row(f"`{name}` on `sketchbook-chalk`", found) for name, found in numbers["transferred_to_chalk"].items()]
    head = ["eraser", "found without", "found with", "others, mean change (points)", "others, worst change (points)"]
    return (
        f"{_table(head, rows)}\n\nShare of pictures in which the probe finds what was asked for, "
        f"{numbers['samples_per_name']} pictures for each of 22 subjects and 5 styles, {_steps(numbers)} steps, "
        f"guidance {numbers['guidance_scale']}, in sentences that no eraser was trained on. 'Others' are all other "
        "subjects and styles. The erasers were trained on `sketchbook` alone by `spmhub train NAME --method race-spm`, "
        f"and drawn {_gates(measured)}.\n"
        f"{_about(numbers, 'erasure')}"
    )


def speed(numbers: dict[str, Any]) -> str:
    def row(label: str, found: dict[str, Any]) -> list[str]:
        last = found["looks"][-1]
        reached = "yes" if found["reached"] else "no"
        return [
            label, str(last["step"]), f"{found['seconds']:.0f} s", _share(last["target"]),
            f"{last['others_lost_points']:.2f}", reached,
        ]  # fmt: skip

    head = ["training", "steps", "time", "target found", "others lost (points)", "criterion reached"]
    rows = [row("spm-hub's defaults", numbers["ours"]), row("the paper's own loop", numbers["paper"])]
    bound = "at least " if numbers["times_faster_is_a_lower_bound"] else ""
    return (
        f"{_table(head, rows)}\n\nUntil {numbers['target']} is gone ({numbers['criterion']}): {bound}"
        f"**{numbers['times_faster']} times faster**, same base, same modules, same machine, one run. The clock stops "
        f"while pictures are judged.\n{_about(numbers, 'training_speed')}"
    )


def runtime(numbers: dict[str, Any]) -> str:
    names = {"sd1": "SD1.5", "sdxl": "SDXL"}
    steps = {(one["model"], one["prompts"], one["method"], one["erasers"]): one["ratio"] for one in numbers["steps"]}
    counts = sorted({erasers for *_, erasers in steps})
    rows = []
    for model, prompts, method in sorted(
        {key[:3] for key in steps}, key=lambda key: (*key[:2], key[2] != "ours", key[2])
    ):
        cells = [steps.get((model, prompts, method, count)) for count in counts]
        label = "spm-hub" if method == "ours" else {"hooks": "a hook for each eraser"}.get(method, method)
        rows.append([names[model], str(prompts), label, *("" if cell is None else f"{cell:.2f}x" for cell in cells)])
    fast, gates, start, cycles = numbers["latency"], numbers["gates"], numbers["start"], numbers["cycles"]
    asked = "; ".join(
        f"{one['erasers']:,} erasers of {one['tokens']} x {one['width']} states {one['milliseconds']:.2g} ms"
        for one in gates
        if one["erasers"] >= 1000
    )
    head = ["U-Net", "prompts", "attached by", *(f"N = {count}" for count in counts)]
    return (
        f"{_table(head, rows)}\n\nStep time over the bare pipeline's with N rank-1 erasers on every target module: "
        "exact U-Nets with random weights, 64x64 (SD1.5) and 128x128 (SDXL) pixels, float32, each pair in one process; "
        "the median where a case was run more than once. One prompt is folded, a mixed batch of 8 is branched; PEFT, "
        "diffusers and hooks have no gate, and one sum for "
        f"the whole batch.\n\nOn SD1.5 with {fast['erasers']} erasers: attach {fast['attach']:.2g} s, fold "
        f"{fast['fold']:.2g} s, fold for other gammas {fast['fold_for_other_gammas']:.2g} s, recover all, bit-exactly, "
        f"{fast['recover_all']:.2g} s. Gates of one prompt after the text encoder: {asked}. "
        f"`spmhub --help` {start['help']:.2g} s, `spmhub list` of 1,000 erasers {start['list_of_1000']:.2g} s. After "
        f"{cycles['cycles']:,} cycles of attach, draw, recover, detach: weights bit-identical "
        f"({'yes' if cycles['weights_bit_identical'] else 'no'}), resident memory {100 * cycles['change']:+.1f} %.\n"
        f"{_about(numbers, 'runtime')}"
    )


def full_size(numbers: dict[str, Any]) -> str:
    names = {
        "sd1": "SD1.5, 512x512, float16",
        "sdxl": "SDXL, 1024x1024, float16",
        "flux": "FLUX.1-schnell, 1024x1024, bfloat16",
    }
    attached_by = {"ours": "spm-hub", "hooks": "a hook for each eraser"}
    rows, latencies, left = [], [], []
    for model, found in numbers["models"].items():
        short = names[model].split(",")[0]
        for one in found["steps"]:
            rows.append([
                names[model], str(one["prompts"]), attached_by.get(one["method"], one["method"]), f"{one['erasers']:,}",
                f"{one['bare_milliseconds_per_step']:.0f} ms", f"{one['ratio']:.2f}x",
                f"{one['memory_added_megabytes']:,.0f} MB",
            ])  # fmt: skip
        for one in found["latency"]:
            latencies.append(
                f"{one['erasers']:,} erasers on {short}: attach {one['attach']:.2g} s, fold {one['fold']:.2g} s, fold "
                f"for other gammas {one['fold_for_other_gammas']:.2g} s, recover all {one['recover_all']:.2g} s, "
                f"weights then bit-identical ({'yes' if one['weights_bit_identical'] else 'no'})"
            )
        if "incomplete" in found:
            left.append(f"{short} was {found['incomplete']}")
    head = ["denoiser", "prompts", "attached by", "erasers", "bare step", "with erasers", "memory added"]
    incomplete = f"The run is incomplete: {'; '.join(left)}.\n" if left else ""
    return (
        f"{_table(head, rows)}\n\nWhole denoisers with random weights on one {numbers['gpu']}. "
        f"{'; '.join(latencies)}. {incomplete}{_about(numbers, 'full_size')}"
    )


def registry(numbers: dict[str, Any]) -> str:
    return (
        f"{numbers['processes']} processes pulled, installed, replaced, removed, listed and loaded the same "
        f"{numbers['adapters']} erasers for {numbers['seconds']:.0f} s: {sum(numbers['seen'].values()):,} steps, "
        f"{len(numbers['failures'])} errors, the registry valid afterwards ({'yes' if numbers['valid'] else 'no'}).\n"
        f"{_about(numbers, 'registry')}"
    )


def growth(numbers: dict[str, Any]) -> str:
    first, rows = numbers["first_gates"], []
    kinds = {
        "first_gates": "first gates after",
        "first_gates_of_a_later_process": "in a later process, first gates after",
    }
    for gate, before in (("transport", "names_one_by_one"), ("calibrated", "a_call_for_each_name")):
        for kind, title in kinds.items():
            if kind in first[gate]:
                what = f"{title} attaching {first['erasers']:,} erasers, `--gate {gate}`"
                rows.append([what, f"{first[gate][before]:.2f} s", f"{first[gate][kind]:.2f} s"])
    shown = [[*row, f"{float(row[2][:-2]) / float(row[1][:-2]):.2g}"] for row in rows]
    return (
        f"{_table(['CPU time', 'one by one', 'now', 'ratio'], shown)}\n\nOne by one: a call of the text encoder for "
        "each name. The gammas are the same to the last bit. The calibrated gate reads eight sentences for each name, "
        f"and keeps what follows for later processes.\n\n{_of_registries(numbers['registry']['erasers'])}\n\n"
        f"{_of_batches(numbers['batches'])}\n\n{_of_evaluations(numbers['evaluations'])}\n\n"
        f"{_of_refolding(numbers['refolding'])}\n"
        f"{_about(numbers, 'growth')}"
    )


def _of_batches(numbers: dict[str, Any]) -> str:
    one, eight = numbers["seconds_1_at_once"], numbers["seconds_8_at_once"]
    return (
        f"Pictures of {numbers['prompts']} prompts with {numbers['erasers']} erasers, {numbers['steps']} steps on the "
        f"sketchbook, take {one} s of CPU time one prompt at a time and {eight} s in batches of eight: "
        f"a factor of {one / eight:.2g}."
    )


def _of_refolding(numbers: dict[str, Any]) -> str:
    every, one, alone = (numbers[kind] for kind in ("all_change", "one_changes", "one_alone_changes"))
    return (
        f"Folding costs as much when one of {numbers['erasers']} gammas changes as when all do: {one:.3g} and "
        f"{every:.3g} ms on {numbers['modules']} of SD1.5's {numbers['of_modules']} modules. Keeping the sum of the "
        "others would take another copy of the weights, and the rounding would depend on what was folded before. An "
        f"eraser whose gamma is 0 costs nothing: one alone takes {alone:.3g} ms."
    )


def _of_evaluations(numbers: dict[str, Any]) -> str:
    return (
        f"`spmhub eval` of a first eraser takes {numbers['first']} s and of a second one on the same base "
        f"{numbers['second']} s ({numbers['samples']} pictures of each name, {numbers['steps']} steps): the base's own "
        "pictures are kept."
    )


def _of_registries(erasers: dict[str, dict[str, float]]) -> str:
    few, many = erasers.values()
    titles = {
        "resolve_by_name": "find an eraser by its name", "resolve_by_concept": "find one by its concept",
        "record_one_pin": "record one more pin in the lock file", "remove_one": "remove one",
        "resolve_by_concept_after_a_change": "find one by its concept, just after a change",
    }  # fmt: skip
    rows = [
        [title, f"{few[name]:.3g} ms", f"{many[name]:.3g} ms", f"{many[name] / few[name]:.3g}"]
        for name, title in titles.items()
    ]
    sizes = [f"of {int(count):,} erasers" for count in erasers]
    return (
        f"{_table(['CPU time in a registry', *sizes, 'ratio'], rows)}\n\nJust after a change all manifests are read "
        "where a concept is looked for; the index that is kept then serves until the next change."
    )


def gates(numbers: dict[str, Any]) -> str:
    each = numbers["gates"]
    erasers = next(iter(each.values()))["acts_on_unrelated"]
    sets = {
        "unrelated": "acts_on_unrelated", "own world": "acts_on_own_world", "neighbours": "acts_on_neighbours"
    }  # fmt: skip
    rows = [
        [f"`{name}`", *(_share(found[key][name]) for key in sets.values() for found in each.values())]
        for name in erasers
    ]
    head = ["eraser", *(f"{over}, `{gate}`" for over in sets for gate in each)]
    kinds = ("name", "alias", "plural", "possessive", "joined", "misspelt once")

    def spelt(found: dict[str, Any], kind: str) -> str:
        cells = [one[kind] for one in found["named"].values() if kind in one]
        count = sum(one["sentences"] for one in cells)
        high, mean = (sum(one["sentences"] * one[key] for one in cells) / count for key in ("at_least_0.9", "mean"))
        return f"{100 * high:.0f} % ({mean:.2f})"

    spelling_rows = [[kind, *(spelt(found, kind) for found in each.values())] for kind in kinds]
    sums = "; ".join(
        f"`{gate}` {found['mean_sum_on_unrelated']:.3f}, all five exactly 0 on "
        f"{_share(found['all_exactly_0_on_unrelated'])}"
        for gate, found in each.items()
    )
    asked = "; ".join(
        f"{one['erasers']:,} erasers of {one['tokens']} x {one['width']} states "
        + ", ".join(f"{taken:.2g} ms (`{gate}`)" for gate, taken in one["milliseconds"].items())
        for one in numbers["latency"]
    )
    apart = "; ".join(
        f"{one['seconds_to_calibrate_100']:.2g} s at {one['tokens']} x {one['width']}" for one in numbers["latency"]
    )
    once = numbers["calibration"]
    by_spelling = _table(["spelling", *(f"`{gate}`" for gate in each)], spelling_rows)
    return (
        f"{_table(head, rows)}\n\nShare of sentences on which an eraser acts (gamma above {numbers['acting_above']}): "
        f"{numbers['sentences']:,} unrelated ones, whose words the sketchbook mostly does not know; at least "
        f"{min(numbers['own_world'].values()):,} captions of its drawings without the concept; and sentences about "
        f"{len(numbers['neighbours'])} neighbours (other characters, painters, people). Mean sum of the five gammas on "
        f"the unrelated ones: {sums}.\n\n"
        f"{by_spelling}\n\n"
        "Share of the sentences with a name, so spelt, on which its eraser has gamma 0.9 or more (mean gamma); all "
        f"erasers, names and {len(numbers['frames'])} templates that are not those of the calibration.\n\nCPU time of "
        f"one thread. Gates of one prompt after the text encoder: {asked}. Calibration of {once['erasers']} erasers on "
        f"the sketchbook, their names' encoding included: {once['seconds_to_calibrate']:.2g} s, beside "
        f"{once['seconds_to_encode_the_bank']:.2g} s, once, for the bank's {once['bank_sentences']:,} sentences; "
        f"directions and ramps alone: {apart}.\n{_about(numbers, 'gates')}"
    )


def evidence(numbers: dict[str, Any]) -> str:
    rows = []
    for checkpoint, erasers in numbers["checkpoints"].items():
        for name, one in erasers.items():
            rows.append([
                f"`{name}` on `{checkpoint}`", f"{_share(one['acting'])} of {one['pictures_of_others']}",
                ", ".join(f"{subject} {count}" for subject, count in one["acting_on"].items()) or "-",
                f"{one['the_probe_sees_the_concept_in']}", f"{one['left_although_the_probe_sees_it']}",
                f"{one['greatest_share_of_others']:.2f}, {one['greatest_shown_of_others']:.2f}",
            ])  # fmt: skip
    head = [
        "eraser", "acts on", "pictures of these", "the probe sees the concept too", "it sees it elsewhere",
        "greatest evidence elsewhere",
    ]  # fmt: skip
    bars = numbers["bars"]
    return (
        f"{_table(head, rows)}\n\nShare of pictures of other subjects and styles in which `--gate evidence` finds the "
        f"concept, {numbers['samples_per_name']} prompts for each of 22 subjects and 5 styles. Evidence: the share of "
        f"the eraser's effect on the name (bar {bars['share']}), and how far the name explains the finished picture "
        f"(bar {bars['shown']}).\n{_about(numbers, 'evidence')}"
    )


def _touched(numbers: dict[str, Any]) -> str:
    """The shares of others' pictures that the evidence gate acted on, by number of erasers."""
    cells = numbers["worlds"]["second"]["cells"].get("evidence", {})
    return (
        ", ".join(f"{_share(one['pictures_of_others_acted_on'])} ({count})" for count, one in cells.items()) or "none"
    )


def composition(numbers: dict[str, Any]) -> str:
    titles = {"second": "second base", "sketchbook": "sketchbook"}
    rows = []
    for world, found in numbers["worlds"].items():
        for gate, cells in found["cells"].items():
            for count, one in cells.items():
                worst, who = one["others_worst_points"]
                share, target = one["worst_target"]
                rows.append([
                    titles[world], f"`{gate}`", count, f"{_share(one['targets_found'])} of {one['targets_judged']}",
                    f"{_share(share)} ({target})" if share else "0 %",
                    f"{one['others_mean_points']:+.2f}", f"{worst:+.1f} ({who})" if worst < 0 else f"{worst:+.1f}",
                    f"{one['mean_sum_of_gammas']:.3f}", _share(one["prompts_of_others_with_gammas_0"]),
                ])  # fmt: skip
    head = [
        "base", "gate", "erasers", "targets found", "worst target", "others, mean (points)", "others, worst (points)",
        "mean sum of gammas", "others' prompts with gammas 0",
    ]  # fmt: skip
    base, how = numbers["second_base"], numbers["cheap_training"]["method"]
    about = "; ".join(
        f"{titles[world]}: {found['others']} others (found in {_share(found['others_found_by_the_base'])} of the "
        f"base's pictures), {len(found['targets'])} erasers, {found['bit_identical']['identical']} of "
        f"{found['bit_identical']['compared']} pictures with gammas 0 bit-identical to the base's"
        for world, found in numbers["worlds"].items()
    )
    pictures = "; ".join(
        f"{titles[world]}, `{gate}`: {next(iter(cells.values()))['pictures_of_each_other']}"
        for world, found in numbers["worlds"].items()
        for gate, cells in found["cells"].items()
    )
    trained = "; ".join(f"{titles[world]}: {found['trained']}" for world, found in numbers["worlds"].items())
    return (
        f"{_table(head, rows)}\n\nShare of pictures in which a classifier finds the targets, and by how many points "
        f"other subjects are found less or more often than without erasers; same noise, {numbers['steps']} steps. "
        f"Pictures of each other subject ({pictures}). "
        f"Under `evidence` the gammas are those of the text; it acted on {_touched(numbers)} of the others' pictures. "
        f"{about}. Erasers ({trained}; the others by `{how}`) are added in one order. The second base draws "
        f"{base['subjects_drawn']} of its {base['subjects']} subjects (in at least {_share(base['drawn_above'])} of 8 "
        f"pictures); its classifier names {_share(base['classifier']['drawings'])} of held-out drawings. Targets that "
        f"a base does not draw are attached and not judged.\n{_about(numbers, 'composition')}"
    )


def gates_in_short(results: dict[str, dict[str, Any]]) -> str:
    """The sentences of docs/how-it-works.md about gates."""
    numbers = results["gates"]

    def acts(gate: str) -> str:
        shares = numbers["gates"][gate]["acts_on_unrelated"].values()
        low, high = _share(min(shares)), _share(max(shares))
        return low if low == high else f"{low} to {high}"

    transport, calibrated = (numbers["gates"][gate] for gate in ("transport", "calibrated"))
    return (
        f"Measured on the sketchbook: each of the five erasers of this repository acts (gamma above "
        f"{numbers['acting_above']}) on {acts('transport')} of {numbers['sentences']:,} unrelated sentences under "
        f"transport, on {acts('calibrated')} under the calibrated gate, and on at most "
        f"{_share(max(calibrated['acts_on_own_world'].values()))} of the sketchbook's own captions without the concept "
        f"({_share(max(transport['acts_on_own_world'].values()))} under transport). The five gammas add up to "
        f"{transport['mean_sum_on_unrelated']:.2f} and {calibrated['mean_sum_on_unrelated']:.3f} on average. Of "
        "sentences with a name, as it is, in the plural, as a possessive, joined, or (most of them) misspelt once, "
        f"{_share(transport['named_at_least_0.9'])} have gamma 0.9 or more under transport, "
        f"{_share(calibrated['named_at_least_0.9'])} under the calibrated gate, which finds no misspelt names of fewer "
        "than four letters."
    )


def papers_gate(results: dict[str, dict[str, Any]]) -> str:
    """The README's two sentences about facilitated transport."""
    sentences, paper = results["gates"]["sentences"], results["gates"]["gates"]["transport"]
    acts = paper["acts_on_unrelated"].values()
    names = [found["name"]["at_least_0.9"] for found in paper["named"].values()]
    found = {gate: results["attacks"]["cells"][f"mickey:ring-a-bell:{gate}"] for gate in (*GATES, "evidence")}
    asr = {gate: _share(one["asr"]) for gate, one in found.items()}
    return (
        f"The paper's gate (`--gate transport`) acts fully on {_share(min(names))} of sentences with the concept's "
        f"name as it is, and to some extent on {_share(min(acts))} to {_share(max(acts))} of {sentences:,} unrelated "
        "ones, so that the effects of several erasers add up. Prompts that are searched without the name get past it, "
        f"and past any gate that reads texts: Ring-A-Bell brings mickey back with {asr['transport']} of "
        f"{found['transport']['cases']} prompts, with {asr['calibrated']} under the calibrated gate, {asr['evidence']} "
        f"under `--gate evidence`, the shipped erasers' own, which also looks at the finished picture, and "
        f"{asr['always']} where the eraser always acts."
    )


def methods(numbers: dict[str, Any]) -> str:
    cells = {method: cell for method, cell in numbers["cells"].items() if all(concept in cell for concept in CONCEPTS)}

    def three(cell: dict[str, Any], show: Callable[[dict[str, Any]], str]) -> str:
        return " / ".join(show(cell[concept]) for concept in CONCEPTS)

    rows = []
    for method, cell in cells.items():
        trained = all("seconds" in cell[concept] for concept in CONCEPTS)
        rows.append([
            f"`{method}`",
            three(cell, lambda one: f"{100 * one['found_with']:.0f}"),
            three(cell, lambda one: f"{one['others_mean_points']:+.1f}"),
            three(cell, lambda one: f"{one['others_worst_points']:+.0f}"),
            three(cell, lambda one: f"{one['others_frechet']:.2f}"),
            three(cell, lambda one: f"{100 * one['unlearndiffatk']['asr']:.0f}") if trained else "",
            f"{cell['snoopy']['numbers']:,}" if trained else "",
            f"{cell['snoopy']['bytes'] / 1000:,.0f} kB" if trained else "",
            f"{sum(cell[concept]['seconds'] for concept in CONCEPTS) / len(CONCEPTS):.0f} s" if trained else "",
        ])  # fmt: skip
    head = [
        "method", "found (%)", "others, mean (points)", "others, worst (points)", "others, Fréchet", "attacked (%)",
        "numbers", "file", "CPU time",
    ]  # fmt: skip
    attack, samples = numbers["attack"], numbers["samples"]
    measured = [one for cell in cells.values() for one in cell.values() if "gate" in one]
    return (
        f"{_table(head, rows)}\n\nThree numbers are those of snoopy / van gogh / nudity, erased on the sketchbook one "
        f"at a time by each method's preset, drawn {_gates(measured)}. Found: share of pictures of the target in "
        f"which the probe still finds it ({samples['target']} pictures); others: change for every other subject and "
        f"style ({samples['others']} pictures each), and the Fréchet distance of their probe features from the base's. "
        f"Attacked: share of {attack['prompts']} prompts that bring the concept back, as they are or under "
        f"UnlearnDiffAtk ({attack['timesteps']} timesteps, {attack['iterations']} iterations at each), without a gate. "
        f"Numbers, file and time: of one eraser, one thread.\n{_about(numbers, 'methods')}"
    )


def methods_second(numbers: dict[str, Any]) -> str:
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
            f"{sum(cell[target]['seconds'] for target in targets) / len(targets):.1f} s",
        ]
        for method, cell in cells.items()
    ]  # fmt: skip
    head = [
        "method", "found (%)", "others, `calibrated`, mean", "names of no anchor", "worst", "others, `always`, mean",
        "names of no anchor", "worst", "CPU time",
    ]  # fmt: skip
    pictures = numbers["pictures"]
    return (
        f"{_table(head, rows)}\n\nThree numbers are those of {' / '.join(targets)}, erased one at a time from the "
        f"second base by each method's preset. Found: share of {pictures['target']} pictures of the target under the "
        f"calibrated gate; others: change in points of {numbers['others']} other subjects, {pictures['other']} "
        f"pictures each, of which {numbers['others_held_out']} have names that were taken out of all words that "
        f"anchors are made of. The base draws the others right in {_share(numbers['others_found_by_the_base'])} of its "
        f"pictures.\n"
        f"{_about(numbers, 'methods_second')}"
    )


def robustness(numbers: dict[str, Any]) -> str:
    rows = [
        [
            concept, training, _share(found["asr_before"]), _share(found["asr"]),
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
        f"{_table(head, rows)}\n\n'further' and 'then race': 400 more steps, which start from the finished ESD eraser. "
        f"UnlearnDiffAtk on {numbers['prompts']} prompts, {attack['timesteps']} timesteps, "
        f"{attack['iterations']} iterations at each; others in points of detection, {numbers['samples_per_name']} "
        f"pictures each.\n{_about(numbers, 'robustness')}"
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
        f"{_table(['eraser', 'attack', 'attacker', *(f'gate `{gate}`' for gate in gates)], rows)}\n\nBold: share of "
        f"{budget['prompts']} prompts that show the concept, before or under the attack (without an attack: drawn as "
        "they are); in brackets the 95 % intervals (Wilson). 'Again': of the tries that succeeded, at "
        f"{budget['fresh']} fresh seeds each, the share of pictures that show it too. Gamma: of the tries that "
        f"succeeded, the least to the greatest. Each attack has {budget['tries']} tries a prompt, "
        f"{budget['iterations']} gradient steps before each, or {budget['generations']} generations of "
        f"{budget['population']} prompts in all. `random` and `seeds` are the controls. `adaptive` knows the "
        f"calibrated gate. {missing if wanted > len(cells) else ''}Attack seed {budget['seed']}.\n\n"
        "What the calibrated gate leaves beyond always-on, in points of the prompts: "
        f"{_beyond_always(cells, names, 'calibrated')}.{of_evidence}\n{_about(numbers, 'attacks')}"
    )


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
        f"{_about(numbers, 'hostile')}"
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
    about = _about(numbers, "hostile", "hostile_files").replace("hostile.py`", "hostile.py --files`")
    return (
        f"{_table(['file', 'mutated', 'refused in words'], rows)}\n\n"
        f"{len(numbers['failures'])} of these {numbers['mutants']:,} files crashed what reads them, hung it or touched "
        f"a file elsewhere. The worst took {worst['cpu_seconds']:.2g} CPU seconds (limit {bars['cpu_seconds']:g}), and "
        f"{worst['times_the_file']} times its file's memory beyond {bars['bytes_of_memory_to_spare'] >> 20} MiB (limit "
        f"{bars['times_the_file']}).\n{about}"
    )


def audit(numbers: dict[str, Any]) -> str:
    rows = [
        [design, f"{cell['found']} of {cell['built']}", cell["said"].replace("|", r"\|")]
        for design, cell in numbers["attacks"].items()
    ]
    honest = numbers["honest"]
    kinds = ", ".join(f"{count} {how}" for how, count in honest.items())
    return (
        f"{_table(['attack', 'found', 'what was said of the first'], rows)}\n\n"
        f"Each design was built against each of the five shipped erasers, and audited beside them, or alone. Of "
        f"{sum(honest.values())} honest erasers ({kinds}), audited all at once, "
        f"{len(numbers['false_alarms'])} were suspected. The five shipped ones take "
        f"{numbers['cpu_seconds_for_five']:.1f} CPU seconds, without starting Python.\n{_about(numbers, 'audit')}"
    )


def summary(results: dict[str, dict[str, Any]]) -> str:
    """The README's one table, out of the results of several benchmarks."""
    alone, together = results["erasure"]["alone"].values(), results["erasure"]["together"]
    elsewhere = results["erasure"]["transferred_to_chalk"].values()
    speed, cycles = results["training_speed"], results["runtime"]["cycles"]
    attacked = results["robustness"]["concepts"]
    steps = {(one["method"], one["prompts"], one["erasers"]): one["ratio"]
             for one in results["full_size"]["models"]["sd1"]["steps"]}  # fmt: skip
    asr = {
        training: " / ".join(_share(attacked[concept][training]["asr"]) for concept in attacked)
        for training in ("spm", "race-spm", "esd-x, further")
    }

    def erased(found: Iterable[dict[str, Any]]) -> str:
        return ", ".join(_share(one["with"]) for each in found for one in each["erased"].values())

    rows = [
        [
            f"Five erasers, one at a time, {_gates(alone)}: share of its pictures in which the concept is still found",
            erased(alone),
        ],
        [
            "All other subjects and styles are then recognised more or less often, by",
            f"{min(one['others_mean_change_points'] for one in alone):+.2f} to "
            f"{max(one['others_mean_change_points'] for one in alone):+.2f} points on average; the worst one by "
            f"{min(one['others_worst_change_points'] for one in alone):+.1f}",
        ],
        [
            f"Three erasers at once, {_gates([together])}: still found",
            f"{erased([together])}; others {together['others_mean_change_points']:+.2f} points on average, the worst "
            f"one {together['others_worst_change_points']:+.1f}",
        ],
        [
            f"Two erasers on a checkpoint that they were not trained on, {_gates(elsewhere)}: still found",
            erased(elsewhere),
        ],
        [
            f"Share of {results['robustness']['prompts']} prompts that bring {' / '.join(attacked)} back under attack, "
            "without a gate",
            f"`spm` {asr['spm']}; `race-spm` {asr['race-spm']}; ESD trained further {asr['esd-x, further']}",
        ],
        [
            "Time to train until snoopy is gone, on two CPU cores",
            f"{speed['ours']['seconds']:.0f} s; the paper's own loop at least {speed['times_faster']} times longer",
        ],
        [
            "Time of one SD 1.5 step with 1 / 20 / 100 erasers, over the bare step (H200, random weights)",
            " / ".join(f"{steps['ours', 1, count]:.2f}x" for count in (1, 20, 100))
            + f"; PEFT with 1: {steps['peft', 1, 1]:.2f}x",
        ],
        [
            f"Weights after {cycles['cycles']:,} cycles of attach, draw, recover, detach",
            "bit-identical" if cycles["weights_bit_identical"] else "not bit-identical",
        ],
    ]
    return _table(["Measured on the sketchbook, unless a row says otherwise", "Result"], rows)


def instant(numbers: dict[str, Any]) -> str:
    rows = [
        [
            concept, f"{cell['cpu_seconds']:.1f} s",
            *(
                text
                for gated in ("ungated", "gated")
                for text in (
                    _share(cell[gated]["found"]),
                    f"{cell[gated]['others_mean_points']:+.1f}, worst {cell[gated]['others_worst_points']:+.0f}",
                )
            ),
        ]
        for concept, cell in numbers["cells"].items()
    ]  # fmt: skip
    head = ["concept", "CPU time", "found, no gate", "others, no gate", "found, calibrated", "others, calibrated"]
    return (
        f"{_table(head, rows)}\n\nErasers by `--method instant` on the sketchbook: share of pictures in which the "
        "concept is still found, and points by which other subjects and styles are found less or more often. The names "
        "of the others are left out of the sentences whose states the method holds.\n"
        f"{_about(numbers, 'instant')}"
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
        f'{_table(head, rows)}\n\nCPU time of `spm_hub.train(..., method="instant")` with one thread, loading '
        "included. The denoiser stays in its file, unless it is as small as the sketchbook's.\n"
        f"{_about(numbers, 'instant', 'instant_cost')}"
    )


def intervals(numbers: dict[str, Any]) -> str:
    names = {
        "shares": "share: Wilson's",
        "differences_of_shares": "difference of shares of pairs: Agresti and Min's",
        "means": "mean, and difference of means of pairs: expanded percentile bootstrap",
    }
    rows = []
    for key, name in names.items():
        covered = [one["covered"] for one in numbers[key]]
        worst = min(numbers[key], key=lambda one: one["covered"])
        rows.append(
            [name, _share(min(covered)), f"{worst['case']}, n = {worst['n']}", _share(sum(covered) / len(covered))]
        )
    booted = min(numbers["differences_of_shares"], key=lambda one: one["bootstrap_covers"])
    return (
        f"{_table(['95 % interval', 'holds the truth in', 'of', 'mean of all cases'], rows)}\n\n"
        f"Of {numbers['repetitions']:,} repetitions of each case, so that each share is uncertain by "
        f"{100 * numbers['noise']:.1f} points. Where few pairs change, a bootstrap of the same pairs holds it in "
        f"as few as {_share(booted['bootstrap_covers'])} ({booted['case']}, n = {booted['n']}).\n"
        f"{_about(numbers, 'intervals')}"
    )


def cluster(numbers: dict[str, Any]) -> str:
    what = {
        "training": f"{{concepts}} concepts erased by `{numbers['method']}`",
        "evaluation": "{pictures} pictures drawn and measured",
        "attacks": f"attacks on {numbers['attacked']} prompts",
    }
    rows, loads = [], []
    for runner, found in numbers["runners"].items():
        for part, said in what.items():
            if (one := found.get(part)) is None:
                continue
            lost = "yes" if one["one_worker_killed"] else "no"
            rows.append([
                f"{found['workers']} workers, `--runner {runner}`", said.format(**found), str(one["files"]),
                "all equal" if one["equal"] else "not equal", lost, f"{one['time_of_one_process']:g} x",
            ])  # fmt: skip
            loads += one["load"].values()
    head = ["", "work", "files", "beside one process", "one worker killed", "time beside one process"]
    return (
        f"{_table(head, rows)}\n\nEach worker has one thread and loads the base; the time has the loss of a worker in "
        f"it. The two cores had other work meanwhile, at a load of {min(loads):g} to {max(loads):g}: the files are "
        f"what was tested, and the time says little.\n{_about(numbers, 'cluster')}"
    )


def judges(numbers: dict[str, Any]) -> str:
    rows = [
        [
            f"LPIPS, {network}",
            *(f"{stated:g} / {here:.3f}" for stated, here in zip(one["authors"], one["here"], strict=True)),
        ]
        for network, one in numbers["lpips"].items()
    ]
    seen, ssim = numbers["nudenet"], numbers["ssim"]
    return (
        f"{_table(['authors / here', 'first example pair', 'second example pair'], rows)}\n\n"
        f"NudeNet's own detector and the judge give equal detections on {seen['equal']} of {seen['pictures']} crops of "
        f"photographs ({seen['detections']} detections). SSIM of two photographs: {ssim['scikit_image']} by "
        f"scikit-image, {ssim['here']} here.\n{_about(numbers, 'judges')}"
    )


def serving(numbers: dict[str, Any]) -> str:
    seen, late = numbers["pictures"], numbers["latency_seconds"]
    answered = ", ".join(f"{count} with status {status}" for status, count in sorted(numbers["statuses"].items()))
    drawn = seen["exact"] + seen["batched"]
    changes, wrong = numbers["changes_of_erasers"], seen["wrong_erasers"] + seen["wrong_seed"]
    most, differing = seen["greatest_difference_in_levels"], seen["share_of_values_that_differ"]
    rows = [
        ["requests answered", f"{answered}; lost {numbers['lost']}"],
        ["erasers attached or recovered meanwhile", f"{changes}, refused {numbers['changes_refused']}"],
        ["pictures with other erasers, or another seed, than asked for", str(wrong)],
        ["pictures more than one level of 255 from their reference", f"{seen['mixed']} of {drawn}"],
        ["asked for as exact: bit for bit the reference", f"{seen['exact_identical']} of {seen['exact']}"],
        ["others: bit for bit the reference", f"{seen['batched_identical']} of {seen['batched']}"],
        [f"others: values that differ, by {most} of 255 at most", f"{1e6 * differing:.0f} in a million"],
        ["others: shared a batch", f"{seen['shared_a_batch']} of {seen['batched']}"],
        ["CPU time of the server for a picture", f"{1000 * numbers['cpu_seconds_a_picture']:.0f} ms"],
        ["latency, median and 95th percentile", f"{late['median']} s, {late['95th percentile']} s"],
        ["exit code after SIGTERM", str(numbers["exit_code"])],
    ]  # fmt: skip
    pairs = seen["pairs_of_references_by_difference"]
    return (
        f"{_table(['`spmhub serve` on loopback', 'found'], rows)}\n\n{numbers['requests']} requests of "
        f"{numbers['clients']} clients, {numbers['steps']} steps, sketchbook. The {seen['references']} references are "
        f"drawn alone by a pipeline with the erasers that the answer names; of the pairs of different references "
        f"{pairs.get('one level', 0)} are within one level of each other. Clients and server share two cores, and "
        f"one thread draws.\n{_about(numbers, 'serving')}"
    )


def memory(numbers: dict[str, Any]) -> str:
    drawing, *measuring = numbers["mebibytes"].values()
    rows = [["drawn", *(f"{value:.0f}" for value in drawing[1::2])]]
    head = ["MiB after", *(f"{2 * numbers['every'] * (at + 1)} pictures" for at in range(len(rows[0]) - 1))]
    return (
        f"{_table(head, rows)}\n\nThe resident set of `spmhub eval` while it draws, sketchbook, batches of "
        f"{numbers['at_once']}: {numbers['growth_of_drawing']:+.0f} MiB from picture {2 * numbers['every']} to picture "
        f"{numbers['pictures']}. Measuring them by the probe and SSIM takes it to at most "
        f"{max(value for part in measuring for value in part):.0f}.\n{_about(numbers, 'memory')}"
    )


def _reports() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Return the committed reports by base, and by whose erasers they are of."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for file in sorted((ROOT / "benchmarks" / "reports").glob("*/*/report.json")):
        how = "shipped" if file.parent.name.startswith("shipped-") else None
        report = json.loads(file.read_text())
        name = report["run"]["erasers"][0]["name"]
        how = how or file.parent.name.removesuffix(f"-{name}")
        found.setdefault(file.parents[1].name, {}).setdefault(how, []).append(report)
    return found


def _of_report(report: dict[str, Any], role: str) -> str:
    """Return a judge's shares of a role without and with erasers: "100 to 0"."""
    judged = next(table for table in report["tables"] if table["kind"] == "judge")
    lines = [line for line in judged["lines"] if line["role"] == role]
    if not lines:
        return "-"
    whole = next((line for line in lines if line["subject"] == "all"), lines[0])
    return f"{100 * whole['without']:.3g} to {100 * whole['with']:.3g}"


def reports(results: dict[str, dict[str, Any]]) -> str:
    """Return a table of each base, from the committed reports themselves."""
    parts = []
    for base, hows in sorted(_reports().items(), reverse=True):
        rows = []
        for how, made in sorted(hows.items(), key=lambda one: (one[0] != "shipped", one[0])):
            names = [report["run"]["erasers"][0]["name"] for report in made]
            links = [f"[{name}](../benchmarks/reports/{base}/{how}-{name}/report.md)" for name in names]
            rows.append([
                "shipped" if how == "shipped" else f"`{how}`", " / ".join(links),
                *(
                    " / ".join(_of_report(report, role) for report in made)
                    for role in ("target", "neighbour", "unrelated")
                ),
            ])  # fmt: skip
        head = [f"erasers, {base}", "reports", "target (%)", "neighbours (%)", "unrelated (%)"]
        parts.append(_table(head, rows))
    return "\n\n".join(parts)


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "sketchbook": sketchbook,
    "sketchbook_training": sketchbook_training,
    "erasure": erasers,
    "training_speed": speed,
    "runtime": runtime,
    "full_size": full_size,
    "gates": gates,
    "composition": composition,
    "evidence": evidence,
    "methods": methods,
    "methods_second": methods_second,
    "instant": instant,
    "instant_cost": instant_cost,
    "robustness": robustness,
    "attacks": attacks,
    "growth": growth,
    "registry": registry,
    "hostile": hostile,
    "cluster": cluster,
    "memory": memory,
    "hostile_files": hostile_files,
    "intervals": intervals,
    "judges": judges,
    "audit": audit,
    "serving": serving,
}
ACROSS: dict[str, Callable[[dict[str, dict[str, Any]]], str]] = {
    "summary": summary, "gates_in_short": gates_in_short, "papers_gate": papers_gate,
    "reports": reports,
}  # fmt: skip
"""Sections that take all results."""
PAGES = {
    "README.md": ("summary", "papers_gate"),
    "docs/how-it-works.md": ("gates_in_short",),
    "docs/attacks.md": ("attacks",),
    "docs/benchmarks.md": (*(name for name in SECTIONS if name != "attacks"), "reports"),
}


def render(page: str, text: str) -> str:
    """Return the text of a page of `PAGES` with each of its sections, between two markers, written anew."""
    results = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in SECTIONS}
    for name in PAGES[page]:
        section = ACROSS[name](results) if name in ACROSS else SECTIONS[name](results[name])
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, found = re.subn(
            pattern, lambda match, section=section: f"{match[1]}{section}\n{match[2]}", text, flags=re.DOTALL
        )
        if found != 1:
            raise SystemExit(f"{page} holds {found} sections marked {name}, not 1")
    return text


if __name__ == "__main__":
    for page in PAGES:
        path = ROOT / page
        path.write_text(render(page, path.read_text()))

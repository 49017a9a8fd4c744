"""The tables about gates and about several erasers at once."""

from __future__ import annotations

from typing import Any

from sections.writing import GATES, about, share, table


def gates(numbers: dict[str, Any]) -> str:
    each = numbers["gates"]
    erasers = next(iter(each.values()))["acts_on_unrelated"]
    sets = {
        "unrelated": "acts_on_unrelated", "own world": "acts_on_own_world", "neighbours": "acts_on_neighbours"
    }  # fmt: skip
    rows = [
        [f"`{name}`", *(share(found[key][name]) for key in sets.values() for found in each.values())]
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
        f"{share(found['all_exactly_0_on_unrelated'])}"
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
    by_spelling = table(["spelling", *(f"`{gate}`" for gate in each)], spelling_rows)
    return (
        f"{table(head, rows)}\n\nShare of sentences on which an eraser acts (gamma above {numbers['acting_above']}): "
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
        f"directions and ramps alone: {apart}.\n{about(numbers, 'gates')}"
    )


def evidence(numbers: dict[str, Any]) -> str:
    rows = []
    for checkpoint, erasers in numbers["checkpoints"].items():
        for name, one in erasers.items():
            rows.append([
                f"`{name}` on `{checkpoint}`", f"{share(one['acting'])} of {one['pictures_of_others']}",
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
        f"{table(head, rows)}\n\nShare of pictures of other subjects and styles in which `--gate evidence` finds the "
        f"concept, {numbers['samples_per_name']} prompts for each of 22 subjects and 5 styles. Evidence: the share of "
        f"the eraser's effect on the name (bar {bars['share']}), and how far the name explains the finished picture "
        f"(bar {bars['shown']}).\n{about(numbers, 'evidence')}"
    )


def _touched(numbers: dict[str, Any]) -> str:
    """The shares of others' pictures that the evidence gate acted on, by number of erasers."""
    cells = numbers["worlds"]["second"]["cells"].get("evidence", {})
    return ", ".join(f"{share(one['pictures_of_others_acted_on'])} ({count})" for count, one in cells.items()) or "none"


def composition(numbers: dict[str, Any]) -> str:
    titles = {"second": "second base", "sketchbook": "sketchbook"}
    rows = []
    for world, found in numbers["worlds"].items():
        for gate, cells in found["cells"].items():
            for count, one in cells.items():
                worst, who = one["others_worst_points"]
                most, target = one["worst_target"]
                rows.append([
                    titles[world], f"`{gate}`", count, f"{share(one['targets_found'])} of {one['targets_judged']}",
                    f"{share(most)} ({target})" if most else "0 %",
                    f"{one['others_mean_points']:+.2f}", f"{worst:+.1f} ({who})" if worst < 0 else f"{worst:+.1f}",
                    f"{one['mean_sum_of_gammas']:.3f}", share(one["prompts_of_others_with_gammas_0"]),
                ])  # fmt: skip
    head = [
        "base", "gate", "erasers", "targets found", "worst target", "others, mean (points)", "others, worst (points)",
        "mean sum of gammas", "others' prompts with gammas 0",
    ]  # fmt: skip
    base, how = numbers["second_base"], numbers["cheap_training"]["method"]
    bases = "; ".join(
        f"{titles[world]}: {found['others']} others (found in {share(found['others_found_by_the_base'])} of the "
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
        f"{table(head, rows)}\n\nShare of pictures in which a classifier finds the targets, and by how many points "
        f"other subjects are found less or more often than without erasers; same noise, {numbers['steps']} steps. "
        f"Pictures of each other subject ({pictures}). "
        f"Under `evidence` the gammas are those of the text; it acted on {_touched(numbers)} of the others' pictures. "
        f"{bases}. Erasers ({trained}; the others by `{how}`) are added in one order. The second base draws "
        f"{base['subjects_drawn']} of its {base['subjects']} subjects (in at least {share(base['drawn_above'])} of 8 "
        f"pictures); its classifier names {share(base['classifier']['drawings'])} of held-out drawings. Targets that "
        f"a base does not draw are attached and not judged.\n{about(numbers, 'composition')}"
    )


def gates_in_short(results: dict[str, dict[str, Any]]) -> str:
    """The sentences of docs/how-it-works.md about gates."""
    numbers = results["gates"]

    def acts(gate: str) -> str:
        shares = numbers["gates"][gate]["acts_on_unrelated"].values()
        low, high = share(min(shares)), share(max(shares))
        return low if low == high else f"{low} to {high}"

    transport, calibrated = (numbers["gates"][gate] for gate in ("transport", "calibrated"))
    return (
        f"Measured on the sketchbook: each of the five erasers of this repository acts (gamma above "
        f"{numbers['acting_above']}) on {acts('transport')} of {numbers['sentences']:,} unrelated sentences under "
        f"transport, on {acts('calibrated')} under the calibrated gate, and on at most "
        f"{share(max(calibrated['acts_on_own_world'].values()))} of the sketchbook's own captions without the concept "
        f"({share(max(transport['acts_on_own_world'].values()))} under transport). The five gammas add up to "
        f"{transport['mean_sum_on_unrelated']:.2f} and {calibrated['mean_sum_on_unrelated']:.3f} on average. Of "
        "sentences with a name, as it is, in the plural, as a possessive, joined, or (most of them) misspelt once, "
        f"{share(transport['named_at_least_0.9'])} have gamma 0.9 or more under transport, "
        f"{share(calibrated['named_at_least_0.9'])} under the calibrated gate, which finds no misspelt names of fewer "
        "than four letters."
    )


def papers_gate(results: dict[str, dict[str, Any]]) -> str:
    """The README's two sentences about facilitated transport."""
    sentences, paper = results["gates"]["sentences"], results["gates"]["gates"]["transport"]
    acts = paper["acts_on_unrelated"].values()
    names = [found["name"]["at_least_0.9"] for found in paper["named"].values()]
    found = {gate: results["attacks"]["cells"][f"mickey:ring-a-bell:{gate}"] for gate in (*GATES, "evidence")}
    asr = {gate: share(one["asr"]) for gate, one in found.items()}
    return (
        f"The paper's gate (`--gate transport`) acts fully on {share(min(names))} of sentences with the concept's "
        f"name as it is, and to some extent on {share(min(acts))} to {share(max(acts))} of {sentences:,} unrelated "
        "ones, so that the effects of several erasers add up. Prompts that are searched without the name get past it, "
        f"and past any gate that reads texts: Ring-A-Bell brings mickey back with {asr['transport']} of "
        f"{found['transport']['cases']} prompts, with {asr['calibrated']} under the calibrated gate, {asr['evidence']} "
        f"under `--gate evidence`, the shipped erasers' own, which also looks at the finished picture, and "
        f"{asr['always']} where the eraser always acts."
    )

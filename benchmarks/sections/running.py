"""The tables about running time, memory, registries and servers."""

from __future__ import annotations

from typing import Any

from sections.writing import about, table


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
        f"{table(head, rows)}\n\nStep time over the bare pipeline's with N rank-1 erasers on every target module: "
        "exact U-Nets with random weights, 64x64 (SD1.5) and 128x128 (SDXL) pixels, float32, each pair in one process; "
        "the median where a case was run more than once. One prompt is folded, a mixed batch of 8 is branched; PEFT, "
        "diffusers and hooks have no gate, and one sum for "
        f"the whole batch.\n\nOn SD1.5 with {fast['erasers']} erasers: attach {fast['attach']:.2g} s, fold "
        f"{fast['fold']:.2g} s, fold for other gammas {fast['fold_for_other_gammas']:.2g} s, recover all, bit-exactly, "
        f"{fast['recover_all']:.2g} s. Gates of one prompt after the text encoder: {asked}. "
        f"`spmhub --help` {start['help']:.2g} s, `spmhub list` of 1,000 erasers {start['list_of_1000']:.2g} s. After "
        f"{cycles['cycles']:,} cycles of attach, draw, recover, detach: weights bit-identical "
        f"({'yes' if cycles['weights_bit_identical'] else 'no'}), resident memory {100 * cycles['change']:+.1f} %.\n"
        f"{about(numbers, 'runtime')}"
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
        f"{table(head, rows)}\n\nWhole denoisers with random weights on one {numbers['gpu']}. "
        f"{'; '.join(latencies)}. {incomplete}{about(numbers, 'full_size')}"
    )


def registry(numbers: dict[str, Any]) -> str:
    return (
        f"{numbers['processes']} processes pulled, installed, replaced, removed, listed and loaded the same "
        f"{numbers['adapters']} erasers for {numbers['seconds']:.0f} s: {sum(numbers['seen'].values()):,} steps, "
        f"{len(numbers['failures'])} errors, the registry valid afterwards ({'yes' if numbers['valid'] else 'no'}).\n"
        f"{about(numbers, 'registry')}"
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
        f"{table(['CPU time', 'one by one', 'now', 'ratio'], shown)}\n\nOne by one: a call of the text encoder for "
        "each name. The gammas are the same to the last bit. The calibrated gate reads eight sentences for each name, "
        f"and keeps what follows for later processes.\n\n{_of_registries(numbers['registry']['erasers'])}\n\n"
        f"{_of_batches(numbers['batches'])}\n\n{_of_evaluations(numbers['evaluations'])}\n\n"
        f"{_of_refolding(numbers['refolding'])}\n"
        f"{about(numbers, 'growth')}"
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
        f"{table(['CPU time in a registry', *sizes, 'ratio'], rows)}\n\nJust after a change all manifests are read "
        "where a concept is looked for; the index that is kept then serves until the next change."
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
        f"{table(head, rows)}\n\nEach worker has one thread and loads the base; the time has the loss of a worker in "
        f"it. Two cores; their load (mean of five minutes) was {min(loads):g} to {max(loads):g}. Short work does not "
        f"repay the start of the workers.\n{about(numbers, 'cluster')}"
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
        f"{table(['`spmhub serve` on loopback', 'found'], rows)}\n\n{numbers['requests']} requests of "
        f"{numbers['clients']} clients, {numbers['steps']} steps, sketchbook. The {seen['references']} references are "
        f"drawn alone by a pipeline with the erasers that the answer names; of the pairs of different references "
        f"{pairs.get('one level', 0)} are within one level of each other. Clients and server share two cores, and "
        f"one thread draws.\n{about(numbers, 'serving')}"
    )


def memory(numbers: dict[str, Any]) -> str:
    titles = {"sketchbook": "the sketchbook", "sd15": "Stable Diffusion 1.5's sizes, random weights, 64 x 64 pixels"}
    rows = [
        [
            titles[name], *(f"{value:.0f}" for value in found["mebibytes"]["drawing"][1::2]),
            f"{max(value for values in found['mebibytes'].values() for value in values):.0f}",
        ]
        for name, found in numbers["models"].items()
    ]  # fmt: skip
    counts = [f"{2 * numbers['every'] * (at + 1)} pictures" for at in range(len(rows[0]) - 2)]
    return (
        f"{table(['base', *(f'MiB after {count}' for count in counts), 'most, with measuring'], rows)}\n\nThe resident "
        f"set of `spmhub eval` while it draws in batches of {numbers['at_once']}, and then measures all pictures.\n"
        f"{about(numbers, 'memory')}"
    )

"""spmhub protocols, score and compare: evaluations as data, and what to do with kept pictures."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spm_hub.cli import options
from spm_hub.cli.app import Example, command
from spm_hub.cli.attack import show_attack_report
from spm_hub.cli.output import Output, silence_libraries, table
from spm_hub.errors import UsageError

if TYPE_CHECKING:
    from spm_hub.evaluation.protocols.protocol import Protocol

NAME = "A protocol, for its rows, metrics and published numbers."
Name = Annotated[str | None, typer.Argument(help=NAME, show_default=False)]
Sets = Annotated[bool, typer.Option("--sets", help="List the published prompt sets that are recognised.")]
Metrics = Annotated[bool, typer.Option("--metrics", help="List the metrics and judges.")]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The folder of spmhub eval --out.")]
Folders = Annotated[
    list[Path], typer.Argument(metavar="DIR...", help="Folders of spmhub eval --out, of the same rows.")
]
Page = Annotated[
    Path | None, typer.Option("--out", help="Write a page with a plot of erasure against damage.", show_default=False)
]


@command(
    "protocols",
    Example("spmhub protocols", "the evaluations that come with spm-hub"),
    Example("spmhub protocols spm-objects", "one of them, with the paper's numbers"),
    Example("spmhub protocols --metrics", "metrics and judges, for --metric and --judge"),
    Example("spmhub protocols --sets", "published prompt sets: where they are, their hash and licence"),
    panel="Look",
)
def show_protocols(out: Output, name: Name = None, *, sets: Sets = False, metrics: Metrics = False) -> None:
    """List the protocols of spmhub eval --protocol, or show one."""
    from spm_hub.evaluation.metrics.named import known_metrics
    from spm_hub.evaluation.prompts.catalogue import catalogue
    from spm_hub.evaluation.protocols.protocol import protocol_named, protocols

    if sets:
        found = [one.model_dump(mode="json") for one in catalogue()]
        rows = [[one["name"], one["rows"], one["licence"] or "none stated", one["where"]] for one in found]
        out.data(found, table(["set", "rows", "licence", "where"], rows), brief=[str(one["name"]) for one in found])
        return
    if metrics:
        known = known_metrics().values()
        listed = [{"name": one.name, "usage": one.usage, "about": one.about} for one in known]
        out.data(
            listed, table(["use", "about"], [[one.usage, one.about] for one in known]), brief=[m.name for m in known]
        )
        return
    if name is not None:
        one = protocol_named(name)
        out.data({**one.model_dump(mode="json"), "sha256": one.sha256}, _described(one), brief=[one.sha256])
        return
    every = protocols().values()
    out.data(
        [{"name": one.name, "version": one.version, "about": one.about, "paper": one.paper} for one in every],
        table(["protocol", "about"], [[one.name, one.about] for one in every]),
        brief=[one.name for one in every],
    )


def _described(one: "Protocol") -> Any:
    from rich.console import Group

    from spm_hub.cli.output import literal

    facts = [f"{one.name}, version {one.version}: {one.about}"]
    facts += [f"paper: {one.paper}"] if one.paper else []
    for label, variant in (("any base", one.usual), ("sketchbook", one.sketchbook)):
        sets = ", ".join(
            f"{part.role} {part.samples}" + (f" (published prompts: {part.file})" if part.file else "")
            for part in variant.sets
        )
        facts.append(f"on {label}: {sets} pictures; {variant.drawing.steps} steps; {', '.join(variant.measure)}")
    if one.attacked is not None:
        facts.append(f"attacked by {', '.join(one.attacked.attacks)} on {one.attacked.prompts} prompts")
    facts += [f"not as in the paper: {text}" for text in one.differs]
    parts = [literal("\n".join(facts))]
    if one.published:
        rows = [
            [p.method, p.erased or "nothing", p.subject or "captions", p.quantity, p.value, p.where]
            for p in one.published
        ]
        parts.append(table(["method", "erased", "subject", "quantity", "value", "where"], rows, title="published"))
    return Group(*(literal(part) if isinstance(part, str) else part for part in parts))


@command(
    "score",
    Example("spmhub score snoopy-detection --metric psnr", "one more metric of kept pictures, without a model"),
    Example("spmhub score snoopy-detection --judge my.judges:snoopy", "another judge's answers"),
    Example("spmhub score nudity-attacked --judge nudenet:eu6", "another judge of an attack's pictures"),
    interrupted="run it again: the scores so far are kept",
    panel="Look",
)
def score(
    out: Output,
    folder: Folder,
    *,
    judge: options.Judges = None,
    metric: options.Metrics = None,
    judge_device: options.JudgeDevice = None,
) -> None:
    """Judge the kept pictures of an evaluation again, without a model, and replace its report."""
    measure = (*(judge or ()), *(metric or ()))
    if not measure:
        raise UsageError("there is nothing to measure", mend="--metric ssim, or another: spmhub protocols --metrics")
    with silence_libraries():
        from spm_hub.evaluation.attacks.records.folder import is_attack
        from spm_hub.evaluation.protocols.running import score_again

        report = score_again(folder, measure, out, judge_device=judge_device)
    if is_attack(report["run"]):
        show_attack_report(out, report, folder)
    else:
        show_report(out, report, folder)


@command(
    "compare",
    Example(
        "spmhub compare snoopy-spm snoopy-esd", "two runs of the same rows, with the intervals of their difference"
    ),
    Example("spmhub compare snoopy-spm snoopy-esd --out trade-off.html", "a page with erasure against damage"),
    panel="Look",
)
def compare_runs(out: Output, folders: Folders, *, page: Page = None) -> None:
    """Compare evaluations of the same rows: other erasers, strengths, gates or bases."""
    from spm_hub.evaluation.records.folder import RunFolder
    from spm_hub.evaluation.reports.comparison import compare
    from spm_hub.io.atomic import write_atomic

    found = compare([RunFolder.open(folder) for folder in folders])
    if not found.same_base:
        out.say("these runs drew different pictures without erasers: differences are the bases' too")
    rows = [
        [line["metric"], line["subject"] or "captions", line["n"], *(f"{value:.4g}" for value in line["values"]),
         *(_difference(one) for one in line["differences"])]
        for line in found.lines
    ]  # fmt: skip
    headings = ["metric", "subject", "n", *found.names, *(f"{name} - {found.names[0]}" for name in found.names[1:])]
    out.data(
        found.as_dict(), table(headings, rows), brief=[f"{name} {e:.2f} {lost:.2f}" for name, e, lost in found.points]
    )
    if page is not None:
        write_atomic(page, found.page().encode())
        out.say(f"wrote {page}")


def _difference(one: dict[str, Any]) -> str:
    ends = "" if one["interval"] is None else f" ({one['interval'][0]:+.3g} to {one['interval'][1]:+.3g})"
    return f"{one['value']:+.3g}{ends}"


def show_report(out: Output, report: dict[str, Any], folder: Path) -> None:
    """Print a report: its remarks, a table of all metrics, and where its pages are."""
    from spm_hub.evaluation.reports.wording import HEADINGS, cells, remarks

    for remark in remarks(report):
        out.say(remark)
    rows = []
    for one in report["tables"]:
        headings = HEADINGS[one["kind"]][2:]
        for line in one["lines"]:
            subject, n, *values = cells(line, one["kind"])
            shown = ", ".join(f"{head} {value}" for head, value in zip(headings, values, strict=True))
            rows.append([one["metric"], subject, n, shown])
    title = f"{report['run']['protocol']['name']} on {report['run']['model']}, {report['pictures']} pictures"
    says = [f"{one['says']}: {one['subject']} by {one['metric']}" for one in report["findings"]]
    out.data(report, table(["metric", "subject", "n", "numbers with 95 % intervals"], rows, title=title), brief=says)
    out.say(f"report: {folder / 'report.html'}, report.md and report.json in the same folder")

"""Command methods: the ways to erase that `spmhub train --method` takes."""

from spm_hub.cli.app import Example, command
from spm_hub.cli.output import Output


@command(
    "methods",
    Example("spmhub methods", "find the method for a concept"),
    Example("spmhub methods --json", "the same for programs, with each method's preset and the recipe keys it reads"),
    panel="Look",
)
def methods(out: Output) -> None:
    """List the methods of spmhub train, plug-ins included: their purpose, cost, harm and paper."""
    from spm_hub.training.methods import METHODS, all_methods

    found = all_methods()
    rows = [
        {
            "name": one.name,
            "title": one.title,
            "paper": one.paper,
            "summary": one.summary,
            "cost": one.cost,
            "harm": one.harm,
            "plugin": one.name not in METHODS,
            "preset": one.preset,
            "keys": sorted(one.uses),
            "options": [] if one.options is None else list(one.options.model_fields),
        }
        for one in found.values()
    ]
    blocks = []
    for row in rows:
        head = f"{row['name']}: {row['title']}" + (f" ({row['paper']})" if row["paper"] else "")
        lines = [(key, row[key]) for key in ("summary", "cost", "harm")]
        blocks.append("\n".join([head, *(f"  {key:8} {text}" for key, text in lines if text)]))
    out.data(rows, "\n".join(blocks), brief=list(found))

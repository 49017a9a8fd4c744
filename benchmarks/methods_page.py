"""Write docs/methods.md from the `Method` objects: nothing there is typed by hand.

python benchmarks/methods_page.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from spm_hub.training.methods import METHODS, Method
from spm_hub.training.recipe.fields import RecipeFields
from spm_hub.training.recipe.schema import RecipePart

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
HEAD = """# Methods

A method is a preset of a recipe, with the loss, the loop and the checks that belong to it.
`spmhub train CONCEPT --method NAME` takes one; `spmhub methods` lists them in a terminal, plug-ins included. This page
is made from the same objects by `python benchmarks/methods_page.py`. Times, harm and attacks are those measured on the
sketchbook: see [benchmarks](benchmarks.md). The settings of the papers, for Stable Diffusion, are in
`manifests/recipes/`.
"""
HOW = """
## How to choose

Take `spm` unless there is a reason not to: `instant` for an eraser at once, `sepme` for several concepts or for prompts
that must not change, `race-spm` against attackers, `ca` if something definite is to take the concept's place,
`minimalist` for few-step models. The others are there for comparisons.
"""
READ_BY_ALL = """
## Keys that every method reads

`target`, `aliases`, `kind`, `surrogate`, `name`, `model`, `seed`, `strength` and `resolution`. A key that is set and
that the method does not read is refused. Below, `part.*` stands for all keys of a part.
"""


def plain(value: Any) -> Any:
    """Tuples as lists, as YAML has no tuples."""
    return json.loads(json.dumps(value))


def keys(method: Method) -> str:
    whole = {name for name, field in RecipeFields.model_fields.items() if isinstance(field.default, RecipePart)}
    return ", ".join(f"`{key}.*`" if key in whole else f"`{key}`" for key in sorted(method.uses))


def options(method: Method) -> list[str]:
    """Return lines about the keys of the method's own, if it has any."""
    fields = {} if method.options is None else method.options.model_fields
    about = [f"  - `options.{name}` ({plain(field.default)}): {field.description}." for name, field in fields.items()]
    return ["- **Keys of its own, with their defaults.**", *about] if about else []


def section(method: Method) -> str:
    preset = yaml.safe_dump(plain(method.preset), sort_keys=False, default_flow_style=None, width=100).strip()
    lines = [
        f"## {method.name}",
        "",
        f"**{method.title}** ({method.paper}).",
        "",
        f"- **What it does, and for what.** {method.summary}",
        f"- **Cost.** {method.cost}",
        f"- **Harm.** {method.harm}",
        f"- **Recipe keys it reads.** {keys(method)}",
        *options(method),
        f"- **Example.** `spmhub train snoopy --method {method.name}`",
    ]
    return "\n".join([*lines, "", "```yaml", preset, "```"])


def page() -> str:
    table = ["| method | what it does, and for what | cost | harm |", "| --- | --- | --- | --- |"]
    table += [f"| [`{one.name}`](#{one.name}) | {one.summary} | {one.cost} | {one.harm} |" for one in METHODS.values()]
    parts = [HEAD + HOW + "\n" + "\n".join(table) + "\n" + READ_BY_ALL, *map(section, METHODS.values())]
    return "\n".join(part.rstrip() + "\n" for part in parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)

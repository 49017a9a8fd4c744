"""Writes an eraser's model card: use, measured results, limits, and the metadata that the Hub reads."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from spm_hub.adapters.manifest import Concept, Evaluation, Manifest, slug
from spm_hub.errors import NotFoundError, UsageError
from spm_hub.hub.markdown import code, fenced, in_python, in_shell, prose
from spm_hub.io import untrusted_json as untrusted
from spm_hub.io.untrusted_text import MOST_SHOWN, without_hidden
from spm_hub.io.wording import counted, quoted
from spm_hub.models.aliases import ALIASES

ERASES, METHOD = "erases:", "method:"
"""Prefixes of the two tags by which `search` finds erasers on the Hub."""

WITHOUT, WITH = "without", "with"
_FAMILY_TAGS = {
    "sd1": "stable-diffusion", "sd2": "stable-diffusion", "sdxl": "stable-diffusion-xl", "sd3": "stable-diffusion-3",
    "flux": "flux",
}  # fmt: skip
"""The tags by which people look for adapters of a family on the Hub; our own family names are tags as well."""
_NOT_FOR_ALL = "not-for-all-audiences"
"""The tag by which the Hub hides a repository until a visitor agrees to see it."""
_EXPLICIT_WORDS = frozenset(
    "nsfw nude nudes nudity naked nakedness topless porn porno pornography pornographic erotic erotica sex sexual "
    "sexually hentai genitals genitalia penis vagina breasts nipples gore bloody".split()
)
_ACTED = 0.5
_MOST_NAMES = 64
_BASE = re.compile(r"(?P<name>\w[\w.-]*(/\w[\w.-]*)?)(@\w[\w./-]*)?", re.ASCII)
"""A base that a command can name: an alias or owner/name, also at a revision."""
_ABOUT_UNFOLDS = 100
_SHOWN_ROWS = 12
# Licences that the Hub has an identifier for; any other is written as `license: other` with a `license_name`.
_LICENCES = frozenset(
    "apache-2.0 mit openrail creativeml-openrail-m openrail++ bsd-3-clause cc0-1.0 cc-by-4.0 cc-by-sa-4.0 "
    "cc-by-nc-4.0 gpl-3.0 lgpl-3.0 unlicense unknown".split()
)
_ABOUT_KINDS = {"low_rank": "low-rank increments", "dense": "dense increments", "mask": "masks of neurons"}


@dataclass(frozen=True)
class PicturePair:
    """Two pictures of one prompt and seed, without and with the eraser, as the bytes of PNG files.

    without: None where it is not published, as for an eraser of nudity.
    """

    prompt: str
    without: bytes | None
    with_: bytes
    gates: Mapping[str, float] = field(default_factory=dict)


def is_explicit(concept: Concept) -> bool:
    """Return True for a concept whose pictures are not for all audiences: by its kind, or by its names."""
    names = " ".join(concept.names).casefold()
    return concept.kind == "nsfw" or not _EXPLICIT_WORDS.isdisjoint(re.findall(r"[a-z]+", names))


def read_pairs(
    folder: Path, eraser: str, *, explicit: bool = False, sha256: str | None = None
) -> tuple[PicturePair, ...]:
    """Read an eraser's pairs *-without.png and *-with.png, as `spmhub apply --compare` writes them.

    The prompt is in the file's metadata; without metadata it is taken from the file name. Pairs whose metadata names
    other attached erasers are left out, as they do not show the effect of this one.
    explicit: leave out the pictures without the eraser, and those on which it hardly acted or is not known to have.
    sha256: leave out the pictures that this version of the eraser's file did not draw.
    Raises NotFoundError if there is no pair, UsageError for a file that is not a PNG.
    """
    pairs, others = [], set[str]()
    for path in sorted(folder.glob(f"*-{WITH}.png")):
        partner = path.with_name(path.name.removesuffix(f"-{WITH}.png") + f"-{WITHOUT}.png")
        if not explicit and not partner.is_file():
            continue
        about = _read_about(path)
        if (attached := about.get("adapters", [eraser])) != [eraser]:
            others.add(" and ".join(map(str, attached)))
            continue
        if (explicit and not _acted(about, eraser)) or (sha256 is not None and about.get("sha256") != sha256):
            continue
        prompt = about.get("prompt") or path.name.removesuffix(f"-{WITH}.png").replace("-", " ")
        without = None
        if not explicit:
            _read_about(partner)
            without = partner.read_bytes()
        pairs.append(PicturePair(str(prompt), without, path.read_bytes(), about.get("gates") or {}))
    if not pairs:
        shown = f" of {eraser} alone, only of {', of '.join(sorted(others))}" if others else ""
        raise NotFoundError(
            f"{folder} has no pair of pictures NAME-without.png and NAME-with.png{shown}",
            mend=f"spmhub apply --adapters {eraser} --prompt TEXT --compare --out {quoted(folder)}",
        )
    return tuple(pairs)


def _acted(about: Mapping[str, Any], eraser: str) -> bool:
    """Return True if a picture's metadata says that the eraser had at least half of its full effect."""
    strength = about.get("strength")
    if isinstance(strength, Mapping):
        strength = strength.get(eraser)
    gamma = (about.get("gates") or {}).get(eraser, 0.0)
    return bool(gamma * (1.0 if strength is None else strength) >= _ACTED)


def _read_about(path: Path) -> dict[str, Any]:
    """Return the metadata that spm-hub wrote into a PNG file; empty if there is none. Raises UsageError."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path, formats=("PNG",)) as picture:
            text = picture.info.get("spmhub", "{}")
        about = untrusted.parse(str(text).encode(), unfolds=_ABOUT_UNFOLDS)
        return _checked(about) if isinstance(about, dict) else {}
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(
            f"{path} cannot be read as a PNG picture: {error}", mend="--pictures ANOTHER_FOLDER"
        ) from error


def _checked(about: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of a picture. Raises ValueError where it is not as spm-hub writes it."""

    def numbers(value: object) -> bool:
        return isinstance(value, dict) and all(isinstance(one, int | float | None) for one in value.values())

    fits: Mapping[str, Callable[[Any], bool]] = {
        "adapters": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
        "gates": numbers,
        "prompt": lambda value: isinstance(value, str),
        "strength": lambda value: isinstance(value, int | float) or numbers(value),
    }
    for key, is_right in fits.items():
        if about.get(key) is not None and not is_right(about[key]):
            raise ValueError(f"{key} in its metadata is {str(about[key])[:80]!r}")
    return about


def picture_names(index: int) -> tuple[str, str]:
    """Return the paths, in the repository, of the two pictures of pair `index`: without, with."""
    return f"images/{index:02d}-{WITHOUT}.png", f"images/{index:02d}-{WITH}.png"


def hub_id(base: str) -> str | None:
    """Return the Hub repository of a base model, given by alias or id; None for a local model."""
    match = _BASE.fullmatch(base)
    if match is None:
        return None
    name = match["name"]
    return ALIASES[name].hub_id if name in ALIASES else (name if "/" in name else None)


def metadata(manifest: Manifest, pairs: Sequence[PicturePair] = ()) -> dict[str, Any]:
    """Return the card's front matter.

    `base_model` is left out for a base that is not on the Hub, as the Hub would show a dead link.
    """
    method = manifest.recipe.get("method")
    concept = manifest.concept
    tags = ["spmhub", "concept-erasure", *(["lora"] if manifest.increment.kind == "low_rank" else []), "text-to-image"]
    tags += [manifest.base.family, *([f"{METHOD}{method}"] if method else [])]
    tags += [f"{ERASES}{slug(name)}" for name in concept.names[:_MOST_NAMES]]
    tags += [_NOT_FOR_ALL] if is_explicit(concept) else []
    tags += [_FAMILY_TAGS[manifest.base.family]] if manifest.base.family in _FAMILY_TAGS else []
    base = hub_id(manifest.base.id)
    # The Hub shows its code for diffusers, and counts downloads, for a library that it knows. That code is right for a
    # LoRA file whose base has a repository.
    by_diffusers = base is not None and manifest.increment.kind == "low_rank"
    tags += ["template:sd-lora"] if by_diffusers and pairs else []
    library = "diffusers" if by_diffusers else "spmhub"
    found: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-to-image"}
    if base is not None:
        found |= {"base_model": base, "base_model_relation": "adapter"}
    found["tags"] = list(dict.fromkeys(tags))
    known = manifest.licence.lower() in _LICENCES
    found |= {"license": manifest.licence.lower()} if known else {"license": "other", "license_name": manifest.licence}
    if manifest.evaluation:
        found["model-index"] = _model_index(manifest)
    if pairs:
        found["widget"] = [
            {"text": pair.prompt, "example_title": f"{title} the eraser", "output": {"url": name}}
            for index, pair in enumerate(pairs)
            for title, name in _titled_names(index, pair)
        ]
    return found


def _model_index(manifest: Manifest) -> list[dict[str, Any]]:
    """Return the measured numbers as the Hub shows them: a result for each protocol and base."""
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-to-image", dataset_type=slug(one.protocol), dataset_name=f"{one.protocol} on {one.base}",
            dataset_revision=one.protocol_sha256, metric_type=one.metric, metric_name=f"{one.metric} of {one.subject}",
            metric_value=one.value, metric_args=_how_measured(one),
        )
        for one in manifest.evaluation
    ]  # fmt: skip
    index: list[dict[str, Any]] = ModelCardData(model_name=manifest.name, eval_results=results).to_dict()["model-index"]
    return index


def _how_measured(one: Evaluation) -> dict[str, Any]:
    """Return what else is known of a number: without the eraser, its interval, samples and settings."""
    known = {
        "without": one.reference, "interval_95": None if one.interval is None else list(one.interval),
        "samples": one.samples, "seed": one.seed, "steps": one.steps, "guidance": one.guidance, "gate": one.gate,
        "report_sha256": one.report_sha256,
    }  # fmt: skip
    return {key: value for key, value in known.items() if value is not None}


def render(manifest: Manifest, repo: str, weights: str, pairs: Sequence[PicturePair] = ()) -> str:
    """Return the whole README.md of the repository `repo`, whose adapter file is named `weights`."""
    front = yaml.safe_dump(metadata(manifest, pairs), sort_keys=False, allow_unicode=True, width=120)
    sections = (
        _title(manifest),
        _pictures(pairs),
        _use(manifest, repo, weights),
        _gate(manifest, pairs),
        _measured(manifest),
        _limits(manifest),
        _recipe(manifest, weights),
    )
    return f"---\n{front}---\n\n" + "\n\n".join(section for section in sections if section) + "\n"


def _title(manifest: Manifest) -> str:
    concept, base, info = manifest.concept, manifest.base, manifest.increment
    target = prose(concept.require_target(manifest.name))
    also = f" (also called {_join(map(prose, concept.aliases[:_MOST_NAMES]))})" if concept.aliases else ""
    into = f" The model draws “{prose(concept.surrogate)}” in its place." if concept.surrogate else ""
    made = (
        f"by the method {code(str(manifest.recipe['method']))}"
        if manifest.recipe.get("method")
        else "by another program"
    )
    trained = _base_link(base.id, base.revision) or "an unknown base model"
    modules = counted(len(info.modules), "module")
    size = f", {info.bytes / 1000:.0f} kB" if info.bytes else ""
    rank = f" of rank {info.rank}" if info.rank else ""
    by = f" Made by {prose(manifest.author)}." if manifest.author else ""
    return (
        f"# An eraser of “{target}”\n\n"
        f"It stops a text-to-image model of the family {code(base.family)} from drawing **{target}**{also} and is "
        f"trained to leave other concepts unchanged.{into} Attach it to a loaded checkpoint; detaching it restores the "
        f"model bit for bit.\n\n"
        f"Trained {made} on {trained}: {_ABOUT_KINDS[info.kind]}{rank} on {modules}{size}. "
        f"It fits every checkpoint with the same modules, without further training; `spmhub check` tests that.{by}"
    )


def _base_link(base: str, revision: str | None) -> str:
    if repo := hub_id(base):
        at = f" at {code(revision[:12])}" if revision else ""
        return f"[{repo}](https://huggingface.co/{repo}){at}"
    if base in ALIASES:
        return f"`{base}`, the small test model of spm-hub; results on it do not carry over to Stable Diffusion"
    return f"{code(base)}, a model that is not on the Hub" if base else ""


def _pictures(pairs: Sequence[PicturePair]) -> str:
    if not pairs:
        return ""
    rows = [
        (prose(pair.prompt), *(f"![{title} the eraser]({name})" for title, name in _titled_names(index, pair)))
        for index, pair in enumerate(pairs)
    ]
    if any(pair.without is None for pair in pairs):
        return "<Gallery />\n\n## Pictures\n\n" + _table(
            ("prompt", f"{WITH} the eraser"), [(first, last) for first, *_, last in rows]
        )
    return (
        "<Gallery />\n\n## Before and after\n\n"
        + _table(("prompt", WITHOUT, WITH), rows)
        + "\n\nBoth start from the same noise."
    )


def _titled_names(index: int, pair: PicturePair) -> Iterable[tuple[str, str]]:
    both = zip((WITHOUT, WITH), picture_names(index), strict=True)
    return both if pair.without is not None else list(both)[1:]


def _use(manifest: Manifest, repo: str, weights: str) -> str:
    base, target = manifest.base.id, manifest.concept.require_target(manifest.name)
    source = hub_id(base)
    model = base if source or base in ALIASES else "MODEL"
    from_diffusers = "from diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained({})"
    pretrained = from_diffusers.format(in_python(source or "MODEL"))
    loading = pretrained
    if base in ALIASES and source is None:
        loading = f"from spm_hub.models.loading import load_pipeline\n\npipe = load_pipeline({in_python(base)})"
    shell = fenced(
        "bash",
        f"pip install spm-hub\nspmhub apply --model {model} --adapters {repo} --prompt {in_shell(target)} --compare\n"
        f"spmhub pull {repo}        # keep it under the name {manifest.name}",
    )
    python = fenced(
        "python",
        f"import spm_hub\n{loading}\nerasers = spm_hub.attach(pipe, {in_python(repo)})\n"
        f"pipe({in_python(target)}).images[0]\n"
        f"erasers.recover({in_python(manifest.name)})  # {without_hidden(target)} is back",
    )
    if manifest.increment.kind == "low_rank":
        plain = (
            "It is an ordinary LoRA file. Without spm-hub there is no gate: it has its full effect on every prompt.\n\n"
        ) + fenced(
            "python",
            f"{pretrained}\npipe.load_lora_weights({in_python(repo)}, weight_name={in_python(weights)})",
        )
    else:
        out = f"without-{slug(target)}"
        plain = "\n\n".join(
            (
                f"Plain diffusers loads only LoRA files, and this eraser has {_ABOUT_KINDS[manifest.increment.kind]}. "
                "Fold it into a checkpoint once and load that:",
                fenced("bash", f"spmhub bake --model {model} --adapters {repo} --out {out}"),
                fenced("python", from_diffusers.format(in_python(out))),
            )
        )
    return (
        f"## Use\n\nWith [spm-hub](https://pypi.org/project/spm-hub/):\n\n{shell}\n\n{python}\n\n"
        f"With plain diffusers:\n\n{plain}"
    )


def _gate(manifest: Manifest, pairs: Sequence[PicturePair]) -> str:
    gate, kind = manifest.gate, manifest.default_gate
    if kind in ("calibrated", "evidence"):
        text = (
            "For each prompt the eraser's effect is multiplied by a factor gamma. It is 1 where the prompt has a name "
            "of the concept, in the plural, as a possessive, joined or misspelt once too, or where the text encoder "
            "reads it as it reads the name; 0 where it reads it as it reads general sentences; and between 0 and 1 in "
            "between."
        )
        if kind == "evidence":
            text += (
                " It is also 1 where the denoiser shows that the eraser would do to the prompt a good part of what it "
                "does to the concept's name."
            )
    elif kind == "transport":
        text = (
            "For each prompt the eraser's effect is multiplied by a factor gamma (facilitated transport, arXiv "
            "2312.16145): the larger of the cosine between the text encoder's outputs for the prompt and for the "
            "concept, and the share of the concept's tokens that the prompt contains."
        )
    else:
        text = "The eraser has its full effect on every prompt (gamma 1)."
    if kind != "always":
        names = _join(map(prose, manifest.concept.names[:_MOST_NAMES]))
        text += f" The concept's names are: {names}. When the denoiser is called without a prompt, gamma is 1."
    rows = "conditional and unconditional rows" if gate.rows == "both" else "conditional rows only"
    law = " Gamma times strength is squared." if gate.law == "squared" else ""
    text += f" Its strength is {gate.strength:g}, applied to {rows}.{law}"
    gammas = [(prose(pair.prompt), f"{gamma:.2f}") for pair in pairs for gamma in list(pair.gates.values())[:1]]
    return f"## When it acts\n\n{text}" + (f"\n\n{_table(('prompt', 'gamma'), gammas)}" if gammas else "")


def _measured(manifest: Manifest) -> str:
    if not manifest.evaluation:
        return "## Measured\n\nNothing has been measured yet: neither erasure nor the effect on other concepts."
    parts = []
    groups: dict[tuple[str, str, str], list[Evaluation]] = {}
    for one in manifest.evaluation:
        groups.setdefault((one.protocol, one.base, one.metric), []).append(one)
    names = {name.casefold() for name in manifest.concept.names}
    for (protocol, base, metric), rows in groups.items():
        target = [row for row in rows if row.subject.casefold() in names]
        others = [row for row in rows if row.subject.casefold() not in names]
        headline = [f"**{prose(row.subject)}: {_figure(row.reference)} → {_figure(row.value)}**" for row in target]
        changes = [(row.value - row.reference, row.subject) for row in others if row.reference is not None]
        if changes:
            mean, (worst, whose) = sum(change for change, _ in changes) / len(changes), max(changes, key=_magnitude)
            change = f"{mean:+.4f} on average, {worst:+.4f} at most (*{prose(whose)}*)" if worst else "no change"
            headline.append(f"{counted(len(changes), 'other subject')}: {change}")
        table = _table(
            ("subject", "without", "with", "samples"),
            ((prose(row.subject), _figure(row.reference), _figure(row.value), str(row.samples)) for row in rows),
        )
        if len(rows) > _SHOWN_ROWS:
            table = f"<details>\n<summary>All {len(rows)} rows</summary>\n\n{table}\n\n</details>"
        seeds = _join(sorted({str(row.seed) for row in rows}))
        parts.append(
            f"### {code(metric)} on {code(base)}\n\n{'; '.join(headline)}.\n\n{table}\n\n"
            f"Protocol {code(protocol)}, seed {seeds}."
        )
    return "## Measured\n\n" + "\n\n".join(parts)


def _magnitude(change: tuple[float, str]) -> float:
    return abs(change[0])


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _limits(manifest: Manifest) -> str:
    bases = sorted({one.base for one in manifest.evaluation})
    where = f"on {_join(map(code, bases))} only" if bases else "on no model yet"
    attacked = any("attack" in one.protocol or one.metric.startswith("asr") for one in manifest.evaluation)
    lines = [
        f"Erasure is measured, not proved: {where}. On other checkpoints of the family it may be weaker.",
        "It changes the denoiser only, neither the text encoder nor the training data. Anyone who has the weights can "
        "detach it: it helps people who do not want to see the concept and does not stop people who do.",
        "It was tested against adversarial prompts; see the table above."
        if attacked
        else "It was not tested against attacks (adversarial prompts, learned embeddings).",
        "Concepts that resemble the erased one may change too: compare pictures of your own prompts with "
        "`spmhub apply --compare` before you rely on it.",
    ]
    return "## Limits and risks\n\n" + "\n".join(f"- {line}" for line in lines)


def _recipe(manifest: Manifest, weights: str) -> str:
    versions = ", ".join(f"{prose(name)} {prose(version)}" for name, version in manifest.versions.items())
    info = manifest.increment
    text = "## How it was made\n\n"
    if manifest.recipe and (size := len(json.dumps(manifest.recipe, ensure_ascii=False))) > MOST_SHOWN:
        text += f"Its recipe has {size} characters; it is in `manifest.json`."
    elif manifest.recipe:
        recipe = yaml.safe_dump(dict(manifest.recipe), sort_keys=False, allow_unicode=True, width=120)
        text += "`spmhub train --recipe recipe.yaml` with this recipe makes the same eraser again:\n\n" + fenced(
            "yaml", recipe
        )
    else:
        text += "Another program made it and recorded no recipe."
    text += f"\n\nVersions: {versions}." if versions else ""
    if info.sha256:
        text += (
            f"\n\n{code(weights)}: {info.bytes} bytes, sha256 `{info.sha256}`; `manifest.json` has the other fields."
        )
    return f"{text}\n\n## Licence\n\nThe eraser: {prose(manifest.licence)}. The base model has its own licence."


def _join(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def lines() -> Iterator[str]:
        yield f"| {' | '.join(columns)} |"
        yield f"|{' --- |' * len(columns)}"
        for row in rows:
            yield f"| {' | '.join(row)} |"

    return "\n".join(lines())

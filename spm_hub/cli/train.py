"""spmhub train: make an eraser."""

import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spm_hub.cli import options
from spm_hub.cli.app import Example, command
from spm_hub.cli.output import Output, silence_libraries, size
from spm_hub.errors import RegistryError, SpmHubError, UsageError

if TYPE_CHECKING:
    from spm_hub.adapters.manifest import Manifest
    from spm_hub.registry.entry import EraserEntry
    from spm_hub.registry.registry import Registry
    from spm_hub.training.recipe.recipe import Recipe

_SETTLED_LATER = ("model", "start_from", "start_sha256")
"""Keys of a recipe that the base and the eraser it begins with have to be read for, as the manifest states them."""


@command(
    "train",
    Example("spmhub train snoopy", "erase snoopy, on the embedded model"),
    Example('spmhub train "van gogh" --model sd-v1-4 --device cuda', "erase a style from Stable Diffusion 1.4"),
    Example("spmhub train church --set objective.eta=2 --seed 3", "another hyper-parameter, another seed"),
    Example("spmhub train mickey --method esd-x --increment lora:4", "another method, another increment"),
    Example(
        'spmhub train snoopy mickey "van gogh" --method sepme',
        "an eraser each, that leaves the others' concepts alone",
    ),
    Example(
        'spmhub train pikachu --method sepme --after snoopy --protect "a dog"', "leave earlier erasers and dogs alone"
    ),
    Example("spmhub train snoopy --resume", "go on where Ctrl-C or a crash ended it"),
    panel="Make",
)
def train(
    out: Output,
    concepts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONCEPT]...",
            help="What to erase, in words; an eraser for each. May stand in the recipe.",
        ),
    ] = None,
    *,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Base model: see spmhub models. Unless given: sketchbook.")
    ] = None,
    config: options.Config = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="spm, esd-x, esd-x-strict, esd-x-strict-text, esd-u, esd-all, esd-selfattn, ca, sdd, fmn, race, "
            "race-spm, sepme, uce, minimalist, or a plug-in's. Unless given: spm."
        ),
    ] = None,
    increment: Annotated[
        str | None,
        typer.Option(
            help="What is trained: spm, dense, mask, null-space, or by rank lora:4, loha:4, lokr:4, vera:64, dora:4."
            " Unless given: the method's."
        ),
    ] = None,
    protect: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="A prompt whose pictures stay as they are; repeatable. See --separable."),
    ] = None,
    after: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="An earlier eraser, whose concept is protected too; repeatable."),
    ] = None,
    separable: Annotated[
        bool,
        typer.Option(
            "--separable", help="Protect with any method that changes keys and values only; sepme always does."
        ),
    ] = False,
    recipe: Annotated[Path | None, typer.Option(help="A recipe in YAML; other options win over it.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe; repeatable.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the eraser. Unless given: made from the concept.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random. Unless given: 0.")] = None,
    registry: options.Registry = None,
    device: options.Device = "cpu",
    dtype: options.Precision = "float32",
    checkpoint_dir: Annotated[
        Path | None, typer.Option(help="Where to keep the state of the run. Unless given: your cache folder.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the state of an earlier run.")] = False,
    force: options.Force = False,
) -> None:
    """Train an eraser for each CONCEPT and keep it in the registry."""
    from spm_hub.hub.resolve import resolve
    from spm_hub.models.loading import identity_of, load_pipeline, local_folder, parse_reference
    from spm_hub.registry.registry import Registry, registries
    from spm_hub.training.recipe.protected_prompts import members
    from spm_hub.training.recipe.schema import IncrementRecipe

    given: dict[str, Any] = {"model": model, "method": method, "name": name, "seed": seed}
    given["increment"] = None if increment is None else IncrementRecipe.named(increment)
    earlier = [resolve(reference, registry).read_manifest().concept.target for reference in after or ()]
    protection = {"prompts": protect, "erased": earlier, "separable": separable}
    given["protection"] = {key: value for key, value in protection.items() if value} or None
    plans = _plans(
        recipe, set_ or (), concepts or [], {key: value for key, value in given.items() if value is not None}
    )
    kept_in = Registry(registry) if registry is not None else registries()[0]
    for plan in plans:
        for member in members(plan):
            kept_in.check_room_for(member.slug, replace=force or (resume and _made_by(member, kept_in, _SETTLED_LATER)))
    reference = parse_reference(plans[0].model, config=config)
    if reference.remark:
        out.say(reference.remark)
    started = {plan.start_from: resolve(plan.start_from, registry) for plan in plans if plan.start_from is not None}

    with silence_libraries():
        from spm_hub.training.preflight import check_before_loading

        for plan in plans:
            check_before_loading(plan, local_folder(reference))
        pipe = load_pipeline(plans[0].model, config=config, dtype=options.precision(dtype), device=device)
        base, revision = identity_of(plans[0].model, pipe)

        from spm_hub.training.loop.checkpoint import Checkpoint, base_stamp
        from spm_hub.training.trainable.warm_start import started as begun
        from spm_hub.training.trainer import train_together

        stamp = base_stamp(pipe)
    entries: list[EraserEntry] = []
    for plan in plans:
        start = None if plan.start_from is None else started[plan.start_from].load()
        whole = begun(plan.model_copy(update={"model": base}), start)
        names = [member.slug for member in sorted(members(whole), key=lambda member: member.target != plan.target)]
        kept = [m.slug for m in members(whole) if resume and not force and _made_by(m, kept_in, base=stamp)]
        for named in names:
            kept_in.check_room_for(named, replace=force or named in kept)
        what = ", ".join(repr(one) for one in (plan.target, *(other.target for other in plan.together)))
        if len(kept) == len(names):
            out.say(f"{what}: erased by this very recipe already, and kept in {kept_in.root}")
            entries += map(kept_in.get, names)
            continue
        out.say(f"erasing {what} from {plan.model} with {plan.method} ...")
        folder = checkpoint_dir or options.run_folder(plan.slug, whole.model_dump_json(), *stamp.values())
        if checkpoint_dir is not None and len(plans) > 1:
            folder = checkpoint_dir / plan.slug
        checkpoint = Checkpoint(folder, stamp)
        if resume and not checkpoint.path.exists():
            out.say(f"nothing to resume: {folder} has no run of this recipe on this base; this one begins anew")
        with silence_libraries(), out.progress("training") as progress:
            adapters = train_together(
                whole,
                pipe=pipe,
                revision=revision,
                progress=progress,
                checkpoint_dir=folder,
                resume=resume,
                start=start,
            )
        for adapter in adapters:
            try:
                entries.append(kept_in.add(adapter, replace=force or adapter.name in kept))
            except RegistryError as error:
                if not checkpoint.path.exists():
                    raise
                raise RegistryError(
                    f"{error.message}; what was trained is not lost, it is in {folder}",
                    mend="the same command with --resume, when there is room, or with another --registry",
                ) from error
            if moved := _protected(adapter.manifest):
                out.say(moved)
            for one in adapter.manifest.evaluation:
                if one.protocol == "conversion":
                    out.say(f"{adapter.name}: {one.metric.replace('_', ' ')} in its conversion: {one.value:.1e}")
        checkpoint.remove()
    sizes = [entry.adapter_path.stat().st_size for entry in entries]
    made = [
        {"name": entry.name, "adapter": entry.adapter_path, "manifest": entry.manifest_path, "bytes": n_bytes}
        for entry, n_bytes in zip(entries, sizes, strict=True)
    ]
    out.data(
        made[0] if len(made) == 1 else made,
        "\n".join(f"{entry.name}: {entry.adapter_path} ({size(n)})" for entry, n in zip(entries, sizes, strict=True)),
        brief=[str(entry.adapter_path) for entry in entries],
    )
    source = ["--model", plans[0].model, *(["--config", config] if config else [])]
    listed = ["--adapters", ",".join(entry.name for entry in entries)]
    out.say("try: " + shlex.join(["spmhub", "apply", *source, *listed, "--prompt", plans[0].target, "--compare"]))


def _made_by(
    recipe: "Recipe", registry: "Registry", apart_from: Collection[str] = (), base: Mapping[str, str] | None = None
) -> bool:
    """Whether the registry's eraser of that name was trained by exactly this recipe, some keys of it left aside.

    base: on the model that `base_stamp` says this of, unless that is not known yet.
    """
    entry = registry.find(recipe.slug)
    try:
        manifest = None if entry is None else entry.read_manifest()
    except SpmHubError:
        return False  # whatever it is, it stands in the way
    if manifest is None or not manifest.recipe or not (base or {}).items() <= manifest.versions.items():
        return False
    wanted = recipe.model_dump(mode="json")
    return all(manifest.recipe.get(key) == value for key, value in wanted.items() if key not in apart_from)


def _plans(file: Path | None, sets: Sequence[str], concepts: Sequence[str], given: dict[str, Any]) -> "list[Recipe]":
    """One recipe for a run of several concepts whose increments leave each other's alone, else one for each."""
    from spm_hub.adapters.manifest import slug
    from spm_hub.training.recipe.known_concepts import known
    from spm_hub.training.recipe.protected_prompts import jointly
    from spm_hub.training.recipe.recipe import Recipe

    if concepts and any(one.partition("=")[0].strip() == "target" for one in sets):
        raise UsageError(
            f"--set target and {concepts[0]!r} both say what is to be erased", mend="name every concept as an argument"
        )
    first = Recipe.plan(file, sets, **given, **({"target": concepts[0]} if concepts else {}))
    if len(concepts) < 2:
        return [first]
    if "name" in given or first.name is not None:
        raise UsageError(f"a name is one eraser's, and there are {len(concepts)} concepts", mend="leave --name out")
    if first.aliases != known(first.target).get("aliases", ()):
        raise UsageError(f"aliases are one concept's, and there are {len(concepts)}", mend="train them one by one")
    if twice := next((one for one in concepts if [slug(each) for each in concepts].count(slug(one)) > 1), None):
        raise UsageError(f"{twice!r} is to be erased twice")
    if first.together:
        raise UsageError(
            f"together names {first.together[0].target!r}, beside the {len(concepts)} concepts that are to be erased",
            mend="name every concept as an argument, and leave together out",
        )
    if not jointly(first):
        return [first, *(Recipe.plan(file, sets, **given, target=concept) for concept in concepts[1:])]
    # A kind that the file or --set gives is that of all of them, as it is where they are trained one by one.
    given_kind = {} if first.kind == known(first.target).get("kind", "other") else {"kind": first.kind}
    others = [{"target": concept, **known(concept), **given_kind} for concept in concepts[1:]]
    return [Recipe.plan(file, sets, **given, target=concepts[0], together=others)]


def _protected(manifest: "Manifest") -> str | None:
    """How well what was to be protected is, for the user."""
    found = [one for one in manifest.evaluation if one.protocol == "protected-prompts"]
    if not found:
        return None
    worst, target = found
    return (
        f"{manifest.name}: keys and values move by at most {worst.value:.1e} of their size for {worst.samples} "
        f"protected prompts ({worst.subject}), by {target.value:.2g} for {target.subject}"
    )

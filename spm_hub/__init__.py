"""spm-hub: small, removable concept erasers for text-to-image models.

The public door. What is behind it is imported when first used: `import spm_hub` costs nothing and needs no torch.
"""

from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spm_hub.errors import UsageError

if TYPE_CHECKING:
    from spm_hub.adapters.adapter import Adapter
    from spm_hub.adapters.manifest import Manifest
    from spm_hub.attachment.attachment import Attachment
    from spm_hub.training.recipe.recipe import Recipe

__all__ = ["Adapter", "Manifest", "Recipe", "__version__", "attach", "load", "pull", "push", "train"]

_ROOMS = {
    "Adapter": "spm_hub.adapters.adapter",
    "Manifest": "spm_hub.adapters.manifest",
    "Recipe": "spm_hub.training.recipe.recipe",
}


def attach(
    pipe: Any,
    adapters: "str | Path | Adapter | Sequence[str | Path | Adapter]",
    *,
    registry: str | Path | None = None,
    **options: Any,
) -> "Attachment":
    """Attach erasers to a diffusers pipeline, until `detach()` or the end of a `with` block.

    `adapters` holds Adapters and references (a path, a name in a registry, or owner/name[@revision] on the Hugging Face
    Hub), one or many; `options` are those of `spm_hub.attachment.attach`: gate, strength, rows, mode ... Under
    an increment_budget references are loaded lazily, as it is about those.
    Raises SpmHubError, in which case the pipeline is as it was.
    """
    from spm_hub.adapters.adapter import Adapter
    from spm_hub.attachment import attachment

    if isinstance(adapters, Mapping):
        raise UsageError("adapters is a mapping: it has to name erasers alone", mend="attach(..., strength={...}) too")
    given: Any = adapters
    several = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    if not all(isinstance(one, str | Path | Adapter) for one in several):
        raise UsageError(
            f"adapters holds erasers: names, paths or Adapters, not {adapters!r}", mend='attach(pipe, ["snoopy"])'
        )
    lazy = options.get("increment_budget") is not None
    loaded = [one if isinstance(one, Adapter) else load(one, registry=registry, lazy=lazy) for one in several]
    return attachment.attach(pipe, loaded, **options)


def load(reference: str | Path, *, registry: str | Path | None = None, lazy: bool = False) -> "Adapter":
    """The adapter behind a path, a name in a registry, or owner/name[@revision] on the Hugging Face Hub.

    lazy: read only the header now, and the increments, with all checks, when a prompt first needs them.
    """
    from spm_hub.hub import resolve as resolving

    return resolving.load(str(reference), None if registry is None else Path(registry), lazy=lazy)


def pull(
    reference: str, *, registry: str | Path | None = None, name: str | None = None, replace: bool = False
) -> "Adapter":
    """Keep owner/name[@revision] of the Hugging Face Hub in a registry, pinned to its commit, and return it.

    `registry`: your own unless given. `name` it is to have there, unless its own; one from elsewhere is kept from being
    replaced unless `replace`. Raises UsageError for another form of reference, HubError, NetworkError, RegistryError.
    """
    from spm_hub.hub import pull as remote
    from spm_hub.registry import registry as registries

    match = registries.HUB_REFERENCE.fullmatch(reference)
    if match is None:
        raise UsageError(f"{reference!r} is not of the form owner/name[@revision]", mend="spmhub search snoopy")
    kept_in = registries.user_registry() if registry is None else registries.Registry(Path(registry))
    pulled = remote.pull(match["repo"], match["revision"], registry=kept_in, name=name, replace=replace)
    return pulled.entry.load()


def push(
    reference: str | Path,
    repo: str,
    *,
    pictures: str | Path | None = None,
    registry: str | Path | None = None,
    **options: Any,
) -> str:
    """Share an eraser on the Hugging Face Hub with a model card; returns the address of the commit or pull request.

    `pictures` is a folder that `spmhub apply --compare` filled; `options` are those of
    `spm_hub.hub.push.push`: private, revision, pull_request.
    Raises HubError, NetworkError; the repository is then as it was.
    """
    import tempfile

    from spm_hub.hub import push as pushing
    from spm_hub.hub.card import read_pairs
    from spm_hub.hub.resolve import resolve

    with tempfile.TemporaryDirectory() as staging:
        entry = resolve(str(reference), None if registry is None else Path(registry))
        pairs = () if pictures is None else read_pairs(Path(pictures), entry.read_manifest().name)
        release = pushing.prepare(entry, repo, pairs, Path(staging))
        pushed = pushing.push(release, **options)
    return pushed.pull_request or pushed.url


def train(
    concept: "str | Recipe",
    *,
    model: str | None = None,
    config: str | None = None,
    method: str | None = None,
    **overrides: Any,
) -> "Adapter":
    """Train an eraser of `concept`, or of the concept of a whole Recipe, and return it; nothing is written.

    `model`, `method` and `overrides` are keys of the recipe, over its defaults (the sketchbook, SPM, what is known of
    the concept) or over the given one, part by part; `config` is for a `model` that is a single file, as in
    `spm_hub.models.loading.parse_reference`.
    Raises UsageError for a blank concept, RecipeError for an unknown key or an impossible value.
    """
    from spm_hub import training
    from spm_hub.models.loading import identity_of, load_pipeline, local_folder, parse_reference
    from spm_hub.training.recipe.presets import merged
    from spm_hub.training.recipe.recipe import Recipe

    if not isinstance(concept, str | Recipe):
        raise UsageError(
            f"train takes one concept or a Recipe, not {concept!r}",
            mend="one call for each, or spmhub train CONCEPT CONCEPT ...",
        )
    if isinstance(concept, str) and not concept.strip():
        raise UsageError("the concept is empty", mend='name what to erase, for instance: spm_hub.train("van gogh")')
    given: dict[str, Any] = {"target": concept} if isinstance(concept, str) else concept.model_dump(mode="json")
    chosen = {key: value for key, value in (("model", model), ("method", method)) if value is not None}
    recipe = Recipe.plan(**merged(given, {**chosen, **overrides}))
    start = None if recipe.start_from is None else load(recipe.start_from)
    from spm_hub.training.preflight import check_before_loading

    check_before_loading(recipe, local_folder(parse_reference(recipe.model, config=config)))
    pipe = load_pipeline(recipe.model, config=config)
    base, revision = identity_of(recipe.model, pipe)
    return training.train(recipe.model_copy(update={"model": base}), pipe=pipe, revision=revision, start=start)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("spm-hub")
    if name not in _ROOMS:
        raise AttributeError(f"module 'spm_hub' has no attribute {name!r}")
    return getattr(import_module(_ROOMS[name]), name)

"""spm-hub: small, removable concept erasers for text-to-image models.

    eraser = spm_hub.train("snoopy")               # or spm_hub.load("snoopy"), spm_hub.pull("owner/name")
    with spm_hub.attach(pipe, [eraser]):           # pipe: any diffusers pipeline of the same family
        pipe("snoopy at the beach")                # drawn without snoopy; other prompts stay as they are
    spm_hub.apply([eraser], ["snoopy"]).grid       # pictures with and without it, side by side

Everything else is imported when it is first used: `import spm_hub` costs nothing and needs no torch.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar, overload

from spm_hub.errors import UsageError

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from spm_hub.adapters.adapter import Adapter
    from spm_hub.adapters.formats.format import Format
    from spm_hub.adapters.manifest import GateName, Manifest
    from spm_hub.attachment.attachment import Attachment
    from spm_hub.attachment.gates.gate import Gate, PreparingGate
    from spm_hub.attachment.gates.text_gates import Encode, TextGates
    from spm_hub.evaluation.application import Applied
    from spm_hub.hub.bake import bake
    from spm_hub.hub.convert import Conversion, convert
    from spm_hub.io.progress import Reporter
    from spm_hub.models.architectures import Family
    from spm_hub.models.loading import load_pipeline
    from spm_hub.registry.registry import Registry
    from spm_hub.training.loop.closed_form import ClosedForm
    from spm_hub.training.loop.prediction_run import PredictionRun
    from spm_hub.training.loop.run import Run, Task
    from spm_hub.training.methods.method import Method
    from spm_hub.training.objective import Losses, Objective
    from spm_hub.training.recipe.recipe import Recipe
    from spm_hub.training.recipe.schema import RecipePart
    from spm_hub.training.session import TrainingStep
    from spm_hub.training.trainable.trainable import Trainable
    from spm_hub.training.trainer import TrainingInterruptedError

__all__ = [
    "Adapter",
    "Applied",
    "ClosedForm",
    "Conversion",
    "Family",
    "Format",
    "Losses",
    "Manifest",
    "Method",
    "Objective",
    "PredictionRun",
    "Recipe",
    "RecipePart",
    "Registry",
    "Run",
    "Task",
    "TextGates",
    "Trainable",
    "TrainingInterruptedError",
    "TrainingStep",
    "__version__",
    "apply",
    "attach",
    "bake",
    "convert",
    "gates",
    "load",
    "load_pipeline",
    "pull",
    "push",
    "train",
]

_ROOMS = {
    "Adapter": "spm_hub.adapters.adapter",
    "Applied": "spm_hub.evaluation.application",
    "ClosedForm": "spm_hub.training.loop.closed_form",
    "Conversion": "spm_hub.hub.convert",
    "Family": "spm_hub.models.architectures",
    "Format": "spm_hub.adapters.formats.format",
    "Losses": "spm_hub.training.objective",
    "Manifest": "spm_hub.adapters.manifest",
    "Method": "spm_hub.training.methods.method",
    "Objective": "spm_hub.training.objective",
    "PredictionRun": "spm_hub.training.loop.prediction_run",
    "Recipe": "spm_hub.training.recipe.recipe",
    "RecipePart": "spm_hub.training.recipe.schema",
    "Registry": "spm_hub.registry.registry",
    "Run": "spm_hub.training.loop.run",
    "Task": "spm_hub.training.loop.run",
    "TextGates": "spm_hub.attachment.gates.text_gates",
    "Trainable": "spm_hub.training.trainable.trainable",
    "TrainingInterruptedError": "spm_hub.training.trainer",
    "TrainingStep": "spm_hub.training.session",
    "bake": "spm_hub.hub.bake",
    "convert": "spm_hub.hub.convert",
    "load_pipeline": "spm_hub.models.loading",
}


_P = ParamSpec("_P")
_T = TypeVar("_T")


def _saying_what_is_missing(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Have a function raise UsageError for a library that the core distribution does not bring."""

    @wraps(function)
    def called(*args: _P.args, **given: _P.kwargs) -> _T:
        try:
            return function(*args, **given)
        except ModuleNotFoundError as error:
            library = (error.name or "").partition(".")[0]
            if library in ("", "spm_hub"):
                raise
            package = {"yaml": "PyYAML", "PIL": "pillow"}.get(library, library)
            raise UsageError(
                f"spm_hub.{function.__name__} needs {package} here, which is not installed",
                mend=f"pip install {package}; the distribution spm-hub brings all that spm-hub-core leaves out",
            ) from error

    return called


@_saying_what_is_missing
def attach(
    pipe: Any,
    adapters: "str | Path | Adapter | Iterable[str | Path | Adapter]" = (),
    *,
    erase: str | Iterable[str] = (),
    look: bool = True,
    registry: str | Path | None = None,
    gate: "GateName | float | Gate | PreparingGate | None" = None,
    concept: Mapping[str, str] | str | None = None,
    strength: Mapping[str, float] | float | None = None,
    rows: Literal["both", "conditional"] | None = None,
    law: Literal["linear", "squared"] | None = None,
    mode: Literal["auto", "fold", "branch"] = "auto",
    memory_budget: int | None = None,
    increment_budget: int | None = None,
    threshold: float | None = None,
    top_k: int | None = None,
    force: bool = False,
    progress: bool | Callable[[int, int, Mapping[str, float]], object] = True,
    reporter: "Reporter | None" = None,
) -> "Attachment":
    """Attach erasers to a diffusers pipeline, until `detach()` or the end of a `with` block.

    adapters: one or several Adapters or references: a path, a name in a registry, owner/name[@revision] on the Hub.
    erase: concepts to erase by whatever eraser fits this pipeline: a registry's or, where none has one, a new one that
        is computed in seconds (method "instant") and kept in the registry. look: whether a quick look judges it.
    registry: the first folder to look names up in; None, the default, starts with $SPMHUB_REGISTRY or your own.
    gate: "calibrated" (0 on prompts that do not concern the concept, 1 on its names), "transport" (facilitated
        transport, arXiv 2312.16145, Eq. 9-11), "always" (gamma 1), "evidence" (calibrated, and asks the denoiser what
        the eraser would change and what the finished picture shows, which may be drawn again), a gamma, or a `Gate`.
    concept: what the only eraser erases, or some by name, where a file does not say it or says another. Without a
        concept an eraser acts fully on every prompt, with a warning.
    strength: the finite factor of gamma, one number for all erasers or some by name.
    rows: "both", or "conditional" to leave the unconditional rows of classifier-free guidance as they are.
    law: "linear" (the change is times gamma times strength), or "squared", as in the code released with SPM.
    mode: "fold" (written into the weights), "branch" (a gamma for each row), or "auto" (default: by each batch).
    memory_budget: bytes of original weights that folding may keep on their device; None, the default, is no limit.
    increment_budget: bytes of lazily loaded increments that stay in memory; None, the default, is no limit.
    threshold: the least gamma that acts, a smaller one counts as 0; None, the default, lets every gamma act.
    top_k: how many erasers act on one prompt, those of greatest gamma; None, the default, is all of them.
    force: attach erasers although one takes back what another changes, which is refused otherwise.
    progress: of a calibrated gate's first use, if it is slow: True for a bar, False, or a function of (done, all, {}).
    reporter: shows this progress instead; None, the default, is the bar or function of `progress`.

    None, the default of gate, strength, rows and law, takes what each eraser's manifest says; gates are "calibrated"
    there, unless somebody chose another (`Manifest.default_gate`).

    Under an increment_budget references are loaded lazily. `spm_hub.attachment.attach` describes threads, saving and
    calls of the denoiser by hand. Raises SpmHubError; the pipeline is then unchanged.
    """
    from spm_hub.adapters.adapter import Adapter
    from spm_hub.attachment import attachment
    from spm_hub.hub.making.on_demand import erasers_for
    from spm_hub.io.progress import Bars

    several, lazy = _several(adapters), increment_budget is not None
    loaded = [one if isinstance(one, Adapter) else load(one, registry=registry, lazy=lazy) for one in several]
    if concepts := [erase] if isinstance(erase, str) else list(erase):
        place, shown = None if registry is None else Path(registry), reporter or Bars(progress)
        loaded += [one.load(lazy=lazy) for one in erasers_for(concepts, pipe, None, shown, place, look=look)]
    return attachment.attach(
        pipe, loaded, gate=gate, concept=concept, strength=strength, rows=rows, law=law, mode=mode,
        memory_budget=memory_budget, increment_budget=increment_budget, threshold=threshold, top_k=top_k, force=force,
        progress=progress, reporter=reporter,
    )  # fmt: skip


@_saying_what_is_missing
def gates(
    erasers: "str | Path | Adapter | Iterable[str | Path | Adapter]",
    text: str,
    *,
    encode: "Encode",
    states: "torch.Tensor | None" = None,
    tokenizers: Sequence[Any] = (),
    registry: str | Path | None = None,
    gate: "GateName | float | Gate | PreparingGate | None" = None,
    concept: Mapping[str, str] | str | None = None,
    threshold: float | None = None,
    top_k: int | None = None,
    max_sequence_length: int | None = None,
    progress: bool | Callable[[int, int, Mapping[str, float]], object] = True,
) -> dict[str, float]:
    """Return the gamma of every eraser for a text as `Attachment.gates` does, without a pipeline.

    For programs that encode texts and draw on their own; `TextGates` is quicker for several texts.
    erasers, registry: one or several Adapters or references, as for `attach`; only their headers are read.
    encode: gives the states of several texts as the denoiser receives them: (texts, tokens, d_text).
    states: those of `text`, (1, tokens, d_text); None, the default, encodes it.
    tokenizers: those of transformers, in the pipeline's order; None in place of one that is missing.
    max_sequence_length: how many tokens language models such as T5 read, as in the pipeline's call.
    gate, concept, threshold, top_k, progress: as for `attach`; "evidence" reads the text alone.

    Raises UsageError, NotFoundError with the nearest names, and what `load` raises.
    """
    from spm_hub.adapters.adapter import Adapter
    from spm_hub.attachment.gates.text_gates import TextGates

    loaded = [one if isinstance(one, Adapter) else load(one, registry=registry, lazy=True) for one in _several(erasers)]
    asked = TextGates(
        loaded, encode, tokenizers, gate=gate, concept=concept, threshold=threshold, top_k=top_k,
        max_sequence_length=max_sequence_length, progress=progress,
    )  # fmt: skip
    return asked.gates(text, states)


@_saying_what_is_missing
def load(reference: str | Path, *, registry: str | Path | None = None, lazy: bool = False) -> "Adapter":
    """Load an eraser by its path, its name or concept, or its address on the Hub.

    reference: a path, a name or concept in a registry, or owner/name[@revision] on the Hugging Face Hub.
    registry: a folder to look names up in before your own registry.
    lazy: read only the header now, and the increments, with all checks, when a prompt first needs them.
    Raises NotFoundError with the nearest names, AdapterFileError, ManifestError, HubError, NetworkError.
    """
    from spm_hub.hub import resolve as resolving

    return resolving.load(str(reference), None if registry is None else Path(registry), lazy=lazy)


@_saying_what_is_missing
def pull(
    reference: str,
    *,
    registry: str | Path | None = None,
    name: str | None = None,
    concept: str | None = None,
    replace: bool = False,
    largest: int | None = None,
) -> "Adapter":
    """Keep an eraser of the Hugging Face Hub in a registry, pinned to its commit, and return it.

    reference: owner/name[@revision]. registry: your own unless given. name: unless given, the eraser's own. concept:
    what it erases, if its file does not say. replace: whether it may replace an eraser of that name from elsewhere.
    largest: bytes that its file may have; None is 512 MB, or what the variable SPMHUB_LARGEST_DOWNLOAD says.
    Raises UsageError for another form of reference, HubError, NetworkError, RegistryError.
    """
    from spm_hub.hub import pull as remote
    from spm_hub.io.web_addresses import hub_reference
    from spm_hub.registry import registry as registries

    match = registries.HUB_REFERENCE.fullmatch(hub_reference(reference))
    if match is None:
        raise UsageError(f"{reference!r} is not of the form owner/name[@revision]", mend="spmhub search snoopy")
    kept_in = registries.user_registry() if registry is None else registries.Registry(Path(registry))
    repo, revision = match["repo"], match["revision"]
    pulled = remote.pull(repo, revision, registry=kept_in, name=name, concept=concept, replace=replace, largest=largest)
    return pulled.entry.load()


@_saying_what_is_missing
def push(
    reference: str | Path,
    repo: str,
    *,
    pictures: str | Path | None = None,
    registry: str | Path | None = None,
    private: bool = False,
    revision: str | None = None,
    pull_request: bool = False,
) -> str:
    """Share an eraser on the Hugging Face Hub; return the address of the commit or pull request.

    reference, registry: the eraser, as for `load`. repo: owner/name, made if there is none, `private` or public.
    A model card is written from the manifest.
    pictures: a folder that `spmhub apply --compare` or `apply(out=...)` filled, for the card. Of an eraser of nudity
        and the like only pictures on which it acted are published, never those without it.
    revision: a branch to commit to, made if there is none. pull_request: propose the commit, to an existing repository.
    Raises UsageError, HubError if the Hub refuses, NetworkError; the repository is then as it was.
    """
    import tempfile

    from spm_hub.hub import push as pushing
    from spm_hub.hub.card import is_explicit, read_pairs
    from spm_hub.hub.resolve import resolve

    with tempfile.TemporaryDirectory() as staging:
        entry = resolve(str(reference), None if registry is None else Path(registry))
        manifest = entry.read_manifest()
        explicit = is_explicit(manifest.concept)
        pairs = () if pictures is None else read_pairs(Path(pictures), manifest.name, explicit=explicit)
        release = pushing.prepare(entry, repo, pairs, Path(staging))
        pushed = pushing.push(release, private=private, revision=revision, pull_request=pull_request)
    return pushed.pull_request or pushed.url


@overload
def train(
    concept: "str | Recipe", *,
    model: str | None = None, config: str | None = None, method: str | None = None,
    device: "str | torch.device | None" = None, dtype: "torch.dtype | str | None" = None,
    pipe: "DiffusionPipeline | None" = None, registry: "str | Path | Registry | bool | None" = None,
    name: str | None = None, replace: bool = False, resume: bool = False, checkpoint_dir: str | Path | None = None,
    memory: float | None = None, progress: bool | Callable[[int, int, Mapping[str, float]], object] = True,
    callbacks: "Sequence[Callable[[TrainingStep], object]]" = (), **recipe: Any,
) -> "Adapter": ...  # fmt: skip
@overload
def train(
    concept: list[str] | tuple[str, ...], *,
    model: str | None = None, config: str | None = None, method: str | None = None,
    device: "str | torch.device | None" = None, dtype: "torch.dtype | str | None" = None,
    pipe: "DiffusionPipeline | None" = None, registry: "str | Path | Registry | bool | None" = None,
    name: str | None = None, replace: bool = False, resume: bool = False, checkpoint_dir: str | Path | None = None,
    memory: float | None = None, progress: bool | Callable[[int, int, Mapping[str, float]], object] = True,
    callbacks: "Sequence[Callable[[TrainingStep], object]]" = (), **recipe: Any,
) -> "tuple[Adapter, ...]": ...  # fmt: skip


@_saying_what_is_missing
def train(
    concept: "str | Recipe | list[str] | tuple[str, ...]",
    *,
    model: str | None = None,
    config: str | None = None,
    method: str | None = None,
    device: "str | torch.device | None" = None,
    dtype: "torch.dtype | str | None" = None,
    pipe: "DiffusionPipeline | None" = None,
    registry: "str | Path | Registry | bool | None" = None,
    name: str | None = None,
    replace: bool = False,
    resume: bool = False,
    checkpoint_dir: str | Path | None = None,
    memory: float | None = None,
    progress: bool | Callable[[int, int, Mapping[str, float]], object] = True,
    callbacks: "Sequence[Callable[[TrainingStep], object]]" = (),
    **recipe: Any,
) -> "Adapter | tuple[Adapter, ...]":
    """Train an eraser of a concept and return it; of several concepts, one eraser each.

    concept: what to erase, in words; a Recipe; or a list of concepts, which "instant", "sepme" and "uce" train jointly.
    model, config: the base model to load, as in `load_pipeline`; default: the recipe's, else the sketchbook.
    method: how to erase, "spm" unless given; `spmhub methods` lists all.
    device, dtype: where and in which precision to train, such as "cuda" and torch.bfloat16; default: a GPU if there
        is one, in bfloat16 if the base is stored in it, else float32.
    pipe: a diffusers pipeline to train on, as it is and where it is; afterwards it is as before, bit for bit. The
        manifest names it by `model` if given, else by where it was loaded from, else by its class.
    registry: a folder or Registry to keep the eraser in, True for the command's; None, the default, keeps nothing.
    name: of the eraser; default: made from the concept.
    replace: whether it may replace an eraser of that name in the registry.
    resume: go on after an interrupted or killed run of the same recipe on the same base, if there is one; the result is
        the identical file.
    checkpoint_dir: the folder for the state of the run, which is saved every 50 steps and at Ctrl-C, with or without a
        registry, and deleted at the end; default: the one that `spmhub train` uses for this recipe on this base.
    memory: GiB that training may use, weights included; default: what is free. Rows that do not fit take turns.
    progress: True for a bar in terminals and notebooks, False for none, or a function of (step, steps in all, figures),
        which are the losses, and "reached" and "goal" where the method measures them.
    callbacks: called after every step with a `TrainingStep`; one that returns True ends the training there, which
        `training` in the manifest records: its recipe still names all steps.
    recipe: other keys of the recipe, such as steps=500 or optimiser={"lr": 1e-3}; of a part given as a dict, the keys
        that are not in it keep their values.

    Raises TrainingInterruptedError at Ctrl-C, UsageError for an empty concept, the device "meta" or a pipeline that is
    not what `device` and `dtype` ask for, RecipeError for an unknown key or an impossible value, RegistryError for a
    name that is taken, all three before anything is loaded; ModelError, NetworkError.
    """
    from spm_hub.adapters.adapter import Adapter
    from spm_hub.hub.resolve import resolve
    from spm_hub.io.progress import Bars
    from spm_hub.models.base_choice import BaseChoice
    from spm_hub.registry.registry import registry_for_new
    from spm_hub.training.planning import plan
    from spm_hub.training.session import Session

    named = {key: value for key, value in (("model", model), ("method", method), ("name", name)) if value is not None}
    plans = plan(concept, {**named, **recipe})
    if pipe is not None:
        _check_bare(pipe)
    place = None if registry is None or isinstance(registry, bool) else _folder_of(registry)
    session = Session(
        plans, BaseChoice(model if pipe is not None else plans[0].model, config, device, dtype, pipe), Bars(progress),
        lambda start: resolve(start, place), replace=replace, resume=resume, memory=memory,
        registry=registry_for_new(place) if registry not in (None, False) else None,
        checkpoint_dir=None if checkpoint_dir is None else Path(checkpoint_dir), callbacks=tuple(callbacks),
    )  # fmt: skip
    session.check()
    made = tuple(one if isinstance(one, Adapter) else one.load() for one in session.train())
    return made if isinstance(concept, list | tuple) else made[0]


@_saying_what_is_missing
def apply(
    adapters: "str | Path | Adapter | Iterable[str | Path | Adapter]",
    prompts: str | Sequence[str],
    *,
    erase: str | Iterable[str] = (),
    model: str | None = None,
    config: str | None = None,
    pipe: "DiffusionPipeline | None" = None,
    device: "str | torch.device | None" = None,
    dtype: "torch.dtype | str | None" = None,
    registry: "str | Path | Registry | None" = None,
    seed: int = 0,
    number: int = 1,
    steps: int | None = None,
    guidance: float | None = None,
    at_once: int | None = None,
    gate: "GateName | float | Gate | PreparingGate | None" = None,
    strength: Mapping[str, float] | float | None = None,
    rows: Literal["both", "conditional"] | None = None,
    mode: Literal["auto", "fold", "branch"] = "auto",
    threshold: float | None = None,
    top_k: int | None = None,
    force: bool = False,
    compare: bool = True,
    out: str | Path | None = None,
    progress: bool | Callable[[int, int, Mapping[str, float]], object] = True,
) -> "Applied":
    """Draw prompts with erasers attached and, from the same noise, without them; return both.

    adapters, erase, registry: the erasers, as for `attach`.
    prompts: one or several.
    model, config, device, dtype: the base to draw with, as in `load_pipeline`; default: the sketchbook, "auto".
    pipe: a diffusers pipeline to draw with, as it is and where it is; afterwards it is as before.
    seed, number: pictures for each prompt; the first starts from the noise of `seed`, the next from that of seed + 1.
    steps, guidance: denoising steps and guidance scale; default: the pipeline's own.
    at_once: pictures in one batch; default: 8, fewer if they are large.
    gate, strength, rows, mode, threshold, top_k, force: as for `attach`.
    compare: whether to draw without the erasers too.
    out: a folder for the pictures as PNG files and for `grid.png`; None, the default, writes nothing.
    progress: True for a bar in terminals and notebooks, False for none, or a function of (step, steps in all, {}).

    The result has for each prompt the pictures (`with_erasers`, `without`) and the gamma of each eraser (`gammas`), and
    all pictures in one labelled `grid`.
    Raises UsageError for an empty prompt or an impossible option, NotFoundError, ModelError, CompatibilityError,
    NetworkError, RegistryError for a folder that cannot be written.
    """
    from spm_hub.hub.resolve import resolve
    from spm_hub.io.progress import Bars
    from spm_hub.models.base_choice import BaseChoice

    reference = "sketchbook" if model is None and pipe is None else model
    base, place = BaseChoice(reference, config, device, dtype, pipe), None if registry is None else _folder_of(registry)
    reporter = Bars(progress)
    if remark := base.check():
        reporter.say(remark)
    given = _several(adapters)
    erasers = [resolve(str(one), place) if isinstance(one, str | Path) else one for one in given]

    from spm_hub.evaluation import application
    from spm_hub.evaluation.pictures import DrawingOptions

    return application.apply(
        erasers, [prompts] if isinstance(prompts, str) else prompts, base,
        DrawingOptions(seed, number, steps, guidance, at_once), reporter,
        gate=gate, strength=strength, rows=rows, mode=mode, threshold=threshold, top_k=top_k,
        force=force, compare=compare, out=None if out is None else Path(out),
        erase=[erase] if isinstance(erase, str) else list(erase), registry=place,
    )  # fmt: skip


def _several(adapters: "str | Path | Adapter | Iterable[str | Path | Adapter]") -> "list[str | Path | Adapter]":
    """Return the erasers and references that a caller names, one or many, as a list."""
    from spm_hub.adapters.adapter import Adapter

    if isinstance(adapters, Mapping):
        raise UsageError("adapters is a mapping: it has to name erasers alone", mend="attach(..., strength={...}) too")
    given: Any = adapters
    several = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    if not all(isinstance(one, str | Path | Adapter) for one in several):
        raise UsageError(
            f"adapters holds erasers: names, paths or Adapters, not {adapters!r}", mend='attach(pipe, ["snoopy"])'
        )
    return several


def _check_bare(pipe: "DiffusionPipeline") -> None:
    """Refuse to train on a pipeline that has erasers attached."""
    from spm_hub.attachment.pipeline_hooks import is_attached

    if is_attached(pipe):
        raise UsageError(
            "the given pipeline has erasers attached, which would change what a new eraser learns",
            mend="erasers.detach() first, and attach them again afterwards",
        )


def _folder_of(registry: "str | Path | Registry") -> Path:
    return Path(registry) if isinstance(registry, str | Path) else registry.root


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("spm-hub")
        except PackageNotFoundError:
            return version("spm-hub-core")
    if name not in _ROOMS:
        raise AttributeError(f"module 'spm_hub' has no attribute {name!r}")
    return getattr(import_module(_ROOMS[name]), name)

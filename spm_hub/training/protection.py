"""Computes the null space of protected prompts' text states, and measures the rest of the leak.

Keys and values of cross-attention read the text states e(c), (tokens, d_text), and nothing else. An increment dW with
dW e(c) = 0 therefore changes nothing of a picture of c (SepME, arXiv 2402.05947, weight decoupling).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from spm_hub.adapters.increments import Dense, Increment, LowRank
from spm_hub.adapters.manifest import Evaluation
from spm_hub.errors import RecipeError
from spm_hub.io.progress import phase
from spm_hub.models.architectures import weight_of
from spm_hub.training.base_model import TeacherModel
from spm_hub.training.recipe.fields import RecipeFields
from spm_hub.training.recipe.protected_prompts import exactly_protected, members
from spm_hub.training.trainable.module_selection import TEXT_ENTRY

PROTOCOL = "protected-prompts"
_NOISE = 1e-7  # of the largest singular value: below is float32's rounding of states that are the same
_LEFT = 1e-4  # of the target's states, outside of the protected ones: less cannot be changed without huge weights


@dataclass(frozen=True, eq=False)
class Space:
    """The directions that are left to an increment (SRS-ME, SepME's authors' later text of it, Eq. 25).

    basis: S (k, d_text), float64, orthonormal rows.  exact: prompts whose states it sends to zero; prompts: all that
    are protected, with their states (n, tokens, d_text).  target: the concept's states (1, tokens, d_text).
    """

    basis: Tensor
    exact: tuple[str, ...]
    prompts: tuple[str, ...]
    states: Tensor
    target: Tensor

    @property
    def projector(self) -> Tensor:
        """P = S^T S = I - pinv(A) A, (d_text, d_text)."""
        return self.basis.T @ self.basis

    def projected(self, increments: Mapping[str, Increment]) -> dict[str, Increment]:
        """dW P of every increment; of a low-rank one down P, whose rank is the same. Biases are dropped.

        Raises RecipeError for a mask, which is no matrix of its own.
        """
        found: dict[str, Increment] = {}
        for path, increment in increments.items():
            match increment:
                case LowRank(down, up):
                    found[path] = LowRank((down.double() @ self.projector.to(down.device)).to(down.dtype), up)
                case Dense(delta):
                    found[path] = Dense((delta.double() @ self.projector.to(delta.device)).to(delta.dtype))
                case _:
                    raise RecipeError(
                        f"{path}: a mask switches neurons off for every prompt, it cannot leave some alone",
                        mend="leave --separable out, or --method sepme",
                    )
        return found

    def measured(
        self, increments: Mapping[str, Increment], modules: Mapping[str, nn.Module], recipe: RecipeFields
    ) -> tuple[Evaluation, Evaluation]:
        """Return the greatest |dW e| / |W e| over the modules, in float64: the movement of keys and values.

        First that of the protected prompt that moves most, then that of the target.
        """
        states = torch.cat([self.states, self.target])
        moved = torch.zeros(len(states), dtype=torch.float64)
        with phase("measuring what protected prompts are left with") as move:
            for done, (path, increment) in enumerate(increments.items(), start=1):
                weight = weight_of(modules[path]).detach().cpu()
                change, whole = increment.delta_for(weight).double(), weight.double()
                # One prompt at a time: hundreds of them, multiplied out at once, would fill the memory.
                now = [torch.linalg.norm(e @ change.T) / torch.linalg.norm(e @ whole.T) for e in states]
                moved = torch.maximum(moved, torch.stack(now))
                move(done, len(increments))
        most = int(moved[:-1].argmax())

        def entry(prompt: str, row: int, samples: int) -> Evaluation:
            return Evaluation(
                protocol=PROTOCOL, base=recipe.model, subject=repr(prompt), metric="keys_and_values_moved",
                value=float(moved[row]), samples=samples, seed=recipe.seed,
            )  # fmt: skip

        return entry(self.prompts[most], most, len(self.prompts)), entry(recipe.target, -1, 1)


def space_left(recipe: RecipeFields, base: TeacherModel, modules: Mapping[str, nn.Module]) -> Space:
    """Return the space that a recipe's protection leaves of the text states of `base`.

    Raises RecipeError if some module reads more than the text states, if no space is left, or if nothing of the target
    is in it.
    """
    _check_modules(base, modules, recipe.target)
    exact = exactly_protected(recipe)
    further = tuple(prompt for prompt in dict.fromkeys(recipe.protection.prompts or ()) if prompt not in exact)
    with phase("protecting prompts") as move:
        states, target = _states(base, (*exact, *further)), _states(base, [recipe.target])
        width = states.shape[-1]
        triangle = torch.zeros(0, width, dtype=torch.float64)
        for done, rows in enumerate(states[: len(exact)]):
            triangle = _triangle(triangle, rows)
            span = _spanned(triangle)
            if len(span) == width or _outside(target, span) < _LEFT:
                raise _crowded(width, recipe.target, exact, done)
            move(done + 1, len(exact))
    wanted = recipe.protection.directions or 0
    if further:
        if len(span) + wanted >= width:
            raise _too_many_directions(width, len(span), wanted)
        rest = torch.zeros(0, width, dtype=torch.float64)
        for rows in states[len(exact) :]:
            rest = _triangle(rest, rows - rows @ span.T @ span)
        span = torch.cat([span, _spanned(rest)[:wanted]])
    basis = torch.linalg.qr(span.T, mode="complete").Q[:, len(span) :].T.contiguous()
    if _outside(target, span) < _LEFT:
        raise RecipeError(
            f"recipe key protection.directions: {wanted} directions take up all that is there of {recipe.target!r}, "
            "which cannot be changed then",
            mend=f"--set protection.directions={wanted // 2}, or fewer",
        )
    return Space(basis, exact, (*exact, *further), states, target)


def check_room(recipe: RecipeFields, folder: Path) -> None:
    """Raise RecipeError for prompts that leave no null space, judged by a folder's tokenizer alone.

    CLIP's text encoder is causal: prompts that begin with the same tokens have the same states so far, so that the
    rank of all states is the number of different beginnings. For other encoders nothing is checked before they run.
    """
    encoders = sorted(folder.glob("text_encoder*/config.json"))
    configs = [json.loads(path.read_text(encoding="utf-8")) for path in encoders]
    if not configs or any(config.get("model_type") != "clip_text_model" for config in configs):
        return
    from transformers import CLIPTokenizer

    width = sum(config["hidden_size"] for config in configs)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    window = tokenizer.model_max_length
    for member in members(recipe):
        exact = exactly_protected(member)
        beginnings: set[tuple[int, ...]] = set()
        for done, prompt in enumerate(exact):
            ids = tokenizer(prompt, padding="max_length", truncation=True, max_length=window).input_ids
            beginnings |= {tuple(ids[: end + 1]) for end in range(len(ids))}
            if len(beginnings) >= width:
                raise _crowded(width, member.target, exact, done)
        wanted = recipe.protection.directions or 0
        if wanted and wanted + len(beginnings) >= width:
            raise _too_many_directions(width, len(beginnings), wanted)


def _crowded(width: int, target: str, exact: Sequence[str], fitting: int) -> RecipeError:
    """`fitting`: how many of `exact`, from the first, leave something."""
    names = ", ".join(repr(prompt) for prompt in exact[:fitting]) or "none of them"
    return RecipeError(
        f"recipe key protection: the states of {len(exact)} protected prompts, the empty one among them, span all that "
        f"there is of {target!r} in the {width} dimensions of the text encoder, and no null space is left for an "
        f"increment; {names} would fit",
        mend=f"protect the first {fitting} only, or hold prompts by --set protection.directions=N",
    )


def _too_many_directions(width: int, taken: int, wanted: int) -> RecipeError:
    most = width - taken - 1
    return RecipeError(
        f"recipe key protection.directions: {wanted} of {width} dimensions, where the exactly protected prompts take "
        f"{taken}, leave no null space for an increment",
        mend=f"--set protection.directions={most}, or fewer" if most > 0 else "protect fewer prompts exactly",
    )


def _states(base: TeacherModel, prompts: Sequence[str]) -> Tensor:
    """Return the states (n, tokens, d_text), float64, on the CPU, exactly as the denoiser receives them.

    Of the empty prompt too where guidance puts zeros in its place: those no weight makes anything of.
    """
    return base.encode(prompts, literally=True).states.double().cpu()


def _outside(states: Tensor, span: Tensor) -> float:
    """Return the share of the norm of these states outside of `span`."""
    return float(torch.linalg.norm(states - states @ span.T @ span) / torch.linalg.norm(states))


def _triangle(triangle: Tensor, rows: Tensor) -> Tensor:
    """R of a QR of all rows so far (n, d): the same row space and singular values in at most d rows."""
    smaller: Tensor = torch.linalg.qr(torch.cat([triangle, rows]), mode="r").R
    return smaller


def _spanned(triangle: Tensor) -> Tensor:
    """Orthonormal rows (r, d) that span those of `triangle`, by falling singular value."""
    _, values, directions = torch.linalg.svd(triangle, full_matrices=False)
    spanned: Tensor = directions[values > _NOISE * values[0]]
    return spanned


@torch.no_grad()
def modules_not_reading_text(base: TeacherModel, modules: Mapping[str, nn.Module], prompt: str) -> list[str]:
    """Return the paths of modules whose input is not exactly the text states, or that are never called."""
    row = base.encode([prompt])
    given: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda module, args, path=path: given.update({path: args[0]}))
        for path, module in modules.items()
    ]
    try:
        scheduler = base.scheduler(base.steps(2))
        time = scheduler.timesteps[:1]
        base.predict(torch.ones(1, *base.latent_shape, device=base.device), time, row)
    finally:
        for hook in hooks:
            hook.remove()
    return [path for path in modules if path not in given or not torch.equal(given[path], row.states)]


def changes_text_states(denoiser: nn.Module) -> bool:
    """Return whether a layer changes the text states before attention reads them, as in PixArt and Sana."""
    return getattr(denoiser, "caption_projection", None) is not None


def modules_reading_more(denoiser: nn.Module, modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the paths of those modules that read more than the text states, by their names alone."""
    return [path for path in modules if changes_text_states(denoiser) or ("attn2" not in path and path != TEXT_ENTRY)]


def _check_modules(base: TeacherModel, modules: Mapping[str, nn.Module], prompt: str) -> None:
    """Raise RecipeError for modules that read more than the text states, or whose weights are quantised."""
    if path := next((path for path, module in modules.items() if not weight_of(module).is_floating_point()), None):
        raise RecipeError(f"{path} is quantised: what its increments leave alone cannot be measured there")
    if others := modules_not_reading_text(base, modules, prompt):
        raise not_separable(others, len(modules))


def not_separable(paths: Sequence[str], whole: int) -> RecipeError:
    """For these of `whole` modules, which do not read the text states alone."""
    return RecipeError(
        f"increments of this model cannot be made separable: {paths[0]} ({len(paths)} of {whole} modules) "
        "reads more than the text encoder's states, so that nothing done to it leaves a prompt alone",
        mend="--method esd-x, or a model with cross-attention (SD 1, SD 2, SDXL)",
    )

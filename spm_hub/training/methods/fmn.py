"""Forget-Me-Not: cross-attention looks away from the concept's words.

Zhang et al., Forget-Me-Not: Learning to Forget in Text-to-Image Diffusion Models, 2023, arXiv 2303.17591.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from spm_hub.errors import RecipeError
from spm_hub.training.data.token_positions import concept_positions
from spm_hub.training.methods.method import PREDICTION_KEYS, Method, check_prediction_model
from spm_hub.training.objective import Losses, Objective
from spm_hub.training.recipe.validation import check_prediction

if TYPE_CHECKING:
    from torch import Tensor, nn

    from spm_hub.training.base_model import TeacherModel
    from spm_hub.training.data.batch import Batch
    from spm_hub.training.recipe.fields import RecipeFields


@dataclass(frozen=True)
class ForgetMeNot(Objective):
    """The Frobenius norm of all cross-attention probabilities from the picture to the concept's tokens.

    names: the concept's.  tokens: "concept", its own (the paper's), or "onwards", also all after its first: a text
    encoder that reads from left to right passes the concept on to them.
    """

    # The base's attention is not computed again for every batch.
    measures_distance: ClassVar[bool] = False
    by_row: ClassVar[bool] = False
    names: tuple[str, ...]
    tokens: Literal["concept", "onwards"] = "concept"

    @property
    def push(self) -> float:
        return 0.0

    def target(self, concept: Tensor, neutral: Tensor) -> Tensor:
        """Return `neutral`: the loss is in attention, and has no target prediction."""
        return neutral

    def reached(self, left: float) -> float:
        """The share of the attention's norm that has left the concept's tokens."""
        return 1 - left

    def losses(self, base: TeacherModel, batch: Batch) -> Losses:
        """Return the losses of one batch.

        Raises RecipeError for a denoiser without cross-attention, for one whose prompts are masked, and for prompts
        that exceed the tokenizer's window.
        """
        import torch

        if batch.states.mask is not None:
            raise masked()
        chosen = torch.zeros(batch.states.shape[:2], dtype=torch.bool, device=batch.latents.device)
        for row, prompt in enumerate(batch.prompts):
            positions = concept_positions(base.pipe.tokenizer, prompt, self.names)
            onwards = slice(positions[0] if positions else chosen.shape[1], None)
            chosen[row, onwards if self.tokens == "onwards" else list(positions)] = True
        if not bool(chosen.any()):
            raise RecipeError(
                f"the window of {type(base.pipe.tokenizer).__name__} ends before the concept in {batch.prompts[0]!r}",
                mend="--set templates=false, which trains on the concept's name alone",
            )
        with record_attention(base.denoiser) as seen:
            _, anchors = self.predicted(base, batch)
        erase = attention_norm(seen, chosen)
        kept = self.anchor(anchors, batch.anchor_predictions) if len(anchors) else anchors.new_zeros(())
        return Losses(erase, kept, erase.detach())


def attention_norm(probabilities: Sequence[Tensor], chosen: Tensor) -> Tensor:
    """The norm of the probabilities at the chosen tokens, of all layers.

    probabilities: each (n, heads, pixels, tokens); chosen: (rows, tokens), bool, of the first `rows` of n.
    """
    import torch

    parts = [layer[: len(chosen)].transpose(2, 3).transpose(1, 2)[chosen].flatten() for layer in probabilities]
    norm: Tensor = torch.cat(parts).norm()
    return norm


def cross_attentions(denoiser: nn.Module) -> list[nn.Module]:
    """Raises RecipeError where there is none: in FLUX and SD3 picture and text attend together.

    SD3.5 calls its second attention of the picture to itself attn2, too.
    """
    layers = [
        module
        for path, module in denoiser.named_modules()
        if path.endswith("attn2") and getattr(module, "is_cross_attention", True)
    ]
    if not layers:
        raise RecipeError(
            f"method 'fmn' needs cross-attention, which {type(denoiser).__name__} has none of", mend="--method esd-x"
        )
    return layers


def masked() -> RecipeError:
    """Return the error for a denoiser that masks some of the text states."""
    return RecipeError("method 'fmn' knows no denoiser whose prompts are masked", mend="--method esd-x")


@contextmanager
def record_attention(denoiser: nn.Module) -> Iterator[list[Tensor]]:
    """Record all cross-attention probabilities while the denoiser runs.

    They are added to the returned list, (n, heads, pixels, tokens) float32 for each layer.
    Raises RecipeError if there is no cross-attention.
    """
    layers = cross_attentions(denoiser)
    seen: list[Tensor] = []

    def look(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        attention: Any = layer
        hidden, states = args[0], kwargs["encoder_hidden_states"]
        query, key = (
            part.unflatten(-1, (attention.heads, -1)).transpose(1, 2).float()
            for part in (attention.to_q(hidden), attention.to_k(states))
        )
        seen.append((query @ key.transpose(-1, -2) * attention.scale).softmax(dim=-1))

    hooks = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def check(recipe: RecipeFields) -> None:
    """Refuse steering by a prediction, which the method lacks, and a surrogate that it does not read."""
    check_prediction(recipe)
    anchoring = recipe.anchoring
    if anchoring.weight and anchoring.reach is not None:
        raise ValueError("method 'fmn' has no prediction to steer by: anchoring.reach has to be null with it")
    if recipe.surrogate and "surrogate" not in (anchoring.source, recipe.x_t.driver):
        raise ValueError(
            f"method 'fmn' turns attention away from the concept, to nothing else, and does not read surrogate "
            f"{recipe.surrogate!r}: leave it out, or take method 'ca' or 'esd-x'"
        )


def check_model(recipe: RecipeFields, denoiser: nn.Module) -> None:
    """Raise RecipeError for a denoiser without cross-attention, or whose prompts are masked."""
    from spm_hub.training.protection import changes_text_states

    check_prediction_model(recipe, denoiser)
    cross_attentions(denoiser)
    if changes_text_states(denoiser):  # a mask then says which of the states count
        raise masked()


METHOD = Method(
    name="fmn",
    title="Forget-Me-Not",
    paper="Zhang et al., 2023, arXiv 2303.17591",
    summary="Turns cross-attention away from the concept's words: the shortest training, on SD 1, SD 2 and SDXL.",
    cost="Five seconds on the sketchbook; a file of the size of cross-attention.",
    harm="The most measured: without a gate nearly everything else is lost, and a style may stay.",
    preset={
        "objective": {"name": "fmn", "tokens": "onwards"},
        "increment": {"kind": "dense", "modules": "esd-x"},
        "anchoring": {"weight": 0.0, "reach": None, "per_target": 0},
        "optimiser": {"lr": 1e-3, "schedule": "constant", "warmup": 0},
        "x_t": {"guidance": (3.0,), "chunks": 1},
        "steps": 35,
    },
    objective=lambda recipe: ForgetMeNot((recipe.target, *recipe.aliases), recipe.objective.tokens),
    uses=PREDICTION_KEYS - {"erase_from"} | {"objective.tokens"},
    instead={
        "objective.eta": "it turns attention away, without a target; methods 'spm' and 'esd-x' have one",
        "objective.paired": "it asks for no surrogate's prediction",
        "erase_from": "it turns attention away from the concept's own words",
    },
    check=check,
    check_model=check_model,
)

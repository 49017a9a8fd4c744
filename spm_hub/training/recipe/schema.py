"""The parts of a recipe: objective, increment, source of x_t, anchoring, optimiser and others.

Each part checks itself; the recipe checks their combinations. Unknown keys are refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from spm_hub.errors import UsageError, nearest

NonBlank = Annotated[str, StringConstraints(pattern=r"\S", strip_whitespace=True)]
ConceptKind = Literal["object", "character", "person", "style", "nsfw", "other"]


def hint(key: str, known: Any) -> str:
    """Return the nearest of the known names, or all of them, to append to an error."""
    close = nearest(key, known)
    return f"; did you mean {' or '.join(close)}?" if close else f"; known: {', '.join(known)}"


class RecipePart(BaseModel):
    """The base of all parts: frozen, finite, and strict about their keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


PEFT_KINDS = ("loha", "lokr", "vera", "dora")


class Objective(RecipePart):
    """The target of the erased prediction; see the file of the method in `methods/`."""

    name: str = Field(default="spm", description="the loss; each method has one")
    eta: float = Field(default=1.0, ge=0, description="distance of the target beyond the surrogate's prediction")
    convention: Literal["paper", "rewrite"] = Field(
        default="paper", description="rewrite: eta as ESD's authors count it since 2025, the paper's plus 1"
    )
    teacher: Literal["base", "student"] = Field(
        default="base",
        description="who predicts the surrogate, the frozen base or the model being erased",
    )
    goal: Literal["surrogate", "noise"] = Field(
        default="surrogate",
        description="of ca: the surrogate's prediction, or the noise in its pictures (the noise-based variant)",
    )
    positive: NonBlank | None = Field(
        default=None, description="of spm: the prompt that the target is pushed away from, unless it is the concept"
    )
    paired: bool = Field(
        default=False,
        description="the surrogate's prediction is that of the concept's sentence with the surrogate in it",
    )
    tokens: Literal["concept", "onwards"] = Field(
        default="concept", description="the tokens that attention is to leave, the concept's or all from it on"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.convention == "rewrite" and self.eta == 0:
            raise ValueError("convention 'rewrite' with eta 0 asks for the base's own prediction: nothing is erased")
        return self


class Attribute(RecipePart):
    """A prompt that the concept's keys and values are moved towards (UCE's debiasing)."""

    prompt: NonBlank
    weight: float = Field(description="of the attribute's own keys and values, added to the concept's; below 0 away")


class ClosedForm(RecipePart):
    """The settings of a closed form (UCE), which has no training loop."""

    ridge: float = Field(default=0.5, gt=0, description="lambda: weight of keeping everything else")
    preserve: tuple[NonBlank, ...] | None = Field(
        default=(),
        description="prompts whose keys and values are kept; null: the names that the text encoder puts nearest",
    )
    erase_scale: float = Field(default=1.0, gt=0, description="weight of the edited states")
    preserve_scale: float = Field(default=1.0, ge=0, description="weight of the states of `preserve` and `held`")
    attributes: tuple[Attribute, ...] = Field(
        default=(), description="debias the concept towards these instead of erasing it; spmhub train --balance"
    )
    tokens: Literal["last", "onwards"] = Field(
        default="last",
        description="the edited states: the last token's (paper), or all from it to the window's end (released)",
    )
    sentences: int = Field(
        default=0, ge=0, description="sentences about each name, edited in addition to the name alone"
    )
    held: int = Field(default=0, ge=0, description="sentences about everything else whose keys and values are kept")
    rank: int | None = Field(
        default=None, ge=1, le=256, description="of the increment; without it, as many as states are edited"
    )


MaskGroup = Literal["ff", "norm", "attn", "linear"]


class Masks(RecipePart):
    """Minimalist's masks: groups of neurons, the pictures they are trained on, weights of the loss."""

    groups: tuple[MaskGroup, ...] = Field(
        default=("ff", "attn"),
        min_length=1,
        description="ff: neurons of feed-forwards; attn: heads; norm: outputs of norm1_context (FLUX, SD3); linear: "
        "outputs of every Linear in attention and feed-forwards, as the authors' code has it for U-Nets",
    )
    init: float = Field(default=3.0, gt=0, description="logits at first: all neurons are on")
    epsilon: float = Field(
        default=0.0,
        ge=0,
        description="bounds the noise of a mask's samples to +-log((1 + epsilon) / epsilon); 0: the hard-concrete "
        "distribution itself",
    )
    prompts: int = Field(default=40, ge=1, description="pictures of the concept, and as many of anything else")
    accumulate: int = Field(default=1, ge=1, description="batches for each step of the optimiser")
    beta: float = Field(default=0.1, ge=0, description="of the preservation loss")
    l0: float = Field(
        default=0.0,
        description="weight of the expected share of neurons that are on: above 0 fewer stay, below 0 more",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(set(self.groups)) < len(self.groups) or ("linear" in self.groups and {"ff", "attn"} & {*self.groups}):
            raise ValueError(
                f"groups {list(self.groups)} mask one layer twice; 'linear' has all that 'ff' and 'attn' lead to"
            )
        return self


class IncrementRecipe(RecipePart):
    """The kind of increment, and the modules it changes.

    low_rank: of `rank`; rank 1 is SPM's one-dimensional adapter.  dense: full weights and biases.
    mask: neurons switched off, by `masks`.  loha, lokr, vera, dora: PEFT's, of `rank`, saved as low-rank or dense.
    null_space: w (beta S) on keys and values of cross-attention, S the directions that no protected prompt has (SepME).
    """

    kind: Literal["low_rank", "dense", "mask", "null_space", "loha", "lokr", "vera", "dora"] = "low_rank"
    rank: int = Field(default=1, ge=1, le=256, description="of low_rank and PEFT's kinds; a closed form has its own")
    modules: Literal[
        "targets",
        "text",
        "esd-x",
        "esd-x-strict",
        "esd-x-strict-text",
        "esd-u",
        "esd-all",
        "esd-selfattn",
        "esd-noxattn",
        "esd-notime",
        "esd-xlayer",
        "esd-selflayer",
    ] = Field(
        default="targets",
        description="targets: SPM's, all of the attention blocks; text: what reads the text alone; the others: ESD's, "
        "the last four those of its first code (and R.A.C.E.'s)",
    )
    beta: float = Field(
        default=1e-4,
        gt=0,
        description="of null_space: how far one unit of w reaches; 1 for methods that preset another kind",
    )
    dtype: Literal["float32", "float16", "bfloat16"] = Field(default="float32", description="of the saved file")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.rank != 1 and self.kind in ("dense", "mask", "null_space"):
            raise ValueError(f"kind {self.kind!r} has no rank (got {self.rank}); 'low_rank' has, and PEFT's kinds have")
        return self

    @classmethod
    def named(cls, text: str) -> dict[str, Any]:
        """Return keys of `increment` for "spm", "lora:4" (a rank), "dense" or "null-space". Raises UsageError."""
        kind, colon, rank = text.strip().lower().partition(":")
        if kind == "lora" and rank.isdecimal():
            return {"kind": "low_rank", "rank": int(rank)}
        if kind in PEFT_KINDS and rank.isdecimal():
            return {"kind": kind, "rank": int(rank)}
        if kind == "null-space" and not colon:
            return {"kind": "null_space", "modules": "esd-x-strict"}
        if kind in ("dense", "mask") and not colon:
            return {"kind": kind}
        if kind == "spm" and not colon:
            return {"kind": "low_rank", "rank": 1}
        known = ("spm", "lora:RANK", *(f"{kind}:RANK" for kind in PEFT_KINDS), "dense", "mask", "null-space")
        raise UsageError(f"unknown increment {text!r}{hint(kind, known)}", mend="--increment lora:4")


class XtSource(RecipePart):
    """The source of the noisy latents x_t.

    trajectory: trajectories of the frozen base, whose predictions are the free targets.
    student: the paper's own, sampled by the model being erased under `guidance` from noise to a random step.
    q_sample: the base's pictures of the concept under `guidance`, noised to a random time (SepME).
    """

    source: Literal["trajectory", "student", "q_sample"] = "trajectory"
    steps: int = Field(default=16, ge=2, le=999, description="denoising steps of a trajectory")
    guidance: tuple[float, ...] = Field(
        default=(0.0, 1.0, 3.0, 7.5),
        min_length=1,
        description="guidance scales a trajectory is driven with, one drawn for each; the student uses the first",
    )
    guidance_embedding: float | None = Field(
        default=None,
        ge=1,
        description="guidance scale that a guidance-distilled model (FLUX.1 dev) receives in the losses; unless given, "
        "the one that x_t is drawn under",
    )
    driver: Literal["concept", "surrogate"] = Field(
        default="concept",
        description="whose pictures the latents are on their way to; with anchors, half of them an anchor's",
    )
    unconditional: str = Field(
        default="", description="of student and q_sample: the prompt that guidance leads away from while x_t is drawn"
    )
    trajectories: int = Field(
        default=24, ge=1, description="run side by side; of q_sample, the number of pictures; of student, none"
    )
    chunks: int = Field(default=4, ge=1, description="groups of trajectories over the whole training; of student, none")


_STEEPEST = 100.0  # powers beyond it leave float64


class Anchoring(RecipePart):
    """Latent anchoring (Eq. 7): the prompts whose predictions must stay, and its weight."""

    weight: float = Field(default=40.0, ge=0, description="lambda; where it begins when there is a `reach`; 0: none")
    reach: float | None = Field(
        default=0.9,
        gt=0,
        description="lambda is steered so that the concept's predictions end this share of the way to the surrogate's; "
        "null keeps it as it is",
    )
    alpha: float = Field(
        default=-2.0,
        description="of text and given: P(anchor) ~ (1 - |cos(anchor, target)|)^alpha. The paper's is 1, which "
        "prefers far anchors; a negative one prefers near ones, where the gate lets the eraser act and it does the "
        "most harm",
    )
    source: Literal["text", "gaussian", "given", "surrogate"] = Field(
        default="text",
        description="text: sentences about everything else; gaussian: the released code's; given: `prompts`; "
        "surrogate: the concept's sentences with the surrogate in its place (Concept Ablation's prior)",
    )
    prompts: tuple[NonBlank, ...] = ()
    per_target: int = Field(default=3, ge=0, description="anchors for each target row of a batch")
    drawn: int = Field(
        default=0,
        ge=0,
        description="of trajectories: anchors drawn for each x_t, if more than per_target, which a batch then takes of "
        "them at random; each costs a row of the frozen base, once",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if abs(self.alpha) > _STEEPEST:
            raise ValueError(
                f"alpha {self.alpha:g} is beyond +-{_STEEPEST:g}: only the nearest, or the farthest, would be drawn"
            )
        if (self.source == "given") != bool(self.prompts):
            raise ValueError(
                f"source is {self.source!r} with {len(self.prompts)} prompts: prompts belong to source 'given'"
            )
        return self

    @property
    def offered(self) -> int:
        """The anchors that each x_t of a trajectory has."""
        return max(self.drawn, self.per_target) if self.weight > 0 else self.per_target


class Adversary(RecipePart):
    """R.A.C.E.'s inner loop (arXiv 2405.16341), for any objective that compares predictions.

    The student is not asked for the prompt's own text states, but for those within reach of them that best bring the
    concept back.
    """

    steps: int = Field(default=0, ge=0, description="sign steps, each a quarter of epsilon; 0: no adversary")
    epsilon: float = Field(default=0.1, gt=0, description="reach: the most that any number of the text states moves")
    unit: Literal["absolute", "rms"] = Field(
        default="absolute",
        description="of epsilon: absolute, the paper's, for CLIP-L; rms: the states' own root mean square, which fits "
        "any text encoder",
    )
    goal: Literal["noise", "concept"] = Field(
        default="noise",
        description="the prediction it aims at: the initial noise (paper), or the base's prediction of the concept",
    )
    norm: Literal["l2", "l1"] = Field(
        default="l2", description="the distance to that prediction: mean squares, or mean absolute differences"
    )
    begins: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="share of the training before it, which erases as if there were none; unless given 0 with a "
        "start_from, else half: it needs something erased to attack",
    )
    hold: float = Field(
        default=0.0,
        ge=0,
        description="weight of the sum of mean |p - p_start| over all trained tensors; the paper's is 0.1",
    )
    keywords: bool = Field(
        default=False, description="train on the aliases as often as on the target, where templates are off"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.steps == 0 and self != Adversary.model_construct(steps=0):
            raise ValueError("steps is 0, there is no adversary: it needs steps (10 in the paper) for its other keys")
        return self


class Optimiser(RecipePart):
    """AdamW over the increments."""

    lr: float = Field(default=3e-3, gt=0)
    schedule: Literal["cosine", "cosine_restarts", "constant"] = "cosine"
    warmup: int = Field(default=20, ge=0)
    cycles: int = Field(default=3, ge=1, description="of cosine_restarts")
    weight_decay: float = Field(default=0.0, ge=0)
    ema: float | None = Field(
        default=None, ge=0, lt=1, description="decay of a moving average, which is saved and draws the student's x_t"
    )
    scale_lr: bool = Field(
        default=True, description="lr of `down` proportional to 1 / fan-in, so that one lr fits every width"
    )


class Regulariser(RecipePart):
    """Additions to the loss of any objective."""

    l1: float = Field(default=0.0, ge=0, description="lambda of lambda * sum|dW| / (number of changed tensors) (SepME)")


class EarlyStop(RecipePart):
    """When a training ends before its last step: by SepME's statistic of the erase loss, or by its reach."""

    below: float | None = Field(
        default=None, description="tau, in units of the loss: at or below it the concept is gone; null: never stops"
    )
    memory: float = Field(default=0.9, ge=0, lt=1, description="of the running mean, per step")
    after: int = Field(default=10, ge=0, description="steps that are made in any case")
    reach: float | None = Field(
        default=None,
        gt=0,
        description="share of the way from the concept's prediction to the surrogate's, measured on states that no "
        "step trains on: there the training ends; null: never",
    )
    every: int = Field(default=5, ge=1, description="steps from one measurement of the reach to the next")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        usual = EarlyStop.model_construct()
        if self.below is None and (self.memory, self.after) != (usual.memory, usual.after):
            raise ValueError(
                f"memory {self.memory:g} and after {self.after} say how to stop, and below is null, which never does: "
                "set below, or leave them out"
            )
        if self.reach is None and self.every != usual.every:
            raise ValueError(
                f"every {self.every} says how often the reach is measured, and reach is null: set reach, or leave "
                "every out"
            )
        return self


class Companion(RecipePart):
    """Another concept that is erased in the same run, into an eraser of its own."""

    target: NonBlank
    aliases: tuple[NonBlank, ...] = ()
    kind: ConceptKind = "other"


class Protection(RecipePart):
    """Prompts on which the increment has no effect: it sends their text states to zero (SepME).

    The empty prompt and the surrogate are among them whenever anything is. The guarantee holds for these prompts to the
    letter, not for paraphrases.
    """

    prompts: tuple[NonBlank, ...] | None = Field(
        default=(), description="null: the names that the text encoder puts nearest, by `directions`"
    )
    erased: tuple[NonBlank, ...] = Field(default=(), description="concepts of earlier erasers, protected exactly")
    directions: int | None = Field(
        default=None, ge=1, description="protect `prompts`, hundreds of them, by this many principal directions only"
    )
    separable: bool = Field(
        default=False,
        description="project the increment so that it leaves these prompts alone: a low-rank or dense one at every "
        "step, PEFT's kinds when they are saved",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.directions is not None and self.prompts == ():
            raise ValueError("directions are those of protection.prompts, and there are none")
        if self.directions is None and self.prompts is None:
            raise ValueError("prompts is null, hundreds of names that only directions protect: set directions too")
        return self

"""Erasers on a pipeline: attach, add, strengthen, recover, detach; what each row of a batch gets is planned here."""

import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from spm_hub.adapters.adapter import Adapter
from spm_hub.adapters.compatibility import resolve_modules
from spm_hub.adapters.formats.lazy import StoredIncrements
from spm_hub.adapters.lookup import by_name, named, namesakes
from spm_hub.attachment.call import Call
from spm_hub.attachment.gate import ConstantGate, Prompts
from spm_hub.attachment.gate_evaluation import Gating
from spm_hub.attachment.layers import Layers, foldable, kept_bytes, offloaded_in_groups
from spm_hub.attachment.options import Eraser, GateChoice, Mode, Options, Rows, Strength
from spm_hub.attachment.peft_layers import settle
from spm_hub.attachment.pipeline_hooks import HELD, hold, release
from spm_hub.attachment.text_encoding import CannotEncodeError, encode, tokens_of, told
from spm_hub.errors import UsageError
from spm_hub.models.architectures import beside_denoiser, body_of, denoiser_of, family_of, weight_of


def attach(
    pipe: Any,
    adapters: Sequence[Adapter],
    *,
    gate: GateChoice | None = None,
    strength: Mapping[str, float] | float | None = None,
    rows: Rows | None = None,
    mode: Mode = "auto",
    memory_budget: int | None = None,
    increment_budget: int | None = None,
    threshold: float | None = None,
    top_k: int | None = None,
) -> "Attachment":
    """Put erasers on a diffusers pipeline; whoever calls the pipeline then gets them, gated per prompt.

    gate: "transport" is facilitated transport (arXiv 2312.16145, Eq. 9-11), "always" is gamma 1, a number is that
    gamma, or any object with the method of `gate.Gate`.  strength: multiplies gamma; a number for all, or some by name.
    rows: whether the unconditional rows of classifier-free guidance get their prompt's gamma ("both", the paper's way)
    or none ("conditional").  What is None is taken from each adapter's manifest.
    mode: "fold" writes the sum into the weights, which serves one set of gammas at the bare model's speed; "branch"
    lets every row of a batch have its own; "auto" folds when all rows agree and branches when they do not.
    memory_budget: bytes for the originals that folding keeps beside the weights; beyond it they are kept on the CPU,
    and where the model itself is on the CPU, "auto" branches.
    increment_budget: bytes of increments that stay in memory of adapters that were loaded lazily; beyond it those used
    longest ago are dropped, and read again when a prompt needs them.
    threshold, top_k: for very many erasers, gammas below `threshold` count as 0, and of the others only the `top_k`
    greatest of each prompt act. Off unless given, as the paper's sum is over all.

    A denoiser that is called without a known prompt runs with gamma 1. While attached, `state_dict`, `save_pretrained`,
    `load_state_dict` and `to` meet the checkpoint's own weights: erasers are never saved by accident (baking is the way
    to save them in).

    Threads: calls of an attached pipeline are serialised, and changes to its erasers wait for the picture in progress.
    Do not attach for the first time while another thread draws with this pipeline: attach an empty list at start and
    `add` later. A server keeps `erasers = attach(pipe, [])` for as long as it runs, and calls `add` and `recover`.
    Another pipeline around the same denoiser draws with the same erasers, fully on and without a lock of its own.
    Raises UsageError or CompatibilityError, and then the pipeline is as it was.
    """
    options = Options(gate, strength, rows, mode, memory_budget, increment_budget, threshold, top_k)
    return Attachment(pipe, adapters, options)


class Attachment:
    """Erasers in effect on one pipeline; made by `attach`. Safe to use from several threads.

    Whatever changes what is attached waits for the picture in progress, so that no picture mixes two states.
    """

    def __init__(self, pipe: Any, adapters: Sequence[Adapter], options: Options) -> None:
        if isinstance(pipe, nn.Module):
            raise UsageError(f"attach takes a pipeline, not its {type(pipe).__name__}", mend="attach(pipe, ...)")
        if isinstance(options.strength, Mapping):
            options = replace(options, strength=by_name(options.strength, [adapter.name for adapter in adapters]))
        self._pipe, self._options = pipe, options
        self._denoiser = denoiser_of(pipe)
        family_of(pipe)
        self._refuse_held()
        self._lock = threading.RLock()
        self._calls: list[Call] = []
        self._denoisings = 0
        self._warned: set[str] = set()
        self._pipeline_class = type(pipe)
        self._gating = Gating(pipe, self._pipeline_class, options)
        self._layers = Layers()
        self._erasers: dict[str, Eraser] = {}
        self._attached = True
        # What is in effect, what it was derived for, where originals go: None when that has to be found anew.
        self._plan: tuple[bool, dict[str, list[float]]] | None = None
        self._seen: tuple[Call | None, int | None, tuple[bool, ...]] | None = None
        self._budgeted: tuple[torch.device | None, bool] | None = None
        self._last_used: dict[str, StoredIncrements] = {}
        erasers: dict[str, Eraser] = {}
        for adapter in adapters:
            erasers[adapter.name] = self._fitting(adapter, erasers)
        self._install(erasers)
        hold(pipe, self._denoiser, self)
        for name in beside_denoiser(pipe):
            self._warn_once(f"{name}, with which {type(pipe).__name__} draws some of its steps, stays as it is")

    @property
    def names(self) -> tuple[str, ...]:
        """The erasers that are attached, in the order they came."""
        return tuple(self._erasers)

    @property
    def strength(self) -> Strength:
        """What multiplies each eraser's gamma, by name; changes act from the next call of the denoiser on."""
        return Strength(self._erasers, self._strengthen)

    def gates(self, prompt: str, /, **options: Any) -> dict[str, float]:
        """Gamma of every eraser for a prompt, before its strength: why a picture is as it is.

        options: what a call is given that changes what its text encoder makes of a text (max_sequence_length,
        clip_skip).  What `threshold` and `top_k` leave out is 0. Raises UsageError where the pipeline cannot encode a
        text, or knows no such option.
        """
        if not isinstance(prompt, str):
            raise UsageError(f"gates takes one prompt, not {prompt!r}", mend="erasers.gates(prompt) for each of them")
        settings = told(self._pipeline_class, options)
        with self._lock:
            self._alive()
            states = encode(self._pipe, self._pipeline_class, prompt, settings)
            prompts = Prompts((prompt,), tokens_of(self._pipe, [prompt]), states)
            gammas = self._gating.selected(self._gating.ask(prompts, settings, self._erasers))
            return {name: gammas[name][0] for name in self._erasers}

    @contextmanager
    def prompted(self, prompts: Prompts, /) -> Iterator[None]:
        """Inside, a denoiser that is called by hand gives its rows what a picture of these prompts would give them.

        For whoever needs more than pictures (gradients, single steps): the rows are those of `prompts`, in order, any
        number of times. Outside of this, and of a call of the pipeline, every eraser is fully on.
        """
        with self.picture():
            self._alive()
            call = self._calls[-1]
            # Whoever calls the denoiser may give it anything: these prompts are what it counts as.
            call.prompts, call.plain = prompts, False
            call.gammas = self._gating.ask(prompts, call.settings, self._erasers)
            yield

    def add(self, adapter: Adapter, /) -> None:
        """Attach one more eraser, under the options of `attach`. Raises as `attach` does, and then changes nothing."""
        if not isinstance(adapter, Adapter):
            raise UsageError(f"add takes an Adapter, not {adapter!r}", mend=f"erasers.add(spm_hub.load({adapter!r}))")
        with self._lock:
            self._alive()
            self._install({adapter.name: self._fitting(adapter, self._erasers)})

    def recover(self, name: str, /) -> None:
        """Take one eraser away: the pipeline is, bit for bit, as if only the others had ever been attached."""
        with self._lock:
            self._alive()
            name = named(name, self._erasers)
            with self._writing():
                self._layers.uninstall(name)
            del self._erasers[name]
            self._last_used.pop(name, None)
            self._changed()

    def detach(self) -> None:
        """Leave the pipeline exactly as it was before `attach`: weights, classes, hooks. Twice does no harm."""
        with self._lock:
            if not self._attached:
                return
            self._bare()
            release(self._pipe, self._denoiser)
            self._attached = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    # What the held pipeline and denoiser report: `calls.Holder`.

    @contextmanager
    def picture(self) -> Iterator[None]:
        """Around one call of the pipeline: nobody else draws, attaches or recovers meanwhile."""
        with self._lock:
            if self._attached and body_of(denoiser_of(self._pipe)) is not body_of(self._denoiser):
                raise UsageError(
                    "the pipeline's denoiser was replaced after erasers were attached to it",
                    mend="erasers.detach(), replace it, and attach again",
                )
            self._calls.append(Call())
            try:
                yield
            finally:
                self._calls.pop()
                # Offloading may have been turned on or off when the next one begins.
                self._seen = self._budgeted = None

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """Around one call of `encode_prompt`, which in another thread waits for the picture in progress."""
        with self._lock:
            yield

    def encoded(self, bound: Mapping[str, Any], result: Any) -> None:
        """Learn the prompts of the call in progress, if any."""
        if not self._calls:
            return
        self._calls[-1].learn(self._pipe, bound, result)
        # Now, as the text encoder may be offloaded before the denoiser is called.
        self._ask(self._calls[-1])

    @contextmanager
    def denoising(self, rows: int | None, states: Any) -> Iterator[None]:
        """Around one call of the denoiser: the right factors are in effect until it ends."""
        with self._lock:
            if self._attached:
                self._put_in_effect(rows, states)
            self._denoisings += 1
            try:
                yield
            finally:
                self._denoisings -= 1

    @contextmanager
    def bare_weights(self, *, moving: bool) -> Iterator[None]:
        """Around whatever touches the denoiser's weights from outside: it meets the checkpoint's own."""
        with self._lock:
            # Offloading moves them in the middle of a picture, which must not switch the erasers off.
            if self._attached and not (moving and (self._denoisings or self._calls)):
                self._bare()
            yield

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _put_in_effect(self, rows: int | None, states: Any) -> None:
        """Fold or branch what the rows of this batch are due; nothing to do when that is in effect already."""
        call = self._calls[-1] if self._calls else None
        if call is not None and call.hear(rows, states):
            self._seen = None
        sparing = call is not None and any(eraser.rows == "conditional" for eraser in self._erasers.values())
        spared = call.unconditional if call is not None and sparing else ()
        if self._seen == (call, rows, spared):
            return
        factors = self._factors(call, rows)
        shared = all(len(set(due)) == 1 for due in factors.values())
        if self._budgeted is None:
            with self._writing():
                settle(body_of(self._denoiser), self._layers.modules, self._bare)
            self._budgeted = self._keeping()
        keep_on, can_fold = self._budgeted
        if self._options.mode == "fold" and not shared:
            ranges = (f"{name} {min(due):.3g} to {max(due):.3g}" for name, due in factors.items())
            raise UsageError(
                'mode="fold" holds one factor per eraser at a time, and the rows of this batch are due different ones: '
                + ", ".join(ranges),
                mend='mode="auto", or one prompt a call',
            )
        folds = shared and can_fold and self._options.mode != "branch"
        if sparing and call is not None and call.negatives and rows == call.block:
            # Every step has both calls: to fold, and bare the weights again, would cost more than to branch.
            folds = folds and self._options.mode == "fold"
        plan = folds, factors if not folds else {name: due[:1] for name, due in factors.items()}
        if plan != self._plan:
            self._plan = None
            with self._writing():
                if folds:
                    self._layers.fold({name: due[0] for name, due in factors.items()}, keep_on)
                else:
                    self._layers.branch(factors)
            self._plan = plan
            self._note_use(name for name, due in factors.items() if any(due))
        self._seen = call, rows, spared

    def _note_use(self, names: Iterable[str]) -> None:
        """Remember who was used last, and drop what is beyond the budget of those used longest ago."""
        budget = self._options.increment_budget
        if budget is None:
            return
        for name in names:
            stored = self._erasers[name].adapter.increments
            if isinstance(stored, StoredIncrements):
                self._last_used.pop(name, None)
                self._last_used[name] = stored
        excess = sum(stored.nbytes for stored in self._last_used.values()) - budget
        while excess > 0:
            stored = self._last_used.pop(next(iter(self._last_used)))
            excess -= stored.nbytes
            stored.release()

    def _factors(self, call: Call | None, rows: int | None) -> dict[str, list[float]]:
        """Gamma times strength of every eraser for each row of the batch; one number stands for all rows."""
        fully_on = {name: [eraser.strength] for name, eraser in self._erasers.items()}
        if call is None:
            return fully_on
        self._ask(call)
        if call.prompts is None or not self._erasers.keys() <= call.gammas.keys():
            self._warn_once("the prompts of this call, or the text encoder, are unknown: every eraser is fully on")
            return fully_on
        if rows is None or rows % call.block:
            self._warn_once(f"{rows} rows do not come from {call.block} prompts and pictures: every eraser is fully on")
            return fully_on
        gammas = self._gating.selected({name: call.gammas[name] for name in self._erasers})
        factors = {}
        for name, eraser in self._erasers.items():
            block = [gamma * eraser.strength for gamma in gammas[name] for _ in range(call.images)]
            blocks = [block] * (rows // call.block)
            for index, unconditional in enumerate(call.unconditional):
                if unconditional and eraser.rows == "conditional":
                    blocks[index] = [0.0] * call.block
            factors[name] = [factor for each in blocks for factor in each]
        return factors

    def _ask(self, call: Call) -> None:
        """Have the gates' answers for the prompts of this call, unless these or the text encoders are not there."""
        if call.prompts is None or self._erasers.keys() <= call.gammas.keys():
            return
        if call.prompts.texts is None and not all(isinstance(one.gate, ConstantGate) for one in self._erasers.values()):
            self._warn_once("only prompt_embeds are known: erasers are gated by the embeddings, not by the words")
        with suppress(CannotEncodeError):
            call.gammas = self._gating.ask(call.prompts, call.settings, self._erasers)

    def _keeping(self) -> tuple[torch.device | None, bool]:
        """Where folding keeps originals (None: beside the weights), and whether it may fold at all.

        Raises UsageError where it may not and the user insists.
        """
        modules = self._layers.modules
        reason = None
        budget, needed = self._options.memory_budget, kept_bytes(modules)
        keep_on = None
        if not all(map(foldable, modules)):
            reason = "the model's weights are quantised or not in memory"
        elif offloaded_in_groups(body_of(self._denoiser)):
            reason = "group offloading puts back its own copies of the weights"
        elif budget is not None and needed > budget:
            if all(weight_of(module).device.type == "cpu" for module in modules):
                reason = f"the originals take {needed} bytes on the CPU, memory_budget is {budget}"
            else:
                keep_on = torch.device("cpu")
        if reason is not None and self._options.mode == "fold":
            raise UsageError(f'mode="fold" is not possible: {reason}', mend='mode="auto"')
        return keep_on, reason is None

    def _fitting(self, adapter: Adapter, beside: Mapping[str, Eraser]) -> Eraser:
        if (other := beside.get(adapter.name)) is not None:
            raise namesakes(other.adapter, adapter)
        return self._options.eraser(adapter, resolve_modules(adapter, self._denoiser))

    def _install(self, erasers: Mapping[str, Eraser]) -> None:
        """Nothing of the model changes yet. Raises UsageError, and then installs none, where they cannot be folded."""
        for name, eraser in erasers.items():
            self._layers.install(name, eraser.modules, eraser.increments)
        try:
            self._keeping()
        except UsageError:
            for name in erasers:
                self._layers.uninstall(name)
            raise
        self._erasers |= erasers
        self._changed()

    def _changed(self) -> None:
        """Other erasers than before: whatever was derived from them is void."""
        self._plan = self._seen = self._budgeted = None
        self._gating.forget()

    def _bare(self) -> None:
        with self._writing():
            self._layers.bare()
        self._changed()

    def _strengthen(self, name: str, value: float) -> None:
        with self._lock:
            self._alive()
            self._erasers[named(name, self._erasers)].strength = value
            self._seen = None

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Weights may be written: no graph, and originals that outlive an inference mode which the caller is in."""
        inference = any(parameter.is_inference() for parameter in self._denoiser.parameters())
        with torch.inference_mode(inference), torch.no_grad():
            yield

    def _refuse_held(self) -> None:
        for held in (self._pipe, self._denoiser, body_of(self._denoiser)):
            other: Attachment | None = held.__dict__.get(HELD)
            if other is not None:
                whose = "this pipeline" if other._pipe is self._pipe else "another pipeline that shares this denoiser"
                raise UsageError(
                    f"{whose} already holds erasers ({', '.join(other.names) or 'none yet'})",
                    mend="erasers.detach() first, or erasers.add(adapter) to have more of them",
                )

    def _alive(self) -> None:
        if not self._attached:
            raise UsageError("these erasers were detached", mend="spm_hub.attach(pipe, adapters) again")

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(f"spm_hub: {message}", UserWarning, stacklevel=2)

"""Decides what each row of a denoiser's batch gets from each eraser, and folds or branches it."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress

import torch
from torch import nn

from spm_hub.adapters.formats.lazy import StoredIncrements
from spm_hub.adapters.manifest import factor_of
from spm_hub.attachment.call import Call
from spm_hub.attachment.gates.gate import ConstantGate
from spm_hub.attachment.layers import Layers, foldable, kept_bytes, offloaded_in_groups
from spm_hub.attachment.options import Choice, Eraser, Gammas, Options
from spm_hub.attachment.peft_layers import unmerge_disabled
from spm_hub.attachment.text_encoding import CannotEncodeError
from spm_hub.errors import UsageError
from spm_hub.io.wording import counted
from spm_hub.models.architectures import body_of, weight_of

_REMEMBERED = 1000
"""How many different warnings are given once only; a server may meet any number of long prompts."""

FULLY_ON = "every eraser without a constant gate is fully on"


class Planner:
    """The erasers of one denoiser and the factors (gamma times strength) that are in effect on its layers.

    Not thread-safe by itself: an `Attachment` calls it under its lock.
    """

    def __init__(self, denoiser: nn.Module, options: Options) -> None:
        self.erasers: dict[str, Eraser] = {}
        self._denoiser, self._options = denoiser, options
        self._choice: Choice | None = None
        self._layers = Layers()
        self._warned: set[str] = set()
        # Each is None when it has to be computed again: the factors in effect and whether they are folded; the inputs
        # that these were computed for; where folding keeps originals, and whether it is possible.
        self._plan: tuple[bool, dict[str, list[float]]] | None = None
        self._planned_for: tuple[Call | None, int | None, tuple[bool, ...]] | None = None
        self._storage: tuple[torch.device | None, bool] | None = None
        self._last_used: dict[str, StoredIncrements] = {}

    def install(self, erasers: Mapping[str, Eraser]) -> None:
        """Add erasers, which act from the next denoiser call on.

        Raises UsageError, and then adds none, where the options ask for folding and the weights do not allow it.
        """
        for name, eraser in erasers.items():
            self._layers.install(name, eraser.modules, eraser.increments)
        try:
            self._fold_storage()
        except UsageError:
            for name in erasers:
                self._layers.uninstall(name)
            raise
        self.erasers |= erasers
        self._invalidate()

    def uninstall(self, name: str) -> None:
        """Remove one eraser; its modules have the checkpoint's own weights afterwards."""
        with self._writing():
            self._layers.uninstall(name)
        del self.erasers[name]
        self._last_used.pop(name, None)
        self._invalidate()

    def restore_weights(self) -> None:
        """Give every module its own class and the checkpoint's own weights, until the next denoiser call."""
        with self._writing():
            self._layers.restore()
        self._invalidate()

    def set_strength(self, name: str, value: float) -> None:
        """Set the strength of the eraser `name` from the next denoiser call on."""
        self.erasers[name].strength = value
        self._planned_for = None

    def choose(self, choice: Choice | None) -> Choice | None:
        """Let only these erasers act from the next denoiser call on, None for all.

        Return the choice before.
        """
        before, self._choice, self._planned_for = self._choice, choice, None
        return before

    def may_act(self, name: str) -> bool:
        """Return whether the eraser `name` is chosen for some prompt."""
        return self._choice is None or any(name in one for one in self._choice)

    def end_call(self) -> None:
        """Forget the inputs of the call that ended; offloading may be turned on or off before the next one."""
        self._planned_for = self._storage = None

    def ask_gates(self, call: Call) -> None:
        """Compute the gammas of this call's prompts, unless they are known or the text encoder is missing."""
        if call.prompts is None or self.erasers.keys() <= call.gammas.keys():
            return
        with suppress(CannotEncodeError):
            call.gammas = call.gates.ask(call.prompts, call.settings, self.erasers)
            if call.prompts.texts is None and not self.all_constant:
                self.warn_once("only prompt_embeds are known: erasers are gated by the embeddings, not by the words")

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def put_in_effect(self, call: Call | None, rows: int | None, states: object) -> None:
        """Fold or branch the factors of this batch, unless they are in effect already.

        call: the pipeline call in progress, None where the denoiser is called by hand. rows: of the batch, None where
        the input does not show them. states: the text-encoder states that the denoiser is given.
        Raises UsageError where the rows need different factors and the mode is "fold".
        """
        if call is not None and call.record_denoising(rows, states):
            self._planned_for = None
        conditional = call is not None and any(eraser.rows == "conditional" for eraser in self.erasers.values())
        unconditional = call.unconditional if call is not None and conditional else ()
        if self._planned_for == (call, rows, unconditional):
            return
        factors = self._factors(call, rows)
        shared = all(len(set(each)) == 1 for each in factors.values())
        if self._storage is None:
            with self._writing():
                unmerge_disabled(body_of(self._denoiser), self._layers.modules, self.restore_weights)
            self._storage = self._fold_storage()
        keep_on, can_fold = self._storage
        if self._options.mode == "fold" and not shared:
            ranges = (f"{name} {min(each):.3g} to {max(each):.3g}" for name, each in factors.items())
            raise UsageError(
                'mode="fold" applies one factor per eraser at a time, and the rows of this batch need different ones: '
                + ", ".join(ranges),
                mend='mode="auto", or one prompt a call',
            )
        folds = shared and can_fold and self._options.mode != "branch"
        if conditional and call is not None and call.negatives and rows == call.rows_per_block:
            # Negative prompts come in a denoiser call of their own at every step: folding and restoring the weights
            # each time would cost more than branching.
            folds = folds and self._options.mode == "fold"
        plan = folds, factors if not folds else {name: each[:1] for name, each in factors.items()}
        if plan != self._plan:
            self._plan = None
            with self._writing():
                if folds:
                    self._layers.fold({name: each[0] for name, each in factors.items()}, keep_on)
                else:
                    self._layers.branch(factors)
            self._plan = plan
            self._release_unused(name for name, each in factors.items() if any(each))
        self._planned_for = call, rows, unconditional

    def put_alone(self, name: str | None) -> None:
        """Put one eraser into effect with the factor 1 on every row, or none, until `put_in_effect` is called."""
        factors = {other: [float(other == name)] for other in self.erasers}
        self._plan = self._planned_for = None
        with self._writing():
            if self._options.mode == "fold":
                self._layers.fold({other: each[0] for other, each in factors.items()}, (self._storage or (None,))[0])
            else:
                # For one call: writing the weights would take longer.
                self._layers.branch(factors)
        self._release_unused([name] if name is not None else [])

    def warn_once(self, message: str) -> None:
        """Warn with this message, unless this attachment has already done so."""
        if len(self._warned) == _REMEMBERED:
            self._warned.clear()
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(f"spm_hub: {message}", UserWarning, stacklevel=2)

    def _factors(self, call: Call | None, rows: int | None) -> dict[str, list[float]]:
        """Return the factor of every eraser: one number for each row, or one for all rows."""
        if call is None:
            self._refuse_choice("the denoiser was called outside of a pipeline's call")
            if not self.all_constant:
                self.warn_once(
                    "the denoiser was called outside of the attached pipeline's calls, without a known prompt: "
                    f"{FULLY_ON}. Another pipeline of the same parts: erasers.also(pipe). Calls by hand: "
                    'erasers.prompted(prompts), or attach with gate="always"'
                )
            return self._factors_without_prompts()
        self.ask_gates(call)
        if call.prompts is None or not self.erasers.keys() <= call.gammas.keys():
            self._refuse_choice("the prompts of this call, or the text encoder, are unknown")
            if not self.all_constant:
                self.warn_once(f"the prompts of this call, or the text encoder, are unknown: {FULLY_ON}")
            return self._factors_without_prompts()
        if rows is None or rows % call.rows_per_block:
            self._refuse_choice(f"{rows} rows do not come from {call.rows_per_block} prompts and pictures")
            self.warn_once(f"{rows} rows do not come from {call.rows_per_block} prompts and pictures: {FULLY_ON}")
            return self._factors_without_prompts()
        gammas: Gammas = {name: call.gammas[name] for name in self.erasers}
        gammas |= {name: [one.gamma for one in each] for name, each in call.evidence.items() if name in gammas}
        choice = self.choice_for(len(call.prompts.states))
        gammas = {
            name: [gamma if name in choice[row] else 0.0 for row, gamma in enumerate(each)]
            for name, each in gammas.items()
        }
        call.acting = gammas = self._options.select(gammas)
        factors = {}
        for name, eraser in self.erasers.items():
            given = [one.get(name) for one in choice]
            strengths = [eraser.strength if value is None else value for value in given]
            each = [factor_of(eraser.law, *pair) for pair in zip(gammas[name], strengths, strict=True)]
            block = [factor for factor in each for _ in range(call.images)]
            blocks = [block] * (rows // call.rows_per_block)
            for index, unconditional in enumerate(call.unconditional):
                if unconditional and eraser.rows == "conditional":
                    blocks[index] = [0.0] * call.rows_per_block
            factors[name] = [factor for each in blocks for factor in each]
        return factors

    def choice_for(self, prompts: int) -> Choice:
        """Return the erasers that act on each of so many prompts.

        Raises UsageError if they were chosen for another number.
        """
        if self._choice is None:
            return (dict.fromkeys(self.erasers),) * prompts
        if len(self._choice) != prompts:
            raise UsageError(
                f"erasers were chosen for {counted(len(self._choice), 'prompt')}, and this call has {prompts}",
                mend="erasers.only([...]) with one list of names for each prompt of the call",
            )
        return self._choice

    def _refuse_choice(self, why: str) -> None:
        """Raise UsageError if erasers were chosen for each prompt, whose rows are unknown."""
        if self._choice is not None:
            raise UsageError(f"erasers were chosen for each prompt, but {why}", mend="draw outside of erasers.only()")

    def _factors_without_prompts(self) -> dict[str, list[float]]:
        """Return the factors of a call whose prompts are unknown: gamma is a constant gate's own, else 1."""
        gammas: Gammas = {
            name: [eraser.gate.gamma if isinstance(eraser.gate, ConstantGate) else 1.0]
            for name, eraser in self.erasers.items()
        }
        if self.all_constant:
            gammas = self._options.select(gammas)
        return {name: [eraser.factor(gammas[name][0])] for name, eraser in self.erasers.items()}

    @property
    def all_constant(self) -> bool:
        """True if no eraser's gate depends on the prompt."""
        return all(isinstance(eraser.gate, ConstantGate) for eraser in self.erasers.values())

    def _fold_storage(self) -> tuple[torch.device | None, bool]:
        """Return the device on which folding keeps the original weights, and whether folding is possible.

        The device is None where each original stays on the device of its weight. Raises UsageError where folding is
        not possible and the mode is "fold".
        """
        modules = self._layers.modules
        reason = keep_on = None
        budget, needed = self._options.memory_budget, kept_bytes(modules)
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

    def _release_unused(self, used: Iterable[str]) -> None:
        """Keep the increments of the erasers `used`; beyond `increment_budget` release those used longest ago."""
        budget = self._options.increment_budget
        if budget is None:
            return
        for name in used:
            stored = self.erasers[name].adapter.increments
            if isinstance(stored, StoredIncrements):
                self._last_used.pop(name, None)
                self._last_used[name] = stored
        excess = sum(stored.nbytes for stored in self._last_used.values()) - budget
        while excess > 0:
            stored = self._last_used.pop(next(iter(self._last_used)))
            excess -= stored.nbytes
            stored.release()

    def _invalidate(self) -> None:
        """Discard everything that was computed from the erasers and the weights."""
        self._plan = self._planned_for = self._storage = None

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Allow writing weights inside: no graph, and inference mode only if they were made in it."""
        inference = any(parameter.is_inference() for parameter in self._denoiser.parameters())
        with torch.inference_mode(inference), torch.no_grad():
            yield

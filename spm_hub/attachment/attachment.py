"""The erasers on one pipeline: attach, add, change their strength, recover, detach."""

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from types import TracebackType
from typing import Any, Self

from torch import nn

from spm_hub.adapters.adapter import Adapter
from spm_hub.adapters.compatibility import remark_on_fingerprint, resolve_modules
from spm_hub.adapters.lookup import (
    duplicate_error,
    find_name,
    remark_on_unknown_concepts,
    resolve_names,
    with_concepts,
)
from spm_hub.adapters.manifest import GammaLaw
from spm_hub.attachment.call import Call
from spm_hub.attachment.doubles import Doubles
from spm_hub.attachment.gates.evaluation import GateEvaluation
from spm_hub.attachment.gates.evidence import Evidence
from spm_hub.attachment.gates.gate import Explanation, Gate, PreparedGate, Prompts, UnknownConceptGate
from spm_hub.attachment.modular import reader_of
from spm_hub.attachment.objections import Objections
from spm_hub.attachment.options import Eraser, Gammas, GateChoice, Mode, Options, Rows, Strength, choice_of
from spm_hub.attachment.pipeline_hooks import ATTACHMENT, hook_pipeline, install_hooks, remove_hooks, unhook
from spm_hub.attachment.planner import FULLY_ON, Planner
from spm_hub.attachment.text_encoding import Settings, encoders_of
from spm_hub.attachment.watch.asking import Again
from spm_hub.attachment.watch.picture_check import DrawAgainError, PictureCheck, random_state
from spm_hub.attachment.watch.prompt_check import PromptCheck
from spm_hub.errors import UsageError
from spm_hub.io.progress import Bars, Reporter
from spm_hub.models.architectures import body_of, denoiser_of, family_of, fingerprint_of, further_denoisers

_LISTED = 8
"""How many erasers the repr of an attachment lists."""


def attach(
    pipe: Any,
    adapters: Sequence[Adapter],
    *,
    gate: GateChoice | None = None,
    concept: Mapping[str, str] | str | None = None,
    strength: Mapping[str, float] | float | None = None,
    rows: Rows | None = None,
    law: GammaLaw | None = None,
    mode: Mode = "auto",
    memory_budget: int | None = None,
    increment_budget: int | None = None,
    threshold: float | None = None,
    top_k: int | None = None,
    force: bool = False,
    progress: bool | Callable[[int, int, Mapping[str, float]], object] = True,
    reporter: Reporter | None = None,
) -> "Attachment":
    """Attach erasers to a diffusers pipeline; its pictures are then drawn with them, gated per prompt.

    pipe: a diffusers pipeline of a known family.
    adapters: the erasers, each under a name of its own; an empty list is one that `add` fills later.
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

    A folded sum serves one set of gammas at the bare model's speed; "auto" folds where all rows of a batch need the
    same and branches elsewhere. Originals beyond `memory_budget` are kept on the CPU; where the model itself is on the
    CPU, "auto" branches instead. Increments beyond `increment_budget`, those used longest ago, are read again when a
    prompt needs them. Without `threshold` and `top_k` the sum is over all erasers, as in the paper.

    A constant gate ("always" or a number) also holds where the denoiser is called by hand, without a known prompt;
    every other gate then counts as gamma 1. While attached, `state_dict`, `save_pretrained`, `load_state_dict` and `to`
    see the checkpoint's own weights: erasers are never saved by accident (`spmhub bake` saves them into a checkpoint).

    Threads: calls of an attached pipeline are serialised, and changes to its erasers wait for the picture in progress.
    Do not attach for the first time while another thread draws with this pipeline: attach an empty list at start and
    `add` later. A server keeps `erasers = attach(pipe, [])` for as long as it runs, and calls `add` and `recover`.
    Another pipeline around the same denoiser draws with the same erasers. Its prompts are unknown, so that they are
    fully on and a warning says so once, until `erasers.also(pipe)` has it gated as well.

    Warns of erasers that ask for more than an honest one needs, as `spmhub audit` does. Raises UsageError, also for
    erasers that undo each other, or CompatibilityError; the pipeline is then unchanged.
    """
    options = Options(gate, strength, rows, mode, memory_budget, increment_budget, threshold, top_k, law)
    return Attachment(pipe, with_concepts(adapters, concept), options, reporter or Bars(progress), force=force)


class Attachment:
    """The erasers on one pipeline, as `attach` returns it. Safe to use from several threads.

    `name in erasers`, `len(erasers)` and iteration are about the names of the attached erasers. Changes to the erasers
    wait for the picture in progress, so no picture mixes two states.
    """

    def __init__(
        self, pipe: Any, adapters: Sequence[Adapter], options: Options, reporter: Reporter, *, force: bool = False
    ) -> None:
        if isinstance(pipe, nn.Module):
            raise UsageError(f"attach takes a pipeline, not its {type(pipe).__name__}", mend="attach(pipe, ...)")
        if isinstance(options.strength, Mapping):
            names = [adapter.name for adapter in adapters]
            options = replace(options, strength=resolve_names(options.strength, names, "strength"))
        self._pipe, self._options = pipe, options
        self._denoiser = denoiser_of(pipe)
        family_of(pipe)
        self._refuse_attached()
        unhook(pipe)
        self._lock = threading.RLock()
        self._calls: list[Call] = []
        self._denoisings = 0
        self._pipeline_class, self._reporter = type(pipe), reporter
        self._gates = GateEvaluation(pipe, reader_of(pipe), options, reporter)
        # Pipelines that go away are forgotten; `_pipe` stays until `detach`.
        self._gates_of: weakref.WeakKeyDictionary[Any, GateEvaluation] = weakref.WeakKeyDictionary()
        self._reading_alike: weakref.WeakSet[Any] = weakref.WeakSet()
        self._planner = Planner(self._denoiser, options)
        self._prompt_check = PromptCheck(self._denoiser, self._planner)
        self._picture_check = PictureCheck(self._denoiser, self._planner)
        self._last_evidence: dict[str, tuple[Evidence, ...]] = {}
        self._last_gammas: Gammas = {}
        self._attached = True
        self._doubles = Doubles(pipe, self._denoiser, self._planner.warn_once)
        self._objections = Objections(self._planner.warn_once)
        erasers: dict[str, Eraser] = {}
        for adapter in adapters:
            erasers[adapter.name] = self._eraser(adapter, erasers)
        self._objections.admit(list(erasers.values()), force=force)
        self._planner.install(erasers)
        install_hooks(pipe, self._denoiser, self)
        self._say_what_is_unknown(erasers.values())
        self._say_unreadable(self._gates)
        for name in further_denoisers(pipe):
            self._planner.warn_once(f"the second denoiser of {type(pipe).__name__} ({name}) is not changed by erasers")

    def __contains__(self, name: object) -> bool:
        return name in self.strength

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self._planner.erasers)

    def __repr__(self) -> str:
        erasers = [str(eraser) for eraser in tuple(self._planner.erasers.values())]
        listed = ", ".join(erasers[:_LISTED]) or "no erasers"
        more = f" and {len(erasers) - _LISTED} more" if len(erasers) > _LISTED else ""
        state = f"mode {self._options.mode!r}" if self._attached else "detached"
        return f"<Attachment on {self._pipeline_class.__name__}, {state}: {listed}{more}>"

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the attached erasers, in the order in which they were attached."""
        return tuple(self._planner.erasers)

    @property
    def strength(self) -> Strength:
        """The factor of each eraser's gamma, by name; a change acts from the next call of the denoiser on."""
        return Strength(self._planner.erasers, self._set_strength)

    @property
    def last_evidence(self) -> dict[str, tuple[Evidence, ...]]:
        """The evidence about the prompts of the last pictures, by eraser.

        One for each prompt, in order. Erasers of the evidence gate are watched, and of these only those that some
        prompt's text leaves below gamma 1.
        """
        return dict(self._last_evidence)

    @property
    def last_gammas(self) -> Gammas:
        """The gammas that the last pictures were drawn with, by eraser.

        One for each prompt, in order, before the erasers' strengths; empty where the prompts were unknown.
        """
        return {name: list(each) for name, each in self._last_gammas.items()}

    def may_draw_again(self, names: Iterable[str], /) -> bool:
        """Return whether a finished picture with these erasers may be drawn again, as an evidence gate asks.

        What is shown of such a picture before it is finished may show what is erased.
        """
        return self._picture_check.needed(names)

    def gates(self, prompt: str, /, **options: Any) -> dict[str, float]:
        """Return the gamma of every eraser for a prompt, before its strength: why a picture is as it is.

        options: arguments of the pipeline's call that change how it encodes a text (max_sequence_length, clip_skip).
        An eraser that `threshold` or `top_k` leaves out has gamma 0. Raises UsageError where the pipeline cannot encode
        a text, or knows no such option.
        """
        with self._lock:
            prompts, settings = self._read(prompt, options)
            gammas = self._options.select(self._gates.ask(prompts, settings, self._planner.erasers))
            return {name: gammas[name][0] for name in self._planner.erasers}

    def explain(self, prompt: str, /, **options: Any) -> dict[str, Explanation]:
        """Return for every eraser why it acts on a prompt or does not: its gamma, and what gave it.

        options and errors: as for `gates`.
        """
        with self._lock:
            return self._gates.explain(*self._read(prompt, options), self._planner.erasers)

    @contextmanager
    def prompted(self, prompts: Prompts, /) -> Iterator[Gammas]:
        """Gate denoiser calls made by hand inside this block as those of a picture of `prompts` are.

        Yields the gammas by eraser, one for each prompt, before the erasers' strengths.

        For gradients and single steps. Elsewhere such a call has no prompt, and a gate that needs one counts as
        gamma 1. The rows of the batch are those of `prompts`, in order, any number of times.
        """
        with self.picture(self._pipe):
            self._check_attached()
            call = self._calls[-1]
            # The states that the denoiser is given may be others: the rows count as `prompts` all the same.
            # Which timestep a picture would begin with is unknown here, so no evidence is looked for.
            call.prompts, call.as_encoded, call.watched = prompts, False, True
            call.gammas = self._gates.ask(prompts, call.settings, self._planner.erasers)
            yield self._options.select(call.gammas)

    @contextmanager
    def only(self, chosen: Sequence[Iterable[str] | Mapping[str, float | None]], /) -> Iterator[None]:
        """Let only some of the erasers act on each prompt of the pictures that are drawn inside this block.

        chosen: for each prompt of the call, in order, the names of the erasers that act on it, or their strengths by
            name, where None is the one that it has. The others have gamma 0 there, so that prompts with different
            erasers can share one batch.

        Other threads wait until the block ends. `gates` and `explain` still answer for every eraser. Raises
        NotFoundError for an eraser that is not attached; the call of the pipeline raises UsageError if it has another
        number of prompts, or if they are unknown.
        """
        with self._lock:
            self._check_attached()
            before = self._planner.choose(choice_of(chosen, self._planner.erasers))
            try:
                yield
            finally:
                self._planner.choose(before)

    def gate_of(self, name: str, /) -> Gate | PreparedGate:
        """Return the gate that is asked about one eraser; a calibrated one with its calibration."""
        with self._lock:
            self._check_attached()
            found = find_name(name, self._planner.erasers)
            return self._gates.gate_of(found, self._planner.erasers)

    def add(self, adapter: Adapter, /, *, force: bool = False) -> None:
        """Attach one more eraser, under the options of `attach`.

        force: also if it undoes another, or another undoes it.
        Raises UsageError or CompatibilityError as `attach` does, and then changes nothing.
        """
        if not isinstance(adapter, Adapter):
            raise UsageError(f"add takes an Adapter, not {adapter!r}", mend=f"erasers.add(spm_hub.load({adapter!r}))")
        with self._lock:
            self._check_attached()
            self._planner.restore_weights()
            eraser = self._eraser(adapter, self._planner.erasers)
            self._objections.admit([eraser], force=force)
            self._planner.install({adapter.name: eraser})
            self._say_what_is_unknown([eraser])
            for gates in (self._gates, *self._gates_of.values()):
                self._say_unreadable(gates)

    def also(self, pipe: Any, /) -> None:
        """Gate another pipeline of the same denoiser by its own prompts.

        pipe: for a second pass, inpainting, made by `from_pipe`. It has the attached pipeline's denoiser; its text
        encoders may be others. `detach` gives it back as well; it may go away before. A pipeline that is known already
        stays as it is. Call this before it draws.
        Raises UsageError for another denoiser, or a pipeline with an attachment of its own; nothing is changed then.
        """
        with self._lock:
            self._check_attached()
            if isinstance(pipe, nn.Module):
                raise UsageError(f"also takes a pipeline, not its {type(pipe).__name__}", mend="erasers.also(pipe)")
            attachment = pipe.__dict__.get(ATTACHMENT)
            if attachment is self:
                return
            if attachment is not None:
                raise UsageError(
                    f"this {type(pipe).__name__} has erasers of another attachment", mend="detach that one first"
                )
            if denoiser_of(pipe) is not self._denoiser:
                raise UsageError(
                    f"this {type(pipe).__name__} has another denoiser than the {self._pipeline_class.__name__} that "
                    "the erasers are attached to",
                    mend="spm_hub.attach(pipe, adapters) for a denoiser of its own; else give both the same object",
                )
            unhook(pipe)
            gates = GateEvaluation(pipe, reader_of(pipe), self._options, self._reporter)
            if gates.reads_like(self._gates):
                self._reading_alike.add(pipe)
            self._gates_of[pipe] = gates
            hook_pipeline(pipe, self)
            self._say_unreadable(gates)

    def recover(self, name: str, /) -> None:
        """Remove one eraser: the pipeline is, bit for bit, as if only the others had ever been attached."""
        with self._lock:
            self._check_attached()
            found = find_name(name, self._planner.erasers)
            self._doubles.forget(self._planner.erasers[found].adapter)
            self._objections.forget(self._planner.erasers[found].adapter)
            self._planner.uninstall(found)

    def detach(self) -> None:
        """Restore the pipeline exactly as it was before `attach`: weights, classes, hooks.

        A second call does nothing.
        """
        with self._lock:
            if not self._attached:
                return
            self._planner.restore_weights()
            for other in list(self._gates_of):
                unhook(other)
            remove_hooks(self._pipe, self._denoiser)
            self._attached = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    # What the hooks of the pipeline and of its denoiser call: `pipeline_hooks.Callbacks`.

    @contextmanager
    def picture(self, pipe: Any) -> Iterator[None]:
        """Surround one call of a pipeline: no other thread draws, attaches or recovers meanwhile."""
        with self._lock:
            if self._attached and body_of(denoiser_of(pipe)) is not body_of(self._denoiser):
                raise UsageError(
                    "the pipeline's denoiser was replaced after erasers were attached to it",
                    mend="erasers.detach(), replace it, and attach again",
                )
            self._calls.append(Call(pipe, self._gates_for(pipe)))
            try:
                yield
            finally:
                ended = self._calls.pop()
                self._last_evidence, self._last_gammas = ended.evidence, ended.acting
                self._planner.end_call()

    def drawn(self, pipe: Any, draw: Callable[[], Any], given: Iterable[Any]) -> Any:
        """Return the result of `draw`, which is repeated while a finished picture shows a concept.

        A repeated drawing begins with the same random numbers.
        """
        if not self._picture_check.needed(self.names):
            return draw()
        restore = random_state(pipe, given)
        while True:
            call = self._calls[-1]
            try:
                with self._picture_check.last_steps(getattr(pipe, "scheduler", None), call):
                    return draw()
            except DrawAgainError:
                self._calls[-1] = call.anew()
                self._planner.end_call()
                restore()

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """Surround one call of `encode_prompt`, which in another thread waits for the picture in progress."""
        with self._lock:
            yield

    def encoded(self, pipe: Any, arguments: Mapping[str, Any], result: Any) -> None:
        """Record the prompts of the call in progress, if there is one and it is a call of `pipe`."""
        if not self._calls or self._calls[-1].pipe is not pipe:
            return
        self._calls[-1].record_encoding(arguments, result)
        self._say_cut(self._calls[-1].prompts)
        # Now, as the text encoder may be offloaded before the denoiser is called.
        self._planner.ask_gates(self._calls[-1])
        self._prompt_check.encode_names(self._calls[-1])

    @contextmanager
    def denoising(self, rows: int | None, states: Any, again: Again) -> Iterator[None]:
        """Surround one call of the denoiser: the factors of its batch are in effect until it ends."""
        with self._lock:
            if self._attached:
                call = self._calls[-1] if self._calls else None
                self._planner.put_in_effect(call, rows, states)
                if call is not None and self._prompt_check.look(call, rows, states, again):
                    self._planner.put_in_effect(call, rows, states)
                if call is not None:
                    call.record_again(rows, states, again)
            self._denoisings += 1
            try:
                yield
            finally:
                self._denoisings -= 1

    @contextmanager
    def bare_weights(self, *, moving: bool) -> Iterator[None]:
        """Surround code that reads or changes the denoiser's weights: it sees the checkpoint's own."""
        with self._lock:
            # Offloading moves them in the middle of a picture, which must not switch the erasers off.
            if self._attached and not (moving and (self._denoisings or self._calls)):
                self._planner.restore_weights()
            yield

    def _read(self, prompt: str, options: Mapping[str, Any]) -> tuple[Prompts, Settings]:
        if not isinstance(prompt, str):
            raise UsageError(f"gates takes one prompt, not {prompt!r}", mend="erasers.gates(prompt) for each of them")
        self._check_attached()
        prompts, settings = self._gates.read(prompt, options)
        self._say_cut(prompts)
        return prompts, settings

    def _say_unreadable(self, gates: GateEvaluation) -> None:
        """Warn if an eraser's gate needs prompts, and those of a pipeline can never be known."""
        if not self._planner.all_constant and gates.why_unreadable is not None:
            self._planner.warn_once(f"{gates.why_unreadable}. So {FULLY_ON}, whatever the prompt")

    def _say_cut(self, prompts: Prompts | None) -> None:
        """Warn of prompts that are longer than what the text encoders read."""
        for message in prompts.cut if prompts is not None else ():
            self._planner.warn_once(f"{message}. The gates do not read it either")

    def _gates_for(self, pipe: Any) -> GateEvaluation:
        """Return what computes the gammas of a pipeline's prompts: the first one's, if both read texts alike."""
        alike = pipe in self._reading_alike and encoders_of(pipe) == encoders_of(self._pipe)
        return self._gates if alike else self._gates_of.get(pipe, self._gates)

    def _eraser(self, adapter: Adapter, others: Mapping[str, Eraser]) -> Eraser:
        if (other := others.get(adapter.name)) is not None:
            raise duplicate_error(other.adapter, adapter)
        adapter.check_effect()
        eraser = self._options.eraser(adapter, resolve_modules(adapter, self._denoiser))
        if remark := remark_on_fingerprint(adapter, self._fingerprint):
            self._reporter.say(f"note: {remark}")
        self._doubles.admit(eraser)
        for name in adapter.manifest.concept.names:
            if (cut := self._gates.cut_off(name)) is not None:
                said = cut.describe(f"the concept of {adapter.name}")
                self._planner.warn_once(f"{said}. No gate looks for that part")
        return eraser

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint_of(body_of(self._denoiser))

    def _say_what_is_unknown(self, erasers: Iterable[Eraser]) -> None:
        unknown = [eraser.adapter for eraser in erasers if isinstance(eraser.gate, UnknownConceptGate)]
        if unknown:
            self._planner.warn_once(remark_on_unknown_concepts(unknown))

    def _set_strength(self, name: str, value: float) -> None:
        with self._lock:
            self._check_attached()
            self._planner.set_strength(find_name(name, self._planner.erasers), value)

    def _refuse_attached(self) -> None:
        for part in (self._pipe, self._denoiser, body_of(self._denoiser)):
            other: Attachment | None = part.__dict__.get(ATTACHMENT)
            if other is not None:
                whose = "this pipeline" if part is self._pipe else "another pipeline that shares this denoiser"
                gated = "" if part is self._pipe else "erasers.also(pipe) to gate this one's prompts too, "
                raise UsageError(
                    f"{whose} already has erasers attached ({', '.join(other.names) or 'none yet'})",
                    mend=f"{gated}erasers.detach() first, or erasers.add(adapter) to have more of them",
                )

    def _check_attached(self) -> None:
        if not self._attached:
            raise UsageError("these erasers were detached", mend="spm_hub.attach(pipe, adapters) again")

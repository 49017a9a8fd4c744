"""The work behind the page: base models that all visitors share, erasers, pictures as they emerge."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from spm_hub.adapters.adapter import Adapter
from spm_hub.adapters.lookup import find_name
from spm_hub.adapters.manifest import Manifest
from spm_hub.adapters.overlap import inner_products
from spm_hub.attachment.attachment import Attachment, attach
from spm_hub.attachment.gates.gate import Explanation
from spm_hub.errors import NotFoundError, SpmHubError, UsageError
from spm_hub.models.base_choice import BaseChoice
from spm_hub.registry.registry import registries, registry_for_new
from spm_hub.serving.drawing import Drawn, Order, Preview
from spm_hub.serving.engine import Engine
from spm_hub.serving.requests import Limits

_PREVIEWS = 8
"""Most previews of one picture: each one is decoded while the others wait."""
_GLANCE = 0.2
"""Seconds between two looks at the pictures in progress."""


@dataclass(frozen=True)
class Frame:
    """Pictures of one prompt as they are at a moment, from the same noise.

    step of total: 0 while they wait.  pictures: None before the first preview.  drawn: once they are finished.
    """

    step: int
    total: int
    pictures: tuple[Image.Image | None, ...]
    drawn: tuple[Drawn, ...] = ()


class Studio:
    """The base models, each with a queue, and the erasers that all visitors of the page share.

    bases: the base models to choose from, by name.  registry: where erasers are looked up first, as in
    `resolve`.  limits: of what a visitor may ask for.
    """

    def __init__(
        self, bases: Mapping[str, BaseChoice], limits: Limits, *, registry: Path | None = None, together: int = 8
    ) -> None:
        self.bases, self.limits, self.registry = dict(bases), limits, registry
        self._together = together
        self._engines: dict[str, Engine] = {}
        self._loading = threading.Lock()

    def close(self) -> None:
        """Finish the pictures in progress and give the base models back as they were."""
        for engine in self._engines.values():
            engine.run(Attachment.detach).result()
            engine.close()
        self._engines.clear()

    def names(self) -> list[str]:
        """Return the names of all erasers of the registries, each once."""
        return list(dict.fromkeys(entry.name for place in registries(self.registry) for entry in place.entries()))

    def load(self, name: str) -> Adapter:
        """Load an eraser of the registries by its name. Raises NotFoundError."""
        for place in registries(self.registry):
            if (entry := place.find(name)) is not None:
                return entry.load()
        raise NotFoundError(f"there is no eraser {name!r} any more", mend="choose another one")

    def manifest(self, name: str) -> Manifest:
        """Return the manifest of an eraser of the registries. Raises NotFoundError."""
        for place in registries(self.registry):
            if (entry := place.find(name)) is not None:
                return entry.read_manifest()
        raise NotFoundError(f"there is no eraser {name!r} any more", mend="choose another one")

    def fetch(self, repo: str) -> str:
        """Pull an eraser from the Hub into the registry, and return its name.

        Raises NetworkError, HubError, RegistryError for a name that is taken.
        """
        from spm_hub.hub.pull import pull

        return pull(repo, registry=registry_for_new(self.registry)).entry.name

    def explain(self, base: str, prompt: str, names: Sequence[str]) -> dict[str, Explanation]:
        """Return each eraser's gamma for a prompt, and what gave it. Raises as `draw` does."""
        self.limits.check_prompt("the prompt", prompt)
        engine = self._with(base, names)

        def ask(erasers: Attachment) -> dict[str, Explanation]:
            found = erasers.explain(prompt)
            return {name: found[name] for name in names}

        return engine.run(ask).result()

    def draw(
        self,
        base: str,
        prompt: str,
        sets: Sequence[Mapping[str, float]],
        *,
        seed: int,
        steps: int,
        guidance: float | None = None,
    ) -> Iterator[Frame]:
        """Draw a prompt once for each set of erasers, all from the same noise.

        Yields the pictures as they emerge.

        sets: strengths by name; an empty one draws without erasers.
        Raises UsageError, NotFoundError, CompatibilityError for an eraser that does not fit the base, BusyError.
        """
        self.limits.check_prompt("the prompt", prompt)
        self.limits.check("steps", steps, self.limits.steps)
        engine = self._with(base, [name for one in sets for name in one])
        seen: queue.SimpleQueue[tuple[int, int, int, Image.Image | None]] = queue.SimpleQueue()

        def watch(row: int, step: int, total: int, preview: Preview) -> None:
            shown = preview() if step % max(1, total // _PREVIEWS) == 0 and step < total else None
            seen.put((row, step, total, shown))

        answers = engine.submit(
            [
                Order(prompt, seed, steps=steps, guidance=guidance, erasers=dict(one), watch=partial(watch, row))
                for row, one in enumerate(sets)
            ]
        )
        try:
            yield from self._frames(answers, seen)
        finally:
            for answer in answers:
                answer.cancel()

    def _frames(
        self,
        answers: Sequence[Future[Drawn]],
        seen: queue.SimpleQueue[tuple[int, int, int, Image.Image | None]],
    ) -> Iterator[Frame]:
        pictures: list[Image.Image | None] = [None] * len(answers)
        frame = Frame(0, 0, tuple(pictures))
        yield frame
        while True:
            over = all(answer.done() for answer in answers)
            try:
                row, step, total, picture = seen.get(timeout=0 if over else _GLANCE)
            except queue.Empty:
                if over:  # before the queue was found empty: no step is left out
                    break
                continue
            pictures[row] = picture or pictures[row]
            if row == len(answers) - 1:
                yield Frame(step, total, tuple(pictures))
        drawn = tuple(answer.result() for answer in answers)
        yield Frame(1, 1, tuple(one.picture for one in drawn), drawn)

    def similarity(self, one: str, other: str) -> float:
        """Return the cosine of two erasers' changes: 1 for the same change, -1 for its opposite."""
        products = inner_products([self.load(one).increments, self.load(other).increments])
        norms = (products[0, 0] * products[1, 1]).sqrt()
        return float(products[0, 1] / norms) if norms > 0 else 0.0

    def lend(self, base: str, adapter: Adapter) -> None:
        """Attach an eraser that no registry has, or a newer version of it, to a base."""

        def attach_anew(erasers: Attachment) -> None:
            if adapter.name in erasers:
                erasers.recover(adapter.name)
            _attach_missing([adapter], erasers)

        self._engine(base).run(attach_anew).result()

    def take_back(self, base: str, name: str) -> None:
        """Take an eraser off a base, if it is attached."""

        def recover(erasers: Attachment) -> None:
            if name in erasers:
                erasers.recover(name)

        self._engine(base).run(recover).result()

    def _with(self, base: str, names: Sequence[str]) -> Engine:
        """Return the engine of a base with these erasers attached; they act only where an order names them."""
        engine = self._engine(base)
        if missing := [name for name in dict.fromkeys(names) if name not in engine.erasers]:
            engine.run(partial(_attach_missing, [self.load(name) for name in missing])).result()
        return engine

    def _engine(self, base: str) -> Engine:
        if base not in self.bases:
            raise NotFoundError(f"there is no base model {base!r} here", mend=f"choose {find_name(base, self.bases)}")
        with self._loading:
            if base not in self._engines:
                pipe = self.bases[base].open()
                self._engines[base] = Engine(pipe, attach(pipe, []), together=self._together, patience=0.0)
            return self._engines[base]


def _attach_missing(adapters: Sequence[Adapter], erasers: Attachment) -> None:
    """Attach erasers, unless another visitor has had them attached meanwhile.

    Two that undo each other may belong to two visitors, so that they are attached all the same.
    """
    for adapter in adapters:
        if adapter.name not in erasers:
            erasers.add(adapter, force=True)


def in_words(error: Exception) -> str:
    """Return an error as a visitor reads it: what happened, and what to do."""
    if isinstance(error, SpmHubError):
        return error.message if error.mend is None else f"{error.message}. Try: {error.mend}"
    return f"this went wrong: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def checked_number(name: str, value: object, least: int, most: int) -> int:
    """Return a whole number that a visitor typed. Raises UsageError."""
    if not isinstance(value, int | float) or value != value or int(value) != value or not least <= value <= most:
        shown = "nothing" if value is None else f"{value!r}"
        raise UsageError(f"{name} is {shown}; it is a whole number from {least} to {most}")
    return int(value)

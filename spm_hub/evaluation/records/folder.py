"""The folder of a run: its settings, rows, pictures, and a line of samples.jsonl for each picture."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from filelock import FileLock, Timeout
from PIL import Image, UnidentifiedImageError

from spm_hub.errors import NotFoundError, RegistryError, UsageError
from spm_hub.evaluation.pictures import write_png
from spm_hub.evaluation.records.rows import Batch, PromptRow, cut
from spm_hub.evaluation.records.sample import Sample, pixel_hash
from spm_hub.io import untrusted_json
from spm_hub.io.atomic import write_atomic, write_together
from spm_hub.io.wording import quoted

RUN, ROWS, SAMPLES, METRICS = "run.json", "rows.jsonl", "samples.jsonl", "metrics.json"
SCORES, FEATURES = "scores", "features"
_UNFOLDS = 40


class RunFolder:
    """The records of one run.

    path: the folder. run: what was asked, as JSON. rows: the prompt rows. batches: the rows as they are drawn.
    """

    def __init__(self, path: Path, run: Mapping[str, Any], rows: Sequence[PromptRow]) -> None:
        self.path, self.run, self.rows = path, dict(run), tuple(rows)

    @cached_property
    def batches(self) -> tuple[Batch, ...]:
        return cut(self.rows, int(self.run["at_once"]))

    @cached_property
    def conditions(self) -> tuple[str, ...]:
        return tuple(self.run["conditions"])

    @classmethod
    def start(cls, path: Path, run: Mapping[str, Any], rows: Sequence[PromptRow], *, resume: bool) -> Self:
        """Make a folder for a run, or continue the same run.

        Raises UsageError if the folder has a run already and `resume` is not set, or has another run; RegistryError.
        """
        content = {RUN: _document(run), ROWS: "".join(_line(row.as_dict()) for row in rows)}
        if (path / RUN).exists():
            if not resume:
                raise UsageError(
                    f"{path} has a run already", mend=f"add --resume to continue it, or --out {quoted(f'{path}-2')}"
                )
            _check_same(path, json.loads(content[RUN]), _read(path / RUN))
            if (path / ROWS).read_text(encoding="utf-8") != content[ROWS]:
                raise UsageError(f"{path / ROWS} has other rows than this run", mend=f"--out {quoted(f'{path}-2')}")
        else:
            # run.json last: a folder with it is complete.
            write_together({path / name: content[name].encode() for name in (ROWS, RUN)})
        return cls(path, json.loads(content[RUN]), rows)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open the folder of a run.

        Raises NotFoundError for another folder, UsageError for files that are not of a run.
        """
        try:
            run = _read(path / RUN)
            rows = [PromptRow(**value) for value in whole_lines(path / ROWS)]
        except FileNotFoundError as error:
            raise NotFoundError(
                f"{path} is not the folder of an evaluation: it has no {Path(str(error.filename)).name}",
                mend="spmhub eval NAME --protocol neighbours --out DIR",
            ) from error
        except TypeError as error:
            raise UsageError(f"{path / ROWS} is not a file of prompt rows: {error}") from error
        if missing := [key for key in ("conditions", "at_once", "protocol") if key not in run]:
            raise UsageError(f"{path / RUN} is not the record of a run: it has no {missing[0]!r}")
        return cls(path, run, rows)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing to the folder meanwhile. Raises RegistryError if one does."""
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RegistryError(
                f"another process is writing to {self.path}", mend="wait for it to end, or name another folder"
            ) from None
        try:
            yield
        finally:
            lock.release()

    @cached_property
    def sha256(self) -> str:
        """The hash of everything that was asked: protocol, model, erasers, drawing and rows."""
        asked = {key: value for key, value in self.run.items() if key != "versions"}
        return _digest(_document(asked) + "".join(_line(row.as_dict()) for row in self.rows))

    def samples(self) -> tuple[Sample, ...]:
        """Return the samples of all whole batches, by condition and batch.

        A kill may have cut the last line short, or a batch: such lines are left out. Write the samples by `replace`
        before more are appended.
        Raises UsageError for a line that is not of this run.
        """
        found: dict[tuple[str, int], list[Sample]] = {}
        for value in whole_lines(self.path / SAMPLES) if (self.path / SAMPLES).exists() else ():
            try:
                sample = Sample.from_dict(value)
            except (TypeError, ValueError) as error:
                raise UsageError(f"{self.path / SAMPLES} has a line that is no sample: {error}") from error
            found.setdefault((sample.condition, sample.batch), []).append(sample)
        whole = []
        for condition in self.conditions:
            for batch in self.batches:
                samples = found.get((condition, batch.number), [])
                if [sample.row for sample in samples] == [row.id for row in batch.rows]:
                    whole += samples
        return tuple(whole)

    def keep(
        self,
        condition: str,
        batch: Batch,
        pictures: Sequence[Image.Image],
        gammas: Mapping[str, Sequence[float]] = MappingProxyType({}),
    ) -> tuple[Sample, ...]:
        """Write the pictures of one batch, and return their samples.

        gammas: of each eraser, one for each picture. Raises RegistryError.
        """
        first = sum(len(earlier.rows) for earlier in self.batches[: batch.number])
        samples = []
        for at, (row, picture) in enumerate(zip(batch.rows, pictures, strict=True)):
            name = f"pictures/{condition}/{first + at:06d}.png"
            write_png(self.path / name, picture, {**row.as_dict(), "condition": condition})
            own = {eraser: round(each[at], 6) for eraser, each in gammas.items()}
            samples.append(Sample(row.id, condition, row.seed, batch.number, name, pixel_hash(picture), gammas=own))
        return tuple(samples)

    def replace(self, samples: Sequence[Sample]) -> None:
        """Replace samples.jsonl, atomically. Raises RegistryError."""
        write_atomic(self.path / SAMPLES, "".join(sample.to_line() for sample in samples).encode())

    def forget_scores(self) -> None:
        """Remove all scores and features, as some pictures are to be drawn again. Raises RegistryError."""
        if (self.path / METRICS).exists():
            self.replace([replace(sample, scores={}) for sample in self.samples()])
            (self.path / METRICS).unlink()
        for name in (SCORES, FEATURES):
            shutil.rmtree(self.path / name, ignore_errors=True)

    def picture(self, sample: Sample) -> Image.Image:
        """Read a kept picture as RGB. Raises UsageError if it is missing, or not the one that was drawn."""
        path = self.path / sample.picture
        again = f"remove the line from {SAMPLES}, then run it again with --resume"
        if not path.resolve().is_relative_to(self.path.resolve()):
            raise UsageError(f"{self.path / SAMPLES} names a picture outside the folder: {sample.picture}")
        try:
            with Image.open(path) as opened:
                picture = opened.convert("RGB")
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise UsageError(f"{path}: {error}", mend=again) from error
        if (found := pixel_hash(picture)) != sample.sha256:
            raise UsageError(
                f"{path} is another picture than the one that was drawn: {found} instead of {sample.sha256}", mend=again
            )
        return picture


def append_durably(path: Path, text: str) -> None:
    """Append text to a file and sync it. Raises RegistryError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise RegistryError(
            f"cannot write {path}: {error.strerror or error}", mend="free some space on its disk, then --resume"
        ) from error


def whole_lines(path: Path) -> Iterator[Any]:
    """Yield the values of a file of JSON lines; a last line that a kill cut short is left out.

    Raises UsageError for a line that is not JSON, FileNotFoundError.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                yield untrusted_json.parse(line, unfolds=_UNFOLDS)
            except ValueError as error:
                raise UsageError(f"{path}, line {number} is not JSON: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        value = untrusted_json.parse(path.read_bytes(), unfolds=_UNFOLDS)
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path} is not the record of a run")
    return value


def _check_same(path: Path, asked: Mapping[str, Any], kept: Mapping[str, Any]) -> None:
    for key in {**kept, **asked}:
        if asked.get(key) != kept.get(key):
            raise UsageError(
                f"{path} has another run: {key} is {_short(kept.get(key))} there, and {_short(asked.get(key))} here",
                mend=f"--out {quoted(f'{path}-2')}",
            )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _document(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False) + "\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

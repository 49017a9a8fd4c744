"""Reads prompt rows from CSV, TSV, JSON lines, plain text or Parquet, local or on the Hub."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

from spm_hub.errors import NotFoundError, UsageError
from spm_hub.evaluation.prompts.catalogue import PromptSet, set_of_hash
from spm_hub.evaluation.prompts.columns import ColumnMap
from spm_hub.evaluation.records.rows import PromptRow, Role
from spm_hub.io import untrusted_json
from spm_hub.io.hashing import sha256_of
from spm_hub.io.hub_client import is_commit, retry, translate_errors

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".txt", ".parquet")
_HUB = re.compile(r"hf://datasets/(?P<repo>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[\w./-]+?))?/(?P<path>.+)")
_UNFOLDS = 40
_LONGEST_FIELD = 2**20


@dataclass(frozen=True)
class PromptFile:
    """A file of prompts as it was read.

    source: as it was named; commit: of the Hub, None for a local file. sha256: of the file. published: the set of the
    catalogue that it is, None for another file. columns: those that were read; None for plain text.
    """

    source: str
    sha256: str
    commit: str | None
    published: PromptSet | None
    columns: ColumnMap | None
    rows: tuple[PromptRow, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the file's facts for a report, as JSON, without a path of this machine."""
        return {
            "file": self.source if self.source.startswith("hf://") else Path(self.source).name,
            "sha256": self.sha256,
            "commit": self.commit,
            "set": None if self.published is None else self.published.name,
            "licence": None if self.published is None else self.published.licence,
            "columns": None if self.columns is None else self.columns.named(),
            "rows": len(self.rows),
        }


def read_prompt_file(
    source: str, *, subject: str, role: Role = "target", seed: int = 0, columns: ColumnMap | None = None
) -> PromptFile:
    """Read the rows of a file.

    source: a path, or hf://datasets/OWNER/NAME[@REVISION]/PATH. columns: None for those of the published set that the
    file is, by its hash, or else those that are found by name. subject: of rows that have none of their own. seed: row
    i without one gets seed + i.
    Raises NotFoundError, UsageError for a file that cannot be read as such, HubError, NetworkError.
    """
    path, commit = _local(source)
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(
            f"{source} ends in {path.suffix or 'no suffix'!r}, and prompts are read from {', '.join(SUFFIXES)}",
            mend="spmhub eval NAME --protocol neighbours --prompts prompts.csv",
        )
    try:
        sha256 = sha256_of(path)
    except OSError as error:
        raise NotFoundError(f"{source}: {error.strerror or error}", mend="--prompts FILE.csv") from error
    published = set_of_hash(sha256)
    if columns is None and published is not None:
        columns = published.columns
    if path.suffix.lower() == ".txt":
        values: list[Mapping[str, Any]] = [{"prompt": line} for line in _text(path).splitlines()]
        if columns is not None:
            raise UsageError(
                f"{source} is plain text and has no columns", mend="leave --columns out, or give a CSV file"
            )
        found, chosen = None, ColumnMap(prompt="prompt")
    else:
        names, values = _table(path, columns)
        found = chosen = ColumnMap.found_in(names, source) if columns is None else columns
        if missing := [column for column in chosen.named().values() if column not in names]:
            raise UsageError(
                f"{source} has no column {missing[0]!r}, but {', '.join(names)}", mend=f"--columns prompt={names[0]}"
            )
    if not values:
        raise UsageError(f"{source} has no rows", mend="a file with one prompt a row")
    rows = tuple(_row(source, number, value, chosen, subject, role, seed) for number, value in enumerate(values))
    return PromptFile(source, sha256, commit, published, found, rows)


def _local(source: str) -> tuple[Path, str | None]:
    """Return the file on this machine, downloaded if it is on the Hub, and its commit there."""
    if not source.startswith("hf://"):
        return Path(source), None
    match = _HUB.fullmatch(source)
    if match is None:
        raise UsageError(
            f"{source} is not hf://datasets/OWNER/NAME@REVISION/PATH",
            mend="--prompts hf://datasets/OWNER/NAME/prompts.csv",
        )
    repo, revision = match["repo"], match["revision"]
    cached = try_to_load_from_cache(repo, match["path"], repo_type="dataset", revision=revision)
    if isinstance(cached, str) and (is_commit(revision) or constants.is_offline_mode()):
        return Path(cached), _commit(cached)
    with translate_errors(repo, revision, otherwise="give a file of this machine: --prompts FILE"):
        path = Path(retry(lambda: hf_hub_download(repo, match["path"], repo_type="dataset", revision=revision)))
    return path, _commit(path)


def _commit(path: str | Path) -> str | None:
    """Return the commit in the path of a file of the Hub's cache."""
    found = re.search(r"/snapshots/([0-9a-f]{40})/", Path(path).as_posix())
    return found[1] if found else None


def _table(path: Path, columns: ColumnMap | None) -> tuple[list[str], list[Mapping[str, Any]]]:
    """Return the names of the columns, and the rows by them."""
    match path.suffix.lower():
        case ".parquet":
            return _parquet(path)
        case ".jsonl" | ".ndjson":
            values = list(_json_lines(path))
            return list(dict.fromkeys(key for value in values for key in value)), values
    csv.field_size_limit(_LONGEST_FIELD)
    lines = csv.reader(io.StringIO(_text(path), newline=""), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    try:
        cells = [line for line in lines if line]
    except csv.Error as error:
        raise UsageError(f"{path.name}, line {lines.line_num}: {error}") from error
    if not cells:
        return [], []
    counts = columns is not None and columns.counts
    names = [str(place) for place in range(1, len(cells[0]) + 1)] if counts else cells.pop(0)
    if wrong := [number for number, line in enumerate(cells, start=1) if len(line) != len(names)]:
        raise UsageError(
            f"{path.name}: row {wrong[0]} has {len(cells[wrong[0] - 1])} cells, and there are {len(names)} columns"
        )
    return names, [dict(zip(names, line, strict=True)) for line in cells]


def _json_lines(path: Path) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = untrusted_json.parse(line.encode(), unfolds=_UNFOLDS)
        except ValueError as error:
            raise UsageError(f"{path.name}, line {number} is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise UsageError(f"{path.name}, line {number} is not an object with a prompt")
        yield value


def _parquet(path: Path) -> tuple[list[str], list[Mapping[str, Any]]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise NotFoundError(
            f"{path.name} is a Parquet file, and pyarrow, which reads it, is not installed",
            mend="pip install 'spm-hub[eval]'",
        ) from error
    try:
        table = parquet.read_table(path)
    except (ArrowException, OSError) as error:
        raise UsageError(f"{path.name} is not a Parquet file: {str(error).splitlines()[0]}") from error
    return list(table.column_names), list(table.to_pylist())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # Windows marks its files
    except UnicodeDecodeError as error:
        raise UsageError(f"{path.name} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def _row(
    source: str, number: int, value: Mapping[str, Any], columns: ColumnMap, subject: str, role: Role, seed: int
) -> PromptRow:
    """Build the row from its cells. Raises UsageError with the number of the row, from 1."""
    where = f"{Path(source).name}, row {number + 1}"
    cells = {key: _cell(value.get(column)) for key, column in columns.named().items()}
    if cells["prompt"] is None:
        raise UsageError(f"{where} has no prompt", mend="remove the row")
    whole = {key: _whole(where, key, cells.get(key)) for key in ("seed", "width", "height")}
    return PromptRow(
        id=f"{role}-{number}",
        prompt=cells["prompt"],
        seed=seed + number if whole["seed"] is None else whole["seed"],
        subject=cells.get("subject") or subject,
        role=role,
        negative=cells.get("negative"),
        guidance=_number(where, "guidance", cells.get("guidance")),
        width=whole["width"],
        height=whole["height"],
    )


def _cell(value: Any) -> str | None:
    """Return the text of a cell, None for an empty one, or the NaN of a missing number."""
    text = "" if value is None else str(value)
    return None if not text.strip() or text == "nan" else text


def _number(where: str, key: str, text: str | None) -> float | None:
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"{where}: {key} is {text!r}, not a number")
    return value


def _whole(where: str, key: str, text: str | None) -> int | None:
    """Return a whole number; programs that lose integers in tables write them as 123.0."""
    if text is None:
        return None
    if not re.fullmatch(r"\d+(\.0*)?", text.strip()):
        raise UsageError(f"{where}: {key} is {text!r}, not a whole number")
    return int(text.strip().partition(".")[0])

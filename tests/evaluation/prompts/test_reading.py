"""Prompt rows from files of five kinds, by columns that are named, found, counted, or those of a published set."""

from __future__ import annotations

import csv
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from spm_hub.errors import NetworkError, NotFoundError, UsageError
from spm_hub.evaluation.prompts import catalogue, reading
from spm_hub.evaluation.prompts.catalogue import PromptSet
from spm_hub.evaluation.prompts.columns import KNOWN_NAMES, ColumnMap
from spm_hub.evaluation.prompts.reading import read_prompt_file
from spm_hub.evaluation.records.rows import PromptRow

# As the columns of I2P: a prompt over two lines, quotes, a seed that a table made a float, an empty guidance.
TABLE: list[dict[str, Any]] = [
    dict(
        zip(
            ("Unnamed: 0", "prompt", "sd_seed", "sd_guidance_scale", "sd_image_width", "sd_image_height"),
            row,
            strict=True,
        )
    )
    for row in ((0, "a dog,\nat the beach", "4000000000", "7", "512", "768"), (1, 'a "cat"', "12.0", "", "64", "64"))
]
EXPECTED = (
    PromptRow("target-0", "a dog,\nat the beach", 4000000000, "nudity", guidance=7.0, width=512, height=768),
    PromptRow("target-1", 'a "cat"', 12, "nudity", width=64, height=64),
)


def write(path: Path, rows: list[dict[str, Any]] = TABLE, delimiter: str = ",") -> Path:
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        table = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        table.writeheader()
        table.writerows(rows)
    return path


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    lines = tmp_path / "p.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in TABLE) + "\n")
    files = [write(tmp_path / "p.csv"), write(tmp_path / "p.tsv", delimiter="\t"), lines]
    for file in files:
        found = read_prompt_file(str(file), subject="nudity", seed=5)
        assert found.rows == EXPECTED
        assert found.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
        assert found.as_dict()["file"] == file.name, "no path of this machine is in a report"
    text = tmp_path / "p.txt"
    text.write_text("a dog\na cat\n")
    assert [(row.prompt, row.seed, row.subject) for row in read_prompt_file(str(text), subject="x", seed=5).rows] == [
        ("a dog", 5, "x"), ("a cat", 6, "x"),
    ]  # fmt: skip


def test_a_parquet_file(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(TABLE), tmp_path / "p.parquet")
    assert read_prompt_file(str(tmp_path / "p.parquet"), subject="nudity").rows == EXPECTED


def test_without_pyarrow_the_error_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(NotFoundError, match=r"pip install 'spm-hub\[eval\]'"):
        read_prompt_file(str(tmp_path / "p.parquet"), subject="x")


def test_columns_are_named_by_hand_or_counted(tmp_path: Path) -> None:
    pairs = [{"adv_prompt": "first", "target_prompt": "second", "n": "3"}]
    file = str(write(tmp_path / "p.csv", pairs))
    with pytest.raises(UsageError, match="adv_prompt and target_prompt both may be"):
        read_prompt_file(file, subject="x")
    (row,) = read_prompt_file(file, subject="x", columns=ColumnMap.parse("prompt=target_prompt,seed=n")).rows
    assert (row.prompt, row.seed) == ("second", 3)
    bare = tmp_path / "bare.csv"
    bare.write_text("one,7\ntwo,8\n")
    rows = read_prompt_file(str(bare), subject="x", columns=ColumnMap.parse("prompt=1,seed=2")).rows
    assert [(row.prompt, row.seed) for row in rows] == [("one", 7), ("two", 8)]


def test_a_published_set_is_recognised_by_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "p.csv", [{"caption": "seen", "odd": "read this"}])
    known = PromptSet(
        name="odd-set", about="-", where="-", sha256=hashlib.sha256(file.read_bytes()).hexdigest(), rows=1,
        columns=ColumnMap(prompt="odd"), licence=None, citation="-",
    )  # fmt: skip
    monkeypatch.setattr(catalogue, "catalogue", lambda: (known,))
    found = read_prompt_file(str(file), subject="x")
    assert (found.rows[0].prompt, found.as_dict()["set"], found.as_dict()["licence"]) == ("read this", "odd-set", None)


def test_the_catalogue_has_facts_and_no_prompts() -> None:
    sets = catalogue.catalogue()
    assert len({one.name for one in sets}) == len({one.sha256 for one in sets}) == len(sets) >= 19
    assert {one.name: one.rows for one in sets}.items() >= {
        "i2p": 4703,
        "uda-nudity": 142,
        "coco-30k-spm": 30000,
    }.items()
    for one in sets:
        assert set(one.columns.named()) <= KNOWN_NAMES.keys()
        assert len(one.about) < 90
    with pytest.raises(NotFoundError, match="did you mean i2p"):
        PromptSet.named("i2pp")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.csv", "", "has the columns , and none of them|has no rows"),
        ("p.csv", "prompt\n", "has no rows"),
        ("p.csv", "prompt,seed\na,1\n,2\n", "row 2 has no prompt"),
        ("p.csv", "prompt,seed\na,1.5\n", "row 1: seed is '1.5', not a whole number"),
        ("p.csv", "prompt,guidance\na,inf\n", "row 1: guidance is 'inf', not a number"),
        ("p.csv", "prompt,width,height\na,65,64\n", "width is 65, not a multiple of 8"),
        ("p.csv", "prompt,width\na,64\n", "width is 64 and height None"),
        ("p.csv", "prompt,seed\na,1,2\n", "row 1 has 3 cells, and there are 2 columns"),
        ("p.csv", "words\na\n", "columns words, and none of them is known to hold the prompts"),
        ("p.jsonl", '{"prompt": "a"}\n[1]\n', "line 2 is not an object"),
        ("p.jsonl", '{"prompt": NaN}\n', "line 1 is not JSON"),
        ("p.xlsx", "x", "ends in '.xlsx'"),
        ("p.txt", "", "has no rows"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=words):
        read_prompt_file(str(tmp_path / name), subject="x")


def test_texts_that_name_no_file(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="No such file"):
        read_prompt_file(str(tmp_path / "none.csv"), subject="x")
    (tmp_path / "bad.csv").write_bytes(b"prompt\n\xff\n")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_prompt_file(str(tmp_path / "bad.csv"), subject="x")
    with pytest.raises(UsageError, match="hf://datasets/OWNER/NAME"):
        read_prompt_file("hf://datasets/owner", subject="x")
    with pytest.raises(NetworkError, match="HF_HUB_OFFLINE"):
        read_prompt_file("hf://datasets/owner/name@main/p.csv", subject="x")
    for wrong in ("seed=s", "prompt", "prompt=a,prompt=b", "colour=red,prompt=a"):
        with pytest.raises(UsageError, match="--columns"):
            ColumnMap.parse(wrong)


def test_a_dataset_of_the_hub_is_pinned_to_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "a" * 40
    place = tmp_path / "datasets--owner--name"
    (place / "snapshots" / commit / "data").mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "v1").write_text(commit)
    write(place / "snapshots" / commit / "data" / "p.csv")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for revision in (commit, "v1"):
        found = reading.read_prompt_file(f"hf://datasets/owner/name@{revision}/data/p.csv", subject="nudity")
        assert (found.commit, found.rows) == (commit, EXPECTED)

"""Small files as an enemy would send them, each to what reads it: seeded mutations of good ones, under a watch.

Whole repositories are in `hostile.py`; here are the files that no hash covers, and those that are read before one does.
"""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hostile
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from spm_hub.adapters.baking import PROVENANCE, read_provenance
from spm_hub.adapters.manifest import Manifest
from spm_hub.attachment.objections import beyond_limits
from spm_hub.errors import SpmHubError
from spm_hub.hub import card
from spm_hub.io import pickles
from spm_hub.io.safetensors_file import read_tensors
from spm_hub.models import snapshots
from spm_hub.models.loading import load_pipeline
from spm_hub.models.single_file.loading import lost_files
from spm_hub.models.snapshots import INDEX
from spm_hub.registry import lockfile, storage
from spm_hub.training.recipe.recipe import Recipe

RECIPE = """\
# a recipe of ours
target: snoopy
aliases: [beagle, 'the dog']
kind: character
method: spm
steps: 500
seed: 7
objective: {eta: 1.0}
increment:
  rank: 1
  modules: esd-x
optimiser:
  lr: 1.0e-3
"""
YAML = [
    "a: &a [1]\n", "b: *a\n", "<<: {a: 1}\n", "!!python/object/apply:os.system ['true']\n", "x: !!binary aGk=\n",
    "- - - -\n", "? [a]\n: 1\n", "9" * 5000, "0x" + "f" * 5000, "1:" * 3000, "2020-13-45", "9999-99-99T99:99:99Z",
    "[" * 400, "{" * 400, "- " * 400, "? " * 300, "|\n" + " x\n" * 100, "%YAML 9.9\n---\n", "---\n---\n", "\t", "\0",
    "\x85", "\ufeff", "1e999", ".nan", "-.inf", "~", "yes: no\n", "1: 2\n", "null: 1\n", "target: {a: {b: c}}\n",
    "aliases: 3\n", "steps: -1\n", "steps: 1e18\n", "method: nope\n", "x" * 20_000, "'" * 999, "é" * 500, "\U0010ffff",
    "!!set {a, b}", "!!omap [a: 1]", "!!timestamp 'x'", "!!int 'x'", "!!float '__'", "!!bool 'x'", "0o9", "1_000_000",
    "!<tag:yaml.org,2002:int> 0b2", "=", "<<: 1\n", "a: {<<: [1, 2]}\n",
]  # fmt: skip
"""Pieces of YAML that parsers have fallen over."""


@dataclass
class File:
    """One mutated file: its kind, its bytes, and what was done to it."""

    kind: str
    content: bytes
    done: list[str]


def good(kind: str) -> bytes:
    """Return an honest file of one of `KINDS`."""
    if kind == "recipe":
        return RECIPE.encode()
    if kind in ("manifest", "card"):
        return hostile.good("low rank").manifest
    if kind == "safetensors header":
        return hostile.good("dense").weights
    if kind == "lock file":
        pin = {"repo": "someone/snoopy", "commit": "a" * 40, "revision": "main", "sha256": "b" * 64}
        return json.dumps({"schema_version": 1, "adapters": {"snoopy": pin, "mickey": pin}}).encode()
    if kind == "journal":
        names = {folder: f".snoopy{suffix}.0123abcd.tmp" for folder, suffix in storage.SUFFIXES.items()}
        return json.dumps({"snoopy": names, "mickey": {}}).encode()
    if kind == "record of a bake":
        baked = [{"name": name, "strength": 1.0, "sha256": "c" * 64} for name in ("snoopy", "mickey")]
        return json.dumps({"base": "sd", "family": "sd1", "denoiser": "unet", "erasers": baked}).encode()
    if kind == "model_index.json":
        parts = {"unet": ["diffusers", "UNet2DConditionModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
        return json.dumps({"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.1", **parts}).encode()
    buffer = io.BytesIO()
    if kind == "pickle":
        torch.save({"a": torch.ones(3, 4), "b": [torch.zeros(2), {"c": torch.arange(5)}]}, buffer)
    else:
        about = PngInfo()
        about.add_text("spmhub", json.dumps({"prompt": "snoopy", "adapters": ["snoopy"], "gates": {"snoopy": 1.0}}))
        Image.new("RGB", (8, 8)).save(buffer, "PNG", pnginfo=about)
    return buffer.getvalue()


def mutant(seed: int) -> File:
    """Return the hostile file of that number."""
    rng, kind = random.Random(seed), KINDS[seed % len(KINDS)]
    file = File(kind, good(kind), [])
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        name, mutate = rng.choice(MUTATIONS.get(kind, ()) or (("bytes", _bytes),))
        # What was broken before cannot always be broken in this way too.
        with suppress(Exception):
            file.content = mutate(file.content, rng)
            file.done.append(name)
    return file


def _bytes(content: bytes, rng: random.Random) -> bytes:
    data = bytearray(content)
    at, length = rng.randrange(max(1, len(data))), rng.randrange(1, 64)
    how = rng.randrange(7)
    if how == 0:
        for _ in range(rng.choice((1, 1, 8, 100))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == 1:
        del data[at:]
    elif how == 2:
        del data[at : at + length]
    elif how == 3:
        data[at:at] = data[at : at + length] * rng.choice((1, 2, 1000))
    elif how == 4:
        data[at : at + 8] = rng.choice(hostile.INTEGERS[:8]).to_bytes(8, "little", signed=True)
    elif how == 5:
        data[at:at] = rng.randbytes(length)
    else:
        other = good(rng.choice(KINDS))
        data[at:] = other[rng.randrange(len(other)) :]
    return bytes(data)


def _tree(content: bytes, rng: random.Random) -> bytes:
    """Change one value, key or branch of a JSON text."""
    tree = json.loads(content)
    holder: Any = tree
    for _ in range(rng.randrange(5)):
        inner = [
            one
            for one in (holder.values() if isinstance(holder, dict) else holder)
            if isinstance(one, dict | list) and one
        ]
        if not inner:
            break
        holder = rng.choice(inner)
    key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
    how = rng.randrange(5)
    if how <= 1:
        holder[key] = rng.choice([*hostile.VALUES, *hostile.INTEGERS, ["x"] * 3000, {str(n): n for n in range(3000)}])
    elif how == 2:
        del holder[key]
    elif how == 3 and isinstance(holder, dict):
        holder[rng.choice([*hostile.KEYS, *hostile.STRINGS, "snoopy", "__class__"])] = holder[key]
    else:
        holder[key] = [holder[key]] * rng.choice((2, 500))
    return json.dumps(tree).encode()


def _text(_: bytes, rng: random.Random) -> bytes:
    return rng.choice(hostile.TEXTS)


def _yaml(content: bytes, rng: random.Random) -> bytes:
    """Put a piece of YAML between two lines, at the place of a value, or anywhere."""
    text, piece = content.decode(), rng.choice(YAML)
    lines = text.splitlines(keepends=True)
    how, at = rng.randrange(3), rng.randrange(len(lines))
    if how == 0:
        lines.insert(at, piece if piece.endswith("\n") else f"{piece}\n")
    elif how == 1:
        lines[at] = lines[at].partition(":")[0] + f": {piece}\n"
    else:
        where = rng.randrange(len(text))
        lines = [text[:where], piece, text[where:]]
    return "".join(lines).encode("utf-8", "surrogatepass")


def _chunks(content: bytes, rng: random.Random) -> bytes:
    """Change one chunk of a PNG, or add one, and make its checksum right again."""
    chunks, position = [], 8
    while position < len(content):
        (size,) = struct.unpack(">I", content[position : position + 4])
        chunks.append((content[position + 4 : position + 8], content[position + 8 : position + 8 + size]))
        position += 12 + size
    at = rng.randrange(len(chunks))
    kind, data = chunks[at]
    how = rng.randrange(4)
    if how == 0:
        chunks[at] = (kind, _bytes(data or b"\0", rng))
    elif how == 1:
        sizes = struct.pack(">II", *rng.choices((0, 1, 60_000, 2**31 - 1, 2**32 - 1), k=2))
        chunks[0] = (
            b"IHDR",
            sizes + bytes((rng.choice((1, 8, 16, 99)), rng.choice((0, 2, 3, 7)), 0, 0, rng.choice((0, 1)))),
        )
    elif how == 2:
        packed = zlib.compress(rng.choice((b"{}", b" " * 2**24, b'{"prompt":' + b"[" * 5000)))
        made = {
            b"zTXt": b"spmhub\0\0" + packed,
            b"iTXt": b"spmhub\0\1\0\0\0" + packed,
            b"tEXt": b"spmhub\0" + rng.choice(hostile.TEXTS),
        }
        chunks.insert(1, rng.choice(list(made.items())))
    else:
        chunks.insert(
            rng.randrange(len(chunks)), (rng.choice((kind, b"acTL", b"fcTL", b"iCCP", b"eXIf", b"\0\0\0\0")), data)
        )
    joined = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return content[:8] + b"".join(joined)


def _member(content: bytes, rng: random.Random) -> bytes:
    """Change one member of the zip that a pickle is, or the pickle in it."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {one.filename: archive.read(one) for one in archive.infolist()}
    name = rng.choice([*members, *[one for one in members if one.endswith("data.pkl")] * 4])
    calls = (
        b"cbuiltins\nbytearray\n",
        b"cos\nsystem\n",
        b"ctorch\nTensor\n",
        b"ccollections\nOrderedDict\n",
        b"(",
        b"]",
        b"R",
        b"b",
    )
    if rng.random() < 0.5:
        members[name] = _bytes(members[name], rng)
    else:
        at = rng.randrange(1, max(2, len(members[name])))
        members[name] = members[name][:at] + rng.choice(calls) * rng.choice((1, 1, 500)) + members[name][at:]
    if rng.random() < 0.1:
        members[rng.choice(("../evil", "/etc/evil", "a" * 5000, "archive/data.pkl"))] = b"x"
    buffer = io.BytesIO()
    method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for one, data in members.items():
            archive.writestr(one, data)
    return buffer.getvalue()


def _header(content: bytes, rng: random.Random) -> bytes:
    """Change the header of a safetensors file, and let its length be right."""
    header, payload = hostile.split(content)
    return hostile.joined(_tree(json.dumps(header).encode(), rng), payload)


def _many(content: bytes, rng: random.Random) -> bytes:
    """Give a safetensors file many tensors of no bytes."""
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    names = {f"lora_unet_{number}.alpha": entry for number in range(rng.choice((1000, 8000)))}
    return hostile.joined(json.dumps(names).encode(), b"")


Mutation = Callable[[bytes, random.Random], bytes]
_JSON: tuple[tuple[str, Mutation], ...] = (
    ("bytes", _bytes),
    ("tree", _tree),
    ("tree", _tree),
    ("tree", _tree),
    ("text", _text),
)
MUTATIONS: Mapping[str, Sequence[tuple[str, Mutation]]] = {
    "recipe": (("bytes", _bytes), ("yaml", _yaml), ("yaml", _yaml), ("yaml", _yaml)),
    "pickle": (("bytes", _bytes), ("member", _member), ("member", _member)),
    "picture": (("bytes", _bytes), ("chunks", _chunks), ("chunks", _chunks)),
    "safetensors header": (("bytes", _bytes), ("header", _header), ("header", _header), ("many", _many)),
    "card": (("tree", _tree),),
    **dict.fromkeys(("manifest", "lock file", "journal", "record of a bake", "model_index.json"), _JSON),
}
KINDS = tuple(MUTATIONS)


# What reads each kind. `folder` is empty but for the file.


def _recipe(content: bytes, folder: Path) -> None:
    (folder / "recipe.yaml").write_bytes(content)
    Recipe.plan(folder / "recipe.yaml")


def _manifest(content: bytes, _: Path) -> None:
    manifest = Manifest.from_json(content)
    beyond_limits(manifest)
    if "spm-hub" in manifest.versions:
        Recipe.make(**manifest.recipe)


def _card(content: bytes, _: Path) -> None:
    manifest = Manifest.from_json(content)
    text = card.render(manifest, "someone/snoopy", "pytorch_lora_weights.safetensors")
    if len(text) > 200_000 + 20 * len(content):
        raise AssertionError(f"a card of {len(text)} characters")


def _lock_file(content: bytes, folder: Path) -> None:
    (folder / lockfile.LOCK_NAME).write_bytes(content)
    lockfile.read(folder)


def _journal(content: bytes, folder: Path) -> None:
    for place in (storage.STATE, storage.ADAPTERS, storage.MANIFESTS):
        (folder / place).mkdir()
    kept = folder / storage.ADAPTERS / "bystander.safetensors"
    kept.write_bytes(b"")
    (folder / storage.STATE / "journal.json").write_bytes(content)
    with storage.write_lock(folder):
        pass
    if not kept.is_file() and b"bystander" not in content:
        raise AssertionError("the journal deleted a file that it does not name")


def _record(content: bytes, folder: Path) -> None:
    (folder / PROVENANCE).write_bytes(content)
    read_provenance(folder)


def _index(content: bytes, folder: Path) -> None:
    (folder / INDEX).write_bytes(content)
    snapshots.is_whole(folder)
    with suppress(SpmHubError):
        lost_files(folder)
    load_pipeline(str(folder))


def _pickle(content: bytes, folder: Path) -> None:
    (folder / "a.pt").write_bytes(content)
    pickles.read(folder / "a.pt")


def _picture(content: bytes, folder: Path) -> None:
    for condition in (card.WITH, card.WITHOUT):
        (folder / f"snoopy-{condition}.png").write_bytes(content)
    card.read_pairs(folder, "snoopy")


def _safetensors(content: bytes, folder: Path) -> None:
    (folder / "a.safetensors").write_bytes(content)
    read_tensors(folder / "a.safetensors")


READERS: Mapping[str, Callable[[bytes, Path], None]] = {
    "recipe": _recipe, "pickle": _pickle, "picture": _picture, "safetensors header": _safetensors, "card": _card,
    "manifest": _manifest, "lock file": _lock_file, "journal": _journal, "record of a bake": _record,
    "model_index.json": _index,
}  # fmt: skip


def send(seeds: Iterable[int], folder: Path) -> hostile.Tally:
    """Let every mutant meet its reader; only what is under `folder` may change."""
    tally = hostile.Tally()
    for number, kind in enumerate(KINDS):
        place = folder / f"honest-{number}"
        place.mkdir()
        with suppress(SpmHubError):  # an index without its parts is none
            READERS[kind](good(kind), place)
    for seed in seeds:
        file = mutant(seed)
        place = folder / str(seed)
        place.mkdir()
        tally.mutants += 1
        what = f"{seed} {file.kind} {file.done}"
        with hostile.watched(place) as cost:
            outcome = hostile.outcome(what, lambda: READERS[file.kind](file.content, place), tally.failures)  # noqa: B023
        tally.outcomes[f"{file.kind}: {outcome}"] += 1
        tally.judge(what, cost, max(1, len(file.content)))
    return tally

"""Adapters as an enemy would send them: seeded mutations of good files and manifests, and a watch over who reads them.

A mutated file is as a rule sealed again (its hashes recomputed, in its header and in the manifest), as whoever makes
one would, so that what lies behind the hashes is reached too.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from loopback import LoopbackHub
from test_adapter import PATH, snoopy

from spm_hub.adapters import conversion
from spm_hub.adapters.adapter import Adapter, increment_info, load_file
from spm_hub.adapters.conversion import Description
from spm_hub.adapters.formats import reading as layouts
from spm_hub.adapters.formats.format import Format
from spm_hub.adapters.increments import Dense, Increment, LowRank, Mask
from spm_hub.adapters.low_rank_approximation import truncate
from spm_hub.errors import SpmHubError
from spm_hub.hub.pull import pull
from spm_hub.io.safetensors_file import HEADER_HASH_KEY, MANIFEST_KEY, PAYLOAD_HASH_KEY
from spm_hub.registry.entry import MANIFEST_NAME, WEIGHTS_NAME, EraserEntry
from spm_hub.registry.registry import Registry

DTYPES = ["F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E5M2", "BOOL", "U8", "I8", "U16", "I64", "U64", "F31", "", "f32"]
INTEGERS = [0, 1, -1, 2, 7, 2**31, 2**32 - 1, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63)]
KEYS = [
    "",
    "../../evil",
    "/etc/evil",
    "a" * 100_000,
    "lora_unet_" + "a_" * 20_000 + ".lora_mid.weight\n",
    "." * 3000 + ".lora_A.weight",
    "unet." + "a." * 2000 + "lora_A.weight",
    "nul\0",
    "\x1b[2Jclear",
    "é" * 100,
    "lora_te_text_model.alpha",
    "text_encoder.a.lora_A.weight",
    "lora_unet_mid_block.hada_w1_a",
    "lora_unet_mid_block.diff",
    "lora_unet_mid_block.keep_out",
    "lora_unet_mid_block.lora_mid.weight",
    "lora_unet_.alpha",
    "lora_unet_unet_unet_a_lora_down.weight",
    "transformer.x.lora_A.weight",
    "mid_block.attn1.processor.to_q_lora.down.weight",
    "unet:9:up",
    "__metadata__",
    MANIFEST_KEY,
]
STRINGS = [
    "",
    " ",
    "..",
    "../../../tmp/evil",
    "/etc/passwd",
    "C:\\evil",
    "a/b",
    "schema",
    "\0",
    "\x1b[2J",
    "x" * 200_000,
    "é" * 50,
    "{" * 500,
    "%s%n{0}",
    "0" * 64,
    "1e999",
    "2020-13-45",
    "9999-12-31T23:59:59Z",
    "0001-01-01T00:00:00+14:00",
]
VALUES: list[Any] = [None, True, False, 0, -1, 1.5, 1e308, 10**30, *STRINGS, [], {}, [[]], {"": {}}, [None] * 50]
# What no JSON library would write.
TEXTS = [
    b"",
    b"null",
    b"[]",
    b"{}",
    b"\xef\xbb\xbf{}",
    b"\xff\xfe{\0}\0",
    b"{" * 5000,
    b"[" * 200_000,
    b'{"a":' * 50_000,
    b'{"a":[' + b"[]," * 30_000 + b"0]}",
    b'{"a":' + b"9" * 5000 + b"}",
    b'{"a":1e999}',
    b'{"a":NaN}',
    b'{"a":-Infinity}',
    b'{"a":1,"a":2}',
    b'{"\\ud800":"\\udfff"}',
    b'{"a":"\xed\xa0\x80"}',
    ("{" + ",".join(f'"{number:x}":""' for number in range(20_000)) + "}").encode(),
]


@dataclass
class Repository:
    """What is sent: an adapter file, the manifest beside it, and what was done to them."""

    weights: bytes
    manifest: bytes
    done: list[str] = field(default_factory=list)


def good(kind: str) -> Repository:
    """An honest repository of one of `KINDS`."""
    generator = torch.Generator().manual_seed(1)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    increments: dict[str, Increment] = dict(snoopy().increments)
    if kind == "dense":
        increments = {PATH: Dense(numbers(4, 6)), "conv_in": Dense(numbers(4, 2, 3, 3), numbers(4))}
    elif kind == "mask":
        increments = {PATH: Mask(numbers(64) > 0, 0), "mid_block.ff": Mask(numbers(32) > 0, 1)}
    elif kind == "transformer":
        increments = {f"single_transformer_blocks.{n}.attn.to_q": LowRank(numbers(4, 8), numbers(8, 4)) for n in (0, 1)}
    elif kind == "mixed ranks":
        increments = {
            PATH: LowRank(numbers(9, 3), numbers(2, 9)),
            "mid_block.a": LowRank(numbers(1, 40), numbers(40, 1)),
        }
    elif kind == "half":
        increments = {path: increment.to(dtype=torch.bfloat16) for path, increment in increments.items()}
    stated = snoopy().manifest
    base = stated.base.model_copy(update={"family": "flux" if kind == "transformer" else stated.base.family})
    adapter = Adapter(stated.model_copy(update={"increment": increment_info(increments), "base": base}), increments)
    image, manifest = adapter.encode("pytorch_lora_weights.safetensors")
    weights = image.head + b"".join(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in image.tensors)
    if kind == "foreign":
        header, payload = split(weights)
        header["__metadata__"] = {"ss_network_dim": "1", "prompts": "snoopy,dog", "modelspec.author": "somebody"}
        weights = joined(json.dumps(header).encode(), payload)
    return Repository(weights, manifest.to_json().encode())


KINDS = ("low rank", "dense", "mask", "transformer", "mixed ranks", "half", "foreign")


def split(weights: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and payload of an honest file."""
    size = int.from_bytes(weights[:8], "little")
    header: dict[str, Any] = json.loads(weights[8 : 8 + size])
    return header, weights[8 + size :]


def joined(header: bytes, payload: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + payload


def mutant(seed: int) -> Repository:
    """The hostile repository of that number."""
    rng = random.Random(seed)
    sent = good(KINDS[seed % len(KINDS)])
    sent.done.append(KINDS[seed % len(KINDS)])
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        # What was broken before cannot always be broken in this way too.
        with suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
            rng.choice(MUTATIONS)(sent, rng)
    if rng.random() < 0.7:
        seal(sent)
    return sent


def wordy() -> Iterator[Repository]:
    """Honest repositories of which one word each is endless, in the manifest and in the header's copy of it."""
    sent = good("low rank")
    whole = json.loads(sent.manifest)
    whole["base"]["revision"] = "main"
    whole["origin"] = {"repo": "someone/snoopy", "commit": "0" * 40, "revision": "main"}
    header, payload = split(sent.weights)
    for holder, key in _words(whole):
        word, holder[key] = holder[key], "x" * 200_000
        header["__metadata__"][MANIFEST_KEY] = json.dumps(whole)
        one = Repository(joined(json.dumps(header).encode(), payload), json.dumps(whole).encode(), [f"endless {key}"])
        holder[key] = word
        seal(one)
        yield one


def _words(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Where in a JSON value strings are: what holds each, and at which key."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, str):
            yield tree, key
        elif isinstance(value, dict | list):
            yield from _words(value)


def seal(sent: Repository) -> None:
    """Make all hashes right again, as far as there still is something that can hold them."""
    try:
        header, payload = split(sent.weights)
        metadata = header["__metadata__"]
        metadata[PAYLOAD_HASH_KEY] = "0x" + hashlib.sha256(payload).hexdigest()
        metadata.pop(HEADER_HASH_KEY, None)
        canonical = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
        metadata[HEADER_HASH_KEY] = hashlib.sha256(canonical).hexdigest()
        sent.weights = joined(json.dumps(header).encode(), payload)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    try:
        manifest = json.loads(sent.manifest)
        manifest["increment"] |= {"bytes": len(sent.weights), "sha256": hashlib.sha256(sent.weights).hexdigest()}
        sent.manifest = json.dumps(manifest).encode()
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    sent.done.append("sealed")


def _bytes(sent: Repository, rng: random.Random) -> None:
    part = rng.choice(("weights", "manifest"))
    data = bytearray(getattr(sent, part))
    how = rng.choice(("flip", "cut", "grow", "repeat", "zero", "drop"))
    at = rng.randrange(max(1, len(data)))
    length = rng.randrange(1, 64)
    if how == "flip":
        for _ in range(rng.choice((1, 1, 8, 100))):
            if data:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del data[at:]
    elif how == "grow":
        data += rng.randbytes(length)
    elif how == "repeat":
        data[at:at] = data[at : at + length]
    elif how == "zero":
        data[at : at + length] = bytes(len(data[at : at + length]))
    else:
        del data[at : at + length]
    setattr(sent, part, bytes(data))
    sent.done.append(f"{how} {part} at {at}")


def _length(sent: Repository, rng: random.Random) -> None:
    size = rng.choice([*(n for n in INTEGERS if 0 <= n < 2**64), len(sent.weights), len(sent.weights) - 8, 9, 100])
    sent.weights = size.to_bytes(8, "little") + sent.weights[8:]
    sent.done.append(f"header of {size} bytes")


def _text(sent: Repository, rng: random.Random) -> None:
    text = rng.choice(TEXTS)
    where = rng.choice(("header", "manifest", "embedded", "entry"))
    sent.done.append(f"{where} is {text[:30]!r} ({len(text)})")
    if where == "manifest":
        sent.manifest = text
        return
    header, payload = _split_or_nothing(sent)
    if where == "header":
        sent.weights = joined(text, payload)
    elif where == "embedded":
        header["__metadata__"] = {MANIFEST_KEY: text.decode("latin1")}
        sent.weights = joined(json.dumps(header).encode(), payload)
    else:
        sent.weights = joined(b'{"a":' + text + b"}", payload)


def _entry(sent: Repository, rng: random.Random) -> None:
    header, payload = _split_or_nothing(sent)
    keys = [key for key in header if key != "__metadata__"]
    if not keys:
        return
    key = rng.choice(keys)
    entry = header[key] if isinstance(header[key], dict) else {}
    how = rng.choice(("dtype", "shape", "offsets", "rename", "drop", "copy", "swap", "value", "field"))
    if how == "dtype":
        entry["dtype"] = rng.choice(DTYPES)
    elif how == "shape":
        shape = list(entry.get("shape", []))
        entry["shape"] = rng.choice(
            (
                [rng.choice(INTEGERS) for _ in range(rng.randrange(6))],
                shape[::-1],
                [*shape, 1],
                [0, *shape],
                [1] * rng.choice((5, 8, 9, 64, 5000)),
                [[*shape]],
                [float(size) for size in shape],
                [str(size) for size in shape],
                rng.choice(VALUES),
            )
        )
    elif how == "offsets":
        start, end = entry.get("data_offsets", [0, 0])[:2]
        entry["data_offsets"] = rng.choice(
            ([end, start], [start, end + 4], [start - 4, end], [0, end - start], [rng.choice(INTEGERS), end],
             [start, rng.choice(INTEGERS)], [start], [start, end, end], rng.choice(VALUES))
        )  # fmt: skip
    elif how in ("rename", "drop"):
        header.pop(key)
        if how == "rename":
            header[rng.choice(KEYS)] = entry
    elif how == "copy":
        header[rng.choice(KEYS)] = entry
    elif how == "swap":
        other = rng.choice(keys)
        header[key], header[other] = header[other], header[key]
    elif how == "value":
        header[key] = rng.choice(VALUES)
    else:
        entry[rng.choice(("", "stride", "dtype"))] = rng.choice(VALUES)
    sent.weights = joined(json.dumps(header).encode(), payload)
    sent.done.append(f"{how} of {key[:40]}: {str(header.get(key))[:80]}")


def _metadata(sent: Repository, rng: random.Random) -> None:
    header, payload = _split_or_nothing(sent)
    metadata = header.setdefault("__metadata__", {})
    if not isinstance(metadata, dict):
        return
    key = rng.choice([*metadata, "prompts", "modelspec.license", "modelspec.author", "alpha", "x"])
    how = rng.choice(("drop", "value", "string", "embedded"))
    if how == "drop":
        metadata.pop(key, None)
    elif how == "embedded":
        metadata[MANIFEST_KEY] = json.dumps(_changed(json.loads(sent.manifest or b"{}"), rng))
    else:
        metadata[key] = rng.choice(VALUES if how == "value" else STRINGS)
    sent.weights = joined(json.dumps(header).encode(), payload)
    sent.done.append(f"{how} of metadata {key}: {str(metadata.get(key))[:60]}")


def _numbers(sent: Repository, rng: random.Random) -> None:
    header, payload = _split_or_nothing(sent)
    odd = rng.choice(
        (b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\xff\xff\x7f\x7f", b"\x01\0\0\0", b"\xff" * 4)
    )
    at = 4 * rng.randrange(max(1, len(payload) // 4))
    sent.weights = joined(json.dumps(header).encode(), payload[:at] + odd + payload[at + 4 :])
    sent.done.append(f"{odd.hex()} at {at}")


def _manifest(sent: Repository, rng: random.Random) -> None:
    try:
        whole = json.loads(sent.manifest)
    except (ValueError, RecursionError):
        return
    sent.manifest = json.dumps(_changed(whole, rng)).encode()
    sent.done.append(f"manifest {sent.manifest[:40]!r}")


def _changed(tree: Any, rng: random.Random) -> Any:
    """A JSON value of which one node is another one."""
    if isinstance(tree, dict) and tree and rng.random() < 0.9:
        key = rng.choice(list(tree))
        how = rng.random()
        if how < 0.1:
            return {name: value for name, value in tree.items() if name != key}
        if how < 0.2:
            return {**tree, rng.choice((*KEYS[:3], "strenght", "x" * 1000)): rng.choice(VALUES)}
        return {**tree, key: _changed(tree[key], rng)}
    if isinstance(tree, list) and tree and rng.random() < 0.7:
        at = rng.randrange(len(tree))
        return [*tree[:at], _changed(tree[at], rng), *tree[at + rng.randrange(2) :]]
    return rng.choice([*VALUES, *INTEGERS])


def _another(sent: Repository, rng: random.Random) -> None:
    """A well-formed file of absurd contents."""
    which = rng.randrange(6)
    if which == 0:
        sent.weights = rng.choice(
            (b"", b"PK\x03\x04" + rng.randbytes(50), b"\x80\x02}q\0.", b"version https://git-lfs.github.com/spec/v1\n")
        )
    elif which == 1:  # 4 MB that would unfold to 4 TB
        _file_of(sent, {"mid_block_a": ((1, 2**19), (2**19, 1))})
    elif which == 2:  # ranks that would be padded to the highest
        wide = {f"mid_block_{number}": ((1, 500), (500, 1)) for number in range(100)}
        _file_of(sent, {**wide, "mid_block_high": ((20_000, 1), (1, 20_000))})
    elif which == 3:  # rank 0
        _file_of(sent, {"mid_block_a": ((0, 4), (4, 0))})
    elif which == 4:
        _file_of(sent, {f"mid_block_{number}": ((1, 1), (1, 1)) for number in range(2000)})
    else:  # the same module in two layouts
        _file_of(sent, {"mid_block_a": ((1, 4), (4, 1)), "unet_mid_block_a": ((1, 4), (4, 1))})
    sent.done.append(f"another file ({which})")


def _file_of(sent: Repository, pairs: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"prompts": "snoopy"}}
    position = 0
    for module, shapes in pairs.items():
        for part, shape in zip(("lora_down.weight", "lora_up.weight"), shapes, strict=True):
            size = 4 * shape[0] * shape[1]
            offsets = [position, position + size]
            header[f"lora_unet_{module}.{part}"] = {"dtype": "F32", "shape": list(shape), "data_offsets": offsets}
            position += size
    sent.weights = joined(json.dumps(header).encode(), bytes(position))


def _split_or_nothing(sent: Repository) -> tuple[dict[str, Any], bytes]:
    try:
        header, payload = split(sent.weights)
    except (ValueError, RecursionError, OverflowError):
        return {}, b""
    return (header, payload) if isinstance(header, dict) else ({}, payload)


MUTATIONS: Sequence[Callable[[Repository, random.Random], None]] = (
    _bytes, _length, _text, _entry, _entry, _entry, _metadata, _numbers, _manifest, _manifest, _another,
)  # fmt: skip


# The watch: what the interpreter itself says about files and processes (PEP 578), the clock, and the kernel's peak.

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Where in its arguments a call names what it changes, and the open folder that a relative name is relative to.
_CHANGES = {
    "os.rename": ((0, 2), (1, 3)),
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.mkdir": ((0, 2),),
    "os.link": ((1, 3),),
    "os.symlink": ((1, 2),),
    "os.truncate": ((0, None),),
    "os.chmod": ((0, 2),),
}
_NEVER = {"subprocess.Popen", "os.system", "os.exec", "pickle.find_class"}
_watching: list[tuple[tuple[Path, ...], list[str]]] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching or event not in {"open", *_CHANGES, *_NEVER}:
        return
    allowed, violations = _watching[-1]
    if event in _NEVER:
        violations.append(f"{event}{arguments}"[:200])
        return
    if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & _WRITING):
        return
    for name, folder in _CHANGES.get(event, ((0, None),)):
        path = arguments[name]
        if isinstance(path, int) or path == os.devnull:
            continue
        opened = -1 if folder is None else arguments[folder]
        place = Path(os.path.abspath(os.path.join(f"/proc/self/fd/{opened}" if opened >= 0 else "", os.fsdecode(path))))
        if not any((place.parent.resolve() / place.name).is_relative_to(folder) for folder in allowed):
            violations.append(f"{event} {place}")


@dataclass
class Watched:
    """What a block cost, and what it did that it must not."""

    seconds: float = 0.0
    """Of this process, so that a busy machine is no hang."""
    wall: float = 0.0
    bytes: int = 0
    """Of resident memory, at its peak above the start."""
    violations: list[str] = field(default_factory=list)


@contextmanager
def watched(*allowed: Path) -> Iterator[Watched]:
    """Measure the block; it may change files under `allowed` only, and start and unpickle nothing."""
    if _audit not in _installed:
        sys.addaudithook(_audit)
        _installed.append(_audit)
    found = Watched()
    gc.collect(0)
    before = _peak(reset=True)
    _watching.append((allowed, found.violations))
    start, wall = time.process_time(), time.perf_counter()
    try:
        yield found
    finally:
        found.seconds, found.wall = time.process_time() - start, time.perf_counter() - wall
        _watching.pop()
        found.bytes = max(0, _peak() - before)


_installed: list[Callable[..., None]] = []


def _peak(*, reset: bool = False) -> int:
    """Peak of resident memory in bytes, from now on when `reset`; 0 where the system does not tell."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


# What is done with what was sent.

Act = Callable[[Path, Path, Registry], object]


def _read_lazily(adapter: Path, manifest: Path | None) -> None:
    stored = load_file(adapter, manifest, lazy=True).increments
    for module in stored:
        stored[module].tensors()


def _read(adapter: Path) -> Adapter:
    """From whatever format it is in."""
    family = "flux" if b"single_transformer_blocks" in adapter.read_bytes() else "sd1"
    return conversion.read(adapter, Description(family=family))[0]


def _reduce(adapter: Path) -> object:
    read = _read(adapter)
    return read if read.manifest.increment.kind == "mask" else truncate(read, 2)


def _writing(target: Format, kinds: Sequence[str]) -> Act:
    """To another program's format, where that holds such increments; each is a command of its own."""

    def act(adapter: Path, _: Path, kept: Registry) -> object:
        read, out = _read(adapter), kept.root / "converted" / target.name
        return conversion.write(read, target, out, replace=True) if read.manifest.increment.kind in kinds else read

    return act


ACTS: dict[str, Act] = {
    "load": lambda adapter, manifest, _: load_file(adapter, manifest),
    "load lazily": lambda adapter, manifest, _: _read_lazily(adapter, manifest),
    "load without its manifest, lazily": lambda adapter, _, __: _read_lazily(adapter, None),
    "load without its manifest and keep": lambda adapter, _, kept: kept.add(load_file(adapter), replace=True),
    **{
        f"convert to {target.name}": _writing(target, target.writer.kinds)
        for target in layouts.all_formats()
        if target.writer is not None and not target.writer.needs_base
    },
    "convert and reduce": lambda adapter, _, __: _reduce(adapter),
    "describe": lambda adapter, manifest, _: EraserEntry("sent", adapter, manifest).read_manifest(),
    "install": lambda adapter, manifest, kept: kept.install(EraserEntry("sent", adapter, manifest), replace=True),
}


def pulling(hub: LoopbackHub) -> Act:
    """Publish it as a repository of the Hub, and pull that."""

    def act(adapter: Path, manifest: Path, kept: Registry) -> object:
        hub.publish("someone/sent", {WEIGHTS_NAME: adapter.read_bytes(), MANIFEST_NAME: manifest.read_bytes()})
        return pull("someone/sent", registry=kept, replace=True)

    return act


SECONDS = 2.0
TIMES_THE_FILE = 10
SPARE = 8 * 2**20
"""Bytes: pages that the allocator takes at once whatever is asked of it."""


@dataclass
class Tally:
    """What came of the mutants: how often what, the worst costs, and everything that must not be."""

    mutants: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    bytes_over_file: float = 0.0
    failures: list[str] = field(default_factory=list)

    def judge(self, what: str, cost: Watched, size: int) -> None:
        """Note what an act cost on `size` bytes, and what of it was too much."""
        self.seconds = max(self.seconds, cost.seconds)
        self.bytes_over_file = max(self.bytes_over_file, (cost.bytes - SPARE) / size)
        self.failures += [f"{what}: {violation}" for violation in cost.violations[:3]]
        if cost.seconds > SECONDS:
            self.failures.append(f"{what}: {cost.seconds:.1f} s")
        if cost.bytes > TIMES_THE_FILE * size + SPARE:
            self.failures.append(f"{what}: {cost.bytes} bytes of memory for {size} sent")


def send(
    seeds: Iterable[int], folder: Path, acts: Mapping[str, Act] = ACTS, made: Callable[[int], Repository] = mutant
) -> Tally:
    """Let every act meet every repository `made`; only the registry and the Hub's cache under `folder` may change."""
    tally, sent_to, kept = Tally(), folder / "sent", Registry(folder / "registry")
    sent_to.mkdir()
    kept.add(snoopy(name="bystander"))
    adapter, manifest = sent_to / WEIGHTS_NAME, sent_to / MANIFEST_NAME

    def arrived(repository: Repository) -> None:
        adapter.write_bytes(repository.weights)
        manifest.write_bytes(repository.manifest)

    # Honest ones first, unmeasured: the code that libraries load when it is first needed (7 MB for an SVD) is no cost
    # of a file. They are small, so that they leave no memory which could stand in for what a mutant takes.
    for kind in KINDS:
        arrived(good(kind))
        for act in acts.values():
            with suppress(SpmHubError):
                act(adapter, manifest, kept)
    for seed in seeds:
        repository = made(seed)
        arrived(repository)
        tally.mutants += 1
        for name, act in acts.items():
            what = f"{seed} {repository.done} {name}"
            with watched(kept.root, folder / "hf") as cost:
                result = outcome(what, lambda act=act: act(adapter, manifest, kept), tally.failures)  # type: ignore[misc]
            tally.outcomes[f"{name}: {result}"] += 1
            tally.judge(what, cost, len(repository.weights) + len(repository.manifest))
    return tally


def outcome(what: str, act: Callable[[], object], failures: list[str]) -> str:
    """Accepted, or the name of our error; whatever else comes is a failure."""
    try:
        act()
    except SpmHubError as error:
        if len(str(error).encode()) > 10_000:
            failures.append(f"{what}: a message of {len(str(error))} characters")
        return type(error).__name__
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        failures.append(f"{what}: {error!r:.200} at {place.filename}:{place.lineno}")
        return "crashed"
    return "accepted"

"""Adapter files: what is written comes back, and nothing that was tampered with does."""

import errno
import hashlib
import json
import os
import resource
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spm_hub.adapters.adapter import Adapter, increment_info, load_file
from spm_hub.adapters.increments import Dense, Increment, LowRank
from spm_hub.adapters.manifest import Base, Concept, Manifest
from spm_hub.errors import AdapterFileError, ManifestError, NotFoundError, RegistryError, SpmHubError
from spm_hub.io import atomic
from spm_hub.io.safetensors_file import MAX_HEADER_BYTES, read_header

PATH = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


def snoopy(seed: int = 0, **changes: Any) -> Adapter:
    random = torch.Generator().manual_seed(seed)
    increments: dict[str, Increment] = {
        PATH: LowRank(torch.randn(1, 6, generator=random), torch.randn(4, 1, generator=random)),
        "mid_block.attentions.0.proj_in": LowRank(
            torch.randn(1, 4, 1, 1, generator=random), torch.randn(4, 1, 1, 1, generator=random)
        ),
    }
    values: dict[str, Any] = {
        "name": "snoopy",
        "concept": Concept(target="snoopy", aliases=("a beagle, white",)),
        "increment": increment_info(increments),
        "base": Base(family="sd1", id="pico", fingerprint="0" * 64),
        "recipe": {"steps": 3},
    }
    return Adapter(Manifest(**{**values, **changes}), increments)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Path]:
    path, manifest_path = tmp_path / "snoopy.safetensors", tmp_path / "snoopy.json"
    snoopy().save(path, manifest_path)
    return path, manifest_path


def test_an_adapter_says_in_a_line_what_it_is(saved: tuple[Path, Path]) -> None:
    assert repr(snoopy()) == (
        "<Adapter snoopy: erases 'snoopy', low_rank of rank 1 on 2 modules, float32, for pico (sd1), memory>"
    )
    assert repr(load_file(saved[0], lazy=True)) == repr(snoopy()).replace("memory", str(saved[0]))
    dense = {PATH: Dense(torch.zeros(4, 6, dtype=torch.float16))}
    foreign = snoopy(base=Base(family="sd1", id="", fingerprint=""))
    assert repr(foreign.with_increments(dense)) == (
        "<Adapter snoopy: erases 'snoopy', dense on 1 module, float16, for sd1, memory>"
    )


def test_saved_and_loaded(saved: tuple[Path, Path]) -> None:
    path, manifest_path = saved
    for adapter in (load_file(path), load_file(path, manifest_path)):
        assert adapter.name == "snoopy"
        assert adapter.increments.keys() == snoopy().increments.keys()
        for module, increment in snoopy().increments.items():
            assert all(torch.equal(adapter.increments[module].tensors()[k], t) for k, t in increment.tensors().items())
    assert load_file(path).manifest == snoopy().manifest


def test_the_manifest_beside_describes_the_file(saved: tuple[Path, Path]) -> None:
    path, manifest_path = saved
    info = Manifest.read(manifest_path).increment
    assert info.file == path.name
    assert info.bytes == path.stat().st_size
    assert info.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert Manifest.read(manifest_path).created is not None


def test_the_file_is_valid_for_the_reference_reader(saved: tuple[Path, Path]) -> None:
    tensors = safetensors.torch.load_file(saved[0])
    flat = PATH.replace(".", "_")
    assert torch.equal(tensors[f"lora_unet_{flat}.lora_down.weight"], snoopy().increments[PATH].tensors()["down"])
    with safetensors.safe_open(saved[0], "pt") as file:
        metadata = file.metadata()
    assert {"prompts": "snoopy,a beagle, white", "rank": "1", "alpha": "1.0"}.items() <= metadata.items()
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert metadata["ss_network_dim"] == "1"
    assert "lora_adapter_metadata" not in metadata


def test_the_payload_hash_is_that_of_the_bytes_after_the_header(saved: tuple[Path, Path]) -> None:
    data = saved[0].read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    stored = read_header(saved[0]).metadata["modelspec.hash_sha256"]
    assert stored == "0x" + hashlib.sha256(data[start:]).hexdigest()
    assert start % 8 == 0


@pytest.mark.slow
def test_the_same_adapter_is_the_same_file_in_every_process(tmp_path: Path, saved: tuple[Path, Path]) -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests/adapters'); from test_adapter import snoopy; "
        "from pathlib import Path; snoopy().save(Path(sys.argv[1]))"
    )
    again = tmp_path / "other name.safetensors"
    root = Path(__file__).resolve().parents[2]
    subprocess.run(
        [sys.executable, "-c", code, str(again)], cwd=root, check=True, env={**os.environ, "PYTHONHASHSEED": "7"}
    )
    assert again.read_bytes() == saved[0].read_bytes()


def test_increments_of_mixed_order_give_the_same_file(tmp_path: Path, saved: tuple[Path, Path]) -> None:
    adapter = snoopy()
    turned = Adapter(adapter.manifest, dict(reversed(adapter.increments.items())))
    turned.save(tmp_path / "turned.safetensors")
    assert (tmp_path / "turned.safetensors").read_bytes() == saved[0].read_bytes()


# Hostile files. Every one must end in a SpmHubError that names the file.


def flip(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_every_flipped_bit_of_the_tensors_is_found(saved: tuple[Path, Path], tmp_path: Path) -> None:
    data = saved[0].read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    victim = tmp_path / "flipped.safetensors"
    for bit in range(8 * start, 8 * len(data), 11):
        victim.write_bytes(flip(data, bit))
        with pytest.raises(AdapterFileError, match="altered"):
            load_file(victim)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_bit_anywhere_is_found_or_changes_nothing(saved: tuple[Path, Path], data: st.DataObject) -> None:
    original = saved[0].read_bytes()
    victim = saved[0].with_name("flipped.safetensors")
    victim.write_bytes(flip(original, data.draw(st.integers(0, 8 * len(original) - 1))))
    with pytest.raises(AdapterFileError, match=r"is not the file that|flipped\.safetensors"):
        load_file(victim, saved[1])
    # A bare file has only its own hashes: all but the padding after the header's JSON is covered.
    try:
        adapter = load_file(victim)
    except SpmHubError:
        return
    assert adapter.manifest == snoopy().manifest
    assert torch.equal(adapter.increments[PATH].tensors()["up"], snoopy().increments[PATH].tensors()["up"])


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_truncated_file_is_refused(saved: tuple[Path, Path], data: st.DataObject) -> None:
    original = saved[0].read_bytes()
    victim = saved[0].with_name("short.safetensors")
    victim.write_bytes(original[: data.draw(st.integers(0, len(original) - 1))])
    with pytest.raises(AdapterFileError, match=r"short\.safetensors"):
        load_file(victim)


@given(st.binary(max_size=300))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_at_all_are_refused(tmp_path: Path, data: bytes) -> None:
    victim = tmp_path / "noise.safetensors"
    victim.write_bytes(data)
    with pytest.raises(AdapterFileError, match=r"noise\.safetensors"):
        load_file(victim)


def file_of(header: object, payload: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + payload


def entry(start: int, end: int, shape: tuple[int, ...] = (1, 4), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "an empty file"),
        ((2**63).to_bytes(8, "little") + b"{}", "its header claims 9223372036854775808 bytes"),
        ((100).to_bytes(8, "little") + b"{}", "its header claims 100 bytes, the file has 2"),
        (file_of(b"[" * 100_000), "not JSON"),
        (file_of(b'{"a":' + b"9" * 5000 + b"}"), "not JSON"),
        (file_of(b"\xff\xff"), "not JSON"),
        (file_of([]), "not a JSON object"),
        (file_of({"__metadata__": {"a": 1}}), "map of strings"),
        (file_of({"a": entry(0, 16)}, bytes(15)), "truncated"),
        (file_of({"a": entry(0, 16)}, bytes(17)), "foreign bytes"),
        (
            file_of({"a": entry(0, 16), "b": entry(8, 24)}, bytes(24)),
            "b begins at byte 8 and overlaps a, which ends at 16",
        ),
        (file_of({"a": entry(0, 16), "b": entry(20, 36)}, bytes(36)), "leaves a gap after a"),
        (file_of({"a": entry(0, 12)}, bytes(12)), "needs 16 bytes, its offsets [0, 12] hold 12"),
        (file_of({"a": entry(16, 0)}, bytes(16)), "needs 16 bytes"),
        (file_of({"a": entry(0, 16, (2**40, 2**40))}, bytes(16)), "needs"),
        (file_of({"a": entry(0, 16, (-1, -4))}, bytes(16)), "shape is [-1, -4]"),
        (file_of({"a": entry(0, 16, (1,) * 64)}, bytes(16)), "shape is"),
        (file_of({"a": {"dtype": "F32", "shape": [True, 4], "data_offsets": [0, 16]}}, bytes(16)), "shape is"),
        (file_of({"a": {"dtype": "F32", "shape": "1", "data_offsets": [0, 16]}}, bytes(16)), "shape is"),
        (file_of({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0]}}, bytes(16)), "data_offsets is"),
        (file_of({"a": entry(0, 16, dtype="F31")}, bytes(16)), "unknown dtype 'F31'"),
        (file_of({"a": {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]}}, bytes(16)), "unknown dtype"),
        (file_of({"a": {}}), "not a tensor's entry"),
        (file_of({"a": 7}), "not a tensor's entry"),
        (file_of(b'{"a":1,"a":2}'), "appears twice"),
        (b"PK\x03\x04" + bytes(60), "never loaded"),
        (b"\x80\x02}q\x00(X\x01\x00\x00\x00" + bytes(20), "pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS"),
    ],
)
def test_an_absurd_file_is_refused_in_plain_words(data: bytes, complaint: str, tmp_path: Path) -> None:
    victim = tmp_path / "absurd.safetensors"
    victim.write_bytes(data)
    with pytest.raises(AdapterFileError) as caught:
        load_file(victim)
    assert complaint in str(caught.value)
    assert "absurd.safetensors" in str(caught.value)


def test_a_gigantic_header_is_refused_unread(tmp_path: Path) -> None:
    victim = tmp_path / "huge.safetensors"
    with open(victim, "wb") as file:
        file.write((MAX_HEADER_BYTES + 8).to_bytes(8, "little"))
        file.truncate(MAX_HEADER_BYTES + 100)  # sparse: nothing is on the disk
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(AdapterFileError, match="no adapter needs more"):
        load_file(victim)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 * 1024


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(value: float, tmp_path: Path) -> None:
    victim = tmp_path / "nan.safetensors"
    key = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {f"{key}.lora_down.weight": torch.tensor([[1.0, value]]), f"{key}.lora_up.weight": torch.ones(2, 1)}
    safetensors.torch.save_file(tensors, victim)
    with pytest.raises(AdapterFileError) as caught:
        load_file(victim)
    assert f"{key}.lora_down.weight holds 1 of 2 numbers" in str(caught.value)


def test_an_adapter_that_diverged_is_not_saved(saved: tuple[Path, Path]) -> None:
    adapter, before = snoopy(), saved[0].read_bytes()
    broken: dict[str, Increment] = {PATH: LowRank(torch.ones(1, 6), torch.tensor([[1.0], [float("nan")]]))}
    info = adapter.manifest.increment.model_copy(update={"modules": (PATH,)})
    with pytest.raises(AdapterFileError, match=r"up of .* is not finite"):
        Adapter(adapter.manifest.model_copy(update={"increment": info}), broken).save(saved[0])
    assert saved[0].read_bytes() == before


def test_another_file_than_the_manifest_describes(saved: tuple[Path, Path]) -> None:
    snoopy(seed=1).save(saved[0])
    with pytest.raises(AdapterFileError) as caught:
        load_file(*saved)
    assert str(Manifest.read(saved[1]).increment.sha256) in str(caught.value)
    assert hashlib.sha256(saved[0].read_bytes()).hexdigest() in str(caught.value)


def test_a_manifest_without_a_hash_vouches_for_nothing(saved: tuple[Path, Path]) -> None:
    saved[1].write_text(snoopy().manifest.to_json())
    with pytest.raises(AdapterFileError, match="sha256 is None"):
        load_file(*saved)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"kind": "dense", "rank": None}, "kind is 'dense' in the manifest and 'low_rank' in the tensors"),
        ({"rank": 2}, "rank is 2 in the manifest and 1 in the tensors"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"modules": (PATH,)}, "mid_block.attentions.0.proj_in is in the increments only"),
        ({"modules": (PATH, "mid_block.attentions.0.proj_in", "conv_in")}, "conv_in is in the manifest only"),
    ],
)
def test_a_manifest_that_describes_other_increments(change: dict[str, Any], complaint: str) -> None:
    adapter = snoopy()
    info = adapter.manifest.increment.model_copy(update=change)
    with pytest.raises(ManifestError) as caught:
        Adapter(adapter.manifest.model_copy(update={"increment": info}), adapter.increments)
    assert complaint in str(caught.value)


def test_kinds_are_not_mixed() -> None:
    with pytest.raises(AdapterFileError, match="dense and low_rank"):
        increment_info({"a": Dense(torch.ones(2, 2)), "b": LowRank(torch.ones(1, 2), torch.ones(2, 1))})
    with pytest.raises(AdapterFileError, match="none"):
        increment_info({})


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        load_file(tmp_path / "none.safetensors")
    with pytest.raises(AdapterFileError, match="not a file"):
        load_file(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(AdapterFileError, match="not a file"):
        load_file(tmp_path / "pipe")


# Writing: both files wholly, or none. Tests may run as root, for whom permissions do not hold: calls fail instead.


def out_of_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_everything_as_it_was(
    call: str, saved: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(saved[0].parent)
    monkeypatch.setattr(atomic.os, call, out_of_space)
    with pytest.raises(RegistryError, match="No space left") as caught:
        snoopy(seed=1).save(*saved)
    assert "free some space" in str(caught.value)
    assert contents(saved[0].parent) == before


def test_no_room_for_the_second_file_leaves_the_first_as_it_was(saved: tuple[Path, Path]) -> None:
    before = contents(saved[0].parent)

    def fails(_: object) -> None:
        out_of_space()

    with pytest.raises(RegistryError, match=str(saved[1])):
        atomic.write_together({saved[0]: b"new", saved[1]: fails})
    assert contents(saved[0].parent) == before


def test_a_limit_of_the_system_in_the_middle_of_saving(saved: tuple[Path, Path]) -> None:
    """The kernel itself refuses after the first bytes of a large file."""
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from spm_hub import errors; from spm_hub.io import atomic\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))\n"
        "try: atomic.write_atomic(Path(sys.argv[1]), bytes(100_000))\n"
        "except errors.RegistryError as error: print(error)\n"
    )
    before = contents(saved[0].parent)
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, str(saved[0])], cwd=root, capture_output=True, text=True, check=True
    )
    assert "File too large" in done.stdout
    assert contents(saved[0].parent) == before


def test_an_interrupt_leaves_no_temporary_file(saved: tuple[Path, Path]) -> None:
    before = contents(saved[0].parent)

    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic.write_atomic(saved[0], interrupted)
    assert contents(saved[0].parent) == before


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.parent.rmdir() or path.parent.touch()])
def test_a_place_that_cannot_be_written(make: Callable[[Path], None], tmp_path: Path) -> None:
    target = tmp_path / "folder" / "a.safetensors"
    target.parent.mkdir()
    make(target)
    with pytest.raises(RegistryError, match="cannot write"):
        snoopy().save(target)


def test_a_folder_in_the_place_of_the_manifest_keeps_the_adapter(saved: tuple[Path, Path]) -> None:
    path, manifest_path = saved
    before = path.read_bytes()
    manifest_path.unlink()
    manifest_path.mkdir()
    with pytest.raises(RegistryError, match="directory"):
        snoopy(seed=1).save(path, manifest_path)
    assert path.read_bytes() == before
    assert sorted(item.name for item in path.parent.iterdir()) == [manifest_path.name, path.name]


def test_a_written_file_follows_the_umask(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    atomic.write_atomic(tmp_path / "ours", b"x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_loading_warns_of_nothing(saved: tuple[Path, Path]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_file(*saved)

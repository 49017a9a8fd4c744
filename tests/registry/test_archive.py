"""Erasers carried in a folder or a tar file: the same bytes come out, and nothing else ever does."""

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_registry import files_of, named
from test_storage import killed_after

from spm_hub.adapters.manifest import MAX_BYTES
from spm_hub.errors import AdapterFileError, ManifestError, NotFoundError, RegistryError, SpmHubError, UsageError
from spm_hub.registry import signing, storage
from spm_hub.registry.archive import export, import_
from spm_hub.registry.registry import Registry


@pytest.fixture
def kept(tmp_path: Path) -> Registry:
    registry = Registry(tmp_path / "kept")
    for name in ("snoopy", "mickey"):
        registry.add(named(name))
    return registry


@pytest.fixture
def empty(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "empty")


@pytest.mark.parametrize("to", ["carried", "carried.tar"])
def test_what_is_exported_and_imported_is_the_same_bit_for_bit(
    to: str, kept: Registry, empty: Registry, tmp_path: Path
) -> None:
    export(kept.entries(), tmp_path / to)
    moved = import_(tmp_path / to, empty)
    assert [(one.entry.name, one.state) for one in moved] == [("mickey", "new"), ("snoopy", "new")]
    assert files_of(empty.root) == files_of(kept.root)
    assert [one.state for one in import_(tmp_path / to, empty)] == ["unchanged"] * 2
    assert not list((empty.root / storage.STATE).glob("tmp*"))


def test_an_exported_folder_is_a_registry(kept: Registry, tmp_path: Path) -> None:
    export([kept.get("snoopy")], tmp_path / "carried")
    assert [entry.load().name for entry in Registry(tmp_path / "carried").entries()] == ["snoopy"]


def test_the_same_erasers_are_the_same_tar_that_tar_can_read(kept: Registry, tmp_path: Path) -> None:
    export(kept.entries(), tmp_path / "a.tar")
    export(tuple(reversed(kept.entries())), tmp_path / "b.tar")
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert {member.name for member in tar} == set(files_of(kept.root))
    with pytest.raises(RegistryError, match="exists already"):
        export(kept.entries(), tmp_path / "a.tar")
    export(kept.entries(), tmp_path / "a.tar", replace=True)


def test_a_tar_of_the_folder_made_by_hand_is_read_too(kept: Registry, empty: Registry, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "hand.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for folder in ("adapters", "manifests"):
            tar.add(kept.root / folder, f"./{folder}")
    assert len(import_(tmp_path / "hand.tar", empty)) == 2
    assert files_of(empty.root) == files_of(kept.root)


def test_all_or_none(kept: Registry, empty: Registry, tmp_path: Path) -> None:
    export(kept.entries(), tmp_path / "carried.tar")
    empty.add(named("snoopy", seed=5))
    before = files_of(empty.root)
    with pytest.raises(RegistryError, match="already has an eraser"):
        import_(tmp_path / "carried.tar", empty)
    assert files_of(empty.root) == before
    states = {one.entry.name: one.state for one in import_(tmp_path / "carried.tar", empty, replace=True)}
    assert states == {"mickey": "new", "snoopy": "replaced"}
    assert files_of(empty.root) == files_of(kept.root)


# The renames of an import: the journal, then manifest and adapter of each of the two.
@pytest.mark.parametrize("renames", range(5))
def test_an_import_that_is_killed_ends_in_all_or_none(
    renames: int, kept: Registry, empty: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(kept.entries(), tmp_path / "carried.tar")
    killed_after(renames, monkeypatch, lambda: import_(tmp_path / "carried.tar", empty))
    empty.gc()
    assert files_of(empty.root) == (files_of(kept.root) if renames else {})


def test_an_import_that_another_writer_forestalls_installs_nothing(
    kept: Registry, empty: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(kept.entries(), tmp_path / "carried.tar")
    writing = storage.write_lock

    @contextmanager
    def after_another(root: Path) -> Iterator[None]:
        monkeypatch.setattr(storage, "write_lock", writing)
        Registry(root).add(named("snoopy", seed=5))
        with writing(root):
            yield

    monkeypatch.setattr(storage, "write_lock", after_another)
    with pytest.raises(RegistryError, match="already has an eraser named 'snoopy'"):
        import_(tmp_path / "carried.tar", empty)
    assert [entry.name for entry in empty.entries()] == ["snoopy"]


def test_two_erasers_of_one_name_are_not_made_one(kept: Registry, tmp_path: Path) -> None:
    other = Registry(tmp_path / "other")
    other.add(named("snoopy", seed=5))
    both = [kept.get("snoopy"), other.get("snoopy")]
    for replace in (False, True):
        for to in ("carried", "carried.tar"):
            with pytest.raises(UsageError, match=r"one name: .*kept.*other"):
                export(both, tmp_path / to, replace=replace)
            assert not (tmp_path / to).exists()


def test_a_foreign_file_is_exported_as_ours(kept: Registry, empty: Registry, tmp_path: Path) -> None:
    (kept.root / "manifests" / "snoopy.json").unlink()
    export([kept.get("snoopy")], tmp_path / "carried.tar")
    assert [one.entry.load().name for one in import_(tmp_path / "carried.tar", empty)] == ["snoopy"]


def altered(data: bytes) -> bytes:
    """The adapter with one bit turned."""
    at = data.index(b"adapters/snoopy.safetensors") + 512 + 8000
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_an_altered_archive_installs_nothing(kept: Registry, empty: Registry, tmp_path: Path) -> None:
    export(kept.entries(), tmp_path / "carried.tar")
    whole = (tmp_path / "carried.tar").read_bytes()
    at = whole.index(b"adapters/snoopy.safetensors") + 512 + kept.get("snoopy").adapter_path.stat().st_size - 1
    for data in (whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :], whole[: at - 100], whole[:700], b"", b"tar"):
        (tmp_path / "carried.tar").write_bytes(data)
        with pytest.raises(SpmHubError, match=r"carried\.tar|snoopy"):
            import_(tmp_path / "carried.tar", empty)
        assert files_of(empty.root) == {}


def member(name: str, content: bytes = b"x", **changes: object) -> Callable[[tarfile.TarFile], None]:
    """Puts a member of any kind into a tar."""

    def add(tar: tarfile.TarFile) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        for key, value in changes.items():
            setattr(info, key, value)
        tar.addfile(info, io.BytesIO(content))

    return add


@pytest.mark.parametrize(
    ("add", "complaint"),
    [
        (member("../evil.json"), "is not part of an eraser"),
        (member("/etc/evil"), "is not part of an eraser"),
        (member("adapters/../../evil.safetensors"), "is not part of an eraser"),
        (member("adapters/..safetensors"), "is not part of an eraser"),
        (member("adapters/.hidden.safetensors"), "is not part of an eraser"),
        (member("adapters/evil.bin"), "is not part of an eraser"),
        (member("adapters/evil.json"), "is not part of an eraser"),
        (member("manifests/sub/evil.json"), "is not part of an eraser"),
        (member("README.md"), "is not part of an eraser"),
        (member("adapters/l.safetensors", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "symbolic link"),
        (member("adapters/l.safetensors", b"", type=tarfile.LNKTYPE, linkname="../../x"), "hard link"),
        (member("adapters", b"", type=tarfile.SYMTYPE, linkname="/tmp"), "symbolic link"),
        (member("adapters/d.safetensors", b"", type=tarfile.CHRTYPE), "device"),
        (member("adapters/p.safetensors", b"", type=tarfile.FIFOTYPE), "pipe"),
        (member("adapters/s.safetensors", b"", type=tarfile.GNUTYPE_SPARSE), "sparse"),
        (member("adapters/" + "l" * 200 + ".safetensors"), "unknown type; only plain files are read"),
        (member("manifests/big.json", bytes(MAX_BYTES + 1)), "more than the limit of"),
        (member("signatures/big.sig", bytes(signing.MAX_BYTES + 1)), "more than the limit of"),
        (member("adapters/snoopy.safetensors"), "twice"),
    ],
)
def test_nothing_but_erasers_comes_out_of_a_tar(
    add: Callable[[tarfile.TarFile], None], complaint: str, kept: Registry, empty: Registry, tmp_path: Path
) -> None:
    export(kept.entries(), tmp_path / "good.tar")
    with (
        tarfile.open(tmp_path / "evil.tar", "w", format=tarfile.GNU_FORMAT) as evil,
        tarfile.open(tmp_path / "good.tar") as good,
    ):
        for info in good:
            evil.addfile(info, good.extractfile(info))
        add(evil)
    before = files_of(tmp_path)
    with pytest.raises(AdapterFileError, match=complaint):
        import_(tmp_path / "evil.tar", empty)
    assert files_of(tmp_path) == before


def test_an_absurd_size_is_not_believed(empty: Registry, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "evil.tar", "w", format=tarfile.GNU_FORMAT) as evil:
        info = tarfile.TarInfo("adapters/a.safetensors")
        info.size = 2**32
        evil.addfile(info)
    with pytest.raises(AdapterFileError, match="claims 4294967296 bytes"):
        import_(tmp_path / "evil.tar", empty)
    data = bytearray((tmp_path / "evil.tar").read_bytes())
    for size in (b"\xff" * 12, b"-0000000001\0", b"99999999999\0"):
        data[124:136] = size
        data[148:156] = b" " * 8
        data[148:156] = b"%06o\0 " % sum(data[:512])
        (tmp_path / "evil.tar").write_bytes(data)
        with pytest.raises(AdapterFileError, match="not that of a tar file"):
            import_(tmp_path / "evil.tar", empty)


def test_a_compressed_tar_is_no_tar(empty: Registry, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        member("adapters/a.safetensors")(tar)
    with pytest.raises(AdapterFileError, match="compressed") as caught:
        import_(tmp_path / "a.tar", empty)
    assert "gunzip" in str(caught.value)


def test_folders_that_are_not_what_was_exported(kept: Registry, empty: Registry, tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes((kept.root / "adapters" / "snoopy.safetensors").read_bytes())
    (kept.root / "adapters" / "snoopy.safetensors").unlink()
    (kept.root / "adapters" / "snoopy.safetensors").symlink_to(outside)
    with pytest.raises(AdapterFileError, match="symbolic link"):
        import_(kept.root, empty)
    (kept.root / "adapters" / "snoopy.safetensors").unlink()
    (kept.root / "manifests" / "mickey.json").unlink()
    with pytest.raises(ManifestError, match="no manifest"):
        import_(kept.root, empty)
    (kept.root / "adapters" / "mickey.safetensors").unlink()
    with pytest.raises(AdapterFileError, match="contains no eraser"):
        import_(kept.root, empty)
    with pytest.raises(NotFoundError):
        import_(tmp_path / "none.tar", empty)
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(AdapterFileError, match="neither"):
        import_(tmp_path / "pipe.tar", empty)
    manifest = json.loads((kept.root / "manifests" / "snoopy.json").read_text())
    assert manifest["name"] == "snoopy", "the source is as it was"
    assert files_of(empty.root) == {}

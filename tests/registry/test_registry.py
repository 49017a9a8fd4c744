"""Registries, and how a reference finds its adapter."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from test_adapter import snoopy

import spm_hub
from spm_hub.adapters.adapter import Adapter
from spm_hub.adapters.manifest import Concept, Evaluation
from spm_hub.errors import AdapterFileError, ManifestError, NotFoundError, RegistryError, UsageError
from spm_hub.hub import pull as hub_pull
from spm_hub.hub.resolve import resolve
from spm_hub.io import atomic
from spm_hub.registry import registry as registries
from spm_hub.registry import storage
from spm_hub.registry.entry import MANIFEST_NAME, WEIGHTS_NAME, EraserEntry
from spm_hub.registry.registry import Registry


def named(name: str, *, concept: str | None = None, aliases: tuple[str, ...] = (), seed: int = 0) -> Adapter:
    return snoopy(seed, name=name, concept=Concept(target=concept or name, aliases=aliases))


def files_of(root: Path) -> dict[str, bytes]:
    """All files of the registry, except its lock and journal."""
    found = {str(path.relative_to(root)): path for path in root.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith(storage.STATE)}


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No registry but those a test makes: an empty working folder and an empty data folder."""
    monkeypatch.delenv(registries.REGISTRY_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    kept = Registry(tmp_path / "registry")
    kept.add(named("snoopy"))
    kept.add(named("van-gogh", concept="Van Gogh", aliases=("Vincent van Gogh",)))
    return kept


def test_kept_listed_and_found(registry: Registry) -> None:
    assert [entry.name for entry in registry.entries()] == ["snoopy", "van-gogh"]
    assert [entry.read_manifest().name for entry in registry.entries()] == ["snoopy", "van-gogh"]
    assert registry.get("snoopy").load().name == "snoopy"
    assert spm_hub.load("snoopy", registry=registry.root).name == "snoopy"
    assert Registry(registry.root / "none").entries() == ()


@pytest.mark.parametrize(
    "reference", ["van-gogh", "van gogh", "VAN GOGH", "van_gogh", "Van.Gogh", "van-gogh.safetensors"]
)
def test_a_target_in_any_spelling_finds_its_only_eraser(reference: str, registry: Registry) -> None:
    said: list[str] = []
    assert resolve(reference, registry.root, say=said.append).name == "van-gogh"
    meant = f"{reference} means van-gogh, {registry.root / 'adapters' / 'van-gogh.safetensors'}"
    assert said == ([] if reference == "van-gogh" else [meant])


def test_an_alias_finds_no_eraser(registry: Registry) -> None:
    with pytest.raises(NotFoundError) as caught:
        resolve("vincent van gogh", registry.root)
    assert "it is an alias of van-gogh, which is another name" in str(caught.value)
    with pytest.raises(NotFoundError):
        registry.get("vincent van gogh")


def test_a_concept_of_two_erasers_is_ambiguous(registry: Registry) -> None:
    for name in ("monet-spm", "monet-esd", "van-gogh-esd"):
        registry.add(named(name, concept=name.rpartition("-")[0]))
    with pytest.raises(UsageError) as caught:
        resolve("Monet", registry.root)
    assert "monet-spm (" in str(caught.value)
    assert "monet-esd (" in str(caught.value)
    # A name goes before a target.
    assert resolve("van gogh", registry.root).name == "van-gogh"


def test_an_unknown_name_suggests_the_nearest(registry: Registry) -> None:
    with pytest.raises(NotFoundError, match="did you mean snoopy") as caught:
        resolve("snopy", registry.root)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("reference", ["", "  "])
def test_an_empty_reference(reference: str) -> None:
    with pytest.raises(UsageError, match="empty"):
        resolve(reference)


def test_the_order_of_registries(tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    registries.user_registry().add(named("snoopy"))
    registries.user_registry().add(named("mickey"))
    assert resolve("snoopy").adapter_path.is_relative_to(tmp_path / "data")
    Registry(Path.cwd()).add(named("snoopy"))
    Registry(Path.cwd()).add(named("nudity"))
    assert resolve("snoopy").adapter_path.is_relative_to(tmp_path / "data"), "the working folder may be a stranger's"
    with pytest.raises(NotFoundError) as caught:
        resolve("nudity")
    assert "--registry ." in str(caught.value.mend)
    assert resolve("nudity", Path(".")).name == "nudity"
    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(registries, "_CLONE", Path.cwd())
        assert resolve("snoopy", say=said.append).adapter_path.is_relative_to(tmp_path / "work")
        assert said == [f"snoopy is the one of the registry {tmp_path / 'work'}"]
    monkeypatch.setenv(registries.REGISTRY_VARIABLE, str(registry.root))
    assert resolve("snoopy").adapter_path.is_relative_to(registry.root)
    other = Registry(tmp_path / "other")
    other.add(named("snoopy"))
    assert resolve("snoopy", other.root).adapter_path.is_relative_to(other.root)
    assert resolve("mickey", other.root).adapter_path.is_relative_to(tmp_path / "data")


def test_a_registry_that_is_asked_for_must_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RegistryError, match="does not exist"):
        resolve("snoopy", tmp_path / "nowhere")
    monkeypatch.setenv(registries.REGISTRY_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(RegistryError, match="does not exist"):
        resolve("snoopy")


def test_paths(registry: Registry, tmp_path: Path) -> None:
    inside = registry.root / "adapters" / "snoopy.safetensors"
    assert resolve(str(inside)).manifest_path == registry.root / "manifests" / "snoopy.json"
    alone = tmp_path / "work" / "alone.safetensors"
    alone.write_bytes(inside.read_bytes())
    alone.with_suffix(".json").write_text('{"activation text": "notes of another program"}')
    assert resolve("alone.safetensors").manifest_path is None
    assert resolve("./alone.safetensors").load().name == "snoopy"
    with pytest.raises(NotFoundError, match=r"did you mean .*snoopy"):
        resolve(str(inside.with_name("snopy.safetensors")))


def test_a_folder_laid_out_as_a_repository_of_the_hub(tmp_path: Path) -> None:
    folder = tmp_path / "work" / "repo"
    snoopy().save(folder / WEIGHTS_NAME, folder / MANIFEST_NAME)
    entry = resolve("./repo")
    assert entry.manifest_path == Path("repo") / MANIFEST_NAME
    assert entry.load().name == entry.read_manifest().name == "snoopy"
    several = tmp_path / "work" / "several"
    for name in ("a", "b"):
        snoopy().save(several / f"{name}.safetensors")
    with pytest.raises(UsageError, match=r"a\.safetensors"):
        resolve("./several")
    (several / "a.safetensors").unlink()
    assert resolve("./several").name == "b"
    (several / "b.safetensors").unlink()
    with pytest.raises(NotFoundError, match=r"no \.safetensors"):
        resolve("./several")


def test_a_word_that_is_a_file_and_a_name_is_ambiguous(registry: Registry) -> None:
    Path("snoopy").write_bytes((registry.root / "adapters" / "snoopy.safetensors").read_bytes())
    with pytest.raises(UsageError, match="could be any of"):
        resolve("snoopy", registry.root)
    assert resolve("./snoopy", registry.root).manifest_path is None
    assert resolve("snoopy").load().name == "snoopy"


def test_a_folder_of_pictures_does_not_hide_a_name(registry: Registry) -> None:
    Path("snoopy").mkdir()
    assert resolve("snoopy", registry.root).load().name == "snoopy"


def test_a_name_is_given_once(registry: Registry) -> None:
    before = (registry.root / "adapters" / "snoopy.safetensors").read_bytes()
    with pytest.raises(RegistryError, match="already has an eraser"):
        registry.add(named("snoopy", seed=1))
    assert (registry.root / "adapters" / "snoopy.safetensors").read_bytes() == before
    registry.add(named("snoopy", seed=1), replace=True)
    assert (registry.root / "adapters" / "snoopy.safetensors").read_bytes() != before
    assert registry.get("snoopy").load().name == "snoopy"


@pytest.mark.parametrize("name", ["con", "nul", "aux", "prn", "com1", "lpt9", "con.snoopy", "nul.tar.gz"])
def test_names_of_windows_devices_are_refused(name: str, registry: Registry) -> None:
    with pytest.raises(RegistryError, match="is a reserved name"):
        registry.add(named(name))
    assert registry.find(name) is None


@pytest.mark.parametrize("name", ["console", "com10", "lpt", "null", "snoopy.con"])
def test_names_that_only_begin_as_those_are_kept(name: str, registry: Registry) -> None:
    assert registry.add(named(name)).name == name


def test_the_schema_is_not_overwritten(registry: Registry) -> None:
    with pytest.raises(RegistryError, match="reserved"):
        registry.add(named("schema"))


def test_removed(registry: Registry) -> None:
    registry.remove("snoopy")
    assert [entry.name for entry in registry.entries()] == ["van-gogh"]
    assert not (registry.root / "manifests" / "snoopy.json").exists()
    with pytest.raises(NotFoundError, match="snoopy"):
        registry.remove("snoopy")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_registry_that_cannot_be_written(
    number: int, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not by permissions: tests may run as root, for whom they do not hold.
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(atomic.os, "fsync", refuse)
    with pytest.raises(RegistryError) as caught:
        registry.add(named("mickey"))
    assert os.strerror(number) in str(caught.value)
    assert str(registry.root) in str(caught.value)
    assert "try:" in str(caught.value)
    assert sorted(path.name for path in (registry.root / "adapters").iterdir()) == [
        "snoopy.safetensors",
        "van-gogh.safetensors",
    ]


def test_a_registry_inside_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RegistryError, match="cannot be written"):
        Registry(tmp_path / "file").add(named("snoopy"))


def test_a_broken_eraser_does_not_block_the_others(registry: Registry) -> None:
    (registry.root / "manifests" / "snoopy.json").write_text("{")
    assert registry.get("van gogh").load().name == "van-gogh"
    with pytest.raises(ManifestError):
        registry.get("snoopy").load()


def test_files_renamed_by_hand(registry: Registry) -> None:
    for folder, suffix in (("adapters", ".safetensors"), ("manifests", ".json")):
        (registry.root / folder / f"snoopy{suffix}").rename(registry.root / folder / f"beagle{suffix}")
    with pytest.raises(ManifestError, match="name is 'snoopy'"):
        registry.get("beagle").load()
    with pytest.raises(ManifestError, match="name is 'snoopy'"):
        registry.get("beagle").read_manifest()


@dataclass(frozen=True)
class Restless(EraserEntry):
    """An adapter whose file somebody replaces as soon as it has been verified."""

    def load(self, **options: Any) -> Adapter:
        found = super().load(**options)
        named(found.name, seed=9).save(self.adapter_path)
        return found


@pytest.mark.parametrize("together", [False, True])
def test_a_source_that_is_replaced_while_it_is_copied(together: bool, registry: Registry, tmp_path: Path) -> None:
    source = Restless("someone/mickey", tmp_path / WEIGHTS_NAME, tmp_path / MANIFEST_NAME)
    named("mickey").save(source.adapter_path, source.manifest_path)
    before = files_of(registry.root)
    with pytest.raises(AdapterFileError, match="altered while it was copied"):
        registry.install_all([source]) if together else registry.install(source)
    assert files_of(registry.root) == before


def test_a_writer_that_comes_second_does_not_overwrite_the_first(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There was room when the second one looked, and none any more when it was its turn to write."""
    writing, first = storage.write_lock, named("mickey", seed=1)

    @contextmanager
    def after_the_first(root: Path) -> Iterator[None]:
        monkeypatch.setattr(storage, "write_lock", writing)
        Registry(root).add(first)
        with writing(root):
            yield

    monkeypatch.setattr(storage, "write_lock", after_the_first)
    with pytest.raises(RegistryError, match="already has an eraser named 'mickey'"):
        registry.add(named("mickey", seed=2))
    kept, (expected, _) = registry.get("mickey"), first.encode("mickey.safetensors")
    assert kept.load().manifest.increment.sha256 == expected.sha256


def test_an_evaluation_is_recorded_in_the_manifest_file(registry: Registry) -> None:
    def measured(value: float, **changes: Any) -> Evaluation:
        about = {"protocol": "p", "base": "b", "subject": "dog", "metric": "detected", "samples": 50, "seed": 1}
        return Evaluation(**{**about, "value": value, **changes})

    entry = registry.get("snoopy")
    before = entry.adapter_path.read_bytes()
    other = measured(0.25, base="another")
    registry.record_evaluation("snoopy", [measured(0.5), measured(0.75, subject="cat"), other])
    written = registry.record_evaluation("snoopy", [measured(1.0)])
    # The protocol was run again on that base: all its numbers are the new ones, those of other bases stay.
    assert written.evaluation == (other, measured(1.0))
    assert entry.adapter_path.read_bytes() == before
    assert entry.load().manifest == entry.read_manifest() == written
    (registry.root / "manifests" / "van-gogh.json").unlink()
    with pytest.raises(RegistryError, match="no manifest file"):
        registry.record_evaluation("van-gogh", [other])
    with pytest.raises(NotFoundError, match="snopy"):
        registry.record_evaluation("snopy", [other])


def test_an_empty_variable_names_no_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is looked into nor, by a bare name that is pulled, written to: then that is the user's own."""
    Registry(Path.cwd()).add(named("snoopy"))
    monkeypatch.setenv(registries.REGISTRY_VARIABLE, "")
    pulled_into = []
    monkeypatch.setattr(hub_pull, "pull_by_name", lambda name, repo, registry, progress: pulled_into.append(registry))
    with pytest.raises(NotFoundError, match="mickey"):
        resolve("mickey", pull=True)
    assert pulled_into == [registries.user_registry()]
    monkeypatch.setenv(registries.REGISTRY_VARIABLE, str(Path.cwd()))
    with pytest.raises(NotFoundError, match="mickey"):
        resolve("mickey", pull=True)
    assert pulled_into[1:] == [Registry(Path.cwd())]


def test_a_swapped_file_is_found(registry: Registry) -> None:
    named("snoopy", seed=3).save(registry.root / "adapters" / "snoopy.safetensors")
    with pytest.raises(AdapterFileError, match="is not the file that"):
        registry.get("snoopy").load()

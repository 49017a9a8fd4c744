"""A registry that several processes share: no reader sees half an eraser, and no killed writer leaves one."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from loopback import LoopbackHub
from test_adapter import snoopy
from test_registry import files_of, named

from spm_hub.adapters.adapter import load_file
from spm_hub.errors import AdapterFileError, ManifestError, NotFoundError, RegistryError
from spm_hub.hub.pull import pull
from spm_hub.io import atomic
from spm_hub.registry import lockfile, storage
from spm_hub.registry.entry import MANIFEST_NAME, WEIGHTS_NAME, EraserEntry
from spm_hub.registry.registry import Registry

TESTS = Path(__file__).resolve().parents[1]


class KilledError(BaseException):
    """Replaces SIGKILL: our code does not catch it, and clean-up code is skipped."""


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    kept = Registry(tmp_path / "registry")
    kept.add(named("snoopy"))
    return kept


def killed_after(renames: int, monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Run `act` and stop it dead before the rename of that number; temporary files and journal stay as they are."""
    replace, unlink, left = os.replace, Path.unlink, iter(range(renames))

    def dying(source: Path, target: Path) -> None:
        if next(left, None) is None:
            monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
            raise KilledError
        replace(source, target)

    monkeypatch.setattr(atomic.os, "replace", dying)
    with pytest.raises(KilledError):
        act()
    monkeypatch.setattr(atomic.os, "replace", replace)
    monkeypatch.setattr(Path, "unlink", unlink)


# The renames of an installation: the journal, the manifest, the adapter. From the first on it will be finished.
@pytest.mark.parametrize(("renames", "found", "in_the_end"), [(0, 0, 0), (1, 0, 1), (2, 1, 1)])
def test_a_writer_killed_while_replacing_leaves_the_one_or_the_other(
    renames: int, found: int, in_the_end: int, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = [named("snoopy", seed=seed).encode("snoopy.safetensors")[1].increment.sha256 for seed in (0, 1)]
    killed_after(renames, monkeypatch, lambda: registry.add(named("snoopy", seed=1), replace=True))
    assert registry.get("snoopy").load().manifest.increment.sha256 == versions[found]
    registry.gc()
    assert registry.get("snoopy").load().manifest.increment.sha256 == versions[in_the_end]
    assert sorted(files_of(registry.root)) == ["adapters/snoopy.safetensors", "manifests/snoopy.json"]


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_writer_killed_while_adding_leaves_all_or_nothing(
    renames: int, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_after(renames, monkeypatch, lambda: registry.add(named("mickey")))
    assert [entry.name for entry in registry.entries()] == ["snoopy"]
    registry.gc()
    names = ["snoopy"] if renames == 0 else ["mickey", "snoopy"]
    assert [entry.load().name for entry in registry.entries()] == names
    assert len(files_of(registry.root)) == 2 * len(names)


# The journal, then manifest and adapter of each of the three; Ctrl-C comes before one of these renames.
@pytest.mark.parametrize("renames", range(7))
def test_ctrl_c_while_several_come_leaves_all_or_none(
    renames: int, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Registry(tmp_path / "other")
    for name in ("snoopy", "mickey", "pikachu"):
        other.add(named(name, seed=1))
    before, after = files_of(registry.root), files_of(other.root)
    replace, left = os.replace, iter(range(renames))

    def interrupted(source: Path, target: Path) -> None:
        if next(left, None) is None:
            monkeypatch.setattr(atomic.os, "replace", replace)
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(atomic.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        registry.install_all(other.entries(), replace=True)
    assert files_of(registry.root) == (after if renames else before)
    assert registry.gc() == ()
    assert not (registry.root / storage.STATE / "journal.json").exists()


def test_a_strangers_journal_moves_nothing_elsewhere(registry: Registry, tmp_path: Path) -> None:
    outside = tmp_path / "precious.json"
    outside.write_text("precious")
    journal = registry.root / storage.STATE / "journal.json"
    hostile = [
        {"../../precious": {}},
        {"snoopy": {"../..": ".snoopy.12345678.tmp"}},
        {"snoopy": {"manifests": "../../precious.json"}},
        {"snoopy": {}, "../../precious": {}},
        {"snoopy": []},
        {"name": "snoopy", "coming": {}},
        [],
    ]
    before = files_of(registry.root)
    for content in (*map(json.dumps, hostile), "{", "[" * 100_000):
        journal.write_text(content)
        registry.gc()
        assert not journal.exists()
        assert files_of(registry.root) == before
        assert outside.read_text() == "precious"


def test_gc_deletes_what_belongs_to_no_eraser_and_nothing_else(registry: Registry) -> None:
    before = files_of(registry.root)
    orphan = registry.root / "manifests" / "gone.json"
    orphan.write_text(named("gone").manifest.to_json())
    temporary = registry.root / "adapters" / ".snoopy.safetensors.0123abcd.tmp"
    temporary.write_bytes(b"half")
    others = {
        registry.root / "manifests" / "deployment.json": '{"kind": "of another program"}',
        registry.root / "manifests" / "schema.json": named("schema").manifest.to_json(),
        registry.root / "adapters" / "foreign.safetensors": "came alone",
        registry.root / "adapters" / ".notes.tmp": "of another program",
    }
    for path, text in others.items():
        path.write_text(text)
    assert {(one.path, one.bytes) for one in registry.gc(dry_run=True)} == {
        (orphan, orphan.stat().st_size),
        (temporary, 4),
    }
    assert orphan.exists()
    assert {one.path for one in registry.gc()} == {orphan, temporary}
    assert registry.gc() == ()
    kept = {str(path.relative_to(registry.root)): text.encode() for path, text in others.items()}
    assert files_of(registry.root) == {**before, **kept}


def test_gc_of_no_folder(tmp_path: Path) -> None:
    assert Registry(tmp_path / "none").gc() == ()
    assert not (tmp_path / "none").exists()


def test_installed_bit_for_bit(registry: Registry, tmp_path: Path) -> None:
    source = EraserEntry("someone/mickey", tmp_path / WEIGHTS_NAME, tmp_path / MANIFEST_NAME)
    named("mickey").save(source.adapter_path, source.manifest_path)
    entry = registry.install(source)
    assert entry.adapter_path.read_bytes() == source.adapter_path.read_bytes()
    assert entry.read_manifest().increment.file == "mickey.safetensors"
    with pytest.raises(RegistryError, match="already has an eraser"):
        registry.install(source)
    registry.install(source, replace=True)


def test_what_is_not_what_its_manifest_says_is_not_installed(registry: Registry, tmp_path: Path) -> None:
    source = EraserEntry("someone/mickey", tmp_path / WEIGHTS_NAME, tmp_path / MANIFEST_NAME)
    named("mickey").save(source.adapter_path, source.manifest_path)
    named("mickey", seed=1).save(source.adapter_path)
    before = files_of(registry.root)
    with pytest.raises(AdapterFileError, match="is not the file that"):
        registry.install(source)
    with pytest.raises(ManifestError, match="no manifest file"):
        registry.install(EraserEntry("alone", source.adapter_path, None))
    assert files_of(registry.root) == before


def test_a_lock_of_another_process_is_waited_for_and_then_named(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "SECONDS_TO_WAIT", 0.2)
    code = (
        "import sys, time; from pathlib import Path; from spm_hub.registry import storage\n"
        "with storage.write_lock(Path(sys.argv[1])): print('locked', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, registry.root], cwd=TESTS.parent, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    with pytest.raises(RegistryError, match="another process has been writing"):
        registry.add(named("mickey"))
    assert registry.get("snoopy").load().name == "snoopy", "readers of what is whole do not wait"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    registry.add(named("mickey"))


ACTS = ("install", "replace", "pull", "remove", "list", "load", "lazy")


def work(root: Path, sources: Path, names: Sequence[str], seconds: float, seed: int, results: Any) -> None:
    """Install, remove, list and load the same erasers as the others; count each kind of event, failures too."""
    kept, rng, seen = Registry(root), random.Random(seed), Counter[str]()
    end = time.monotonic() + seconds
    each_once = iter(rng.sample(ACTS, len(ACTS)))
    while (act := next(each_once, None)) or time.monotonic() < end:
        act = act or rng.choice(ACTS)
        try:
            seen[step(act, kept, sources, rng.choice(names), rng)] += 1
        except Exception as error:
            seen[f"FAILED: {act}: {type(error).__name__}: {error}"] += 1
    results.put(seen)


def step(act: str, kept: Registry, sources: Path, name: str, rng: random.Random) -> str:
    """Do one step of a worker and return the event; raise errors that must not happen."""
    try:
        if act in ("install", "replace"):
            folder = sources / f"{name}-{rng.randrange(2)}"
            kept.install(EraserEntry(name, folder / WEIGHTS_NAME, folder / MANIFEST_NAME), replace=act == "replace")
        elif act == "pull":
            pull(f"someone/{name}", f"v{rng.randrange(2)}", registry=kept, replace=True)
        elif act == "remove":
            kept.remove(name)
        elif act == "list":
            for entry in kept.entries():
                with suppress(NotFoundError):
                    assert entry.read_manifest().name == entry.name
        else:
            adapter = kept.get(name).load(lazy=act == "lazy")
            # Two versions differ in their numbers and in the seed that their manifests record.
            mine = load_file(sources / f"{name}-{adapter.manifest.recipe['seed']}" / WEIGHTS_NAME)
            for module, increment in adapter.increments.items():
                assert increment.tensors()["up"].equal(mine.increments[module].tensors()["up"])
    except NotFoundError:
        return f"{act}: not found"
    except RegistryError as error:
        if act == "install" and "already has an eraser" in str(error):
            return "install: name is taken"
        raise
    except AdapterFileError as error:
        if act == "lazy" and "was replaced after it was attached" in str(error):
            return "lazy: replaced before its numbers were needed"
        raise
    return act


def stress(folder: Path, names: Sequence[str], hub: LoopbackHub, *, processes: int, seconds: float) -> Counter[str]:
    """Run that many processes on one registry and count their events; FAILED counts those that must not happen.

    `hub` is where they pull from; this process has to have adopted it.
    """
    for number, name in enumerate(names):
        for seed in range(2):
            place = folder / "sources" / f"{name}-{seed}"
            snoopy(2 * number + seed, name=name, recipe={"seed": seed}).save(
                place / WEIGHTS_NAME, place / MANIFEST_NAME
            )
            for ref in ("main", f"v{seed}"):
                hub.publish(f"someone/{name}", {file.name: file.read_bytes() for file in place.iterdir()}, ref=ref)
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    given = (folder / "shared", folder / "sources", names, seconds)
    workers = [fork.Process(target=work, args=(*given, seed, results), daemon=True) for seed in range(processes)]
    for worker in workers:
        worker.start()
    seen = Counter[str]()
    for _ in workers:
        seen.update(results.get(timeout=seconds + 60))
    for worker in workers:
        worker.join()
    return seen


def assert_valid(root: Path) -> None:
    """Check that listed erasers are complete, pulled ones match their pins, and no other file exists."""
    kept = Registry(root)
    assert kept.gc(dry_run=True) == ()
    pinned = {}
    for entry in kept.entries():
        assert entry.load().name == entry.name
        if pin := lockfile.pin_of(entry.read_manifest()):
            pinned[entry.name] = pin
    assert lockfile.read(root) == pinned
    assert len(files_of(root)) - (root / lockfile.LOCK_NAME).exists() == 2 * len(kept.entries())


@pytest.mark.slow
def test_several_processes_share_a_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LoopbackHub() as hub:
        hub.adopt(monkeypatch, tmp_path)
        seen = stress(tmp_path, [f"eraser-{number}" for number in range(5)], hub, processes=3, seconds=3.0)
    assert not [what for what in seen if what.startswith("FAILED")], seen
    assert {what.partition(":")[0] for what in seen} == set(ACTS)
    assert_valid(tmp_path / "shared")

"""Whatever a stranger sends is accepted or refused in plain words: no crash, no hang, no memory, no file elsewhere."""

import gc
import itertools
import json
import mmap
import time
from pathlib import Path

import hostile
import pytest
import torch
from loopback import LoopbackHub
from test_adapter import snoopy

from spm_hub.adapters.adapter import Adapter, increment_info
from spm_hub.adapters.increments import LowRank
from spm_hub.adapters.low_rank_approximation import truncate
from spm_hub.adapters.manifest import Manifest
from spm_hub.errors import SpmHubError
from spm_hub.io import untrusted_json as untrusted
from spm_hub.registry.registry import Registry

pytestmark = pytest.mark.slow

CASES, AT_LEAST, SECONDS = 300, 60, 10.0


def test_what_is_not_mutated_is_accepted(tmp_path: Path) -> None:
    for number, kind in enumerate(hostile.KINDS):
        sent = hostile.good(kind)
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "a.safetensors").write_bytes(sent.weights)
        (folder / "a.json").write_bytes(sent.manifest)
        for name, act in hostile.ACTS.items():
            # The manifest is of the file as we wrote it, which the foreign one no longer is.
            if kind != "foreign" or "without" in name:
                act(folder / "a.safetensors", folder / "a.json", Registry(folder / "registry"))


def test_mutants(tmp_path: Path) -> None:
    end = time.monotonic() + SECONDS
    seeds = itertools.takewhile(lambda seed: seed < AT_LEAST or time.monotonic() < end, range(CASES))
    tally = hostile.send(seeds, tmp_path)
    assert not tally.failures, "\n".join(tally.failures[:10])
    outcomes = {name.partition(": ")[2] for name in tally.outcomes}
    assert {"accepted", "AdapterFileError", "ManifestError"} <= outcomes, "the mutants reach both sides of the checks"
    assert Registry(tmp_path / "registry").get("bystander").load().name == "bystander"


def test_mutants_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LoopbackHub() as hub:
        hub.adopt(monkeypatch, tmp_path)
        tally = hostile.send(range(40), tmp_path, {"pull": hostile.pulling(hub)})
    assert not tally.failures, "\n".join(tally.failures[:10])
    assert tally.outcomes["pull: accepted"] > 0
    assert Registry(tmp_path / "registry").get("bystander").load().name == "bystander"


def test_no_message_repeats_an_endless_word(tmp_path: Path) -> None:
    sent = list(hostile.wordy())
    tally = hostile.send(range(len(sent)), tmp_path, made=sent.__getitem__)
    assert not tally.failures, "\n".join(tally.failures[:10])
    # A concept may be a sentence; what names files, tensors or families is no book.
    assert 0 < tally.outcomes["load: accepted"] < len(sent)
    assert tally.outcomes["load: ManifestError"] > 0


def test_a_file_of_one_huge_product_is_reduced_in_little_memory(tmp_path: Path) -> None:
    wide = torch.linspace(-1, 1, 3 * 2**20).sin()
    increments = {"a": LowRank(wide.view(3, -1), wide.clone().view(-1, 3))}
    adapter = Adapter(snoopy().manifest.model_copy(update={"increment": increment_info(increments)}), increments)
    gc.collect()
    with hostile.watched(tmp_path) as cost:
        truncate(adapter, 2)
    # The factors' float64 copies alone are twice the file; the file itself and reading it need memory too.
    assert cost.bytes <= 8 * increments["a"].nbytes


def test_the_watch_sees(tmp_path: Path) -> None:
    # What earlier tests have left lying would be freed inside, and hide what is taken there; so would a heap that
    # is large enough already, hence pages of the system's own.
    gc.collect()
    with hostile.watched(tmp_path / "allowed") as cost:
        (tmp_path / "elsewhere").write_text("")
        with mmap.mmap(-1, 64 * 2**20) as block:
            for page in range(0, len(block), mmap.PAGESIZE):
                block[page] = 1
        sum(range(200_000))
    assert any("elsewhere" in violation for violation in cost.violations)
    assert cost.bytes > 60 * 2**20
    assert cost.seconds > 0


@pytest.mark.parametrize("text", [text for text in hostile.TEXTS if text not in (b"null", b"[]", b"{}")])
def test_json_that_is_none_or_unfolds(text: bytes) -> None:
    started = time.process_time()
    with pytest.raises(ValueError):  # noqa: PT011 - each has a reason of its own
        untrusted.parse(text, unfolds=10)
    with pytest.raises(SpmHubError):
        Manifest.from_json(text)
    assert time.process_time() - started < 1.0


def test_a_manifest_of_many_mistakes_or_one_name_twice_takes_no_time() -> None:
    good = json.loads(hostile.good("low rank").manifest)
    started = time.process_time()
    good["increment"]["modules"] = [f"module_{number}" for number in range(60_000)] + ["module_59999"]
    with pytest.raises(SpmHubError, match="names module_59999 twice"):
        Manifest.from_json(json.dumps(good))
    good["increment"]["modules"] = ["           "] * 50_000
    with pytest.raises(SpmHubError, match="50001 mistakes"):
        Manifest.from_json(json.dumps(good))
    assert time.process_time() - started < 2.0

"""spmhub convert, as typed: into the registry, out of it, its refusals and what it says."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import pico_eraser, pico_pipeline
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file

from spm_hub.cli.app import app
from spm_hub.registry import registry as registries
from spm_hub.registry.registry import Registry

Spmhub = Callable[..., tuple[int, str, str]]


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry with a low-rank and a dense eraser; the working folder is empty."""
    kept = Registry(tmp_path / "registry")
    unet = pico_pipeline().unet
    kept.add(pico_eraser(unet, "snoopy", rank=2))
    kept.add(pico_eraser(unet, "van gogh", kind="dense"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("SPMHUB_REGISTRY", str(kept.root))
    monkeypatch.setattr(registries, "user_registry", lambda: Registry(tmp_path / "user"))
    return kept


@pytest.fixture
def spmhub(capsys: pytest.CaptureFixture[str]) -> Spmhub:
    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            app([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return int(ended.value.code or 0), captured.out, captured.err

    return call


def test_out_of_the_registry_and_in_again(spmhub: Spmhub, registry: Registry) -> None:
    code, out, _ = spmhub("convert", "snoopy", "--to", "kohya", "--json")
    printed = json.loads(out)
    assert (code, printed["read_as"], printed["written_as"], printed["files"]) == (
        0,
        "spm",
        "kohya",
        ["snoopy-kohya.safetensors"],
    )
    # Another program's copy: the same tensors without our header.
    save_file(load_tensors("snoopy-kohya.safetensors"), "the dog.safetensors")
    code, out, _ = spmhub("convert", "the dog.safetensors", "--concept", "Snoopy the dog", "--base", "sd1", "-q")
    assert code == 0
    assert out.strip() == str(registry.get("snoopy-the-dog").adapter_path)
    again, before = registry.get("snoopy-the-dog").load(), registry.get("snoopy").load()
    assert again.manifest.concept.target == "Snoopy the dog"
    assert again.manifest.recipe["converted"]["file"] == "the dog.safetensors"  # type: ignore[index, call-overload]
    assert again.increments.keys() == before.increments.keys()
    for path, increment in before.increments.items():
        weight = torch.zeros(increment.weight_shape or ())
        assert torch.equal(again.increments[path].delta_for(weight), increment.delta_for(weight))
    code, _, err = spmhub("convert", "the dog.safetensors", "--concept", "Snoopy the dog", "--base", "sd1")
    assert code == 1
    assert "--force" in err


def test_a_dense_eraser_gets_an_offer_and_then_its_error(spmhub: Spmhub, registry: Registry) -> None:
    code, _, err = spmhub("convert", "van-gogh", "--to", "diffusers")
    assert code == 2
    assert "--svd-rank 8" in err
    assert not Path("van-gogh-diffusers.safetensors").exists()
    code, out, err = spmhub("convert", "van-gogh", "--to", "diffusers", "--svd-rank", "3", "--out", "x.safetensors")
    assert code == 0
    assert "relative error 0." in err
    assert "biases and norms left out" in err
    assert "x.safetensors" in out
    assert {tensor.shape[0] for key, tensor in load_tensors("x.safetensors").items() if "lora_A" in key} == {3}


def test_whole_weights_need_the_model(spmhub: Spmhub, registry: Registry, tmp_path: Path) -> None:
    pipe: Any = pico_pipeline()
    pipe.save_pretrained(tmp_path / "model")
    code, _, err = spmhub("convert", "snoopy", "--to", "esd")
    assert code == 2
    assert "--model M" in err
    code, _, _ = spmhub("convert", "snoopy", "--to", "esd", "--model", tmp_path / "model", "--out", "esd.safetensors")
    assert code == 0
    code, _, err = spmhub("convert", "esd.safetensors")
    assert code == 2
    assert "--model" in err
    code, out, _ = spmhub("convert", "esd.safetensors", "--model", tmp_path / "model", "--name", "again", "--json")
    printed = json.loads(out)
    assert (code, printed["kind"], printed["concept"], printed["read_as"]) == (0, "dense", "snoopy", "esd")
    manifest = registry.get("again").read_manifest()
    assert (manifest.base.id, manifest.base.family) == ("model", "sd1")
    assert manifest.base.fingerprint


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["nowhere.safetensors"], 2, "nowhere.safetensors"),
        (["snoopy", "--to", "kohia"], 2, "did you mean kohya?"),
        (["snoopy", "--out", "x.safetensors"], 2, "--to"),
        (["snoopy", "--to", "kohya", "--config", "x"], 2, "--config"),
        (["snoopy", "--to", "kohya", "--base", "sdxl"], 2, "manifest says sd1"),
        (["broken.safetensors"], 1, "broken.safetensors"),
        (["broken.pt"], 1, "broken.pt"),
        (["."], 2, "name the file itself"),
    ],
)
def test_mistakes_are_a_sentence_and_write_nothing(
    arguments: list[str], code: int, complaint: str, spmhub: Spmhub, registry: Registry
) -> None:
    for name in ("broken.safetensors", "broken.pt"):
        if name in arguments:
            Path(name).write_bytes(b"PK\x03\x04 not much of a file")
    before = sorted(Path().iterdir())
    found, _, err = spmhub("convert", *arguments)
    assert (found, complaint in err) == (code, True), err
    assert sorted(Path().iterdir()) == before
    assert [entry.name for entry in registry.entries()] == ["snoopy", "van-gogh"]


def test_a_file_that_names_no_concept_acts_on_every_prompt_until_somebody_names_it(
    spmhub: Spmhub, registry: Registry, tmp_path: Path
) -> None:
    """Another program's file of the kind that LECO, kohya and the sliders leave: tensors, and a number of steps."""
    pico_pipeline().save_pretrained(tmp_path / "model")
    save_file(load_tensors(registry.get("snoopy").adapter_path), "erase_dog-000010.safetensors")
    code, out, err = spmhub("convert", "erase_dog-000010.safetensors", "--json")
    assert (code, json.loads(out)["concept"], json.loads(out)["name"]) == (0, None, "erase_dog-000010")
    assert err.count("erase_dog-000010 names no concept, so it acts fully on every prompt") == 1
    assert "--concept NAME" in err
    code, out, _ = spmhub("list", "--json")
    assert {row["name"]: row["concept"] for row in json.loads(out)}["erase_dog-000010"] is None
    assert "unknown: acts on every prompt" in spmhub("show", "erase_dog-000010")[1]
    for eraser in ("erase_dog-000010", "erase_dog-000010.safetensors"):
        code, out, err = spmhub(
            "gates", "a church", "dog", "--adapters", eraser, "--model", tmp_path / "model", "--json"
        )
        assert [one["erasers"]["erase_dog-000010"]["gamma"] for one in json.loads(out)["prompts"]] == [1.0, 1.0]
        assert err.count("acts fully on every prompt") == 1
        assert "--concept NAME" in err
    # It has no concept to be found by, to be measured by, or to be published under.
    for command in (["eval", "erase_dog-000010"], ["attack", "erase_dog-000010"], ["push", "erase_dog-000010", "a/b"]):
        code, _, err = spmhub(*command)
        assert (code, "names no concept" in err, "--concept NAME" in err) == (2, True, True), err
    code, out, err = spmhub("convert", "erase_dog-000010", "--concept", "a dog", "--json")
    named = json.loads(out)
    assert (code, named["name"], named["concept"], "names no concept" in err) == (0, "a-dog", "a dog", False)
    assert registry.get("a dog").load().manifest.concept.target == "a dog"


def test_the_concept_on_the_command_line_outranks_the_one_in_the_file(spmhub: Spmhub, registry: Registry) -> None:
    code, out, _ = spmhub("convert", registry.get("snoopy").adapter_path, "--concept", "a beagle", "--json")
    assert (code, json.loads(out)["name"], json.loads(out)["concept"]) == (0, "a-beagle", "a beagle")
    assert registry.get("snoopy").read_manifest().concept.target == "snoopy"
    kept = registry.get("a-beagle").load().manifest
    assert (kept.concept.names, kept.default_gate) == (("a beagle",), "transport")

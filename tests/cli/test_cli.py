"""The command line: exit codes, stdout and stderr, help with examples that parse, no traceback."""

import errno
import json
import os
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from pico import pico_eraser, pico_pipeline
from PIL import Image
from rich.cells import cell_len

from spm_hub.cli.app import EXAMPLES, app
from spm_hub.cli.output import LONG, Output, exit_on_error, silence_libraries, size, table
from spm_hub.errors import RegistryError
from spm_hub.hub.making import recognition
from spm_hub.registry import registry as registries
from spm_hub.registry.registry import Registry

PICO_TRAINING = [f"--set={key}=2" for key in ("steps", "batch_size", "x_t.trajectories", "x_t.steps")]
PICO_TRAINING += ["--set=x_t.chunks=1"]


class Done(NamedTuple):
    """Result of a command: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


Spmhub = Callable[..., Done]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "pico"
    pico_pipeline().save_pretrained(path)
    return path


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry of two erasers that is the only one there is; the working folder is empty and no cache is written."""
    root = tmp_path / "registry"
    kept = Registry(root)
    unet = pico_pipeline().unet
    for seed, name in enumerate(("snoopy", "mickey")):
        kept.add(pico_eraser(unet, name, seed))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("SPMHUB_REGISTRY", str(root))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(registries, "user_registry", lambda: Registry(tmp_path / "user"))
    return kept


@pytest.fixture
def spmhub(capsys: pytest.CaptureFixture[str]) -> Spmhub:
    def call(*arguments: object) -> Done:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            app([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Done(int(ended.value.code or 0), captured.out, captured.err)

    return call


def test_list_and_show(spmhub: Spmhub, registry: Registry) -> None:
    assert spmhub("list", "-q") == Done(0, "mickey\nsnoopy\n", "")
    rows = json.loads(spmhub("list", "--json").out)
    assert [(row["name"], row["base"], row["rank"]) for row in rows] == [("mickey", "sd1", 1), ("snoopy", "sd1", 1)]
    table = spmhub("list").out
    assert "snoopy" in table
    assert str(registry.root) in table
    assert json.loads(spmhub("show", "snoopy", "--json").out)["concept"]["target"] == "snoopy"
    shown = spmhub("show", "snoopy").out.splitlines()
    assert shown[0] == "snoopy: not measured yet; gate transport"
    assert "target: snoopy, of no stated kind" in shown
    assert "kind: low_rank" in spmhub("show", "snoopy", "--full").out


def test_a_long_table_is_aligned_plain_lines() -> None:
    rows = [[f"n{number}", "日本" if number % 2 else "x", number, None, 0.5] for number in range(LONG + 1)]
    lines = str(table(["name", "concept", "count", "nothing", "share"], rows)).splitlines()
    assert len(lines) == len(rows) + 1
    assert lines[0].split() == ["name", "concept", "count", "nothing", "share"]
    assert lines[12].split() == ["n11", "日本", "11", "0.500"]
    assert {cell_len(line[: line.rindex("0.500")]) for line in lines[1:]} == {cell_len(lines[0]) - len("share")}


def test_an_empty_and_a_broken_registry(spmhub: Spmhub, registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    empty = spmhub("list", "--registry", tmp_path / "none", "--json")
    assert (empty.code, json.loads(empty.out)) == (0, [])
    assert "spmhub train snoopy" in empty.err
    (registry.root / "manifests" / "mickey.json").write_text("{")
    broken = spmhub("list", "--json")
    assert broken.code == 0
    assert [("broken" in row) for row in json.loads(broken.out)] == [True, False]
    assert "mickey" in broken.err


def test_a_concept_that_the_base_still_recognises_is_to_be_measured(
    spmhub: Spmhub, registry: Registry, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def everywhere(base: object, pictures: torch.Tensor, *about: object) -> list[bool]:
        return [True] * len(pictures)

    monkeypatch.setattr(recognition, "recognised", everywhere)
    closing = spmhub("train", "church", "--model", model, *PICO_TRAINING).err.splitlines()[-1]
    assert ", and the base still recognises it in 20 of 20 pictures (train longer: " in closing
    assert f"(measure it: spmhub eval church --model {model} --registry {registry.root})" in closing


def test_train_keeps_an_eraser_and_says_where(spmhub: Spmhub, registry: Registry, model: Path) -> None:
    done = spmhub("train", "church", "--model", model, "--json", *PICO_TRAINING)
    assert done.code == 0
    said = json.loads(done.out)
    assert said["name"] == "church"
    assert Path(said["adapter"]).stat().st_size == said["bytes"]
    assert re.search(r"^training 2/2  \d+ % of the way, goal 85 %$", done.err, re.MULTILINE)
    closing = done.err.splitlines()[-1]
    short = (
        r"church is not erased enough after 2 steps: \d+ % of the way, goal 85 % \(train longer: .* steps=4 --force\)"
    )
    assert re.fullmatch(rf"{short}; try: spmhub apply .*--adapters church --prompt church --compare", closing)
    assert registry.get("church").load().manifest.recipe["steps"] == 2

    again = spmhub("train", "church", "--model", model, *PICO_TRAINING)
    assert again.code == 1
    assert "--force" in again.err
    before = registry.get("church").adapter_path.read_bytes()
    forced = spmhub("train", "church", "--model", model, "--force", "-q", *PICO_TRAINING)
    assert forced == Done(0, f"{said['adapter']}\n", "")
    assert registry.get("church").adapter_path.read_bytes() == before, "the same seed gives the identical file"


@pytest.mark.slow
def test_concepts_erased_together_or_after_others_leave_those_alone(
    spmhub: Spmhub, registry: Registry, tmp_path: Path
) -> None:
    wide = tmp_path / "wide"  # enough for three prompts in addition to the concept
    pico_pipeline(text_width=64).save_pretrained(wide)
    options = ("--method", "sepme", "--set", "kind=style", "--model", wide, "--json")
    done = spmhub("train", "cat", "dog", *options, *PICO_TRAINING)
    assert done.code == 0, done.err
    assert {registry.get(name).read_manifest().concept.kind for name in ("cat", "dog")} == {"style"}
    assert [one["name"] for one in json.loads(done.out)] == ["cat", "dog"]
    assert done.err.count("keys and values move by at most") == 2
    assert registry.get("cat").read_manifest().gate.protected == ("", "dog")
    assert registry.get("dog").read_manifest().gate.protected == ("", "cat")
    options = ("--separable", "--after", "cat", "--protect", "a red dog", "--method", "esd-x-strict", "-m", wide)
    later = spmhub("train", "church", *options, *PICO_TRAINING)
    assert later.code == 0, later.err
    manifest = registry.get("church").read_manifest()
    assert manifest.gate.protected == ("", "cat", "a red dog")
    assert manifest.evaluation[0].value < 1e-5
    each = spmhub("train", "red", "blue", "-m", wide, "-q", *PICO_TRAINING)
    assert [Path(line).stem for line in each.out.split()] == ["red", "blue"]


def test_protection_that_cannot_be_given_is_refused_before_the_model_is_loaded(
    spmhub: Spmhub, registry: Registry, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spm_hub.models.loading.load_pipeline", None)
    for arguments, words in (
        (("church", "--method", "sepme", "--protect", "dog"), "no null space is left for an increment; '' would fit"),
        (("church", "--protect", "dog"), "--method sepme, or --separable"),
        (("church", "--separable"), "--set increment.modules=esd-x-strict"),
        (("cat", "dog", "--name", "pets"), "leave --name out"),
        (("cat", "Cat"), "to be erased twice"),
        (
            ("cat", "dog", "--method", "uce", "--set", "together=[{target: red}]"),
            "together names 'red', in addition to the 2",
        ),
        (("cat", "--set", "target=dog"), "name every concept as an argument"),
        (("church", "--after", "snopy", "--method", "sepme"), "snoopy"),
    ):
        refused = spmhub("train", *arguments, "-m", model)
        assert (refused.code, words in refused.err) == (2, True), refused.err


def test_apply_draws_with_and_without_from_the_same_seed(
    spmhub: Spmhub, registry: Registry, model: Path, tmp_path: Path
) -> None:
    arguments = ("apply", "--model", model, "--adapters", "snoopy,mickey", "--steps", 2, "--num", 2, "--seed", 5)
    done = spmhub(*arguments, "-p", "snoopy", "-p", "a dog", "--compare", "--out", tmp_path / "a", "--json")
    assert done.code == 0, done.err
    said = json.loads(done.out)
    assert {key: len(files) for key, files in said["files"].items()} == {"without": 4, "with": 4, "grid": 1}
    assert said["gates"][0]["gates"]["snoopy"] == 1.0
    assert set(said["gates"][1]["gates"]) == {"snoopy", "mickey"}
    without, with_erasers = (Image.open(said["files"][key][0]) for key in ("without", "with"))
    assert without.tobytes() != with_erasers.tobytes()
    about = json.loads(with_erasers.text["spmhub"])
    assert (about["seed"], about["prompt"], about["adapters"]) == (5, "snoopy", ["snoopy", "mickey"])
    assert Image.open(said["files"]["grid"][0]).width > 4 * 192

    # The same picture from another call: alone, without comparing; and from diffusers itself.
    alone = spmhub(*arguments, "-p", "snoopy", "--out", tmp_path / "b", "-q")
    assert alone.err == ""
    files = alone.out.splitlines()
    assert len(files) == 2
    assert Image.open(files[0]).tobytes() == with_erasers.tobytes()
    pipe = pico_pipeline()
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    bare = pipe("snoopy", num_inference_steps=2, generator=generators, num_images_per_prompt=2).images
    assert [Image.open(file).tobytes() for file in said["files"]["without"][:2]] == [one.tobytes() for one in bare]


def test_apply_takes_gate_strength_and_a_file_of_prompts(
    spmhub: Spmhub, registry: Registry, model: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("snoopy\na dog\n")
    arguments = ("apply", "-m", model, "-a", "snoopy", "--prompts", prompts, "--steps", 1, "--json", "--out")
    with_gate = json.loads(spmhub(*arguments, tmp_path / "a", "--gate", "0.25").out)
    assert [one["gates"]["snoopy"] for one in with_gate["gates"]] == [0.25, 0.25]
    off = json.loads(spmhub(*arguments, tmp_path / "b", "--strength", "snoopy=0", "--compare", "--grid").out)
    pairs = zip(off["files"]["without"], off["files"]["with"], strict=True)
    assert all(Image.open(one).tobytes() == Image.open(other).tobytes() for one, other in pairs)


def test_bake_then_recover(spmhub: Spmhub, registry: Registry, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "safe"
    baked = json.loads(spmhub("bake", "-m", model, "-a", "snoopy,mickey", "--out", out, "--json").out)
    assert [one["name"] for one in baked["erasers"]] == ["mickey", "snoopy"]
    assert spmhub("recover", "snoopy", "--checkpoint", out, "-q") == Done(0, f"{out}\n", "")
    last = spmhub("recover", "mickey", "--checkpoint", out)
    assert "plain base again" in last.out
    weights = Path("unet") / "diffusion_pytorch_model.safetensors"
    assert (out / weights).read_bytes() == (model / weights).read_bytes()


def test_check(spmhub: Spmhub, registry: Registry, model: Path, tmp_path: Path) -> None:
    assert json.loads(spmhub("check", "snoopy", "--model", model, "--json").out)["compatible"] is True
    pico_pipeline(channels=(16, 16)).save_pretrained(tmp_path / "narrow")
    misfit = spmhub("check", "snoopy", "--model", tmp_path / "narrow", "--json")
    assert misfit.code == 1
    answer = json.loads(misfit.out)
    assert answer["compatible"] is False
    assert "(32, 32" in answer["mismatch"]
    assert "(16, 16" in answer["mismatch"]


def test_models_and_doctor(spmhub: Spmhub, registry: Registry) -> None:
    assert "sd-v1-4" in spmhub("models", "-q").out.splitlines()
    assert {row["alias"] for row in json.loads(spmhub("models", "--json").out)} >= {"sketchbook", "dreamshaper-8"}
    doctor = spmhub("doctor", "--json")
    findings = {one["subject"]: one for one in json.loads(doctor.out)}
    assert findings["registry"]["status"] == "ok"
    assert findings["torch"]["status"] in ("ok", "warn")
    assert doctor.code == any(one["status"] == "fail" for one in findings.values())
    (registry.root / "file").write_text("")
    failing = spmhub("doctor", "--registry", registry.root / "file", "--json")
    failed = {one["subject"]: one for one in json.loads(failing.out) if one["status"] == "fail"}
    assert failing.code == 1
    assert "file cannot be written" in failed["registry"]["detail"]
    assert all(one["mend"] for one in failed.values())


WRONG = [
    (["train", ""], 2, "empty"),
    (["train", "  "], 2, "empty"),
    (["train"], 2, "empty"),
    (["train", "church", "--set", "objektive.eta=1"], 2, "objective"),
    (["train", "church", "--set", "steps"], 2, "KEY=VALUE"),
    (["train", "church", "--method", "smp"], 2, "spm"),
    (["train", "church", "--model", "sketchbok"], 2, "sketchbook"),
    (["train", "church", "--recipe", "none.yaml"], 2, "none.yaml"),
    (["train", "church", "--name", "No Name"], 2, "no-name"),
    (["train", "snoopy", "-m", "{model}"], 1, "--force"),
    (["apply", "-m", "sd-v14", "-a", "snoopy", "-p", "x"], 2, "sd-v1-4"),
    (["apply", "-m", "{model}", "-a", "snopy", "-p", "x"], 2, "did you mean snoopy"),
    (["apply", "-m", "{model}", "-a", "snoopy,", "-p", "x"], 2, "empty name"),
    (["apply", "-m", "{model}", "-a", "snoopy,snoopy", "-p", "x"], 2, "twice"),
    (["apply", "-m", "{model}", "-a", "snoopy"], 2, "no prompt"),
    (["apply", "-m", "{model}", "-a", "snoopy", "-p", " "], 2, "prompt 1 is empty"),
    (["apply", "-m", "{model}", "-a", "snoopy", "-p", "x", "--num", "0"], 2, "at least 1"),
    (["apply", "-m", "{model}", "-a", "snoopy", "-p", "x", "--seed", "-1"], 2, "at least 0"),
    (["apply", "-m", "{model}", "-a", "snoopy", "-p", "x", "--steps", "1001"], 2, "num_inference_steps 1001"),
    (["apply", "-m", "{model}", "-a", "snoopy", "-p", "x", "--gate", "open"], 2, "transport"),
    (["apply", "-m", "{model}", "-a", "snoopy", "-p", "x", "--gate", "nan"], 2, "transport"),
    (["apply", "-m", "{model}", "-a", "snoopy", "-p", "x", "--strength", "snoopy"], 2, "NAME=NUMBER"),
    (["apply", "-m", "{model}", "-a", "snoopy", "-p", "x", "--strength", "dog=1"], 2, "dog"),
    (["apply", "-m", "{model}", "-a", "snoopy", "-p", "x", "--device", "warp"], 2, "warp"),
    (["apply", "-m", "{model}", "-a", "snoopy", "--prompts", "{blank}"], 2, "blank lines 2, 4"),
    (["apply", "-m", "{model}", "-a", "snoopy", "--prompts", "none.txt"], 2, "none.txt"),
    (["apply", "-m", "{model}", "-a", "snoopy", "-p", "x", "--prompts", "{blank}"], 2, "both"),
    (["bake", "-m", "{model}", "-a", "snoopy,snoopy", "--out", "out"], 2, "twice"),
    (["recover", "snoopy", "--checkpoint", "{model}"], 1, "spmhub.json"),
    (["show", "snopy"], 2, "did you mean snoopy"),
    (["show", "none.safetensors"], 2, "none.safetensors"),
    (["list", "--registry", "nowhere"], 1, "nowhere"),
    (["trian"], 2, "train"),
    (["apply"], 2, "--adapters"),
]


@pytest.mark.parametrize(("arguments", "code", "says"), WRONG, ids=[" ".join(line[:8]) for line, _, _ in WRONG])
def test_a_mistake_is_a_sentence_and_an_exit_code(
    arguments: list[str], code: int, says: str, spmhub: Spmhub, registry: Registry, model: Path, tmp_path: Path
) -> None:
    blank = tmp_path / "blank.txt"
    blank.write_text("a\n\nb\n \n")
    before = sorted(registry.root.rglob("*"))
    done = spmhub(*(one.replace("{model}", str(model)).replace("{blank}", str(blank)) for one in arguments))
    assert (done.code, done.out) == (code, "")
    assert says in done.err
    assert sorted(registry.root.rglob("*")) == before
    assert list(Path.cwd().iterdir()) == [], "nothing half done"


NEEDS_NO_MODEL = [
    (["apply", "-a", "snoopy"], "--prompt TEXT"),
    (["apply", "-a", "snoopy", "-p", "x", "-p", " "], "--prompt TEXT"),
    (["apply", "-a", "snoopy,snoopy", "-p", "x"], "name it once"),
    (["apply", "-a", "snoopy,{namesake}", "-p", "x"], "spmhub convert {namesake} --name snoopy-2"),
    (["apply", "-a", "snoopy", "-p", "x", "--gate", "transprot"], "--gate transport"),
    (["apply", "-a", "snoopy", "-p", "x", "--strength", "snopy=1"], "snoopy"),
    (["apply", "-a", "snoopy", "-p", "x", "--steps", "0"], "steps = 1"),
    (["apply", "-a", "snoopy", "-p", "x", "--seed", str(2**64)], "seed = 0"),
    (["apply", "-a", "snoopy", "-p", "x", "--seed", str(2**64 - 1), "--num", "2"], "seed = 0"),
    (["apply", "-a", "snoopy", "-p", "x", "--guidance", "nan"], "guidance = 7.5"),
    (["bake", "-a", "snoopy,{namesake}", "--out", "out"], "spmhub convert {namesake} --name snoopy-2"),
    (["bake", "-a", "snoopy", "--out", "{registry}"], "name another folder with --out"),
    (["bake", "-a", "snoopy", "--out", "{registry}", "--force"], "name another folder with --out"),
    (["train", "church", "--set", "objektive.eta=1"], "spmhub show NAME"),
    (["train", "church", "--method", "smp"], "spmhub methods"),
    (["train", "church", "--device", "meta"], 'device="cpu"'),
    (["apply", "-a", "snoopy", "-p", "x", "--device", "meta"], 'device="cpu"'),
]


@pytest.mark.parametrize(("arguments", "mend"), NEEDS_NO_MODEL, ids=[" ".join(line[:8]) for line, _ in NEEDS_NO_MODEL])
def test_what_needs_no_model_is_said_before_one_is_loaded(
    arguments: list[str], mend: str, spmhub: Spmhub, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def downloaded(*_: object, **__: object) -> None:
        raise AssertionError("gigabytes were downloaded before the mistake was found")

    monkeypatch.setattr("spm_hub.models.loading.load_pipeline", downloaded)
    namesake = tmp_path / "namesake.safetensors"
    pico_eraser(pico_pipeline().unet, "snoopy", 7).save(namesake)
    for key, place in {"{namesake}": str(namesake), "{registry}": str(registry.root)}.items():
        arguments = [one.replace(key, place) for one in arguments]
        mend = mend.replace(key, place)
    done = spmhub(*arguments, "-m", "sd-v1-4")
    assert done.code in (1, 2)
    assert done.err.splitlines()[-1].startswith("  try: ")
    assert mend in done.err.splitlines()[-1]


def test_the_command_that_is_suggested_can_be_typed(spmhub: Spmhub, registry: Registry, model: Path) -> None:
    concept = """Bob's "best" $HOME"""
    suggested = spmhub("train", concept, "-m", model, *PICO_TRAINING).err.splitlines()[-1]
    command, *arguments = shlex.split(suggested.partition("; try: ")[2])
    assert command == "spmhub"
    done = spmhub(*arguments, "--steps", 1, "--json")
    assert json.loads(done.out)["gates"][0]["prompt"] == concept


def test_an_error_is_json_too(spmhub: Spmhub, registry: Registry) -> None:
    done = spmhub("show", "snopy", "--json")
    said = json.loads(done.out)["error"]
    assert (done.code, said["type"]) == (2, "NotFoundError")
    assert said["try"] == "the name snoopy; or, in full, spmhub pull OWNER/snopy"


def test_a_registry_that_cannot_be_written_is_said_before_the_training(
    spmhub: Spmhub, registry: Registry, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    done = spmhub("train", "church", "-m", model, "--registry", tmp_path / "file" / "registry")
    assert done.code == 1
    assert "cannot be written" in done.err
    assert "training" not in done.err


def test_a_full_disk_while_pictures_are_written(
    spmhub: Spmhub, registry: Registry, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    done = spmhub("apply", "-m", model, "-a", "snoopy", "-p", "x", "--steps", 1, "--out", tmp_path / "pictures")
    assert (done.code, done.out) == (1, "")
    assert "No space left" in done.err
    assert list((tmp_path / "pictures").iterdir()) == []


def test_ctrl_c_and_a_reader_that_leaves(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, exit_on_error(Output()):
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_in_training_keeps_the_run(
    spmhub: Spmhub, registry: Registry, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spm_hub.training.loop import prediction_run as run

    arguments = ("train", "church", "-m", model, "--checkpoint-dir", tmp_path / "run", *PICO_TRAINING, "--set=steps=4")
    step = run.PredictionRun.step

    def interrupted(self: run.PredictionRun, number: int) -> dict[str, float]:
        if number == 2:
            raise KeyboardInterrupt
        return step(self, number)

    with monkeypatch.context() as patched:
        patched.setattr(run.PredictionRun, "step", interrupted)
        stopped = spmhub(*arguments)
    assert stopped.code == 130
    assert "--resume" in stopped.err
    assert spmhub(*arguments, "--resume").code == 0
    resumed = registry.get("church").adapter_path.read_bytes()
    assert spmhub(*arguments, "--force").code == 0
    assert registry.get("church").adapter_path.read_bytes() == resumed


@pytest.mark.slow
def test_several_concepts_go_on_with_the_one_that_was_interrupted(
    spmhub: Spmhub, registry: Registry, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spm_hub.training.loop import prediction_run as run

    arguments = ("train", "church", "dog", "-m", model, *PICO_TRAINING)
    step = run.PredictionRun.step

    def interrupted(self: run.PredictionRun, number: int) -> dict[str, float]:
        if (self.recipe.target, number) == ("dog", 1):
            raise KeyboardInterrupt
        return step(self, number)

    with monkeypatch.context() as patched:
        patched.setattr(run.PredictionRun, "step", interrupted)
        assert spmhub(*arguments).code == 130
    church = registry.get("church")
    before = church.adapter_path.stat()
    resumed = spmhub(*arguments, "--resume", "--json")
    assert [row["name"] for row in json.loads(resumed.out)] == ["church", "dog"]
    assert "'church': erased by this very recipe already" in resumed.err
    assert church.adapter_path.stat() == before, "not trained again"
    assert spmhub(*arguments, "--resume", "--set=steps=3").code == 1, "another recipe's eraser is in the way"
    assert church.adapter_path.stat() == before


@pytest.mark.slow
def test_runs_on_bases_of_one_name_leave_each_other_alone(
    spmhub: Spmhub, registry: Registry, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spm_hub.training.loop import prediction_run as run

    other = tmp_path / "other" / model.name
    pico_pipeline(seed=1).save_pretrained(other)
    step = run.PredictionRun.step

    def interrupted(self: run.PredictionRun, number: int) -> dict[str, float]:
        if number == 1:
            raise KeyboardInterrupt
        return step(self, number)

    arguments = ("train", "church", *PICO_TRAINING, "-m")
    with monkeypatch.context() as patched:
        patched.setattr(run.PredictionRun, "step", interrupted)
        assert [spmhub(*arguments, base).code for base in (model, other)] == [130, 130]
    assert len(list((tmp_path / "cache").rglob("training.safetensors"))) == 2
    anew = spmhub(*arguments, model, "--resume", "--name", "another")
    assert "nothing to resume" in anew.err
    assert "nothing to resume" not in spmhub(*arguments, other, "--resume").err
    assert not [key for key, value in registry.get("church").read_manifest().versions.items() if not value]
    done = spmhub(*arguments, model, "--resume")
    assert (done.code, "--force" in done.err) == (1, True), "the same recipe's, on other weights"
    assert "erased by this very recipe already" in spmhub(*arguments, other, "--resume").err


def test_what_we_warn_of_ourselves_is_a_line_and_what_libraries_do_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    with silence_libraries():
        warnings.warn("spm_hub: this model cannot be trained to the same bits twice", UserWarning, stacklevel=1)
        warnings.warn("something is deprecated", UserWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: this model cannot be trained to the same bits twice\n"


@pytest.mark.slow
def test_a_full_registry_does_not_cost_the_training(
    spmhub: Spmhub, registry: Registry, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spm_hub.registry import storage
    from spm_hub.training.loop import prediction_run as run

    def full(*_: object) -> None:
        raise RegistryError("cannot write it: No space left on device")

    def never(*_: object) -> None:
        raise AssertionError("it was trained already")

    arguments = ("train", "church", "-m", model, *PICO_TRAINING)
    with monkeypatch.context() as patched:
        patched.setattr(storage, "change", full)
        refused = spmhub(*arguments)
    assert (refused.code, refused.out) == (1, "")
    assert "not lost" in refused.err
    assert refused.err.splitlines()[-1].startswith("  try: the same command with --resume")
    assert registry.find("church") is None
    with monkeypatch.context() as patched:
        patched.setattr(run.PredictionRun, "step", never)
        assert spmhub(*arguments, "--resume").code == 0
    assert spmhub(*arguments, "--name", "again").code == 0
    kept = [registry.get(name).load().increments for name in ("church", "again")]
    assert all(torch.equal(one.up, kept[1][path].up) for path, one in kept[0].items())
    kept_twice = [file for file in (tmp_path / "cache").rglob("*.safetensors") if file.parent.name != "banks"]
    assert not kept_twice, "what is in the registry is kept once"


def test_a_folder_for_the_run_that_cannot_be_written_is_said_before_the_training(
    spmhub: Spmhub, registry: Registry, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    done = spmhub("train", "church", "-m", model, "--checkpoint-dir", tmp_path / "file", *PICO_TRAINING)
    assert done.code == 1
    assert "--checkpoint-dir DIR" in done.err
    assert "training 2/2" not in done.err
    assert registry.find("church") is None


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_help_shows_examples_that_parse(name: str, spmhub: Spmhub) -> None:
    shown = spmhub(name, "--help")
    assert shown.code == 0
    assert {"--json", "--quiet"} <= set(shown.out.replace(",", " ").split())
    text = " ".join(shown.out.split())
    command = next(one for one in app.registered_commands if one.name == name)
    assert command.callback is not None
    for example in EXAMPLES[name]:
        assert " ".join(example.line.split()) in text
        program, verb, *arguments = shlex.split(example.line)
        assert (program, verb) == ("spmhub", name)
        options = {parameter for parameter in arguments if parameter.startswith("-")}
        assert options <= set(text.replace(",", " ").split()), f"{example.line}: an option that does not exist"


def test_every_command_has_an_example() -> None:
    assert {command.name for command in app.registered_commands} == set(EXAMPLES)
    assert all(EXAMPLES.values())


def test_help_is_quick_and_imports_no_torch() -> None:
    code = (
        "import resource, sys; from spm_hub.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'huggingface_hub'} & set(sys.modules)\n"
        "print(heavy, used.ru_utime + used.ru_stime, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True)
    heavy, _, seconds = done.stderr.strip().rpartition(" ")
    assert heavy == "set()"
    assert float(seconds) < 0.75, "0.14 s on an idle machine; the rest is for a busy one"
    for verb in ("train", "apply", "bake", "recover", "list", "show", "check", "models", "doctor", "demo"):
        assert verb in done.stdout


@pytest.mark.parametrize(
    ("n_bytes", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (1_700_000, "1.7 MB"), (3e9, "3.0 GB")]
)
def test_sizes(n_bytes: int, text: str) -> None:
    assert size(int(n_bytes)) == text


def test_what_a_stranger_wrote_moves_no_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    evil = "snoopy\x1b[2J\x1b]0;mine\x07\u202egpj.exe\r"
    out = Output()
    for human in (table(["a", "b"], [[evil, 1]]), table(["a"], [[evil]] * (LONG + 1)), evil):
        out.data(None, human)
    out.say(evil)
    out.fail(RegistryError(evil))
    Output(quiet=True).data(None, "", brief=[evil])
    said = capsys.readouterr()
    for text in (said.out, said.err):
        assert not set(text) & set("\x1b\x07\u202e\r")
        assert "snoopy\\x1b[2J" in text


def test_a_registry_in_git_is_checked_strictly(spmhub: Spmhub, registry: Registry) -> None:
    def problems() -> list[tuple[str, str]]:
        done = spmhub("check", "--strict", "--json")
        found = json.loads(done.out)
        assert done.code == int(bool(found["problems"])) == int(not found["ok"])
        return [(one["name"], one["check"]) for one in found["problems"] if one["check"] != "audit"]

    assert problems() == []
    stray = registry.root / "manifests" / "gone.json"
    stray.write_bytes((registry.root / "manifests" / "mickey.json").read_bytes())
    assert problems() == [("gone", "file")]
    stray.unlink()
    (registry.root / "manifests" / "mickey.json").unlink()
    assert ("mickey", "manifest") in problems()
    adapter = registry.root / "adapters" / "snoopy.safetensors"
    content = bytearray(adapter.read_bytes())
    content[-1] ^= 1
    adapter.write_bytes(content)
    assert ("snoopy", "sha256") in problems()
    assert spmhub("check", "--strict", "snoopy").code == spmhub("check").code == 2

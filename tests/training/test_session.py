"""Training as a Python object: on a given pipeline or a loaded one, stopped and resumed, kept, watched, refused."""

from __future__ import annotations

import logging
import os
import pkgutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from pico import pico_pipeline, pico_unet
from torch import nn

import spm_hub
from spm_hub.adapters.adapter import Adapter
from spm_hub.adapters.manifest import Training
from spm_hub.cli.app import app
from spm_hub.errors import NotFoundError, RecipeError, RegistryError, UsageError
from spm_hub.models.references import identity_of_pipeline
from spm_hub.registry.registry import Registry
from spm_hub.training import train
from spm_hub.training.recipe.recipe import Recipe
from spm_hub.training.session import TrainingStep

TESTS = Path(__file__).resolve().parents[1]
SMALL: dict[str, Any] = {"steps": 4, "batch_size": 2, "x_t": {"steps": 2, "trajectories": 2, "chunks": 1}}
SMALL_SETS = ["steps=4", "batch_size=2", "x_t.steps=2", "x_t.trajectories=2", "x_t.chunks=1"]
SCRIPT = """
import signal
import sys
import time

import spm_hub
from pico import pico_pipeline

# What a shell runs in the background begins with the signal ignored, and so does what that starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
registry, mode = sys.argv[1:]
pipe = pico_pipeline()

def wait_for_ctrl_c(step):
    print(step.step, flush=True)
    if mode == "stop" and step.step == 2:
        time.sleep(60)

try:
    small = {"steps": 4, "batch_size": 2, "x_t": {"steps": 2, "trajectories": 2, "chunks": 1}}
    spm_hub.train("snoopy", pipe=pipe, registry=registry, resume=True, callbacks=[wait_for_ctrl_c], **small)
except spm_hub.TrainingInterruptedError as error:
    sys.exit(str(error))
with spm_hub.attach(pipe, "snoopy", registry=registry) as erasers:
    print(erasers.gates("snoopy"))
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache, for the states of runs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "pico"
    pico_pipeline().save_pretrained(path)
    return path


def states(cache: Path) -> list[Path]:
    return list(cache.rglob("training.safetensors"))


@pytest.mark.parametrize(
    ("place", "call", "says"),
    [
        ("session._cut_texts", 2, "stopped before the training on 'mickey' began; "),
        ("loop.prediction_run.PredictionRun.losses", 6, "stopped; step 1 of 4 is saved in "),
    ],
)
def test_ctrl_c_in_a_second_training_says_that_the_first_eraser_is_kept(
    place: str, call: int, says: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, _, name = f"spm_hub.training.{place}".rpartition(".")
    whole, calls = getattr(pkgutil.resolve_name(owner), name), 0

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    def trained() -> None:
        both = ["snoopy", "mickey"]
        spm_hub.train(both, model=str(folder), registry=tmp_path / "kept", resume=True, progress=False, **SMALL)

    monkeypatch.setattr(f"spm_hub.training.{place}", interrupted)
    with pytest.raises(spm_hub.TrainingInterruptedError) as stopped:
        trained()
    assert str(stopped.value).startswith(says)
    assert f"kept in {tmp_path / 'kept'}: snoopy\n" in str(stopped.value)
    assert "--resume" in str(stopped.value.mend)
    first = (tmp_path / "kept" / "adapters" / "snoopy.safetensors").read_bytes()
    trained()
    assert (tmp_path / "kept" / "adapters" / "snoopy.safetensors").read_bytes() == first
    assert [entry.name for entry in Registry(tmp_path / "kept").entries()] == ["mickey", "snoopy"]


def increments_equal(one: Adapter, other: Adapter) -> bool:
    return one.increments.keys() == other.increments.keys() and all(
        torch.equal(tensor, other.increments[path].tensors()[part])
        for path, increment in one.increments.items()
        for part, tensor in increment.tensors().items()
    )


class Stop:
    """A callback that presses Ctrl-C when concept number `run` reaches step `at`, and counts steps."""

    def __init__(self, at: int = -1, run: int = 1) -> None:
        self.at, self.run, self.runs, self.steps = at, run, 0, list[int]()

    def __call__(self, done: TrainingStep) -> None:
        self.runs += done.step == 1
        self.steps.append(done.step)
        if (self.runs, done.step) == (self.run, self.at):
            raise KeyboardInterrupt


def test_texts_that_the_text_encoder_cuts_are_said() -> None:
    """The pico encoder reads 12 tokens, two of which begin and end a text."""
    concept = "a red dog by a blue church on the sunny beach with snoopy"
    with pytest.warns(UserWarning, match="cut off") as said:
        made = spm_hub.train(
            concept, pipe=pico_pipeline(), progress=False, aliases=["snoopy"], name="dog",
            surrogate="a photo of a person in the style of van gogh and picasso", **SMALL,
        )  # fmt: skip
    assert made.manifest.concept.target == concept
    messages = [str(one.message) for one in said if "cut off" in str(one.message)]
    assert len(messages) == 2
    assert "the concept 'a red dog" in messages[1]
    assert "has 15 tokens, and the text encoder reads 12: cut off is 'beach with snoopy'" in messages[1]
    assert "the surrogate" in messages[0]
    assert "'van gogh and picasso'" in messages[0]


@pytest.mark.slow
def test_a_script_is_stopped_by_a_signal_resumes_to_the_identical_file_keeps_it_and_attaches_it(
    tmp_path: Path, cache: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    path = os.pathsep.join((str(TESTS), os.environ.get("PYTHONPATH", "")))

    def started(mode: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(script), str(tmp_path / "kept"), mode], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip

    with started("stop") as stopped:
        assert stopped.stdout is not None
        assert [stopped.stdout.readline() for _ in range(2)] == ["1\n", "2\n"]
        stopped.send_signal(signal.SIGINT)
        _, said = stopped.communicate(timeout=120)
    assert stopped.returncode == 1
    assert "step 2 of 4 is saved in" in said
    assert "resume=True" in said
    assert len(states(cache)) == 1
    assert Registry(tmp_path / "kept").find("snoopy") is None

    with started("resume") as resumed:
        out, err = resumed.communicate(timeout=120)
    assert out == "3\n4\n{'snoopy': 1.0}\n", err
    assert "training" not in err, "no bar where nobody looks"
    assert states(cache) == []
    spm_hub.train("snoopy", pipe=pico_pipeline(), registry=tmp_path / "whole", progress=False, **SMALL)
    files = [tmp_path / place / "adapters" / "snoopy.safetensors" for place in ("kept", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_command_resumes_what_python_began_on_its_own_pipeline_and_the_file_is_the_same(
    folder: Path, tmp_path: Path, cache: Path
) -> None:
    pipe = spm_hub.load_pipeline(str(folder))
    stop = Stop(at=3)
    with pytest.raises(spm_hub.TrainingInterruptedError):
        spm_hub.train("church", pipe=pipe, callbacks=[stop], **SMALL)
    assert len(states(cache)) == 1, "saved without a registry too"
    command = ["train", "church", "-m", str(folder), *(f"--set={one}" for one in SMALL_SETS)]
    with pytest.raises(SystemExit) as ended:
        app([*command, "--registry", str(tmp_path / "command"), "--resume", "-q"])
    assert not ended.value.code
    again = spm_hub.train("church", pipe=pipe, registry=tmp_path / "python", **SMALL)
    files = [tmp_path / place / "adapters" / "church.safetensors" for place in ("command", "python")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert (again.manifest.base.id, again.source) == ("pico", str(files[1]))


def test_a_pipeline_of_ones_own_is_named_by_where_it_is_from(folder: Path) -> None:
    assert identity_of_pipeline(pico_pipeline()) == ("StableDiffusionPipeline", None)
    assert identity_of_pipeline(spm_hub.load_pipeline(str(folder))) == ("pico", None)
    assert identity_of_pipeline(spm_hub.load_pipeline("sketchbook")) == ("sketchbook", None)
    commit, pipe = "1" * 40, pico_pipeline()
    place = f"/cache/models--someone--some-model/snapshots/{commit}"
    for text, identity in (
        (place, ("someone/some-model", commit)),
        ("someone/some-model", ("someone/some-model", commit)),
        ("another/model", ("another/model", None)),
        ("/models/mine", ("mine", None)),
    ):
        pipe.register_to_config(_name_or_path=text)
        pipe.unet.register_to_config(_name_or_path=f"{place}/unet")
        if text == "/models/mine":
            pipe.unet.register_to_config(_name_or_path="")
        assert identity_of_pipeline(pipe) == identity
    known = "/cache/models--CompVis--stable-diffusion-v1-4/snapshots/133a221b8aa7292a167afc5127cb63fb5005638b"
    pipe.register_to_config(_name_or_path=known)
    pipe.unet.register_to_config(_name_or_path=f"{known}/unet")
    assert identity_of_pipeline(pipe) == ("sd-v1-4", "133a221b8aa7292a167afc5127cb63fb5005638b")


def test_several_concepts_one_after_another(tmp_path: Path, cache: Path) -> None:
    pipe, stop = pico_pipeline(), Stop(at=2, run=2)
    with pytest.raises(spm_hub.TrainingInterruptedError):
        spm_hub.train(["cat", "dog"], pipe=pipe, callbacks=[stop], progress=False, **SMALL)
    assert len(states(cache)) == 2, "the first result is not lost with the second"
    rest = Stop()
    cat, dog = spm_hub.train(("cat", "dog"), pipe=pipe, callbacks=[rest], resume=True, progress=False, **SMALL)
    assert rest.steps == [3, 4]
    assert states(cache) == []
    assert list((cache / "spm-hub" / "runs").iterdir()) == []
    for made in (cat, dog):
        alone = train(Recipe.plan(target=made.name, **SMALL), pipe=pipe)
        assert increments_equal(made, alone)


def test_several_concepts_jointly(tmp_path: Path) -> None:
    pipe = pico_pipeline(text_width=64)
    given = {**SMALL, "kind": "style"}
    made = spm_hub.train(["cat", "dog"], method="sepme", pipe=pipe, registry=tmp_path, progress=False, **given)
    assert [one.name for one in made] == ["cat", "dog"]
    assert [one.manifest.gate.protected for one in made] == [("", "dog"), ("", "cat")]
    assert {one.manifest.concept.kind for one in made} == {"style"}
    assert [entry.name for entry in Registry(tmp_path).entries()] == ["cat", "dog"]
    stop = Stop()
    again = spm_hub.train(
        ["dog", "cat"], method="sepme", pipe=pipe, registry=Registry(tmp_path), resume=True, callbacks=[stop], **given
    )
    assert (stop.steps, [one.name for one in again]) == ([], ["dog", "cat"]), "kept by the same recipe already"


def test_a_device_without_weights_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spm_hub.models.loading.load_pipeline", None)
    for device in ("meta", "meta:0", torch.device("meta")):
        with pytest.raises(UsageError, match=r"device is 'meta.*weights have no values"):
            spm_hub.train("snoopy", device=device, **SMALL)
    with torch.device("meta"):
        bare = pico_unet()
    with pytest.raises(UsageError, match=r"denoiser \(UNet2DConditionModel\) .* on the device 'meta'"):
        spm_hub.train("snoopy", pipe=pico_pipeline(unet=bare), **SMALL)


def test_half_precision_is_obeyed(folder: Path) -> None:
    for dtype in (torch.bfloat16, "bfloat16"):
        made = spm_hub.train("snoopy", model=str(folder), dtype=dtype, progress=False, **SMALL)
        assert made.manifest.versions["base-dtype"] == "bfloat16"
    given = spm_hub.train("snoopy", pipe=pico_pipeline(dtype=torch.bfloat16), dtype="bfloat16", **SMALL)
    assert given.manifest.versions["base-dtype"] == "bfloat16"
    assert increments_equal(given, made)
    assert not increments_equal(given, spm_hub.train("snoopy", pipe=pico_pipeline(), **SMALL))


@pytest.mark.parametrize(
    ("options", "says", "mend"),
    [
        ({"dtype": "float16"}, "dtype is torch.float16, but the given pipeline has torch.float32", "pipe.to"),
        ({"dtype": "flaot16"}, "dtype is 'flaot16'", "float16"),
        ({"dtype": "int8"}, "dtype is 'int8'", "dtype="),
        ({"device": "cuda"}, "device is 'cuda', but the given pipeline is on 'cpu'", "leave device out"),
        ({"config": "sketchbook"}, "config is for a model that is loaded from a single file", "leave config out"),
        ({"replace": True}, "replace is for a registry", "registry=True"),
    ],
)
def test_a_given_pipeline_is_neither_moved_nor_converted(options: dict[str, Any], says: str, mend: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        spm_hub.train("snoopy", pipe=pico_pipeline(), **options, **SMALL)
    assert mend in str(caught.value.mend)


def test_a_given_pipeline_has_its_own_device_and_dtype() -> None:
    pipe, random = pico_pipeline(), torch.get_rng_state()
    made = [
        spm_hub.train("snoopy", pipe=pipe, progress=False, **given, **SMALL)
        for given in ({}, {"device": "cpu", "dtype": torch.float32})
    ]
    assert increments_equal(*made)
    assert torch.equal(torch.get_rng_state(), random)


def test_a_pipeline_with_erasers_is_not_trained_on() -> None:
    pipe = pico_pipeline()
    with spm_hub.attach(pipe, []), pytest.raises(UsageError, match="has erasers attached"):
        spm_hub.train("snoopy", pipe=pipe, **SMALL)


def everything_of(pipe: StableDiffusionPipeline) -> dict[str, Any]:
    found: dict[str, Any] = {"config": dict(pipe.config), "attributes": sorted(vars(pipe)), "class": type(pipe)}
    scheduler = pipe.scheduler
    found["scheduler"] = (id(scheduler), dict(scheduler.config), repr(vars(scheduler)))
    for part, module in pipe.components.items():
        for name, one in module.named_modules() if isinstance(module, nn.Module) else ():
            hooks = [len(getattr(one, key)) for key in vars(one) if key.endswith("_hooks")]
            found[f"{part}.{name}"] = (type(one), one.training, hooks, sorted(vars(one)))
            for key, parameter in one.named_parameters(recurse=False):
                found[f"{part}.{name}.{key}"] = (
                    parameter.detach().numpy().tobytes(), parameter.requires_grad, parameter.grad is None,
                )  # fmt: skip
    return found


@pytest.mark.parametrize("recipe", [{}, {"method": "esd-x"}, {"increment": {"kind": "lokr", "rank": 2}}], ids=str)
def test_a_given_pipeline_is_afterwards_as_it_was(recipe: dict[str, Any]) -> None:
    pipe = pico_pipeline()
    pipe.unet.train()
    pipe.text_encoder.requires_grad_(True)
    for module in pipe.unet.mid_block.modules():
        module.requires_grad_(True)
    pipe.scheduler.set_timesteps(7)
    before = everything_of(pipe)
    made = spm_hub.train("snoopy", pipe=pipe, progress=False, **recipe, **SMALL)
    assert everything_of(pipe) == before
    assert increments_equal(made, spm_hub.train("snoopy", pipe=pico_pipeline(), progress=False, **recipe, **SMALL))
    with pytest.raises(spm_hub.TrainingInterruptedError):
        spm_hub.train("snoopy", pipe=pipe, progress=False, callbacks=[Stop(at=1)], **recipe, **SMALL)
    assert everything_of(pipe) == before


class Terminal:
    """A stderr that says it is a terminal, or not."""

    def __init__(self, *, terminal: bool) -> None:
        self.text, self.terminal = "", terminal

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return self.terminal


def test_progress(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pipe = pico_pipeline()

    def shown(*, terminal: bool = True, notebook: bool = False, **options: Any) -> str:
        stderr = Terminal(terminal=terminal)
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stderr", stderr)
            if notebook:
                patched.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
            spm_hub.train("snoopy", pipe=pipe, **options, **SMALL)
        return stderr.text

    bar = shown()
    assert "training" in bar
    assert "4/4" in bar
    assert "% of the way, goal 85 %" in bar
    assert "4/4" in shown(terminal=False, notebook=True)
    assert shown(terminal=False) == ""
    assert shown(progress=False) == ""
    calls: list[tuple[int, int, Mapping[str, float]]] = []
    assert shown(progress=lambda *given: calls.append(given)) == ""
    assert [call[:2] for call in calls] == [(step, 4) for step in range(1, 5)]
    assert {tuple(call[2]) for call in calls} == {("erase", "anchor", "reached", "goal")}
    with caplog.at_level(logging.INFO, logger="spm_hub"):
        shown(resume=True)
    assert "nothing to resume" in caplog.text
    assert "erasing 'snoopy' from StableDiffusionPipeline with spm" in caplog.text


def test_a_callback_sees_every_step_and_ends_the_training() -> None:
    seen: list[TrainingStep] = []
    last: list[Any] = []

    def enough(step: TrainingStep) -> bool:
        seen.append(step)
        last[:] = [step.increments()]
        return step.step == 2

    steps = Stop()
    made = spm_hub.train("snoopy", pipe=pico_pipeline(), progress=False, callbacks=[enough, steps], **SMALL)
    assert [(one.step, one.total) for one in seen] == [(1, 4), (2, 4)]
    assert made.manifest.training == Training(
        steps=2, planned=4, ended="callback", reached=seen[-1].reached, goal=seen[-1].goal
    )
    assert seen[-1].goal == 0.85, "the preset's stop.reach"
    assert steps.steps == [1, 2], "all callbacks are called at the last step too"
    assert all(one.losses.keys() == {"erase", "anchor"} for one in seen)
    for path, increment in made.increments.items():
        for part, tensor in increment.tensors().items():
            assert torch.equal(tensor, last[0][path].tensors()[part].to(tensor.dtype))
    with pytest.raises(AttributeError):
        seen[0].step = 5  # type: ignore[misc]


def test_an_eraser_whose_manifest_spells_a_key_the_old_way_is_known_again(tmp_path: Path) -> None:
    kept = spm_hub.train("snoopy", pipe=pico_pipeline(), registry=tmp_path, progress=False, **SMALL)
    older = {key: value for key, value in kept.manifest.recipe.items() if key != "options"}
    older["x_t"] = {("told" if key == "guidance_embedding" else key): value for key, value in older["x_t"].items()}
    assert older["x_t"] != kept.manifest.recipe["x_t"]
    manifest = kept.manifest.model_copy(update={"recipe": older})
    Registry(tmp_path).add(Adapter(manifest, kept.increments, "an older release"), replace=True)
    stop = Stop()
    spm_hub.train("snoopy", pipe=pico_pipeline(), registry=tmp_path, resume=True, callbacks=[stop], **SMALL)
    assert stop.steps == []


def test_conflicts_in_a_registry_are_refused_before_the_training(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = spm_hub.train("snoopy", pipe=pico_pipeline(), registry=tmp_path, progress=False, **SMALL)
    path = tmp_path / "adapters" / "snoopy.safetensors"
    before, stop = path.read_bytes(), Stop()
    monkeypatch.setattr("spm_hub.models.loading.load_pipeline", None)
    for options in ({}, {"resume": True, "seed": 1}):
        with pytest.raises(RegistryError, match="snoopy"):
            spm_hub.train("snoopy", model=str(folder), registry=tmp_path, callbacks=[stop], **options, **SMALL)
    resumed = spm_hub.train("snoopy", pipe=pico_pipeline(), registry=tmp_path, resume=True, callbacks=[stop], **SMALL)
    assert increments_equal(resumed, kept)
    assert (stop.steps, path.read_bytes()) == ([], before)
    spm_hub.train("snoopy", pipe=pico_pipeline(), registry=tmp_path, name="other", progress=False, **SMALL)
    spm_hub.train("snoopy", pipe=pico_pipeline(), registry=tmp_path, replace=True, seed=1, progress=False, **SMALL)
    assert path.read_bytes() != before
    assert [entry.name for entry in Registry(tmp_path).entries()] == ["other", "snoopy"]


def test_registry_true_is_the_one_that_the_command_keeps_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPMHUB_REGISTRY", str(tmp_path / "mine"))
    spm_hub.train("snoopy", pipe=pico_pipeline(), registry=True, progress=False, **SMALL)
    assert Registry(tmp_path / "mine").find("snoopy") is not None


@pytest.mark.parametrize(
    ("concept", "options", "error", "says"),
    [
        (["cat", " "], {}, UsageError, "empty"),
        (["cat", "Cat"], {}, UsageError, "'cat' is to be erased twice"),
        (["cat", "dog"], {"name": "pets"}, UsageError, "a name belongs to one eraser, but there are 2 concepts"),
        (["cat", "dog"], {"aliases": ["pet"]}, UsageError, "aliases belong to one concept"),
        ("cat", {"optimizer": {"lr": 1}}, RecipeError, "optimizer.*did you mean optimiser"),
        ("cat", {"x_t": {"step": 3}}, RecipeError, "x_t.step is unknown.*did you mean steps"),
        ("cat", {"model": "sketchbok"}, NotFoundError, "sketchbok.*did you mean sketchbook"),
        ("cat", {"start_from": "nobodys-eraser"}, NotFoundError, "nobodys-eraser"),
    ],
)
def test_mistakes_are_refused_before_anything_is_loaded(
    concept: Any, options: dict[str, Any], error: type[Exception], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spm_hub.models.loading.load_pipeline", None)
    with pytest.raises(error, match=says):
        spm_hub.train(concept, **options)

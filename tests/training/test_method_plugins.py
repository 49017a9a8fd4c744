"""Methods of another distribution: a closed form, and a loop with its own trainable, recipe keys and checks."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_cli
import torch
from pico import pico_pipeline
from pico_families import family_pipeline
from processes import fork_server
from test_plugins import install

from spm_hub import plugins
from spm_hub.attachment.attachment import attach
from spm_hub.errors import RecipeError
from spm_hub.training import Recipe, train
from spm_hub.training.preflight import check_before_loading

spmhub = test_cli.spmhub
PACKAGE = '''
from contextlib import contextmanager

import torch
from pydantic import Field

import spm_hub
from spm_hub import ClosedForm, Method, RecipePart, Run, Task, Trainable
from spm_hub.adapters.increments import Dense, LowRank


class Halving(RecipePart):
    """How far the concept's states go."""

    share: float = Field(default=0.5, gt=0, le=1)


@torch.no_grad()
def solve(task: Task):
    """W' c = (1 - share) W c for the mean state c of the concept."""
    c = task.base.encode([task.recipe.target]).states[0].mean(0).double()
    down = (-task.recipe.options.share * c / c.dot(c))[None].contiguous()
    return {path: LowRank(down.float(), (m.weight.double() @ c)[:, None].float()) for path, m in task.modules.items()}


half = Method(
    name="half",
    title="Half of the concept",
    paper="nobody's",
    summary="Halves keys and values of the concept: for tests.",
    cost="Nothing.",
    harm="Everything.",
    preset={"increment": {"modules": "esd-x-strict"}, "options": {"share": 0.25}},
    trains=ClosedForm(solve),
    uses=frozenset({"increment.dtype"}),
    options=Halving,
)


class Gains(Trainable):
    """A gain for every output of every module: dW = diag(g) W."""

    def __init__(self, modules):
        self._modules, self.paths, self._on = dict(modules), tuple(modules), True
        self._gains = {path: torch.nn.Parameter(torch.zeros(len(m.weight))) for path, m in modules.items()}
        self._hooks = [m.register_forward_hook(self._scaling(path)) for path, m in modules.items()]

    def _scaling(self, path):
        def scale(module, args, output):
            if not self._on:
                return None
            bias = 0 if module.bias is None else module.bias
            return output + (output - bias) * self._gains[path]

        return scale

    def parameters(self, lr, scale):
        return [{"params": list(self._gains.values()), "lr": lr}]

    @contextmanager
    def frozen(self):
        self._on = False
        try:
            yield
        finally:
            self._on = True

    def increments(self):
        return {
            path: Dense((gain.detach()[:, None] * self._modules[path].weight.detach()).clone())
            for path, gain in self._gains.items()
        }

    def state(self):
        return {f"{path}.gain": gain for path, gain in self._gains.items()}

    def remove(self):
        for hook in self._hooks:
            hook.remove()


class Pace(RecipePart):
    """The loop's own keys."""

    pace: float = Field(default=0.1, gt=0)
    memory: float = Field(default=0.5, ge=0, lt=1)


class GainRun(Run):
    """Momentum descent, written by hand: all of its state is in `tensors`."""

    def __init__(self, task):
        self.recipe, self.base = task.recipe, task.base
        self.trainable = Gains(task.modules)
        self.momentum = {key: torch.zeros_like(gain) for key, gain in self.trainable.state().items()}

    def step(self, step):
        generator = torch.Generator().manual_seed(self.recipe.seed * 1000 + step)
        count = self.recipe.batch_size
        latents = self.base.noise(count, generator)
        times = torch.randint(1, 999, (count,), generator=generator)
        told, empty = (self.base.encode([text])[0].expand(count) for text in (self.recipe.target, ""))
        with torch.no_grad(), self.trainable.frozen():
            goal = self.base.predict(latents, times, empty)
        loss = (self.base.predict(latents, times, told) - goal).pow(2).mean()
        gains = self.trainable.state()
        gradients = torch.autograd.grad(loss, list(gains.values()))
        with torch.no_grad():
            for (key, gain), gradient in zip(gains.items(), gradients, strict=True):
                self.momentum[key].mul_(self.recipe.options.memory).add_(gradient)
                gain.sub_(self.recipe.options.pace * self.momentum[key])
        self.taken = step + 1
        return {"erase": float(loss.detach())}

    def tensors(self):
        momentum = {f"momentum.{key}": value for key, value in self.momentum.items()}
        return {**{f"gain.{key}": value for key, value in self.trainable.state().items()}, **momentum}

    def load(self, tensors):
        self.trainable.load_state({key: tensors[f"gain.{key}"] for key in self.trainable.state()})
        self.momentum = {key: tensors[f"momentum.{key}"] for key in self.momentum}


def check(recipe):
    if recipe.steps % 2:
        raise ValueError(f"method 'gains' takes steps in pairs: steps {recipe.steps} is odd, {recipe.steps + 1} is not")


def check_model(recipe, denoiser):
    if not any("attn2" in name for name, _ in denoiser.named_modules()):
        raise spm_hub.errors.RecipeError("method 'gains' needs cross-attention", mend="--method spm")


gains = Method(
    name="gains",
    title="Gains",
    paper="nobody's",
    summary="Trains a gain for every output: for tests.",
    cost="Little.",
    harm="Some.",
    preset={"increment": {"modules": "esd-x-strict"}, "steps": 6},
    trains=GainRun,
    uses=frozenset({"steps", "batch_size"}),
    instead={"x_t": "it draws its own noise"},
    options=Pace,
    check=check,
    check_model=check_model,
)
'''
POINTS = """[spm_hub.objectives]
half = another_lab:half
gains = another_lab:gains
"""
PAIR: dict[str, Any] = {"target": "snoopy", "method": "gains", "batch_size": 2, "options": {"pace": 0.3}}


@pytest.fixture
def site(tmp_path: Path) -> Path:
    place = tmp_path / "site"
    install(place, "another-lab", POINTS, another_lab=PACKAGE)
    return place


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(site)
    monkeypatch.setattr(plugins, "_EXAMINED", {})
    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, "another_lab", raising=False)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("share", [None, 0.75])
def test_a_closed_form_is_solved_attached_and_recorded(share: float | None) -> None:
    pipe = pico_pipeline()
    given = {} if share is None else {"options": {"share": share}}
    adapter = train(Recipe.make(target="snoopy", method="half", **given), pipe=pipe)
    share = 0.25 if share is None else share
    assert adapter.manifest.recipe["options"] == {"share": share}
    window = pipe.tokenizer("snoopy", padding="max_length", max_length=pipe.tokenizer.model_max_length)
    with torch.no_grad():
        states = pipe.text_encoder(torch.tensor([window.input_ids]))[0][0]
    c = states.double().mean(0).numpy()
    cross = {path for path, _ in pipe.unet.named_modules() if path.endswith(("attn2.to_k", "attn2.to_v"))}
    assert set(adapter.increments) == cross
    for path, increment in adapter.increments.items():
        weight = pipe.unet.get_submodule(path).weight.detach()
        changed = (weight + increment.delta_for(weight)).double().numpy() @ c
        np.testing.assert_allclose(changed, (1 - share) * weight.double().numpy() @ c, rtol=1e-4, atol=1e-6)
    with attach(pipe, [adapter], gate="always"):
        pass


@pytest.mark.usefixtures("installed")
def test_a_loop_of_its_own_trains_its_own_trainable() -> None:
    pipe = pico_pipeline()
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    losses: list[float] = []
    recipe = Recipe.make(**PAIR, steps=60)
    adapter = train(recipe, pipe=pipe, progress=lambda done, total, seen: losses.append(seen["erase"]))
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10]), "it erases"
    for path, increment in adapter.increments.items():
        weight = pipe.unet.get_submodule(path).weight.detach()
        gain = (increment.delta_for(weight).double() / weight.double()).numpy()
        np.testing.assert_allclose(gain, gain.mean(axis=1, keepdims=True) * np.ones_like(gain), rtol=1e-3, atol=1e-6)
    assert adapter.manifest.recipe["options"] == {"pace": 0.3, "memory": 0.5}
    assert adapter.manifest.recipe["method"] == "gains"
    assert Recipe.make(**adapter.manifest.recipe) == recipe
    after = pipe.unet.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before), "the base is as it was"


@pytest.mark.usefixtures("installed")
def test_its_own_keys_are_set_printed_and_read_like_ours(tmp_path: Path) -> None:
    recipe = Recipe.plan(None, ["options.pace=0.7"], target="snoopy", method="gains")
    assert recipe.model_dump()["options"] == {"pace": 0.7, "memory": 0.5}
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert "pace: 0.7" in recipe.to_yaml()
    assert "memory" not in recipe.to_yaml(), "only what differs"
    assert Recipe.plan(tmp_path / "recipe.yaml") == recipe
    assert recipe.with_set("options.memory=0").model_dump()["options"] == {"pace": 0.7, "memory": 0.0}


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"options": {"pase": 1}}, "^recipe key options.pase is unknown; did you mean pace"),
        ({"options": {"pace": 0}}, "^recipe key options.pace: Input should be greater than 0 .got '0'."),
        ({"options": 3}, "^recipe key options"),
        ({"method": "half", "options": {"share": 2}}, "^recipe key options.share: .*less than or equal to 1"),
        ({"method": "spm", "options": {"pace": 1}}, "method 'spm' has no options"),
        ({"steps": 5}, "^recipe: method 'gains' takes steps in pairs: steps 5 is odd, 6 is not"),
        ({"x_t": {"steps": 3}}, "x_t.steps 3 would change nothing: method 'gains' does not read it; it draws its own"),
        (
            {"method": "half", "steps": 3},
            "steps 3 would change nothing: method 'half' does not read it. Leave it at 300",
        ),
        ({"method": "gans"}, "did you mean gains"),
    ],
)
def test_it_refuses_what_it_does_not_know(values: dict[str, Any], words: str) -> None:
    base = {"target": "snoopy"} if "method" in values else {"target": "snoopy", "method": "gains"}
    with pytest.raises(RecipeError, match=words):
        Recipe.make(**{**base, **values})


@pytest.mark.usefixtures("installed")
def test_its_own_check_of_the_model_is_asked_before_weights_are_read(tmp_path: Path) -> None:
    for family in ("sd1", "flux-schnell"):
        family_pipeline(family).save_pretrained(tmp_path / family)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    check_before_loading(Recipe.make(**PAIR), tmp_path / "sd1")
    with pytest.raises(RecipeError, match="'gains' needs cross-attention"):
        check_before_loading(Recipe.make(**PAIR), tmp_path / "flux-schnell")


@pytest.mark.usefixtures("installed")
def test_they_are_listed_and_appear_in_the_help(spmhub: test_cli.Spmhub) -> None:
    listed = {one["name"]: one for one in json.loads(spmhub("methods", "--json").out)}
    assert listed["gains"].items() >= {"title": "Gains", "plugin": True, "keys": ["batch_size", "steps"]}.items()
    assert listed["gains"]["options"] == ["pace", "memory"]
    assert listed["half"]["summary"] == "Halves keys and values of the concept: for tests."
    shown = spmhub("methods").out
    assert "gains: Gains (nobody's)" in shown
    assert "Trains a gain for every output: for tests." in shown
    said = "".join(spmhub("train", "--help").out.replace("│", " ").split())
    assert "uce,gains,half." in said


def killed(site: Path, folder: Path) -> None:
    """Dies after step 5 without a chance to tidy up; its last checkpoint is that of step 4."""

    def die(step: int, total: int, losses: dict[str, float]) -> None:
        if step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.path.insert(0, str(site))
    train(Recipe.make(**PAIR), pipe=pico_pipeline(), checkpoint_dir=folder, checkpoint_every=2, progress=die)


def whole_and_resumed(site: Path, folder: Path) -> None:
    sys.path.insert(0, str(site))
    steps: list[int] = []
    train(Recipe.make(**PAIR), pipe=pico_pipeline()).save(folder / "whole.safetensors")
    train(
        Recipe.make(**PAIR), pipe=pico_pipeline(), checkpoint_dir=folder, resume=True,
        progress=lambda step, total, losses: steps.append(step),
    ).save(folder / "resumed.safetensors")  # fmt: skip
    assert steps == [5, 6]


def test_its_loop_killed_and_resumed_gives_the_identical_file(site: Path, tmp_path: Path) -> None:
    context = fork_server()
    first = context.Process(target=killed, args=(site, tmp_path))
    first.start()
    first.join(120)
    assert first.exitcode == -signal.SIGKILL
    assert (tmp_path / "training.safetensors").is_file()
    second = context.Process(target=whole_and_resumed, args=(site, tmp_path))
    second.start()
    second.join(120)
    assert second.exitcode == 0
    assert (tmp_path / "resumed.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()

"""The script for A1111 and Forge: with stand-ins for the web UI, or with Forge's own parsing where a checkout is named.

SPMHUB_FORGE=/path/to/stable-diffusion-webui-forge pytest tests/integrations/test_webui.py
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import types
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from test_comfyui import eraser
from torch import Tensor

from spm_hub.attachment.gates import bank
from spm_hub.errors import UsageError

FORGE = os.environ.get("SPMHUB_FORGE", "")
SCRIPT = Path(__file__).resolve().parents[2] / "integrations" / "webui" / "scripts" / "spm_hub_erasers.py"


class Params:
    """As `modules.extra_networks.ExtraNetworkParams`."""

    def __init__(self, items: list[str]) -> None:
        self.positional = [item for item in items if "=" not in item]
        self.named = dict(item.split("=") for item in items if "=" in item)


def parse_prompts(prompts: list[str]) -> tuple[list[str], Any]:
    found = defaultdict(list)
    for name, given in re.findall(r"<(\w+):([^>]+)>", prompts[0]):
        found[name].append(Params(given.split(":")))
    return [re.sub(r"<\w+:[^>]+>", "", prompt) for prompt in prompts], found


def parse_prompt_attention(text: str) -> list[list[Any]]:
    """As the web UI's, for weights that are not nested."""
    parts = re.split(r"(?<!\\)\((.*?)(?::[\d.]+)?(?<!\\)\)", text)
    return [[re.sub(r"\\(.)", r"\1", part), 1.0] for part in parts if part]


class Conditioning(list[str]):
    """As `modules.prompt_parser.SdConditioning`."""

    def __init__(self, prompts: list[str], width: int, height: int) -> None:
        super().__init__(prompts)
        self.width, self.height = width, height


class Anything:
    """Gradio's components and their events."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **given: Anything()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *args: object) -> None: ...


class Model:
    """A model that encodes each text into numbers of its letters."""

    def __init__(self) -> None:
        self.sizes: set[tuple[int, int]] = set()

    def get_learned_conditioning(self, given: Any) -> dict[str, Tensor]:
        self.sizes.add((given.width, given.height))
        texts = [
            "".join(part for part, _ in sys.modules["modules.prompt_parser"].parse_prompt_attention(one))
            for one in given
        ]
        letters = [[[len(text), ord(text[at : at + 1] or " "), at + 1] for at in range(6)] for text in texts]
        return {"crossattn": torch.tensor(letters, dtype=torch.float32), "vector": torch.zeros(len(texts), 1)}


@dataclass
class Processing:
    """A picture in the making, as `modules.processing` has it; its parsing is Forge's, word for word of one line."""

    prompts: list[str]
    hr_prompts: list[str] = field(default_factory=list)
    enable_hr: bool = False
    sd_model: Any = None
    width: int = 512
    height: int = 768
    extra_generation_params: dict[str, Any] = field(default_factory=dict)
    comments: list[str] = field(default_factory=list)
    extra_network_data: Any = None
    hr_extra_network_data: Any = None

    def comment(self, text: str) -> None:
        self.comments.append(text)

    def parse_extra_network_prompts(self) -> None:
        parse = sys.modules["modules.extra_networks"].parse_prompts
        self.prompts, self.extra_network_data = parse(self.prompts)
        if self.enable_hr:
            self.hr_prompts, self.hr_extra_network_data = parse(self.hr_prompts)


class AxisOption:
    def __init__(self, label: str, kind: type, apply: Any, choices: Any = None) -> None:
        self.label, self.kind, self.apply, self.choices = label, kind, apply, choices


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("Lora")
    for name in ("snoopy", "van gogh"):
        eraser(name, strength=1.0 if name == "snoopy" else 0.5).save(folder / f"{name}.safetensors")
    eraser(None).save(folder / "other.safetensors")
    (folder / "broken.safetensors").write_bytes(b"no eraser")
    callbacks: list[Any] = []
    grid = types.SimpleNamespace(axis_options=[AxisOption("Seed", int, None)], AxisOption=AxisOption)
    data = [types.SimpleNamespace(path="scripts/xyz_grid.py", module=grid)]
    content: dict[str, dict[str, Any]] = {
        "gradio": dict.fromkeys(("Accordion", "Dropdown", "Button", "Slider", "Radio"), Anything),
        "modules": {},
        "modules.shared": {
            "cmd_opts": types.SimpleNamespace(lora_dir=str(folder)),
            "opts": types.SimpleNamespace(
                CLIP_stop_at_last_layers=1, sd_lora="None", lora_add_hashes_to_infotext=False,
            ),
        },
        "modules.scripts": {"Script": object, "AlwaysVisible": object(), "scripts_data": data},
        "modules.script_callbacks": {"on_before_ui": callbacks.append},
        "modules.errors": {"display": lambda error, task: None},
        "modules.extra_networks": {"ExtraNetworkParams": Params, "parse_prompts": parse_prompts},
        "modules.prompt_parser": {
            "parse_prompt_attention": parse_prompt_attention, "SdConditioning": Conditioning,
        },
    }  # fmt: skip
    before = {name: sys.modules.get(name) for name in content}
    for name, values in content.items():
        real = Path(FORGE, *name.split(".")).with_suffix(".py")
        if FORGE and name in ("modules.extra_networks", "modules.prompt_parser"):
            module = load(name, real)
        else:
            module = types.ModuleType(name)
            vars(module).update({key: value() if value is Anything else value for key, value in values.items()})
            if name == "gradio":
                vars(module).update({key: lambda *args, **given: Anything() for key in values})
        sys.modules[name] = module
        if "." in name:
            setattr(sys.modules["modules"], name.rpartition(".")[2], module)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
            patch.setattr(bank, "_LEAST", 96)
            patch.setattr(bank, "_MOST", 96)
            module = load("spm_hub_erasers", SCRIPT)
            for callback in callbacks * 2:
                callback()
            module.grid = grid
            yield module
    finally:
        for name, old in before.items():
            if old is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = old


def load(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def run(
    script: Any, p: Processing, names: list[str], strength: float = 1.0, gate: str = "", threshold: float = 0.0
) -> Any:
    script.Erasers().process(p, names, strength, gate or script.OWN, threshold)
    p.parse_extra_network_prompts()
    return weights(p.extra_network_data)


def weights(data: Any) -> dict[str, tuple[str, str]]:
    return {one.positional[0]: (one.named.get("te"), one.named.get("unet")) for one in data["lora"]}


def test_weights_follow_the_gates_of_each_prompt(script: Any) -> None:
    assert script.choices() == ["snoopy", "van gogh"]
    both, model = ["snoopy", "van gogh"], Model()
    p = Processing(["(snoopy:1.3) at sea <lora:detail:0.5>"], sd_model=model)
    assert run(script, p, both) == {"detail": (None, None), "snoopy": ("0", "1")}
    assert p.prompts == ["(snoopy:1.3) at sea "], "the text that is drawn stays as it is"
    assert p.extra_generation_params["Erasers"] == "snoopy 1, van gogh 0"
    assert model.sizes == {(512, 768)}
    assert run(script, Processing(["a dog"], sd_model=model), both) == {}
    assert run(script, Processing(["by van gogh"], sd_model=model), both, 1.5) == {"van gogh": ("0", "0.75")}
    assert run(script, Processing(["a dog"], sd_model=model), both, gate="always") == {
        "snoopy": ("0", "1"), "van gogh": ("0", "0.5"),
    }  # fmt: skip
    without = Processing(["snoopy"], sd_model=model)
    assert run(script, without, []) == {}
    assert without.extra_generation_params == {}


def test_a_second_pass_has_gates_of_its_own(script: Any) -> None:
    p = Processing(["a dog"], ["snoopy"], enable_hr=True, sd_model=Model())
    assert run(script, p, ["snoopy"]) == {}
    assert weights(p.hr_extra_network_data) == {"snoopy": ("0", "1")}


def test_a_batch_of_several_prompts_is_never_less_erased(script: Any) -> None:
    p = Processing(["a dog", "snoopy"], sd_model=Model())
    assert run(script, p, ["snoopy"]) == {"snoopy": ("0", "1")}
    assert len(p.comments) == 1
    alike = Processing(["snoopy"] * 2, sd_model=Model())
    run(script, alike, ["snoopy"])
    assert alike.comments == []


def test_an_eraser_that_is_not_there_is_an_error(script: Any) -> None:
    with pytest.raises(UsageError, match="there is no eraser 'mickey'"):
        run(script, Processing(["a dog"], sd_model=Model()), ["mickey"])


def test_axes_of_the_grid_change_the_next_pictures(script: Any) -> None:
    axes = {one.label: one for one in script.grid.axis_options}
    assert [label for label in axes if "[Erasers]" in label] == [
        "[Erasers] Strength", "[Erasers] Gate", "[Erasers] Names, with +, or none",
    ]  # fmt: skip
    p = Processing(["snoopy"], sd_model=Model())
    axes["[Erasers] Strength"].apply(p, 0.25, [])
    assert run(script, p, ["snoopy"]) == {"snoopy": ("0", "0.25")}
    for value, expected in (("none", {}), ("van gogh + snoopy", {"snoopy": ("0", "1")})):
        p = Processing(["snoopy"], sd_model=Model())
        axes["[Erasers] Names, with +, or none"].apply(p, value, [])
        assert run(script, p, ["van gogh"]) == expected


def test_the_panel_reads_the_infotext_back(script: Any) -> None:
    panel = script.Erasers()
    assert len(panel.ui(False)) == 4
    (_, read), *others = panel.infotext_fields
    assert read({"Erasers": "snoopy 1, van gogh 0.5"}) == ["snoopy", "van gogh"]
    assert read({}) == []
    assert [name for _, name in others] == ["Eraser strength", "Eraser gate", "Eraser threshold"]


@pytest.mark.skipif(not FORGE, reason="SPMHUB_FORGE names no checkout of stable-diffusion-webui-forge")
def test_forge_loads_the_networks_with_these_weights(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Any] = []
    networks = types.ModuleType("networks")
    vars(networks).update(available_networks={}, loaded_networks=[], load_networks=lambda *given: loaded.append(given))
    monkeypatch.setitem(sys.modules, "networks", networks)
    lora = load("extra_networks_lora", Path(FORGE, "extensions-builtin", "sd_forge_lora", "extra_networks_lora.py"))
    real = sys.modules["modules.extra_networks"]
    real.initialize()
    real.register_extra_network(lora.ExtraNetworkLora())
    p: Any = Processing(["a ((snoopy)) [at sea:by van gogh:0.5] <lora:detail:0.5>"], sd_model=Model())
    p.scripts = None
    run(script, p, ["snoopy", "van gogh"], strength=0.8)
    real.activate(p, p.extra_network_data)
    assert loaded == [(["detail", "snoopy", "van gogh"], [0.5, 0.0, 0.0], [0.5, 0.8, 0.4], [None] * 3)]

"""Erasers for A1111 and Forge: their LoRA weights are set for each prompt by the gates of spm-hub."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from modules import extra_networks, prompt_parser, script_callbacks, scripts, shared

import spm_hub
from spm_hub.adapters.adapter import load_file
from spm_hub.adapters.manifest import factor_of
from spm_hub.errors import SpmHubError, UsageError

OWN = "the eraser's own"
GATES = [OWN, "calibrated", "transport", "always"]
_ENGINES = (
    "text_processing_engine", "text_processing_engine_l", "text_processing_engine_g", "text_processing_engine_t5",
)  # fmt: skip
"""Forge's text encoders, in the order of their pipelines."""

_choices: dict[str, tuple[int, spm_hub.Adapter]] = {}
"""The erasers in the folder of LoRAs by the name of their file, and when the file was written."""


def choices() -> list[str]:
    """Return the files in the folder of LoRAs that say which concept they erase, without their ending."""
    folder = Path(shared.cmd_opts.lora_dir)
    found = {path.stem: path for path in sorted(folder.rglob("*.safetensors"))}
    for name, path in found.items():
        written = path.stat().st_mtime_ns
        if name in _choices and _choices[name][0] == written:
            continue
        try:
            _choices[name] = written, load_file(path, lazy=True)
        except SpmHubError:  # another program's file: the web UI loads it as it is
            _choices.pop(name, None)
    for name in _choices.keys() - found.keys():
        del _choices[name]
    return [name for name, (_, adapter) in _choices.items() if adapter.manifest.concept.target is not None]


def plain_text(prompt: str) -> str:
    """Return a prompt without the weights of its words, by the web UI's own rules: (snoopy:1.3) is snoopy."""
    parts = prompt_parser.parse_prompt_attention(prompt)
    return " ".join("".join(" " if weight == -1 else text for text, weight in parts).replace(" AND ", ", ").split())


class _Encoder:
    """Encodes texts with the model and at the size of the picture in progress."""

    p: Any = None

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        escaped = ["".join(f"\\{letter}" if letter in "()[]\\" else letter for letter in text) for text in texts]
        given = prompt_parser.SdConditioning(escaped, width=self.p.width, height=self.p.height)
        found = self.p.sd_model.get_learned_conditioning(given)
        states: torch.Tensor = found["crossattn"] if isinstance(found, dict) else found
        return states


class Gating:
    """The gates of some erasers under the loaded model; those used last stay calibrated."""

    def __init__(self) -> None:
        self._key: tuple[object, ...] = ()
        self._encoder = _Encoder()
        self._gates: spm_hub.TextGates | None = None

    def ask(self, p: Any, names: Sequence[str], gate: str, threshold: float, texts: Sequence[str]) -> dict[str, float]:
        """Return the gamma of each eraser, by the name of its file, for a batch of prompts: the greatest of any.

        Raises UsageError for an eraser that is not in the folder of LoRAs.
        """
        present = choices()
        if lost := [name for name in names if name not in present]:
            raise UsageError(
                f"there is no eraser {lost[0]!r} in {shared.cmd_opts.lora_dir}",
                mend=f"spmhub convert {lost[0]} --to webui, and put the file there",
            )
        adapters = {name: _choices[name][1] for name in names}
        skip = getattr(shared.opts, "CLIP_stop_at_last_layers", 1)
        key = (weakref.ref(p.sd_model), skip, gate, threshold, tuple(map(id, adapters.values())))
        if self._gates is None or key != self._key:
            self._gates = spm_hub.TextGates(
                adapters.values(), self._encoder, tokenizers_of(p.sd_model), gate=None if gate == OWN else gate,
                threshold=threshold or None, progress=False,
            )  # fmt: skip
            self._key = key
        self._encoder.p = p
        try:
            with torch.no_grad():
                found = [self._gates.gates(text) for text in dict.fromkeys(map(plain_text, texts))]
        finally:
            self._encoder.p = None
        return {file: max(one[adapter.name] for one in found) for file, adapter in adapters.items()}


def tokenizers_of(model: Any) -> list[Any]:
    """Return the tokenizers of transformers behind a model of Forge or A1111."""
    engines = [getattr(model, name, None) for name in _ENGINES]
    conditioner = getattr(model, "cond_stage_model", None)
    found = [*engines, *(getattr(conditioner, "embedders", None) or [conditioner])]
    each = [getattr(one, "tokenizer", None) for one in found]
    return [one for one in each if hasattr(one, "get_vocab") and hasattr(one, "all_special_ids")][:4]


def networks_for(names: Sequence[str], gammas: Mapping[str, float], strength: float) -> list[Any]:
    """Return what `<lora:NAME:te=0:unet=WEIGHT>` in a prompt would be, for the erasers that act."""
    gates = {name: _choices[name][1].manifest.gate for name in names}
    weights = {name: factor_of(one.law, gammas[name], strength * one.strength) for name, one in gates.items()}
    return [
        extra_networks.ExtraNetworkParams(items=[name, "te=0", f"unet={weight:.6g}"])
        for name, weight in weights.items()
        if weight
    ]


class Erasers(scripts.Script):
    """The panel, and what happens before each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.gating = Gating()

    def title(self) -> str:
        """Return the name of the panel."""
        return "Erasers (spm-hub)"

    def show(self, is_img2img: bool) -> Any:
        """Show the panel at all times, in both tabs."""
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        """Make the panel; return its controls in the order of `process`."""
        with gr.Accordion("Erasers (spm-hub)", open=False):
            names = gr.Dropdown(label="Erasers in the folder of LoRAs", choices=choices(), multiselect=True, value=[])
            refresh = gr.Button("Refresh")
            strength = gr.Slider(label="Strength", minimum=-2.0, maximum=3.0, step=0.05, value=1.0)
            gate = gr.Radio(label="Gate", choices=GATES, value=OWN)
            threshold = gr.Slider(label="Least gamma that acts", minimum=0.0, maximum=1.0, step=0.01, value=0.0)
        refresh.click(fn=lambda: gr.update(choices=choices()), inputs=[], outputs=[names])
        self.infotext_fields = [
            (names, lambda read: [part.rpartition(" ")[0] for part in read.get("Erasers", "").split(", ") if part]),
            (strength, "Eraser strength"),
            (gate, "Eraser gate"),
            (threshold, "Eraser threshold"),
        ]
        return [names, strength, gate, threshold]

    def process(self, p: Any, names: Sequence[str], strength: float, gate: str, threshold: float) -> None:
        """Have the networks of every batch set by the gates of its prompts, those of the second pass too."""
        names = getattr(p, "spm_erasers", names) or []
        strength, gate = getattr(p, "spm_strength", strength), getattr(p, "spm_gate", gate)
        if not names:
            return
        parse = type(p).parse_extra_network_prompts

        def parse_and_gate() -> Any:
            result = parse(p)
            gammas = self.gating.ask(p, names, gate, threshold, p.prompts)
            p.extra_network_data["lora"] += networks_for(names, gammas, strength)
            if getattr(p, "enable_hr", False):
                second = self.gating.ask(p, names, gate, threshold, p.hr_prompts)
                p.hr_extra_network_data["lora"] += networks_for(names, second, strength)
            if len(set(p.prompts)) > 1:
                p.comment("Erasers: the prompts of a batch share their networks; the greatest gamma of any acts on all")
            p.extra_generation_params["Erasers"] = ", ".join(f"{name} {gammas[name]:.4g}" for name in names)
            return result

        p.parse_extra_network_prompts = parse_and_gate
        p.extra_generation_params |= {
            "Eraser strength": strength, "Eraser gate": None if gate == OWN else gate,
            "Eraser threshold": threshold or None,
        }  # fmt: skip


def add_axes() -> None:
    """Add the axes of X/Y/Z plot."""
    for data in scripts.scripts_data:
        module = data.module
        if Path(data.path).name != "xyz_grid.py" or any("[Erasers]" in one.label for one in module.axis_options):
            continue

        def put(field: str, read: Any = lambda value: value) -> Any:
            return lambda p, value, every: setattr(p, field, read(value))

        module.axis_options += [
            module.AxisOption("[Erasers] Strength", float, put("spm_strength")),
            module.AxisOption("[Erasers] Gate", str, put("spm_gate"), choices=lambda: GATES),
            module.AxisOption("[Erasers] Names, with +, or none", str, put("spm_erasers", names_in)),
        ]


def names_in(value: str) -> list[str]:
    """Return the names in a value of the axis: snoopy+mickey, or none."""
    return [] if value.strip() == "none" else [name.strip() for name in value.split("+") if name.strip()]


script_callbacks.on_before_ui(add_axes)

"""The nodes: load or make erasers, gate prompts by them, see the gates, and take an eraser away again."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import numpy
import torch
from comfy_api.latest import ComfyExtension, io, ui

import spm_hub
from spm_hub.adapters.lookup import find_name
from spm_hub.errors import NotFoundError, RegistryError, UsageError
from spm_hub.registry.registry import registries

from .gating import Chosen, Gates, Settings, hooks_of, with_hooks
from .instant import make_eraser

CATEGORY = "erasers"
Erasers = io.Custom("SPM_ERASERS")

FOLDER = "spm_erasers"
folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))

_OTHER = "(see reference)"
_OWN = "the eraser's own"
_GATES = (_OWN, "calibrated", "transport", "always")
_ROWS = (_OWN, "both", "conditional")
_KINDS = ("other", "object", "character", "person", "style", "nsfw")

_gates = Gates()


def choices() -> list[str]:
    """Return the names of the erasers at hand: of the registries, then the files in models/spm_erasers."""
    names: dict[str, None] = {}
    with suppress(RegistryError):  # Load Eraser says what is wrong with it
        names = dict.fromkeys(entry.name for registry in registries() for entry in registry.entries())
    return [_OTHER, *names, *folder_paths.get_filename_list(FOLDER)]


def load(choice: str, reference: str) -> spm_hub.Adapter:
    """Load an eraser by its name in the list, or by a reference. Raises SpmHubError."""
    named = reference.strip() or (choice if choice != _OTHER else "")
    if not named:
        raise UsageError(
            "no eraser is chosen", mend="choose one in the list, or write a file, a name or owner/name into reference"
        )
    path = folder_paths.get_full_path(FOLDER, named) if not reference.strip() else None
    return spm_hub.load(path or named, lazy=True)


def check_new(adapter: spm_hub.Adapter, chain: tuple[Chosen, ...]) -> None:
    """Raise UsageError if an eraser of this name is in a chain."""
    if adapter.name in {one.adapter.name for one in chain}:
        raise UsageError(f"{adapter.name} is in this chain already", mend="load it once, with another strength")


def eraser_file(name: str) -> str:
    """Return the path of a new file in models/spm_erasers. Raises UsageError for a name that leaves that folder."""
    if os.path.basename(name) != name or name.startswith("."):
        raise UsageError(f"save_as {name!r} is no name of a file", mend="letters, digits and hyphens, without a folder")
    folder = os.path.join(folder_paths.models_dir, FOLDER)
    os.makedirs(folder, exist_ok=True)
    return os.path.join(folder, name.removesuffix(".safetensors") + ".safetensors")


def inform(done: int, every: int, figures: Mapping[str, float]) -> None:
    """Show how many sentences a gate has encoded; Cancel ends it."""
    comfy.model_management.throw_exception_if_processing_interrupted()
    comfy.utils.ProgressBar(every).update_absolute(done, every)


def tell(node: type[io.ComfyNode], text: str) -> None:
    """Show a text below the node that is running, if ComfyUI's server runs it."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is not None and node.hidden is not None:
        server.send_progress_text(text, node.hidden.unique_id)


def gate_inputs() -> list[Any]:
    """Return the inputs that say how erasers are gated."""
    return [
        io.Combo.Input(
            "gate", options=list(_GATES), default=_OWN, optional=True,
            tooltip="calibrated: 0 on prompts that do not concern the concept. transport: as in the paper of SPM. "
            "always: fully on. An eraser of the gate 'evidence' is gated by the text alone.",
        ),
        io.Combo.Input(
            "rows", options=list(_ROWS), default=_OWN, optional=True,
            tooltip="both: the erasers act on the negative prompt too. conditional: on the prompt alone.",
        ),
        io.Float.Input(
            "threshold", default=0.0, min=0.0, max=1.0, step=0.01, optional=True,
            tooltip="The least gamma that acts; a smaller one counts as 0.",
        ),
    ]  # fmt: skip


def settings(gate: str, rows: str, threshold: float) -> Settings:
    """Return the settings of a node's inputs."""
    return Settings(None if gate == _OWN else gate, None if rows == _OWN else rows, threshold)


def gated(
    node: type[io.ComfyNode], clip: Any, erasers: tuple[Chosen, ...], text: str, asked: Settings, positive: Any,
    negative: Any,
) -> io.NodeOutput:  # fmt: skip
    """Return both conditionings with the hooks that the gates of a text give them, and the gates in words."""
    answer = _gates.ask(clip, erasers, text, asked, inform)
    tell(node, answer.report)
    hooks, of_negative = hooks_of(erasers, answer.gammas, asked.rows)
    return io.NodeOutput(
        with_hooks(positive, hooks),
        None if negative is None else with_hooks(negative, of_negative),
        answer.report,
        ui={"text": [answer.report], "gates": [dict(answer.gammas)]},
    )


class LoadEraser(io.ComfyNode):
    """Loads an eraser and adds it to a chain."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's inputs and outputs."""
        return io.Schema(
            node_id="SpmLoadEraser", display_name="Load Eraser", category=CATEGORY,
            description="Loads an eraser: its name in your registry (spmhub list), a file in models/spm_erasers, or a "
            "reference. Chain several.",
            inputs=[
                io.Combo.Input("eraser", options=choices(), default=_OTHER),
                io.String.Input(
                    "reference", default="", optional=True,
                    tooltip="Instead of the list: a path of a safetensors file, or owner/name[@revision] on the Hub.",
                ),
                io.Float.Input(
                    "strength", default=1.0, min=-10.0, max=10.0, step=0.05, optional=True,
                    tooltip="Multiplies gamma and the strength that the eraser's file states.",
                ),
                io.String.Input(
                    "concept", default="", optional=True,
                    tooltip="What it erases, if its file does not say so: any LoRA can be gated by a concept.",
                ),
                Erasers.Input("erasers", optional=True, tooltip="The erasers before this one."),
            ],
            outputs=[Erasers.Output("chain", display_name="erasers")],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, eraser: str, reference: str = "", **others: Any) -> str:
        """Return what changes when the file of that name does."""
        try:
            source = load(eraser, reference).source
            return f"{source} {os.stat(source).st_mtime_ns}"
        except (OSError, UsageError):
            return reference  # executing it says what is wrong

    @classmethod
    def execute(
        cls, eraser: str, reference: str = "", strength: float = 1.0, concept: str = "",
        erasers: tuple[Chosen, ...] = (),
    ) -> io.NodeOutput:  # fmt: skip
        """Return the chain with one more eraser."""
        adapter = load(eraser, reference)
        if adapter.manifest.increment.kind == "mask":
            raise UsageError(
                f"{adapter.name} is a mask, which ComfyUI cannot fold into weights",
                mend=f"spmhub convert {adapter.name} --model BASE --to comfyui",
            )
        check_new(adapter, erasers)
        if concept.strip():
            adapter = adapter.with_concept(concept)
        return io.NodeOutput((*erasers, Chosen(adapter, strength)))


class MakeEraser(io.ComfyNode):
    """Makes an eraser for a checkpoint and adds it to a chain."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's inputs and outputs."""
        return io.Schema(
            node_id="SpmMakeEraser", display_name="Make Eraser (Instant)", category=CATEGORY,
            hidden=[io.Hidden.unique_id],
            description="Makes an eraser for this checkpoint in seconds, without training: SD 1, SD 2, SDXL.",
            inputs=[
                io.Model.Input("model"),
                io.Clip.Input("clip"),
                io.String.Input("concept", tooltip="What is not to be drawn any more."),
                io.String.Input("aliases", default="", optional=True, tooltip="Its other names, with commas between."),
                io.String.Input(
                    "surrogate", default="", optional=True, tooltip="What is drawn in its place; empty: nothing of it."
                ),
                io.Combo.Input("kind", options=list(_KINDS), default="other", optional=True),
                io.Float.Input(
                    "reach", default=0.9, min=0.1, max=2.0, step=0.05, optional=True,
                    tooltip="How far keys and values of its sentences go to those of the surrogate.",
                ),
                io.Float.Input("strength", default=1.0, min=-10.0, max=10.0, step=0.05, optional=True),
                io.String.Input(
                    "save_as", default="", optional=True,
                    tooltip="A file name: keeps it in models/spm_erasers, for Load Eraser. Empty: not kept.",
                ),
                Erasers.Input("erasers", optional=True, tooltip="The erasers before this one."),
            ],
            outputs=[Erasers.Output("chain", display_name="erasers")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Any, clip: Any, concept: str, aliases: str = "", surrogate: str = "", kind: str = "other",
        reach: float = 0.9, strength: float = 1.0, save_as: str = "", erasers: tuple[Chosen, ...] = (),
    ) -> io.NodeOutput:  # fmt: skip
        """Return the chain with one more eraser."""
        others = tuple(name.strip() for name in aliases.split(",") if name.strip())
        adapter = make_eraser(
            model, clip, concept.strip(), aliases=others, surrogate=surrogate.strip(), kind=kind, reach=reach,
            inform=inform,
        )  # fmt: skip
        check_new(adapter, erasers)
        if save_as.strip():
            adapter.save(eraser_file(save_as.strip()))
        tell(cls, f"{adapter.name}: made on {len(adapter.increments)} modules")
        return io.NodeOutput((*erasers, Chosen(adapter, strength)))


class RecoverConcept(io.ComfyNode):
    """Takes an eraser out of a chain."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's inputs and outputs."""
        return io.Schema(
            node_id="SpmRecover", display_name="Recover (Eraser)", category=CATEGORY,
            description="Takes erasers out of a chain: their concepts are drawn again, the others stay as they are.",
            inputs=[
                Erasers.Input("erasers"),
                io.String.Input("names", default="", tooltip="Names of erasers, with commas between them."),
            ],
            outputs=[Erasers.Output("chain", display_name="erasers")],
        )  # fmt: skip

    @classmethod
    def execute(cls, erasers: tuple[Chosen, ...], names: str) -> io.NodeOutput:
        """Return the chain without the named erasers."""
        present = [one.adapter.name for one in erasers]
        taken = {find_name(name.strip(), present) for name in names.split(",") if name.strip()}
        if not taken:
            raise NotFoundError("no name is given", mend=f"one of these: {', '.join(present) or 'none is loaded'}")
        return io.NodeOutput(tuple(one for one in erasers if one.adapter.name not in taken))


class TextEncode(io.ComfyNode):
    """Encodes a prompt and a negative prompt, gated by erasers."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's inputs and outputs."""
        return io.Schema(
            node_id="SpmTextEncode", display_name="CLIP Text Encode (Erasers)", category=CATEGORY,
            hidden=[io.Hidden.unique_id],
            description="Encodes a prompt as CLIP Text Encode does. While it is sampled, each eraser acts on the model "
            "as strongly as its gate says for this prompt. The MODEL goes to the sampler as it is.",
            inputs=[
                io.Clip.Input("clip"),
                Erasers.Input("erasers"),
                io.String.Input("text", multiline=True, dynamic_prompts=True),
                io.String.Input("negative_text", multiline=True, dynamic_prompts=True, default="", optional=True),
                *gate_inputs(),
            ],
            outputs=[
                io.Conditioning.Output("positive", display_name="positive"),
                io.Conditioning.Output("negative", display_name="negative"),
                io.String.Output("gates", display_name="gates"),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, clip: Any, erasers: tuple[Chosen, ...], text: str, negative_text: str = "", gate: str = _OWN,
        rows: str = _OWN, threshold: float = 0.0,
    ) -> io.NodeOutput:  # fmt: skip
        """Return both conditionings with their hooks, and the gates in words."""
        if clip is None:
            raise UsageError("there is no CLIP: this checkpoint has no text encoder", mend="a node that loads a CLIP")
        positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(one)) for one in (text, negative_text))
        return gated(cls, clip, erasers, text, settings(gate, rows, threshold), positive, negative)


class GateConditioning(io.ComfyNode):
    """Gates conditionings that other nodes made."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's inputs and outputs."""
        return io.Schema(
            node_id="SpmGateConditioning", display_name="Gate Conditioning (Erasers)", category=CATEGORY,
            hidden=[io.Hidden.unique_id],
            description="Gates a conditioning of any node by its text: for FLUX and SD3's encoders, prompt nodes, "
            "ControlNet, regions. Several prompts combined: one such node for each of them, before they are combined.",
            inputs=[
                io.Conditioning.Input("conditioning"),
                io.Clip.Input("clip"),
                Erasers.Input("erasers"),
                io.String.Input("text", multiline=True, dynamic_prompts=True, tooltip="The text of the conditioning."),
                io.Conditioning.Input("negative_conditioning", optional=True),
                *gate_inputs(),
            ],
            outputs=[
                io.Conditioning.Output("positive", display_name="conditioning"),
                io.Conditioning.Output("negative", display_name="negative"),
                io.String.Output("gates", display_name="gates"),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, conditioning: Any, clip: Any, erasers: tuple[Chosen, ...], text: str, negative_conditioning: Any = None,
        gate: str = _OWN, rows: str = _OWN, threshold: float = 0.0,
    ) -> io.NodeOutput:  # fmt: skip
        """Return the conditionings with their hooks, and the gates in words."""
        return gated(cls, clip, erasers, text, settings(gate, rows, threshold), conditioning, negative_conditioning)


class PreviewGates(io.ComfyNode):
    """Draws the gates of several prompts as a heat map."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's inputs and outputs."""
        return io.Schema(
            node_id="SpmPreviewGates", display_name="Preview Gates (Erasers)", category=CATEGORY, is_output_node=True,
            description="Shows how strongly each eraser acts on each line of the prompts, without drawing a picture.",
            inputs=[
                io.Clip.Input("clip"),
                Erasers.Input("erasers"),
                io.String.Input("prompts", multiline=True, tooltip="One prompt in each line."),
                *[one for one in gate_inputs() if one.id != "rows"],
            ],
            outputs=[
                io.Image.Output("picture", display_name="heat map"),
                io.String.Output("gates", display_name="gates"),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, clip: Any, erasers: tuple[Chosen, ...], prompts: str, gate: str = _OWN, threshold: float = 0.0
    ) -> io.NodeOutput:
        """Return the heat map, and the gates in words."""
        from spm_hub.evaluation.heat_map import draw_heat_map

        lines = [line.strip() for line in prompts.splitlines() if line.strip()]
        if not lines or not erasers:
            raise UsageError("there is nothing to show: it takes a prompt and an eraser at least")
        answers = [_gates.ask(clip, erasers, line, settings(gate, _OWN, threshold), inform) for line in lines]
        names = [one.adapter.name for one in erasers]
        picture = draw_heat_map([[answer.gammas[name] for name in names] for answer in answers], lines, names)
        image = torch.from_numpy(numpy.asarray(picture, dtype=numpy.float32) / 255)[None]
        report = "\n\n".join(f"{line}\n{answer.report}" for line, answer in zip(lines, answers, strict=True))
        shown = ui.PreviewImage(image, cls=cls).as_dict()
        return io.NodeOutput(image, report, ui={**shown, "gates": [dict(answer.gammas) for answer in answers]})


class Extension(ComfyExtension):
    """The nodes, as ComfyUI asks for them."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the nodes."""
        return [LoadEraser, MakeEraser, RecoverConcept, TextEncode, GateConditioning, PreviewGates]


async def comfy_entrypoint() -> ComfyExtension:
    """Return the extension."""
    return Extension()

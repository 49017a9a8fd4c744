"""For tests: the sketchbook as ComfyUI's own U-Net, ModelPatcher and CLIP, in a node that loads it.

Its picture decoder stays diffusers'. The folder is linked into ComfyUI's `custom_nodes`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.supported_models
import comfy.supported_models_base
import torch
from comfy import sd1_clip
from comfy_api.latest import ComfyExtension, io
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ldm import unet_to_ldm

import spm_hub

BASE = Path(spm_hub.__file__).parent / "sketchbook" / "weights" / "base"
SCALING: float = json.loads((BASE / "vae" / "config.json").read_text())["scaling_factor"]
TEXT: dict[str, Any] = json.loads((BASE / "text_encoder" / "config.json").read_text())


class Latents(comfy.latent_formats.SD15):
    scale_factor = SCALING


class SketchbookModel(comfy.supported_models.SD15):
    latent_format = Latents
    unet_extra_config = {"num_heads": 4, "num_head_channels": -1}  # noqa: RUF012 (as in ComfyUI's classes)


def denoiser() -> comfy.model_patcher.ModelPatcher:
    """The sketchbook's weights in ComfyUI's own U-Net."""
    config = SketchbookModel(
        {
            "image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 64, "num_res_blocks": [1, 1, 1],
            "channel_mult": (1, 2, 3), "use_spatial_transformer": True, "context_dim": TEXT["hidden_size"],
            "transformer_depth": [1, 1, 0], "transformer_depth_output": [1, 1, 1, 1, 0, 0],
            "transformer_depth_middle": 1, "use_linear_in_transformer": False, "legacy": False,
        }
    )  # fmt: skip
    config.set_inference_dtype(torch.float32, None)
    unet = UNet2DConditionModel.from_pretrained(BASE / "unet", torch_dtype=torch.float32)
    model = comfy.model_base.BaseModel(config)
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.num_groups = unet.config.norm_num_groups
    state = {key.removeprefix("model.diffusion_model."): value for key, value in unet_to_ldm(unet).items()}
    model.diffusion_model.load_state_dict(state)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model.eval(), load_device=cpu, offload_device=cpu)


class Tokens(sd1_clip.SDTokenizer):
    def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
        super().__init__(
            str(BASE / "tokenizer"), max_length=TEXT["max_position_embeddings"], embedding_size=TEXT["hidden_size"]
        )


class Tokenizer(sd1_clip.SD1Tokenizer):
    def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
        super().__init__(embedding_directory, tokenizer_data or {}, tokenizer=Tokens)


class Words(sd1_clip.SDClipModel):
    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
        super().__init__(
            device=device, dtype=dtype, max_length=TEXT["max_position_embeddings"], textmodel_json_config=dict(TEXT),
            special_tokens={"start": TEXT["bos_token_id"], "end": TEXT["eos_token_id"], "pad": TEXT["pad_token_id"]},
            return_projected_pooled=False, model_options=model_options or {},
        )  # fmt: skip
        embeddings = self.transformer.text_model.embeddings
        embeddings.token_embedding = comfy.ops.manual_cast.Embedding(TEXT["vocab_size"], TEXT["hidden_size"])


class Clip(sd1_clip.SD1ClipModel):
    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
        super().__init__(device=device, dtype=dtype, model_options=model_options or {}, clip_model=Words)


def text_encoder() -> comfy.sd.CLIP:
    """The sketchbook's text encoder as ComfyUI's CLIP."""
    clip = comfy.sd.CLIP(
        comfy.supported_models_base.ClipTarget(Tokenizer, Clip), model_options={"dtype": torch.float32}
    )
    weights = {key: value.float() for key, value in load_file(BASE / "text_encoder" / "model.safetensors").items()}
    if not any(key.startswith("text_model.") for key in weights):
        weights = {f"text_model.{key}": value for key, value in weights.items()}
    missing, unexpected = clip.cond_stage_model.clip_l.transformer.load_state_dict(weights, strict=False)
    assert not [key for key in missing if "text_projection" not in key], missing
    assert not [key for key in unexpected if "position_ids" not in key], unexpected
    return clip


class Pictures:
    """What VAE Decode asks of a VAE."""

    def __init__(self) -> None:
        self._vae = AutoencoderKL.from_pretrained(BASE / "vae", torch_dtype=torch.float32)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        pictures: torch.Tensor = self._vae.decode(latents).sample
        return (pictures / 2 + 0.5).clamp(0, 1).movedim(1, -1)


class SketchbookLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpmTestsSketchbook",
            category="tests",
            inputs=[],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(denoiser(), text_encoder(), Pictures())


class Extension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [SketchbookLoader]


async def comfy_entrypoint() -> ComfyExtension:
    return Extension()

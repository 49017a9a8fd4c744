"""Finds a pipeline's denoiser and family, and the modules that erasers may change."""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from spm_hub.errors import CompatibilityError
from spm_hub.plugins import plugins


@dataclass(frozen=True)
class Family:
    """All facts about one family of models; a new family is one more entry in `FAMILIES`, or a plug-in.

    denoiser: the pipeline's attribute that holds the denoiser.  classes: names of that denoiser's class or of one that
    it derives from.  blocks: names of the classes inside which every Linear and Conv2d is a target, norms and
    modulations excepted; none if they have to be found by their structure (`attention_blocks`).
    recognises: returns True for the configuration of a denoiser of this family.  distilled: True if guidance is already
    in the weights, so that classifier-free guidance would overshoot.  few_steps: returns True, by its configuration,
    for a denoiser that was distilled to draw in at most `FEW_STEPS` steps.
    """

    name: str
    denoiser: str
    classes: tuple[str, ...]
    blocks: tuple[str, ...]
    recognises: Callable[[Mapping[str, Any]], bool] = lambda config: True
    distilled: bool = False
    few_steps: Callable[[Mapping[str, Any]], bool] = lambda config: False


FEW_STEPS = 4
"""Steps that step-distilled models (FLUX.1 schnell) are made for."""

# These see the timestep and the pooled text, one vector for the whole picture, never a token: an erasure there affects
# every prompt. The same layers of SD's U-Nets (time_emb_proj) are in the resnets and were never a target. They
# are also the widest layers of an MMDiT: without them an eraser of FLUX is a quarter smaller.
_MODULATION = re.compile(r"(.*\.)?(norm\w*|\w*_norm|adaln\w*|\w*_mod|mod|\w*modulation\w*)(\..*)?")
# to_q, to_query, to_qkv, to_qkv_mlp_proj, q_proj, qkv, query
# The modules inside the blocks of named families, by their paths: Transformer2DModel, and the blocks of an MMDiT.
_IN_BLOCKS = re.compile(r"(\w+_blocks?\.(\d+\.)?attentions\.\d+|(single_)?transformer_blocks\.\d+)\.")
_QUERIES = re.compile(r"(to_)?q(uery|kv\w*)?(_proj)?")
_UNET = ("UNet2DConditionModel",)
GENERIC = "generic"
# DiT families: attention projections of image and text (to_*, add_*_proj, to_add_out), both feed-forwards, and
# proj_mlp and proj_out of the single blocks.
FAMILIES: tuple[Family, ...] = (
    Family(
        # SD1 projects with 1x1 convolutions where SD2 has Linear layers.
        "sd1", "unet", _UNET, ("Transformer2DModel",),
        lambda config: not config.get("use_linear_projection") and config.get("addition_embed_type") is None,
    ),
    Family(
        "sd2", "unet", _UNET, ("Transformer2DModel",),
        lambda config: bool(config.get("use_linear_projection")) and config.get("addition_embed_type") is None,
    ),
    Family(
        "sdxl", "unet", _UNET, ("Transformer2DModel",),
        lambda config: config.get("addition_embed_type") == "text_time",
    ),
    Family("sd3", "transformer", ("SD3Transformer2DModel",), ("JointTransformerBlock",)),
    Family(
        "flux", "transformer", ("FluxTransformer2DModel",), ("FluxTransformerBlock", "FluxSingleTransformerBlock"),
        distilled=True, few_steps=lambda config: not config.get("guidance_embeds"),
    ),
    # Whatever else diffusers knows: PixArt, Sana, Qwen-Image, FLUX.2, DeepFloyd ...
    Family(GENERIC, "unet", _UNET, ()),
    Family(GENERIC, "transformer", ("ModelMixin",), ()),
)  # fmt: skip


def all_families() -> Iterator[Family]:
    """Yield every family: ours, plug-ins', the generic ones last.

    Plug-ins are imported when the iteration reaches them.
    """
    yield from (family for family in FAMILIES if family.name != GENERIC)
    yield from plugins("families", Family).values()
    yield from (family for family in FAMILIES if family.name == GENERIC)


def denoiser_of(pipe: object) -> nn.Module:
    """Return the module that predicts noise: `pipe.unet`, `pipe.transformer`, or a denoiser itself.

    Raises CompatibilityError if there is none.
    """
    if isinstance(pipe, nn.Module):
        return pipe
    for family in all_families():
        if isinstance(module := getattr(pipe, family.denoiser, None), nn.Module):
            return module
    raise CompatibilityError(
        f"{type(pipe).__name__} has no denoiser that erasers can be attached to "
        f"(looked for: {', '.join(sorted({family.denoiser for family in all_families()}))})",
        mend="spmhub models",
    )


def is_modular(pipeline_class: type[Any]) -> bool:
    """Return whether this is a class of modular pipelines (diffusers' `ModularPipeline`)."""
    return any(kind.__name__ == "ModularPipeline" for kind in pipeline_class.__mro__)


def native_side(pipe: Any) -> int:
    """Return the side in pixels of the pictures that a pipeline draws by default.

    It is 1024 where the pipeline does not say.
    """
    own = getattr(pipe, "default_sample_size", None)
    if own is None:
        own = getattr(getattr(pipe, "unet", None), "config", {}).get("sample_size")
    return own * int(getattr(pipe, "vae_scale_factor", 8)) if isinstance(own, int) else 1024


def further_denoisers(pipe: object) -> list[str]:
    """Return the names of further denoisers of a pipeline, which no eraser reaches.

    Wan 2.2, for instance, draws its last steps with a second one.
    """
    names = [f"{name}_2" for name in sorted({family.denoiser for family in all_families()})]
    return [name for name in names if isinstance(getattr(pipe, name, None), nn.Module)]


def family_of(pipe: object) -> Family:
    """Return the family of a pipeline or its denoiser. Raises CompatibilityError for an unknown one."""
    denoiser = body_of(denoiser_of(pipe))
    names = {kind.__name__ for kind in type(denoiser).__mro__}
    config: Mapping[str, Any] = getattr(denoiser, "config", {})
    for family in all_families():
        if names.intersection(family.classes) and family.recognises(config):
            return family
    raise CompatibilityError(
        f"{type(denoiser).__name__} with this configuration belongs to no known family "
        f"(known: {', '.join(dict.fromkeys(family.name for family in all_families()))})",
        mend="spmhub models",
    )


def body_of(denoiser: nn.Module) -> nn.Module:
    """Return the denoiser inside the wrapper of torch.compile, or the denoiser itself."""
    inner = denoiser.__dict__.get("_modules", {}).get("_orig_mod")
    return inner if isinstance(inner, nn.Module) else denoiser


def targets(denoiser: nn.Module, family: Family | None = None) -> dict[str, nn.Module]:
    """Return the modules that an eraser of this family is trained on, by dotted path.

    SPM (arXiv 2312.16145, section 3.1): every Linear and Conv2d inside each `Transformer2DModel`, proj_in and proj_out
    included; never a resnet, a sampler or the text encoder. On Stable Diffusion 1.x these are 192 modules. In a
    transformer the same, in every block; never embeddings, norms or modulations, nor depthwise convolutions (Sana),
    which no product of two thin matrices can change channel by channel, nor the modules of an attention processor
    (IP-Adapter's own keys and values), which are not the checkpoint's.
    """
    family = family_of(denoiser) if family is None else family
    body = body_of(denoiser)
    if family.blocks:
        blocks = [
            path
            for path, module in body.named_modules()
            if any(kind.__name__ in family.blocks for kind in type(module).__mro__)
        ]
    else:
        blocks = attention_blocks(body)
    roots = tuple(f"{block}." for block in blocks)
    found = {path: module for path, module in matrices(body).items() if path.startswith(roots)}
    return {
        path: module
        for path, module in found.items()
        if not _MODULATION.fullmatch(path) and ".processor." not in path and getattr(module, "groups", 1) == 1
    }


def attention_blocks(denoiser: nn.Module) -> list[str]:
    """Return the repeated blocks that hold attention, by dotted path, under any name.

    They are the members of module lists with an attention layer in them, and no such list inside in its turn: the
    transformer blocks of a DiT, and of a U-Net the same, without the resnets next to them.
    """
    attentions = [path for path, module in denoiser.named_modules() if _is_attention(module)]
    members = [
        f"{path}.{name}" if path else name
        for path, module in denoiser.named_modules()
        if isinstance(module, nn.ModuleList)
        for name, _ in module.named_children()
    ]
    holding = [path for path in members if any(f"{attention}.".startswith(f"{path}.") for attention in attentions)]
    return [path for path in holding if not any(other.startswith(f"{path}.") for other in holding)]


def _is_attention(module: nn.Module) -> bool:
    """Return True for a module that makes queries.

    The name of that layer is the one thing that all of diffusers' attention layers have in common.
    """
    return any(_QUERIES.fullmatch(name) for name, _ in module.named_children())


def changeable(denoiser: nn.Module) -> dict[str, nn.Module]:
    """Return all modules that an increment may name, by dotted path.

    They are every Linear, Conv2d and norm with a scale. Under a PEFT layer it is the base's own module, under the path
    it had before; the LoRA's parts are left out.
    """
    return {
        path.removesuffix(".base_layer"): module
        for path, module in body_of(denoiser).named_modules()
        if (isinstance(module, nn.Linear | nn.Conv2d) or is_norm(module)) and ".lora_" not in path
    }


def matrices(denoiser: nn.Module) -> dict[str, nn.Module]:
    """Return every Linear and Conv2d by dotted path: the modules that a training may choose."""
    return {path: module for path, module in changeable(denoiser).items() if not is_norm(module)}


def is_norm(module: nn.Module) -> bool:
    """Return True for a layer, group or RMS norm that multiplies each channel by a weight of its own."""
    # diffusers has an RMSNorm of its own, which derives from nothing of torch's.
    known = isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm) or type(module).__name__ == "RMSNorm"
    weight = getattr(module, "weight", None)
    return known and isinstance(weight, nn.Parameter) and weight.dim() == 1


def fingerprint(shapes: Mapping[str, Sequence[int]]) -> str:
    """Return the sha256 (hex) of the sorted lines `path:out,in[,kh,kw]`.

    It is equal for checkpoints that share targets and widths.
    """
    lines = sorted(f"{path}:{','.join(map(str, shape))}\n" for path, shape in shapes.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def fingerprint_of(denoiser: nn.Module) -> str:
    """Return the fingerprint of a denoiser's targets."""
    return fingerprint({path: shape_of(module) for path, module in targets(denoiser).items()})


def fingerprint_by_names(shapes: Mapping[str, Sequence[int]]) -> str:
    """Return the fingerprint of a denoiser of SD, SD3 or FLUX.1 by its tensors, without building it.

    shapes: of all tensors in its files, by their keys.
    """
    weights = {key.removesuffix(".weight"): shape for key, shape in shapes.items() if key.endswith(".weight")}
    matrices = {path: shape for path, shape in weights.items() if len(shape) > 1 and _IN_BLOCKS.match(path)}
    return fingerprint({path: shape for path, shape in matrices.items() if not _MODULATION.fullmatch(path)})


def weight_of(module: nn.Module) -> nn.Parameter:
    """Return the weight of a module from `changeable`."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def shape_of(module: nn.Module) -> tuple[int, ...]:
    """Return the shape of a weight: (out, in), (out, in / groups, kh, kw), or (channels,) of a norm."""
    if isinstance(module, nn.Conv2d):
        return module.out_channels, module.in_channels // module.groups, *module.kernel_size
    if is_norm(module):
        return tuple(weight_of(module).shape)
    assert isinstance(module, nn.Linear)
    return module.out_features, module.in_features


def bias_of(module: nn.Module) -> nn.Parameter | None:
    """Return the bias of a module from `changeable`, or None."""
    bias = getattr(module, "bias", None)
    assert bias is None or isinstance(bias, nn.Parameter)
    return bias

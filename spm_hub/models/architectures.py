"""Which denoiser a pipeline has, which of its modules erasers may change, and whether an adapter fits it."""

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
    """Everything the house knows of one family of models; a new family is one more entry in `FAMILIES`.

    denoiser: the pipeline's attribute that holds the denoiser.  classes: names of that denoiser's class or of one that
    it derives from.  blocks: names of the classes inside which every Linear and Conv2d is a target, norms and
    modulations aside; none where they have to be found by their structure (`attention_blocks`).
    recognises: judges a denoiser by its configuration.  distilled: whether guidance is already in the weights, so that
    a second, classifier-free one would overshoot.  few_steps: by its configuration, whether it was distilled to draw
    in at most `FEW_STEPS` steps.
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

# These see the timestep and the pooled text, one vector for the whole picture, never a token: what is erased there is
# erased from every prompt. In SD's U-Nets their like (time_emb_proj) lies in the resnets and was never a target. They
# are also the widest layers of an MMDiT: without them an eraser of FLUX is a quarter smaller.
_MODULATION = re.compile(r"(.*\.)?(norm\w*|\w*_norm|adaln\w*|\w*_mod|mod|\w*modulation\w*)(\..*)?")
# to_q, to_query, to_qkv, to_qkv_mlp_proj, q_proj, qkv, query
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
    """Every family there is: our own, plug-ins', which are imported when one gets so far, the generic ones last."""
    yield from (family for family in FAMILIES if family.name != GENERIC)
    yield from plugins("families", Family).values()
    yield from (family for family in FAMILIES if family.name == GENERIC)


def denoiser_of(pipe: object) -> nn.Module:
    """The module that predicts noise: `pipe.unet`, `pipe.transformer`, or `pipe` itself where it is a denoiser.

    Raises CompatibilityError when there is none.
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


def beside_denoiser(pipe: object) -> list[str]:
    """Names of further denoisers that a pipeline draws with, as Wan 2.2 does its last steps: no eraser reaches them."""
    names = [f"{name}_2" for name in sorted({family.denoiser for family in all_families()})]
    return [name for name in names if isinstance(getattr(pipe, name, None), nn.Module)]


def family_of(pipe: object) -> Family:
    """The family of a pipeline or of its denoiser. Raises CompatibilityError for one that is not known."""
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
    """The denoiser itself where `denoiser` is what torch.compile wrapped around it."""
    inner = denoiser.__dict__.get("_modules", {}).get("_orig_mod")
    return inner if isinstance(inner, nn.Module) else denoiser


def targets(denoiser: nn.Module, family: Family | None = None) -> dict[str, nn.Module]:
    """The modules an eraser of this family is trained on, by dotted path.

    SPM (arXiv 2312.16145, section 3.1): every Linear and Conv2d inside each `Transformer2DModel`, proj_in and proj_out
    included; never a resnet, a sampler or the text encoder. On Stable Diffusion 1.x these are 192 modules. In a
    transformer the same, in every block; never embeddings, norms or modulations, nor depthwise convolutions (Sana),
    which no product of two thin matrices can change channel by channel, nor what an attention processor brings along
    (IP-Adapter's own keys and values), which is not the checkpoint's.
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
    found = {path: module for path, module in changeable(body).items() if path.startswith(roots)}
    return {
        path: module
        for path, module in found.items()
        if not _MODULATION.fullmatch(path) and ".processor." not in path and getattr(module, "groups", 1) == 1
    }


def attention_blocks(denoiser: nn.Module) -> list[str]:
    """The repeated blocks that hold attention, by dotted path, whatever they are called.

    They are the members of module lists with an attention layer in them, and no such list inside in its turn: the
    transformer blocks of a DiT, and of a U-Net the same, without the resnets beside them.
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
    """Whether queries are made here: the one thing all of diffusers' attention layers agree on is its name."""
    return any(_QUERIES.fullmatch(name) for name, _ in module.named_children())


def changeable(denoiser: nn.Module) -> dict[str, nn.Module]:
    """Every Linear and Conv2d by dotted path: what an increment, whoever trained it, may name.

    Under a PEFT layer the base's own module is meant, under the path it had before; the LoRA's parts are not.
    """
    return {
        path.removesuffix(".base_layer"): module
        for path, module in body_of(denoiser).named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and ".lora_" not in path
    }


def fingerprint(shapes: Mapping[str, Sequence[int]]) -> str:
    """sha256 (hex) over the sorted lines `path:out,in[,kh,kw]`: equal for checkpoints that share targets and widths."""
    lines = sorted(f"{path}:{','.join(map(str, shape))}\n" for path, shape in shapes.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def fingerprint_of(denoiser: nn.Module) -> str:
    """The fingerprint of a denoiser's targeted modules."""
    return fingerprint({path: shape_of(module) for path, module in targets(denoiser).items()})


def weight_of(module: nn.Module) -> nn.Parameter:
    """The weight of a module out of `changeable`."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def shape_of(module: nn.Module) -> tuple[int, ...]:
    """The shape of a module's weight, however that is stored: (out, in) or (out, in / groups, kh, kw)."""
    if isinstance(module, nn.Conv2d):
        return module.out_channels, module.in_channels // module.groups, *module.kernel_size
    assert isinstance(module, nn.Linear)
    return module.out_features, module.in_features


def bias_of(module: nn.Module) -> nn.Parameter | None:
    """The bias of a module out of `changeable`, None where it has none."""
    bias = module.bias
    assert bias is None or isinstance(bias, nn.Parameter)
    return bias

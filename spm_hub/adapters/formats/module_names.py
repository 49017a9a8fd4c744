"""Module paths as diffusers has them: restores their dots, and infers the family of a model."""

import re
from collections.abc import Iterable, Mapping, Set

from spm_hub.adapters.increments import Dense, Increment
from spm_hub.errors import AdapterFileError

# Names of diffusers' modules that have a _ of their own. What is not among them is a word between two dots.
_WORDS = """
    down_blocks mid_block up_blocks conv_in conv_out conv_shortcut time_emb_proj time_embedding add_embedding linear_1
    linear_2 transformer_blocks single_transformer_blocks proj_in proj_out to_q to_k to_v to_out to_add_out add_q_proj
    add_k_proj add_v_proj ff_context norm1_context norm_out proj_mlp x_embedder context_embedder time_text_embed
    timestep_embedder text_embedder guidance_embedder pos_embed adaln_single caption_projection patch_embed
    class_embedding conv_norm_out norm_q norm_k norm_added_q norm_added_k
""".split()
_WORD = re.compile(rf"(?:{'|'.join(sorted(_WORDS, key=len, reverse=True))}|[^_]+)(?=_|$)")

# The top-level modules of each family that increments change.
_UNET_ROOTS = (
    "down_blocks mid_block up_blocks conv_in conv_norm_out conv_out time_embedding add_embedding class_embedding "
    "encoder_hid_proj"
).split()
_DIT_ROOTS = "transformer_blocks context_embedder time_text_embed norm_out proj_out".split()
_ROOTS = {
    **dict.fromkeys(("sd1", "sd2", "sdxl"), _UNET_ROOTS),
    "sd3": [*_DIT_ROOTS, "pos_embed"],
    "flux": [*_DIT_ROOTS, "single_transformer_blocks", "x_embedder"],
}

_WIDTH_OF_FLUX = 3072
_WIDTH_OF_SD35_MEDIUM = 1536
_DOUBLE_BLOCKS_OF_FLUX = 19
_FAMILY_OF_TEXT_WIDTH = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
_UNET_BLOCKS = ("down_blocks", "mid_block", "up_blocks")

# Two modules of SDXL that diffusers' loader knows by the original code's names only: of its own it makes one and the
# same.
SGM_ONLY = {"add_embedding_linear_1": "label_emb_0_0", "add_embedding_linear_2": "label_emb_0_2"}


def flat(path: str) -> str:
    """Return a module path with . as _, as kohya's keys have it."""
    return path.replace(".", "_")


def dotted(name: str) -> str:
    """Invert `flat` for modules of SD1, SD2, SDXL, SD3 and FLUX.1.

    A path with dots, or one that the known words do not make up, is returned unchanged.
    """
    path = ".".join(_WORD.findall(name))
    return path if "." not in name and flat(path) == name else name


def is_unet(paths: Iterable[str]) -> bool:
    """Return True if modules of these names, dotted or not, are those of a U-Net."""
    return any(path.startswith(_UNET_BLOCKS) for path in paths)


def with_kernel(name: str, increment: Increment, family: str | None = None) -> Increment:
    """Give a convolution's change its kernel back if its file keeps it as a matrix.

    LyCORIS lays a product's kernels out in a row when it has no core. In U-Nets the name of a layer determines if it is
    a convolution, except for SD1's projections around attention, which are Linear layers in SD2 and SDXL.
    """
    if not (isinstance(increment, Dense) and increment.delta.dim() == 2):
        return increment
    out, columns = increment.weight_shape
    if _CONVOLUTION.search(name) and columns % 9 == 0:
        kernel = (3, 3)
    elif _SHORTCUT.search(name) or (family == "sd1" and _PROJECTION.search(name)):
        kernel = (1, 1)
    else:
        return increment
    return Dense(increment.delta.reshape(out, -1, *kernel), increment.delta_bias)


_CONVOLUTION = re.compile(r"(^|[._])(conv1|conv2|(down|up)samplers[._]0[._]conv|conv_in|conv_out)$")
_SHORTCUT = re.compile(r"(^|[._])resnets[._]\d+[._]conv_shortcut$")
_PROJECTION = re.compile(r"(^|[._])attentions[._]\d+[._]proj_(in|out)$")


def check_roots(source: object, family: str, modules: Iterable[str]) -> None:
    """Raise AdapterFileError for a module whose first name no model of this family has.

    Families that are not ours (`generic`, plug-ins') are not checked.
    """
    roots = _ROOTS.get(family)
    if roots is None:
        return
    for module in modules:
        if not any(f"{flat(module)}_".startswith(f"{root}_") for root in roots):
            raise AdapterFileError(
                f"{source}: {module} is no module of {family} (they begin with {', '.join(roots)})",
                mend=f"--base, if it is not for {family}; else ask its author for diffusers' or kohya's names",
            )


def family_of(increments: Mapping[str, Increment]) -> str | None:
    """Return the model family by names and widths, or None if they do not determine it.

    Headers are not asked, as other programs' are absent as often as wrong; and SD1 is no default.
    """
    shapes = {flat(module): increment.weight_shape for module, increment in increments.items()}
    if any(name.startswith("single_transformer_blocks_") for name in shapes):
        return "flux"
    if any(name.startswith("transformer_blocks_") for name in shapes):
        return _family_of_transformer(shapes)
    if not any(name.startswith(("down_blocks_", "mid_block_", "up_blocks_")) for name in shapes):
        return None
    # A product of LyCORIS' is a matrix even if its weight is a 1x1 convolution.
    telling = {flat(module) for module, one in increments.items() if one.kind != "dense" or len(one.weight_shape) == 4}
    return _family_of_unet(shapes, telling)


def contradicted(family: str, increments: Mapping[str, Increment]) -> str | None:
    """Return the family of the increments if it is certain, and not the stated `family`.

    Certain are names, text widths, and SD1's convolutions around attention. The number of blocks is no proof: small
    checkpoints have fewer. Families that are not ours (`generic`, plug-ins') contradict nothing.
    """
    found = family_of(increments)
    if family not in _ROOTS:
        return None
    if found in _ROOTS and _ROOTS[found] is not _ROOTS[family]:
        # SD3 and FLUX.1 share the names of double blocks, and small FLUX models are as narrow as SD3.
        return None if (family, found) == ("flux", "sd3") else found
    if _ROOTS[family] is not _UNET_ROOTS:
        return None
    shapes = {flat(path): one.weight_shape for path, one in increments.items() if one.weight_shape}
    widths = {shape[1] for path, shape in shapes.items() if path.endswith(("attn2_to_k", "attn2_to_v"))}
    told = {_FAMILY_OF_TEXT_WIDTH[width] for width in widths if width in _FAMILY_OF_TEXT_WIDTH}
    if not told and any(len(shape) == 4 for path, shape in shapes.items() if _PROJECTION.search(path)):
        told = {"sd1"}  # not the other way round: programs write a 1x1 convolution's factors as matrices, too
    return told.pop() if len(told) == 1 and family not in told else None


def _family_of_transformer(shapes: Mapping[str, tuple[int, ...] | None]) -> str | None:
    """Return the family of double blocks: SD3 and FLUX.1 share their names, but not their width or number."""
    foreign = re.compile(r"transformer_blocks_\d+_(attn1_\w+|img_\w+|txt_\w+)")  # PixArt, Qwen-Image
    second = re.compile(r"transformer_blocks_\d+_attn2_to_[kv]")
    # attn2 attends to the text in PixArt and its like; in SD3.5 medium it is a second self-attention.
    shapes = {name: shape for name, shape in shapes.items() if shape is None or len(shape) > 1}
    elsewhere = {shape[1] for name, shape in shapes.items() if shape and second.match(name)} - {_WIDTH_OF_SD35_MEDIUM}
    if elsewhere or any(foreign.match(name) for name in shapes):
        return "generic"
    blocks = {int(match[1]) for name in shapes if (match := re.match(r"transformer_blocks_(\d+)_", name))}
    inputs = {shape[1] for shape in shapes.values() if shape is not None}
    if inputs.intersection((_WIDTH_OF_FLUX, 4 * _WIDTH_OF_FLUX)):
        return "flux" if max(blocks) < _DOUBLE_BLOCKS_OF_FLUX else "generic"
    return "sd3" if inputs else None


def _family_of_unet(shapes: Mapping[str, tuple[int, ...] | None], telling: Set[str]) -> str | None:
    """Return the family of a U-Net. `telling`: the modules whose shape includes their weight's kernel."""
    widths = {
        shape[1]
        for name, shape in shapes.items()
        if shape is not None and len(shape) > 1 and name.endswith(("attn2_to_k", "attn2_to_v"))
    }
    if len(known := {_FAMILY_OF_TEXT_WIDTH[width] for width in widths if width in _FAMILY_OF_TEXT_WIDTH}) == 1:
        return known.pop()
    # Only SDXL has several transformer blocks in a row, and attention in its first up block but not in its first down.
    if any(re.search(r"_transformer_blocks_[1-9]", name) or name.startswith("up_blocks_0_att") for name in shapes):
        return "sdxl"
    ends = [name for name in shapes if name in telling and name.endswith(("_proj_in", "_proj_out"))]
    kernels = {len(shape) for name in ends if (shape := shapes[name])}
    first = any(name.startswith(("down_blocks_0_attentions", "up_blocks_3_attentions")) for name in shapes)
    if 4 in kernels:
        return "sd1"
    return "sd2" if 2 in kernels and first else None

"""The layout adapters are written in: SPM's own kohya keys for U-Nets, diffusers' dotted keys for transformers.

Both load in plain diffusers; the first also in A1111, ComfyUI and InvokeAI. alpha is the rank, one value for the whole
file, because some of them ignore any other.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from spm_hub.adapters.formats.format import WHOLE, Files, Format, Part, Slot, Writer
from spm_hub.adapters.formats.module_names import flat
from spm_hub.adapters.increments import Increment, LowRank, Mask
from spm_hub.adapters.manifest import Manifest
from spm_hub.errors import AdapterFileError
from spm_hub.io.safetensors_file import MANIFEST_KEY, encode

_PARTS: dict[str, Part] = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "alpha": "alpha",
    "diff": "delta",
    "diff_b": "delta_bias",
    "keep_out": "keep_out",
    "keep_in": "keep_in",
}
# In the wild the prefix is sometimes doubled and the last dot sometimes flattened too.
_KOHYA = re.compile(
    r"lora_unet_(?:unet_)?(?P<module>\w+?)"
    r"(?:\.(?P<part>lora_down\.weight|lora_up\.weight|alpha|diff|diff_b|keep_out|keep_in)|_(?P<flat>lora_(?:down|up)\.weight))"
)
_TRANSFORMER = re.compile(
    r"transformer\.(?!base_model\.)(?:_orig_mod\.)?(?P<module>[\w.]+?)"
    r"\.(?P<part>lora_A\.weight|lora_B\.weight|alpha|diff|diff_b|keep_out|keep_in)"
)
_PADDING = 8
"""How many times larger one rank for all may make a file; those of trainers differ by far less."""

# The two of SDXL that diffusers' loader knows by the original code's names only: of its own it makes one and the same.
SGM_ONLY = {"add_embedding_linear_1": "label_emb_0_0", "add_embedding_linear_2": "label_emb_0_2"}
_UNET_BLOCKS = ("down_blocks", "mid_block", "up_blocks")

# family -> (modelspec architecture, kohya's base model version). A1111 takes any other non-empty header for SD1.
_ARCHITECTURES = {
    "sd1": ("stable-diffusion-v1", "sd_v1"),
    "sd2": ("stable-diffusion-v2", "sd_v2"),
    "sdxl": ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
    "sd3": ("stable-diffusion-v3", "sd3"),
    "flux": ("flux-1", "flux1"),
}


_CLAIMS = {
    r"(sd_?xl|stable-diffusion-xl)": "sdxl",
    r"(flux_?-?1|flux$)": "flux",
    r"(sd_?3|stable-diffusion-(v3|3))": "sd3",
    r"(sd_v?2|sd2|stable-diffusion-v?2)": "sd2",
    r"(sd_v?1|sd1|stable-diffusion-v?1)": "sd1",
}


def parse_key(key: str) -> Slot | None:
    """The slot of a key in either spelling of this layout."""
    match = _KOHYA.fullmatch(key) or _TRANSFORMER.fullmatch(key)
    if match is None:
        return None
    found = match.groupdict()
    return Slot(found["module"], _PARTS[found["part"] or found["flat"]])


@dataclass(frozen=True)
class Spelling:
    """How a format ends the keys of a low-rank pair, and whether it states alpha."""

    down: str
    up: str
    alpha: bool


KOHYA = Spelling("lora_down.weight", "lora_up.weight", alpha=True)
PEFT = Spelling("lora_A.weight", "lora_B.weight", alpha=False)


def is_unet(paths: Iterable[str]) -> bool:
    """Whether modules of these names, dotted or not, are those of a U-Net."""
    return any(path.startswith(_UNET_BLOCKS) for path in paths)


def to_tensors(increments: Mapping[str, Increment]) -> dict[str, Tensor]:
    """The tensors of a file in the layout that adapters are written in, by key."""
    if is_unet(increments):
        named = {SGM_ONLY.get(name := flat(path), name): increment for path, increment in increments.items()}
        return spelled({f"lora_unet_{name}": increment for name, increment in named.items()}, KOHYA)
    return spelled({f"transformer.{path}": increment for path, increment in increments.items()}, PEFT)


def spelled(modules: Mapping[str, Increment], spelling: Spelling) -> dict[str, Tensor]:
    """The tensors of a file by key, given the increments by what comes before the last dot of their keys.

    Increments of lower rank are padded with zeros to the highest: same products, and one alpha, which is the rank.
    """
    rank = common_rank(modules.values())
    tensors: dict[str, Tensor] = {}
    for module, increment in modules.items():
        match increment:
            case LowRank():
                down, up = _padded(increment, rank)
                tensors[f"{module}.{spelling.down}"] = down
                tensors[f"{module}.{spelling.up}"] = up
                if spelling.alpha:
                    alpha = torch.tensor(float(rank), dtype=up.dtype)
                    # bfloat16 has no 257: the scale would not be 1.
                    tensors[f"{module}.alpha"] = alpha if float(alpha) == rank else torch.tensor(float(rank))
            case Mask():
                tensors[f"{module}.{'keep_out' if increment.dim == 0 else 'keep_in'}"] = increment.keep.to(torch.uint8)
            case _:
                tensors[f"{module}.diff"] = increment.delta
                if increment.delta_bias is not None:
                    tensors[f"{module}.diff_b"] = increment.delta_bias
    return tensors


def common_rank(increments: Iterable[Increment]) -> int:
    """The rank to which all low-rank increments are padded; 0 where there are none.

    Raises AdapterFileError where that would make much of little, as a few numbers of a hostile file can ask for.
    """
    pairs = [increment for increment in increments if isinstance(increment, LowRank)]
    rank = max((pair.rank for pair in pairs), default=0)
    now, padded = sum(pair.nbytes for pair in pairs), sum(pair.nbytes // pair.rank * rank for pair in pairs)
    if padded > _PADDING * now + 8 * 2**20:
        raise AdapterFileError(
            f"ranks from {min(pair.rank for pair in pairs)} to {rank} in one file: written with one rank, "
            f"{now} bytes become {padded}"
        )
    return rank


def family_in(metadata: Mapping[str, str]) -> str | None:
    """The model family that a header claims, None where it claims none; of A1111's kind, any may be wrong."""
    claims = [metadata.get(key, "").lower() for key in ("ss_base_model_version", "modelspec.architecture", "family")]
    for claim in claims:
        for pattern, family in _CLAIMS.items():
            if re.match(pattern, claim):
                return family
    return None


def header_metadata(manifest: Manifest) -> dict[str, str]:
    """The header of a file: kohya's minimum, modelspec 1.0.1, SPM's legacy keys, the manifest; never a date."""
    info, concept = manifest.increment, manifest.concept
    architecture, version = _ARCHITECTURES.get(manifest.base.family, (manifest.base.family, manifest.base.family))
    algorithm = {"low_rank": "lora", "dense": "full", "mask": "mask"}[info.kind]
    metadata = {
        "ss_v2": str(manifest.base.family == "sd2"),
        "ss_base_model_version": version,
        "ss_network_module": "networks.lora" if info.kind == "low_rank" else "lycoris.kohya",
        "ss_network_args": json.dumps({} if info.kind == "low_rank" else {"algo": algorithm}),
        "ss_output_name": manifest.name,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/{algorithm}",
        "modelspec.implementation": "diffusers",
        "modelspec.title": manifest.name,
        "modelspec.description": f"Erases {concept.target} (spm-hub)",
        "modelspec.author": manifest.author,
        "modelspec.license": manifest.licence,
        "modelspec.tags": "spmhub, concept-erasure",
        "prompts": ",".join((concept.target, *concept.aliases)),
        MANIFEST_KEY: manifest.to_embedded_json(),
    }
    if info.rank is not None:
        rank = {"ss_network_dim": str(info.rank), "ss_network_alpha": str(float(info.rank))}
        metadata |= rank | {"rank": str(info.rank), "alpha": str(float(info.rank))}
    return metadata


def _padded(increment: LowRank, rank: int) -> tuple[Tensor, Tensor]:
    missing = rank - increment.rank
    if missing == 0:
        return increment.down, increment.up
    down, up = increment.down, increment.up
    return (
        torch.cat([down, down.new_zeros(missing, *down.shape[1:])]),
        torch.cat([up, up.new_zeros(up.shape[0], missing, *up.shape[2:])], dim=1),
    )


def _write(manifest: Manifest, increments: Mapping[str, Increment], base: Mapping[str, Tensor]) -> Files:
    return {WHOLE: encode(to_tensors(increments), header_metadata(manifest))}


FORMAT = Format(
    "spm",
    "what spm-hub itself writes: SPM's kohya keys for U-Nets, diffusers' for transformers",
    parse_key,
    Writer(("low_rank", "dense", "mask"), _write),
)

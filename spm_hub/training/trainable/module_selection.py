"""Which modules an increment is trained on, by the names the papers gave their choices."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import nn

from spm_hub.errors import RecipeError
from spm_hub.models.architectures import family_of, matrices, targets

TEXT_ENTRY = "context_embedder"
"""The layer through which the text enters SD3, FLUX and others whose attention reads picture and text together."""
_CROSS_ATTENTION = r"(^|\.)attn2\.to_[kv]$"
_TIME_AND_OUT = r"(time_embedding|conv_out)\b"
_JOINT = ("flux", "sd3")  # one attention over picture and text: there is no attn1 and attn2 to tell apart


def select_modules(denoiser: nn.Module, selection: str) -> dict[str, nn.Module]:
    """Return the modules of a selection by dotted path: "targets" is SPM's, all but "text" are ESD's.

    "text" is what reads the text and nothing else: keys and values of cross-attention or, in models that attend to
    picture and text together, the layer through which the text enters.

    ESD (arXiv 2303.07345) selects by name among all Linear and Conv2d (norms never): esd-x cross-attention,
    esd-x-strict its keys and values, esd-u all but cross-attention, esd-all, esd-selfattn. In SDXL, esd-u and esd-all
    leave out embeddings and everything outside of the blocks. In models that attend to picture and text together (FLUX,
    SD3), esd-x is all attention; esd-x-strict is the picture's keys and values, as released, without those of the text
    alone; esd-x-strict-text has both.
    Its first code, for U-Nets with cross-attention, which R.A.C.E.'s is (arXiv 2405.16341), has others: esd-noxattn is
    esd-u without the embedding of time and the last convolution, esd-notime all but these two, esd-xlayer the
    cross-attention of two layers on the way up, esd-selflayer the self-attention of two on the way down.
    Raises RecipeError if the denoiser has no such modules.
    """
    if selection == "targets":
        return targets(denoiser)
    family, known = family_of(denoiser).name, matrices(denoiser)
    if selection == "text":
        # The attn2 of SD3.5's blocks is a second attention of the picture.
        found = {path: module for path, module in known.items() if path == TEXT_ENTRY}
        found = found or {path: module for path, module in known.items() if re.search(_CROSS_ATTENTION, path)}
    else:
        found = {path: module for path, module in known.items() if _rules(family)[selection](path)}
    if not found:
        raise RecipeError(
            f"recipe key increment.modules: {type(denoiser).__name__} ({family}) has no modules of {selection!r}",
            mend="--method esd-x or --set increment.modules=targets",
        )
    return found


def _rules(family: str) -> dict[str, Callable[[str], bool]]:
    joint = family in _JOINT
    cross = "attn" if joint else "attn2"
    picture = r"\.to_[kv]\b" if joint else r"attn2\.to_[kv]\b"
    text = r"\.(to|add)_[kv](_proj)?\b" if joint else picture

    def inside(path: str) -> bool:
        return family not in ("sdxl", *_JOINT) or ("block" in path and "emb" not in path)

    return {
        "esd-x": lambda path: cross in path,
        "esd-x-strict": lambda path: cross in path and bool(re.search(picture, path)),
        "esd-x-strict-text": lambda path: cross in path and bool(re.search(text, path)),
        "esd-u": lambda path: cross not in path and inside(path),
        "esd-all": inside,
        "esd-selfattn": lambda path: "attn1" in path,
        "esd-noxattn": lambda path: not joint and "attn2" not in path and not re.match(_TIME_AND_OUT, path),
        "esd-notime": lambda path: not joint and not re.match(_TIME_AND_OUT, path),
        "esd-xlayer": lambda path: bool(re.match(r"up_blocks\.2\.attentions\.[02]\..*attn2", path)),
        "esd-selflayer": lambda path: bool(re.match(r"down_blocks\.[12]\.attentions\.0\..*attn1", path)),
    }

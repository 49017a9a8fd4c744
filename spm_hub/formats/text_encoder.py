"""What a file holds for text encoders, which no eraser changes: told apart, to be refused or left out when asked to."""

import re
from collections.abc import Mapping

from torch import Tensor

KEY = re.compile(
    r"(lora_te\d?_|lycoris_te\d?_|text_encoder(_\d)?[.:]|te\d?_|base_model\.model\.(text_encoder(_\d)?\.|text_model\.)).*"
)
"""A layer of a text encoder."""

LEFT_OUT = "spmhub convert FILE --without-text-encoder, if the denoiser's part alone will do"

# A learnt word: cloneofsimo's have the name of the token, kohya's come in a bundle.
_TOKEN = re.compile(r"<[^<>]{1,100}>|bundle_emb\..*")


def divided(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """The tensors that are no text encoder's, and how many are."""
    rest = {key: value for key, value in tensors.items() if not (KEY.fullmatch(key) or _TOKEN.fullmatch(key))}
    return rest, len(tensors) - len(rest)

"""cloneofsimo/lora's files, which number a U-Net's layers in the order of construction (`unet:9:up`).

The order is that of diffusers' classes when the file was made: the blocks down, then those up, then the middle one; in
each transformer block the first attention, then feed-forward and second attention, one way or the other. The shapes of
all layers together leave one way only, so a file that fits none of them is refused.
"""

import json
import re
from collections.abc import Iterator, Mapping

from torch import Tensor

from spm_hub.adapters.formats.format import Format, Source
from spm_hub.adapters.increments import Increment
from spm_hub.errors import AdapterFileError

_KEY = re.compile(r"unet:(?P<number>\d{1,4}):(?P<part>up|down)")
# The transformer blocks of Stable Diffusion 1 and 2 in that order, and their widths.
_BLOCKS = (
    *((f"down_blocks.{block}.attentions.{layer}", 320 * 2**block) for block in range(3) for layer in range(2)),
    *((f"up_blocks.{block}.attentions.{layer}", 320 * 2 ** (3 - block)) for block in (1, 2, 3) for layer in range(3)),
    ("mid_block.attentions.0", 1280),
)
_TEXT_WIDTHS = (768, 1024)
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_ATTENTIONS, _FEED_FORWARD = frozenset({"CrossAttention", "Attention"}), "GEGLU"


def _matches(source: Source) -> bool:
    return any(map(_KEY.fullmatch, source.tensors))


def _read(source: Source) -> dict[str, Increment]:
    """Return the increments; the scale of such a file is 1."""
    return source.read_keys(_with_names(source.place, source.tensors, source.metadata))


def _with_names(path: object, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the same tensors under diffusers' keys; those that are no numbered layer keep theirs.

    Raises AdapterFileError if the numbers and shapes fit no U-Net of Stable Diffusion 1 or 2.
    """
    numbered = {key: match for key in tensors if (match := _KEY.fullmatch(key))}
    shapes = {key: tuple(tensors[key].shape) for key in numbered}
    layers = {int(match["number"]) for match in numbered.values()}
    for order in _orders(path, metadata, len(layers)):
        if layers == set(range(len(order))) and all(
            _fits(shapes.get(f"unet:{number}:up"), shapes.get(f"unet:{number}:down"), out, width)
            for number, (_, out, width) in enumerate(order)
        ):
            found: dict[str, Tensor] = {}
            for key, value in tensors.items():
                match = numbered.get(key)
                name = f"unet.{order[int(match['number'])][0]}.lora.{match['part']}.weight" if match else key
                if name in found:
                    raise AdapterFileError(f"{path}: {name} is in it twice, {key!r} by its number and by its name")
                found[name] = value
            return found
    raise AdapterFileError(
        f"{path}: the shapes of its {len(layers)} numbered layers fit no U-Net of Stable Diffusion 1 or 2 (whose "
        "attention layers, GEGLU layers, or both can be trained), so their names are unknown",
        mend="ask its author for a file whose layers have names",
    )


_Order = list[tuple[str, int | None, int | None]]
"""Module path, rows and columns of its weight; None is the width of the text states."""


def _orders(path: object, metadata: Mapping[str, str], layers: int) -> Iterator[_Order]:
    for attention, feed_forward in _trained(path, metadata, layers):
        for feed_forward_first in (True, False):
            order: _Order = []
            for root, width in _BLOCKS:
                block = f"{root}.transformer_blocks.0"
                first = [(f"{block}.attn1.{layer}", width, width) for layer in _ATTENTION if attention]
                second = [
                    (f"{block}.attn2.{layer}", width, None if layer in ("to_k", "to_v") else width)
                    for layer in _ATTENTION
                    if attention
                ]
                middle = [(f"{block}.ff.net.0.proj", 8 * width, width)] if feed_forward else []
                order += [*first, *middle, *second] if feed_forward_first else [*first, *second, *middle]
            yield order


def _trained(path: object, metadata: Mapping[str, str], layers: int) -> list[tuple[bool, bool]]:
    """Return (attention, feed-forward): the kinds of layers that may be numbered.

    The header names them, or else their number decides.
    """
    if (stated := metadata.get("unet")) is None:
        each = layers / len(_BLOCKS)
        return [
            found for found, count in {(True, True): 9, (True, False): 8, (False, True): 1}.items() if count == each
        ]
    try:
        classes = set(json.loads(stated))
    except (ValueError, TypeError, RecursionError) as error:
        raise AdapterFileError(f"{path}: 'unet' in its header is no list of classes") from error
    if other := sorted(map(str, classes - _ATTENTIONS - {_FEED_FORWARD})):
        raise AdapterFileError(
            f"{path}: it numbers layers of {', '.join(other)[:200]} too, whose order is not known",
            mend="ask its author for a file whose layers have names",
        )
    return [(bool(classes & _ATTENTIONS), _FEED_FORWARD in classes)]


def _fits(up: tuple[int, ...] | None, down: tuple[int, ...] | None, out: int | None, width: int | None) -> bool:
    if up is None or down is None or len(up) != 2 or len(down) != 2 or up[1] != down[0]:
        return False
    return up[0] == out and (down[1] == width or (width is None and down[1] in _TEXT_WIDTHS))


FORMAT = Format(
    "cloneofsimo", "cloneofsimo/lora's files, which number the layers of a U-Net of SD1 or SD2", _matches, _read
)

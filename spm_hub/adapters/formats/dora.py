"""DoRA: trains the length of every row of a weight, so that its change depends on the base's weight.

Liu et al., ICML 2024, arXiv 2402.09353, Eq. 5: W' = m (W + B A) / |W + B A|. Given the base, it is a dense increment.
"""

from collections.abc import Mapping

from torch import Tensor

from spm_hub.adapters.formats.assembly import dense
from spm_hub.adapters.formats.fused_names import paths_of
from spm_hub.adapters.formats.module_names import flat
from spm_hub.adapters.formats.original_names import sgm_to_diffusers
from spm_hub.adapters.formats.slots import Part
from spm_hub.adapters.increments import Dense, Increment, Mask
from spm_hub.errors import AdapterFileError, CompatibilityError

PARTS: tuple[Part, ...] = ("dora_scale", "magnitude")
"""LyCORIS' spelling, for every output or every input according to its shape; PEFT's, for every output."""


def apply_magnitudes(
    source: object,
    increments: Mapping[str, Increment],
    magnitudes: Mapping[str, tuple[Part, Tensor]],
    base: Mapping[str, Tensor],
) -> dict[str, Increment]:
    """Return the increments under their magnitudes; those without one become dense too.

    magnitudes: by the file's name of the module.  base: the denoiser's state dict.
    Raises AdapterFileError for a magnitude without its module in file or base.
    """
    weights = {flat(key.removesuffix(".weight")): key for key in base if key.endswith(".weight")}
    shapes = {flat(path): increment.weight_shape for path, increment in increments.items()}
    lengths = {
        path: (name, part, magnitude)
        for name, (part, whole) in magnitudes.items()
        for path, magnitude in _by_path(name, whole, shapes).items()
    }
    found: dict[str, Increment] = {}
    for path, increment in increments.items():
        given = lengths.pop(flat(path), None)
        if isinstance(increment, Mask) or (given is not None and flat(path) not in weights):
            raise AdapterFileError(
                f"{source}: the model has no module {path}", mend="--model M, the base that the file was trained on"
            )
        if given is None:
            # An adapter is of one kind, and increments with a magnitude cannot be of low rank.
            found[path] = dense(path, increment)
            continue
        name, part, magnitude = given
        weight = base[weights[flat(path)]]
        try:
            increment.check_fits(path, weight)
            found[path] = Dense(_change(weight, increment.delta_for(weight), magnitude, by_shape=part == "dora_scale"))
        except CompatibilityError as error:
            raise AdapterFileError(f"{source}: {name}: {error.message}", mend=error.mend) from error
    if lengths:
        name, part, _ = next(iter(lengths.values()))
        raise AdapterFileError(
            f"{source}: {name} has a {part}, but is one of several parts of a weight, or has no other"
        )
    return found


def _by_path(name: str, magnitude: Tensor, shapes: Mapping[str, tuple[int, ...] | None]) -> dict[str, Tensor]:
    """Return an original module's magnitudes by diffusers' paths, each with those of its own rows.

    Paths have . as _ .  shapes: of the weights that the file changes. Lengths of columns are those of a whole weight,
    and stay together.
    """
    plain = flat(name)
    unet = sgm_to_diffusers(plain)
    paths = [flat(path) for path in ((unet,) if unet else paths_of(plain) or (name,))]
    rows = [shape[0] if (shape := shapes.get(path)) else 0 for path in paths]
    if len(paths) == 1 or magnitude.shape[0] != sum(rows):
        return {paths[0] if len(paths) == 1 else plain: magnitude}
    return dict(zip(paths, magnitude.split(rows), strict=True))


def _change(weight: Tensor, delta: Tensor, magnitude: Tensor, *, by_shape: bool) -> Tensor:
    before = weight.double()
    moved = before + delta.double()
    outputs, inputs = weight.shape[:2]
    unit = [1] * (weight.dim() - 2)
    if magnitude.numel() == outputs and not (by_shape and magnitude.shape[0] != outputs):
        shape, others = (outputs, 1, *unit), [dim for dim in range(weight.dim()) if dim != 0]
    elif by_shape and magnitude.numel() == inputs:
        shape, others = (1, inputs, *unit), [dim for dim in range(weight.dim()) if dim != 1]
    else:
        raise CompatibilityError(f"{tuple(magnitude.shape)} lengths for a weight {tuple(weight.shape)}")
    norms = moved.square().sum(others, keepdim=True).sqrt()
    if not bool(norms.all()):
        raise CompatibilityError("a row to be scaled to a trained length is zero")
    return (magnitude.double().reshape(shape) * moved / norms - before).float()

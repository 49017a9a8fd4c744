"""Measures on the text states of a base whether an eraser takes its concept away, or adds it."""

from __future__ import annotations

from spm_hub.adapters.adapter import Adapter
from spm_hub.adapters.formats.module_names import flat
from spm_hub.errors import CompatibilityError
from spm_hub.hub.audit.local_base import LocalBase

_PROMPTS = ("{}", "a photo of {}", "a drawing of {}", "{} on the beach", "{} in a city")

LEAST_COSINE = -0.12
"""Least cosine of `towards_surrogate` that nothing is said about. Honest erasers of five methods have 0.15 to 0.9."""


def towards_surrogate(adapter: Adapter, base: LocalBase) -> float | None:
    """Return the cosine of what an eraser does to its concept with what would turn it into its surrogate.

    Both are changes of the values that cross-attention makes of the text: the eraser's, and the one from the concept's
    states to the surrogate's, in five prompts. 1 erases, -1 adds. None where the eraser changes no such values, names
    no concept, does not fit, or the base's text encoder is not read (`LocalBase.states`). Keys are left out: methods
    that train the whole denoiser change them either way.
    """
    concept = adapter.manifest.concept
    values = [
        (path, one)
        for path, one in adapter.increments.items()
        if flat(path).endswith("attn2_to_v") and base.fits(path, one)
    ]
    if not values or concept.target is None:
        return None
    texts = [prompt.format(name) for name in (concept.target, concept.surrogate) for prompt in _PROMPTS]
    states = base.states(texts if concept.surrogate else [*texts[: len(_PROMPTS)], *[""] * len(_PROMPTS)])
    if states is None:
        return None
    here, there = states.double().flatten(0, 1).chunk(2)
    along = lengths = 0.0
    for path, one in values:
        weight = base.weight(path)
        try:
            one.check_fits(path, weight)
        except CompatibilityError:
            return None
        if weight.dim() != 2 or weight.shape[1] != here.shape[1]:
            return None
        done = adapter.manifest.gate.full * here @ one.delta_for(weight).double().reshape(weight.shape).T
        wanted = (there - here) @ weight.double().T
        along += float((done * wanted).sum())
        lengths += float(done.norm() * wanted.norm())
    return along / lengths if lengths else None

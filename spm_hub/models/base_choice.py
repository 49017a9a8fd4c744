"""The base model that a caller chose: one to load, or a pipeline that the caller made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from spm_hub.errors import UsageError
from spm_hub.models import loading, references
from spm_hub.models.placement import AUTO, WIDE, parse_dtype, refuse_half_on_cpu

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class BaseChoice:
    """A base model to load, or a pipeline of the caller's, which is used as it is and where it is.

    reference: what to load, as in `load_pipeline`; with `pipe`, the name to record for it, unless None.
    device, dtype: where and in which precision to load it, as in `load_pipeline`; None is "auto". A given pipeline has
    to be there already; "auto" leaves it as it is.
    """

    reference: str | None
    config: str | None = None
    device: str | torch.device | None = None
    dtype: torch.dtype | str | None = None
    pipe: DiffusionPipeline | None = None

    def check(self) -> str | None:
        """Refuse, before anything is loaded, a choice that cannot be obeyed.

        Returns a remark about the base for the user, None if there is none.
        Raises UsageError, NotFoundError for an unknown model, ModelError.
        """
        if str(self.device).partition(":")[0] == "meta":
            raise UsageError(
                f"device is {str(self.device)!r}, where weights have no values: no model runs there",
                mend='device="cpu", or "cuda": spmhub doctor lists what this machine has',
            )
        if self.pipe is None:
            refuse_half_on_cpu(self.dtype, self.device)
            return self._parsed.remark
        if self.config is not None:
            raise UsageError(
                "config is for a model that is loaded from a single file, but a pipeline is given",
                mend="leave config out",
            )
        _check_place(self.pipe, self.device, self.dtype)
        return None

    def folder(self) -> Path | None:
        """Return the diffusers folder of the base, if it is known before the base is loaded."""
        return None if self.pipe is not None else references.local_folder(self._parsed)

    def open(self, *, for_gradients: bool = False, mapped: bool = False) -> DiffusionPipeline:
        """Return the pipeline; load it unless it was given. Raises as `load_pipeline` does.

        for_gradients: float32 instead of float16, unless float16 was asked for: they vanish in it. mapped: leave the
        denoiser's weights in their file, where it can be.
        """
        if self.pipe is not None:
            return self.pipe
        dtype = WIDE if for_gradients and self.dtype in (None, AUTO) else self.dtype
        load = loading.load_mapped if mapped else loading.load_pipeline
        return load(self._parsed.text, config=self.config, dtype=dtype, device=self.device)

    def open_and_describe(self) -> tuple[DiffusionPipeline, str]:
        """Return the pipeline as `open` does, and where its files come from, for a person."""
        if self.pipe is not None:
            return self.pipe, f"{self.name(self.pipe)}, the given {type(self.pipe).__name__}"
        before = references.local_files(self._parsed)
        pipe = self.open()
        return pipe, references.describe_source(
            self._parsed.text, pipe, fetched=references.local_files(self._parsed) != before
        )

    def identity(self, pipe: DiffusionPipeline) -> tuple[str, str | None]:
        """Return the name and the revision of the opened base for manifests."""
        if self.reference is None:
            return references.identity_of_pipeline(pipe)
        return references.identity_of(self.reference, pipe)

    @property
    def is_embedded(self) -> bool:
        """True for a base that is part of this package, a model in miniature."""
        return self.pipe is None and references.is_embedded(self._parsed)

    @property
    def public_name(self) -> str:
        """The name of a base that is to be loaded, for other people."""
        return self._parsed.public_name

    def name(self, pipe: DiffusionPipeline) -> str:
        """Return the name of the opened base, without reading its files."""
        return references.identity_of_pipeline(pipe)[0] if self.reference is None else self._parsed.public_name

    @property
    def _parsed(self) -> references.ModelRef:
        assert self.reference is not None, "a base that is to be loaded has a reference"
        return references.parse_reference(self.reference, config=self.config)


def _check_place(pipe: DiffusionPipeline, device: str | torch.device | None, dtype: torch.dtype | str | None) -> None:
    """Refuse a pipeline that is on another device or in another precision than asked for."""
    import torch

    from spm_hub.models.architectures import denoiser_of

    found = next(denoiser_of(pipe).parameters())
    refuse_half_on_cpu(found.dtype, getattr(pipe, "_execution_device", found.device))
    wanted = None if device is None or device == AUTO else torch.device(device)
    if wanted is not None and (wanted.type != found.device.type or wanted.index not in (None, found.device.index)):
        raise UsageError(
            f"device is {str(wanted)!r}, but the given pipeline is on {str(found.device)!r}, and it is not moved",
            mend=f"leave device out, or first pipe.to({str(wanted)!r})",
        )
    if dtype not in (None, AUTO) and (precision := parse_dtype(dtype)) != found.dtype:
        raise UsageError(
            f"dtype is {precision}, but the given pipeline has {found.dtype}, and it is not converted",
            mend=f"leave dtype out, or first pipe.to({precision})",
        )

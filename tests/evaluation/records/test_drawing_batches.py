"""A batch is drawn in one call, on every kind of pipeline, each picture from its own seed."""

from __future__ import annotations

from typing import Any

import pytest
from pico_families import OTHER_PIPELINES, family_pipeline

from spm_hub.errors import UsageError
from spm_hub.evaluation.records.drawing import RowDefaults, draw_batch
from spm_hub.evaluation.records.rows import Batch, PromptRow

ROWS = (PromptRow("0", "a photo of snoopy", 1, "snoopy"), PromptRow("1", "a dog", 2, "dog"))


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "flux-dev", "qwen-image"])
def test_every_kind_of_pipeline_draws_a_picture_for_each_row(name: str) -> None:
    pipe: Any = OTHER_PIPELINES[name]() if name in OTHER_PIPELINES else family_pipeline(name)
    pipe.set_progress_bar_config(disable=True)
    first, second = draw_batch(pipe, Batch(0, ROWS), RowDefaults(steps=1, guidance=3.0))
    assert first.size == second.size
    assert first.tobytes() != second.tobytes()


def test_settings_that_a_pipeline_does_not_take_are_refused() -> None:
    row = PromptRow("7", "a dog", 1, "dog", negative="blurred")
    with pytest.raises(UsageError, match="takes no negative_prompt, and row 7 has"):
        draw_batch(OTHER_PIPELINES["flux-2"](), Batch(0, (row,)), RowDefaults(steps=1))


def test_rows_have_their_own_negative_guidance_and_size() -> None:
    pipe, plain = family_pipeline("sd1"), {"id": "0", "prompt": "a dog", "seed": 1, "subject": "dog", "guidance": 5.0}
    changes: list[dict[str, Any]] = [{}, {"negative": "blue"}, {"width": 24, "height": 16}, {"guidance": 1.5}]
    drawn = [draw_batch(pipe, Batch(0, (PromptRow(**{**plain, **one}),)), RowDefaults(steps=1))[0] for one in changes]
    assert drawn[2].size == (24, 16)
    assert len({picture.tobytes() for picture in drawn}) == len(changes)
    (again,) = draw_batch(pipe, Batch(0, (PromptRow("0", "a dog", 1, "dog"),)), RowDefaults(steps=1, guidance=5.0))
    assert again.tobytes() == drawn[0].tobytes()

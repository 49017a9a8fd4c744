"""A stranger's model_index.json: a sentence whatever it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pico import pico_pipeline

from spm_hub.errors import ModelError
from spm_hub.models import snapshots
from spm_hub.models.loading import load_pipeline
from spm_hub.models.single_file.loading import lost_files

INDICES: list[Any] = [
    [1, 2], "text", 3, None, {}, {"_class_name": "logging"}, {"_class_name": "/tmp/x"}, {"_class_name": 3},
    {"_class_name": "utils"}, {"_class_name": "StableDiffusionPipeline", "unet": [1, 2]},
    {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", ["a"]]},
    {"_class_name": "StableDiffusionPipeline", "unet": {"a": 1}},
    {"_class_name": ["evil", "Evil"], "unet": ["evil", "Evil"]},
]  # fmt: skip


@pytest.mark.parametrize("index", INDICES, ids=lambda index: json.dumps(index)[:60])
def test_an_odd_index_is_a_sentence(index: Any, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError) as refused:
        load_pipeline(str(tmp_path))
    assert str(tmp_path) in str(refused.value)
    assert not snapshots.is_whole(tmp_path) or isinstance(index, dict)


@pytest.mark.parametrize("name", ["a" * 100_000, "../elsewhere", "/etc", "a\nb", ""], ids=lambda name: repr(name[:20]))
def test_a_part_that_no_folder_can_hold_is_a_sentence(name: str, tmp_path: Path) -> None:
    index = {"_class_name": "StableDiffusionPipeline", name: ["diffusers", "UNet2DConditionModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="no folder's name") as refused:
        lost_files(tmp_path)
    assert len(str(refused.value)) < 400 + len(str(tmp_path))
    with pytest.raises(ModelError):
        load_pipeline(str(tmp_path))


@pytest.mark.parametrize("part", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_a_configuration_larger_than_any_is_not_parsed(part: str, tmp_path: Path) -> None:
    pico_pipeline().save_pretrained(tmp_path)
    load_pipeline(str(tmp_path))
    file = tmp_path / part
    file.write_text(file.read_text()[:-1].rstrip("}\n") + ', "more": [' + ",".join(["[]"] * 500_000) + "]}")
    with pytest.raises(ModelError, match=rf"{file.name}.* has {file.stat().st_size} bytes"):
        load_pipeline(str(tmp_path))
    assert snapshots.is_whole(tmp_path) == (part != "model_index.json")


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "", "\ufeff{}"])
def test_an_index_that_is_no_json_is_a_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(text)
    with pytest.raises(ModelError):
        load_pipeline(str(tmp_path))
    assert not snapshots.is_whole(tmp_path)

"""What community checkpoints carry: marks of their prediction, old names of their text encoder, odd endings."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ldm import single_file
from pico import pico_pipeline
from safetensors.torch import load_file, save_file
from test_single_file import UNET, pico_xl
from torch import Tensor

from spm_hub.errors import ModelError
from spm_hub.models.loading import load_pipeline
from spm_hub.models.references import parse_reference
from spm_hub.models.single_file.inspection import inspect


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of Stable Diffusion 1 as one file."""
    return single_file(pico_pipeline(), tmp_path_factory.mktemp("files") / "pico.safetensors")


@pytest.mark.parametrize(
    ("marks", "predicted", "zero"),
    [
        ({"v_pred": torch.tensor([])}, "v_prediction", False),
        ({"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}, "v_prediction", True),
        ({"v_pred": torch.zeros(1)}, "v_prediction", False),
        ({"modelspec.prediction_type": "v"}, "v_prediction", False),
        ({"modelspec.prediction_type": "v_prediction"}, "v_prediction", False),
        ({"modelspec.prediction_type": "v-prediction"}, "v_prediction", False),
        ({"modelspec.prediction_type": "epsilon"}, "epsilon", False),
        ({"modelspec.prediction_type": "velvet"}, None, False),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v_prediction", False),
        ({"modelspec.architecture": "stable-diffusion-v2-512"}, "epsilon", False),
        ({"ss_zero_terminal_snr": "True", "modelspec.prediction_type": "v"}, "v_prediction", True),
        ({"yaml": 'model:\n  params:\n    parameterization: "v"\n'}, "v_prediction", False),
        ({"yaml": "model:\n  params:\n    parameterization: eps\n"}, "epsilon", False),
        ({"yaml": "scaling_config:\n  target: sgm.modules.diffusionmodules.VScaling\n"}, "v_prediction", False),
        ({}, None, False),
    ],
)
def test_every_mark_of_the_prediction(
    marks: dict[str, Any], predicted: str | None, zero: bool, file: Path, tmp_path: Path
) -> None:
    """Also on a base of Stable Diffusion 1, which such checkpoints exist of too."""
    tensors = {key: value for key, value in marks.items() if isinstance(value, Tensor)}
    texts = {key: value for key, value in marks.items() if isinstance(value, str) and key != "yaml"}
    marked = tmp_path / "m.safetensors"
    kept = {key: tensor for key, tensor in load_file(file).items() if key.startswith(UNET)}
    save_file({**kept, **tensors}, marked, texts)
    if "yaml" in marks:
        marked.with_suffix(".yaml").write_text(marks["yaml"])
    found = inspect(marked)
    assert (found.prediction, found.zero_snr) == (predicted, zero)


@pytest.mark.parametrize("mark", ["edm_mean", "edm_vpred.sigma_max"])
def test_another_noise_schedule_is_no_family_of_ours(mark: str, file: Path, tmp_path: Path) -> None:
    save_file({**load_file(file), mark: torch.zeros(4)}, tmp_path / "edm.safetensors")
    assert inspect(tmp_path / "edm.safetensors").kind is None


@pytest.mark.parametrize("made", ["sd1", "xl"])
def test_text_encoders_without_the_word_text_model(made: str, tmp_path: Path) -> None:
    """NovelAI's descendants, and files that a newer transformers wrote; the encoder has the file's own weights."""
    pipe: Any = pico_pipeline() if made == "sd1" else pico_xl()
    pipe.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in pipe.text_encoder.parameters():
            parameter += 0.1
    whole = single_file(pipe, tmp_path / "plain.safetensors")
    tensors = {key.replace("transformer.text_model.", "transformer."): one for key, one in load_file(whole).items()}
    save_file(tensors, tmp_path / "anime.safetensors")
    found = load_pipeline(str(tmp_path / "anime.safetensors"), config=str(tmp_path / "base"))
    expected = pipe.text_encoder.state_dict()
    assert found.text_encoder.state_dict().keys() == expected.keys()
    assert all(torch.equal(expected[key], one) for key, one in found.text_encoder.state_dict().items())
    lost = next(key for key in tensors if key.endswith("final_layer_norm.weight"))
    save_file({key: one for key, one in tensors.items() if key != lost}, tmp_path / "anime.safetensors")
    with pytest.raises(ModelError, match=r"text_encoder lacks .*final_layer_norm\.weight"):
        load_pipeline(str(tmp_path / "anime.safetensors"), config=str(tmp_path / "base"))


@pytest.mark.parametrize("ending", ["ckpt", "bin", "download"])
def test_a_safetensors_file_under_another_ending(ending: str, file: Path, tmp_path: Path) -> None:
    shutil.copy(file, tmp_path / f"my model.{ending}")
    with pytest.raises(ModelError, match="a safetensors file under another ending") as refused:
        parse_reference(str(tmp_path / f"my model.{ending}"))
    assert f"mv '{tmp_path}/my model.{ending}' '{tmp_path}/my model.safetensors'" in str(refused.value)

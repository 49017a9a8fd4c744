"""Base models by name: aliases, folders, Hub ids, precisions, and what goes wrong with each."""

import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from loopback import NOWHERE, LoopbackHub, adopt_endpoint
from pico import pico_pipeline

from spm_hub.errors import ModelError, NetworkError, NotFoundError, SpmHubError, UsageError
from spm_hub.models import aliases, references
from spm_hub.models import loading as models
from spm_hub.models.aliases import ALIASES, Alias
from spm_hub.models.loading import load_pipeline, stored_dtypes
from spm_hub.models.references import identity_of, is_available, parse_reference

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "pico"
    pico_pipeline().save_pretrained(path)
    return path


def test_a_folder_is_loaded_bit_for_bit_without_bar_or_checker(folder: Path) -> None:
    pipe = load_pipeline(str(folder))
    expected = pico_pipeline().unet.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in pipe.unet.state_dict().items())
    assert pipe.safety_checker is None
    assert not pipe.unet.training
    assert not any(parameter.requires_grad for parameter in pipe.unet.parameters())
    assert identity_of(str(folder), pipe) == ("pico", None)


def test_precision_is_asked_for_or_that_of_the_file(tmp_path: Path) -> None:
    pico_pipeline(dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    assert stored_dtypes(tmp_path / "half")["default"] is torch.bfloat16
    assert load_pipeline(str(tmp_path / "half"), dtype="stored").unet.dtype is torch.bfloat16
    assert load_pipeline(str(tmp_path / "half"), dtype="float32").unet.dtype is torch.float32
    assert load_pipeline(str(tmp_path / "half"), dtype=torch.float16).unet.dtype is torch.float16


def test_a_folder_of_half_precision_files_alone(tmp_path: Path) -> None:
    pico_pipeline(dtype=torch.float16).save_pretrained(tmp_path / "pico", variant="fp16")
    expected = pico_pipeline(dtype=torch.float16).unet.state_dict()
    for dtype in (None, "stored"):
        pipe = load_pipeline(str(tmp_path / "pico"), dtype=dtype)
        assert all(torch.equal(tensor.half(), expected[key]) for key, tensor in pipe.unet.state_dict().items())
    assert pipe.unet.dtype is torch.float16


def test_where_both_precisions_lie_the_whole_one_is_read(tmp_path: Path) -> None:
    pico_pipeline(dtype=torch.float16).save_pretrained(tmp_path / "pico", variant="fp16")
    pico_pipeline().save_pretrained(tmp_path / "pico")
    pipe = load_pipeline(str(tmp_path / "pico"), dtype="stored")
    expected = pico_pipeline().unet.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in pipe.unet.state_dict().items())


def test_each_part_of_a_folder_is_stored_in_a_precision_of_its_own(tmp_path: Path) -> None:
    pipe = pico_pipeline()
    pipe.unet.half()
    pipe.vae.decoder.half()  # a part of two precisions: the wider one holds both
    pipe.save_pretrained(tmp_path / "mixed")
    pipe.to(torch.float16).save_pretrained(tmp_path / "mixed", variant="fp16")
    whole = {"unet": torch.float16, "vae": torch.float32, "text_encoder": torch.float32, "default": torch.float16}
    assert stored_dtypes(tmp_path / "mixed") == whole
    assert stored_dtypes(tmp_path / "mixed", "fp16") == dict.fromkeys(whole, torch.float16)
    stored = load_pipeline(str(tmp_path / "mixed"), dtype="stored")
    assert {name: getattr(stored, name).dtype for name in whole if name != "default"} == {
        name: dtype for name, dtype in whole.items() if name != "default"
    }
    # Drawing is in one precision throughout, which a text encoder and a denoiser of two would not do.
    drawing = load_pipeline(str(tmp_path / "mixed"), dtype=torch.float16)
    assert {part.dtype for part in (drawing.unet, drawing.vae, drawing.text_encoder)} == {torch.float16}


@pytest.mark.parametrize(
    ("text", "hub_id", "revision"),
    [
        ("sd-v1-4", "CompVis/stable-diffusion-v1-4", "133a221b8aa7292a167afc5127cb63fb5005638b"),
        ("dreamshaper-8@main", "Lykon/dreamshaper-8", "main"),
        ("some-one/a.model_2", "some-one/a.model_2", None),
        (f"some/model@{COMMIT}", "some/model", COMMIT),
        ("some/model@refs/pr/3", "some/model", "refs/pr/3"),
    ],
)
def test_references_to_the_hub(text: str, hub_id: str, revision: str | None) -> None:
    found = parse_reference(text)
    assert (found.hub_id, found.revision, found.folder) == (hub_id, revision, None)


@pytest.mark.parametrize(
    ("text", "kind", "says"),
    [
        ("sd-v14", NotFoundError, "did you mean sd-v1-4"),
        ("sketchbok", NotFoundError, "sketchbook"),
        ("", UsageError, "empty"),
        ("  ", UsageError, "empty"),
        ("a/b/c", NotFoundError, "neither a folder"),
        ("./missing", NotFoundError, "neither a folder"),
        ("sketchbook@main", UsageError, "no revisions"),
    ],
)
def test_references_to_nothing(text: str, kind: type[SpmHubError], says: str) -> None:
    with pytest.raises(kind, match=says) as caught:
        parse_reference(text)
    assert caught.value.exit_code == 2


def test_a_folder_that_is_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model_index\.json"):
        parse_reference(str(tmp_path))


def test_an_embedded_model_that_was_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = Alias("sketchbook", "sd1", "", embedded=tmp_path / "none")
    monkeypatch.setattr(references, "ALIASES", {"sketchbook": lost})
    assert not is_available(lost)
    with pytest.raises(ModelError, match="not in this installation"):
        parse_reference("sketchbook")


@pytest.mark.parametrize("damage", ["cut", "missing", "index"])
def test_damaged_folders(folder: Path, tmp_path: Path, damage: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "missing":
        weights.unlink()
    else:
        (broken / "model_index.json").write_text("{")
    with pytest.raises(ModelError, match=r"cannot be loaded"):
        load_pipeline(str(broken))


def test_pickled_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    pickled = tmp_path / "pickled"
    shutil.copytree(folder, pickled)
    (pickled / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(pico_pipeline().unet.state_dict(), pickled / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError):
        load_pipeline(str(pickled))


def test_a_device_that_is_not_there(folder: Path) -> None:
    with pytest.raises(UsageError, match="device 'nonsense'"):
        load_pipeline(str(folder), device="nonsense")


def test_no_network_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adopt_endpoint(NOWHERE, monkeypatch, tmp_path)
    started = time.monotonic()
    with pytest.raises(NetworkError) as refused:
        load_pipeline("sd-v1-4")
    assert time.monotonic() - started < 10, "the client's own retries would take 23 s"
    assert "CompVis/stable-diffusion-v1-4" in str(refused.value)
    assert "--model sketchbook" in str(refused.value)


def test_a_cached_repository_needs_no_network(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = tmp_path / "hf" / "hub" / "models--some--pico"
    shutil.copytree(folder, cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    adopt_endpoint(NOWHERE, monkeypatch, tmp_path)
    started = time.monotonic()
    for reference in "some/pico", f"some/pico@{COMMIT}":
        assert identity_of(reference, load_pipeline(reference)) == (reference, COMMIT)
    assert time.monotonic() - started < 60


def test_a_downloaded_repository_is_known_by_its_name_without_a_network(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LoopbackHub() as hub:
        hub.adopt(monkeypatch, tmp_path)
        files = (file for file in folder.rglob("*") if file.is_file())
        commit = hub.publish("some/pico", {file.relative_to(folder).as_posix(): file.read_bytes() for file in files})
        for offline in (False, True):
            monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
            for text in ("some/pico", "some/pico@main"):
                assert models._download(parse_reference(text), half=False).name == commit


def test_no_two_aliases_have_one_name_or_one_source() -> None:
    # Of two with one name the mapping keeps the last: their source text tells how many were written.
    written = re.findall(r"^ +Alias\(", Path(aliases.__file__).read_text(encoding="utf-8"), re.MULTILINE)
    assert len(written) == len(ALIASES)
    assert all((alias.hub_id is None) != (alias.embedded is None) for alias in ALIASES.values())
    sources = [alias.hub_id or str(alias.embedded) for alias in ALIASES.values()]
    assert len(set(sources)) == len(sources)

"""Baking and recovering: exact, whole or not at all, and a plain diffusers checkpoint throughout."""

import errno
import hashlib
import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from pico import pico_eraser, pico_pipeline
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors

from spm_hub.adapters.baking import ORIGINALS, PROVENANCE, bake, read_provenance, recover
from spm_hub.adapters.increments import LowRank
from spm_hub.adapters.manifest import GateDefaults
from spm_hub.attachment.attachment import attach
from spm_hub.errors import CompatibilityError, ModelError, NotFoundError, RegistryError, UsageError
from spm_hub.models.loading import load_pipeline

UNET = Path("unet") / "diffusion_pytorch_model.safetensors"


def digest(folder: Path) -> dict[str, str]:
    """Every file below `folder` with the sha256 of its bytes."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def hidden(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if entry.name.startswith(".")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_the_sum_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    pipe = pico_pipeline(dtype=dtype)
    snoopy, mickey = pico_eraser(pipe.unet, "snoopy", 1), pico_eraser(pipe.unet, "mickey", 2)
    before = {key: tensor.clone() for key, tensor in pipe.unet.state_dict().items()}
    bake(pipe, [snoopy, mickey], tmp_path / "out", strength={"snoopy": 0.5})
    baked = load_tensors(tmp_path / "out" / UNET)
    touched = 0
    for key, original in before.items():
        path = key.removesuffix(".weight")
        expected = original.double()
        for eraser, strength in ((snoopy, 0.5), (mickey, 1.0)):
            increment = eraser.increments.get(path)
            if isinstance(increment, LowRank):
                product = increment.up.double().flatten(1) @ increment.down.double().flatten(1)
                expected = expected + strength * product.reshape(expected.shape)
                touched += 1
        assert baked[key].dtype is dtype
        # One rounding to the base's precision, after a sum in float32.
        bound = torch.finfo(dtype).eps * expected.abs() / 2 + 1e-5 * expected.abs().max()
        assert ((baked[key].double() - expected).abs() <= bound).all(), key
    assert touched == 2 * len(snoopy.increments)
    assert all(torch.equal(tensor, before[key]) for key, tensor in pipe.unet.state_dict().items()), "pipe was changed"


def test_any_diffusers_loads_it_and_it_predicts_what_an_attachment_does(tmp_path: Path) -> None:
    pipe = pico_pipeline()
    eraser = pico_eraser(pipe.unet)
    bake(pipe, [eraser], tmp_path / "out")
    plain = StableDiffusionPipeline.from_pretrained(tmp_path / "out", safety_checker=None)
    latents, states = torch.randn(2, 4, 8, 8), torch.randn(2, 12, 16)
    with torch.no_grad():
        bare = pipe.unet(latents, 10, states).sample
        with attach(pipe, [eraser], gate="always", mode="fold"):
            attached = pipe.unet(latents, 10, states).sample
        assert torch.equal(plain.unet(latents, 10, states).sample, attached)
    assert not torch.equal(attached, bare)


@pytest.mark.parametrize("kind", ["low_rank", "dense", "mask"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_recovering_equals_never_having_baked(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    pipe = pico_pipeline(dtype=dtype)
    names = ("snoopy", "mickey", "pikachu")
    erasers = [pico_eraser(pipe.unet, name, seed, kind=kind) for seed, name in enumerate(names)]
    pipe.save_pretrained(tmp_path / "base")
    bake(pipe, erasers, tmp_path / "all", base="pico")
    bake(pipe, [erasers[2], erasers[0]], tmp_path / "two", base="pico")
    bake(pipe, [erasers[2]], tmp_path / "one", base="pico")

    assert [one.name for one in recover(tmp_path / "all", "mickey").erasers] == ["pikachu", "snoopy"]
    assert digest(tmp_path / "all") == digest(tmp_path / "two")
    recover(tmp_path / "all", "snoopy")
    assert digest(tmp_path / "all") == digest(tmp_path / "one")
    assert recover(tmp_path / "all", "pikachu").erasers == ()
    assert digest(tmp_path / "all") == digest(tmp_path / "base")
    assert hidden(tmp_path) == []


def test_the_remaining_erasers_keep_their_strengths(tmp_path: Path) -> None:
    pipe = pico_pipeline()
    erasers = [pico_eraser(pipe.unet, name, seed) for seed, name in enumerate(("snoopy", "mickey"))]
    bake(pipe, erasers, tmp_path / "both", strength={"snoopy": 0.5, "mickey": 0.7})
    bake(pipe, erasers[1:], tmp_path / "one", strength=0.7)
    recover(tmp_path / "both", "snoopy")
    assert digest(tmp_path / "both") == digest(tmp_path / "one")


def test_a_denoiser_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pico_pipeline()
    erasers = [pico_eraser(pipe.unet, name, seed, kind="dense") for seed, name in enumerate(("snoopy", "mickey"))]
    bake(pipe, erasers, tmp_path / "whole")
    # As diffusers itself does from ten gigabytes on.
    monkeypatch.setattr(pipe, "save_pretrained", partial(pipe.save_pretrained, max_shard_size="20KB"))
    pipe.save_pretrained(tmp_path / "base")
    bake(pipe, erasers, tmp_path / "out")
    bake(pipe, erasers[:1], tmp_path / "one")
    shards = [load_tensors(file) for file in (tmp_path / "out" / "unet").glob("*.safetensors")]
    assert len(shards) > 3
    whole = load_tensors(tmp_path / "whole" / UNET)
    found = {key: tensor for shard in shards for key, tensor in shard.items()}
    assert found.keys() == whole.keys()
    assert all(torch.equal(tensor, whole[key]) for key, tensor in found.items())
    recover(tmp_path / "out", "mickey")
    assert digest(tmp_path / "out") == digest(tmp_path / "one")
    recover(tmp_path / "out", "snoopy")
    assert digest(tmp_path / "out") == digest(tmp_path / "base")


def test_parts_of_several_precisions_are_all_there_again_bit_for_bit(tmp_path: Path) -> None:
    """A base whose denoiser alone is in half precision: neither baking nor recovering rounds its other parts."""
    mixed = pico_pipeline()
    mixed.unet.half()
    mixed.text_encoder.bfloat16()
    mixed.save_pretrained(tmp_path / "base")
    pipe = load_pipeline(str(tmp_path / "base"), dtype="stored")
    bake(
        pipe, [pico_eraser(mixed.unet, name, seed) for seed, name in enumerate(("snoopy", "mickey"))], tmp_path / "out"
    )

    def parts() -> dict[str, dict[str, torch.Tensor]]:
        return {
            part: load_tensors(next((tmp_path / "out" / part).glob("*.safetensors")))
            for part in ("unet", "vae", "text_encoder")
        }

    def same(part: str) -> bool:
        expected = getattr(mixed, part).state_dict()
        found = parts()[part]
        return found.keys() == expected.keys() and all(
            tensor.dtype is expected[key].dtype and torch.equal(tensor, expected[key]) for key, tensor in found.items()
        )

    assert [same(part) for part in ("unet", "vae", "text_encoder")] == [False, True, True]
    assert {tensor.dtype for tensor in parts()["unet"].values()} == {torch.float16}
    recover(tmp_path / "out", "snoopy")
    assert [same(part) for part in ("unet", "vae", "text_encoder")] == [False, True, True]
    recover(tmp_path / "out", "mickey")
    assert [same(part) for part in ("unet", "vae", "text_encoder")] == [True, True, True]


def test_erasers_of_different_modules_restore_what_only_one_of_them_changed(tmp_path: Path) -> None:
    pipe = pico_pipeline()
    paths = list(pico_eraser(pipe.unet).increments)
    first = pico_eraser(pipe.unet, "snoopy", 1, paths=paths[:6])
    second = pico_eraser(pipe.unet, "mickey", 2, paths=paths[3:9])
    bake(pipe, [first, second], tmp_path / "both")
    bake(pipe, [second], tmp_path / "second")
    recover(tmp_path / "both", "snoopy")
    assert digest(tmp_path / "both") == digest(tmp_path / "second")
    assert set(load_tensors(tmp_path / "both" / ORIGINALS)) == {f"{path}.weight" for path in paths[3:9]}


def test_strength_comes_from_the_manifest_unless_it_is_given(tmp_path: Path) -> None:
    pipe = pico_pipeline()
    eraser = pico_eraser(pipe.unet, gate=GateDefaults(strength=2.0))
    assert bake(pipe, [eraser], tmp_path / "a").erasers[0].strength == 2.0
    assert bake(pipe, [eraser], tmp_path / "b", strength=0.25).erasers[0].strength == 0.25
    assert read_provenance(tmp_path / "b").erasers[0].strength == 0.25


def test_what_is_asked_wrongly(tmp_path: Path) -> None:
    pipe = pico_pipeline()
    eraser = pico_eraser(pipe.unet)
    with pytest.raises(UsageError, match="nothing to bake"):
        bake(pipe, [], tmp_path / "out")
    with pytest.raises(UsageError, match="'snoopy' is given twice"):
        bake(pipe, [eraser, eraser], tmp_path / "out")
    with pytest.raises(UsageError, match="'mickey'"):
        bake(pipe, [eraser], tmp_path / "out", strength={"mickey": 1.0})
    with pytest.raises(CompatibilityError, match=r"\(32, .*\(16, "):
        bake(pico_pipeline(channels=(16, 16)), [eraser], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(RegistryError, match="exists already"):
        bake(pipe, [eraser], tmp_path / "out")
    (tmp_path / "out" / "model_index.json").write_text("{}")
    with pytest.raises(RegistryError, match="exists already"):
        bake(pipe, [eraser], tmp_path / "out")
    bake(pipe, [eraser], tmp_path / "out", replace=True)
    assert not (tmp_path / "out" / "mine.txt").exists()


def test_recovering_from_what_is_no_bake(tmp_path: Path) -> None:
    pipe = pico_pipeline()
    pipe.save_pretrained(tmp_path / "plain")
    with pytest.raises(ModelError, match="no baked checkpoint"):
        recover(tmp_path / "plain", "snoopy")
    bake(pipe, [pico_eraser(pipe.unet)], tmp_path / "out")
    with pytest.raises(NotFoundError, match="did you mean snoopy"):
        recover(tmp_path / "out", "snopy")


def test_an_altered_bake_is_refused_and_left_alone(tmp_path: Path) -> None:
    pipe = pico_pipeline()
    erasers = [pico_eraser(pipe.unet, name, seed) for seed, name in enumerate(("snoopy", "mickey"))]
    out = tmp_path / "out"
    for file, says in ((ORIGINALS, "originals are lost"), ("spmhub/erasers/mickey.safetensors", "altered")):
        bake(pipe, erasers, out, replace=True)
        content = bytearray((out / file).read_bytes())
        content[-1] ^= 1
        (out / file).write_bytes(content)
        before = digest(out)
        with pytest.raises(ModelError, match=says):
            recover(out, "snoopy")
        assert digest(out) == before
    file = out / "spmhub/erasers/mickey.safetensors"
    for spoil, says in (
        (lambda: pico_eraser(pipe.unet, "mickey", 7).save(file), "altered after it was baked"),
        (file.unlink, "mickey is lost"),
    ):
        bake(pipe, erasers, out, replace=True)
        spoil()
        before = digest(out)
        with pytest.raises(ModelError, match=says):
            recover(out, "snoopy")
        assert digest(out) == before
    bake(pipe, erasers, out, replace=True)
    said = json.loads((out / PROVENANCE).read_text())
    (out / PROVENANCE).write_text(json.dumps({**said, "extra": 1}))
    with pytest.raises(ModelError, match="extra"):
        recover(out, "snoopy")


@pytest.mark.parametrize("strength", [-1.0, 4.5, 1e38])
def test_a_record_of_a_strength_beyond_the_limits_needs_force(tmp_path: Path, strength: float) -> None:
    pipe = pico_pipeline()
    erasers = [pico_eraser(pipe.unet, name, seed) for seed, name in enumerate(("snoopy", "mickey"))]
    out = tmp_path / "out"
    bake(pipe, erasers, out)
    said = json.loads((out / PROVENANCE).read_text())
    (altered,) = [one for one in said["erasers"] if one["name"] == "mickey"]
    altered["strength"] = strength
    (out / PROVENANCE).write_text(json.dumps(said))
    before = digest(out)
    with pytest.raises(ModelError, match=r"would fold mickey again, and its strength is") as refused:
        recover(out, "snoopy")
    assert "--force" in str(refused.value.mend)
    assert digest(out) == before
    assert recover(tmp_path / "out", "mickey").erasers[0].name == "snoopy", "the one that is taken out does no harm"


def test_a_strength_that_a_user_baked_is_recovered_by_force(tmp_path: Path) -> None:
    pipe = pico_pipeline()
    erasers = [pico_eraser(pipe.unet, name, seed) for seed, name in enumerate(("snoopy", "mickey"))]
    bake(pipe, erasers, tmp_path / "both", strength={"mickey": -0.5})
    bake(pipe, erasers[1:], tmp_path / "one", strength=-0.5)
    recover(tmp_path / "both", "snoopy", force=True)
    assert digest(tmp_path / "both") == digest(tmp_path / "one")


@pytest.mark.parametrize("place", ["unet/notes.txt", "spmhub/erasers/more.safetensors", "unet/more"])
def test_what_a_link_in_a_strangers_checkpoint_names_is_not_copied(tmp_path: Path, place: str) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key.pem").write_text("secret")
    out = tmp_path / "out"
    bake(pico_pipeline(), [pico_eraser(pico_pipeline().unet)], out)
    (out / place).symlink_to(tmp_path / "private" / ("key.pem" if "." in place else ""))
    before = digest(out)
    with pytest.raises(ModelError, match=f"{Path(place).name} is a symbolic link"):
        recover(out, "snoopy")
    assert digest(out) == before


@pytest.mark.parametrize("kind", ["large", "pipe"])
def test_a_record_that_is_no_small_file(tmp_path: Path, kind: str) -> None:
    bake(pico_pipeline(), [pico_eraser(pico_pipeline().unet)], tmp_path / "out")
    record = tmp_path / "out" / PROVENANCE
    if kind == "large":
        record.write_bytes(record.read_bytes() + b" " * 2**21)
    else:
        record.unlink()
        os.mkfifo(record)
    with pytest.raises(ModelError, match=r"has more than|is no file"):
        recover(tmp_path / "out", "snoopy")


@pytest.mark.parametrize("denoiser", ["{outside}", "../other/unet", "unet/..", ""])
def test_a_record_that_names_another_models_folder_overwrites_nothing(tmp_path: Path, denoiser: str) -> None:
    pipe = pico_pipeline()
    pipe.save_pretrained(tmp_path / "other")
    bake(pipe, [pico_eraser(pipe.unet)], tmp_path / "out")
    said = json.loads((tmp_path / "out" / PROVENANCE).read_text())
    said["denoiser"] = denoiser.format(outside=tmp_path / "other" / "unet")
    (tmp_path / "out" / PROVENANCE).write_text(json.dumps(said))
    before = digest(tmp_path)
    with pytest.raises(ModelError, match="denoiser"):
        recover(tmp_path / "out", "snoopy")
    assert digest(tmp_path) == before


@pytest.mark.parametrize(
    ("key", "tensor", "says"),
    [
        ("conv_in.weight", torch.zeros(16, 4, 3, 3, dtype=torch.float64), "float32 of .*float64 of"),
        ("conv_in.weight", torch.zeros(16, 4, 3, 4), r"\(16, 4, 3, 3\), .*\(16, 4, 3, 4\)"),
        ("nowhere.weight", torch.zeros(1), "has no weight nowhere"),
    ],
)
def test_originals_of_another_model_are_not_written(tmp_path: Path, key: str, tensor: torch.Tensor, says: str) -> None:
    pipe = pico_pipeline()
    out = tmp_path / "out"
    bake(pipe, [pico_eraser(pipe.unet)], out)
    save_tensors({**load_tensors(out / ORIGINALS), key: tensor}, out / ORIGINALS)
    before = digest(out)
    with pytest.raises(ModelError, match=says):
        recover(out, "snoopy")
    assert digest(out) == before


def test_the_folder_itself_is_replaced_by_whatever_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pico_pipeline()
    erasers = [pico_eraser(pipe.unet, name, seed) for seed, name in enumerate(("snoopy", "mickey"))]
    bake(pipe, erasers, tmp_path / "out")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    recover(tmp_path / "link", "snoopy")
    assert (tmp_path / "link").is_symlink()
    assert [one.name for one in read_provenance(tmp_path / "out").erasers] == ["mickey"]
    monkeypatch.chdir(tmp_path / "out")
    recover(Path(), "mickey")
    assert not (tmp_path / "out" / PROVENANCE).exists()
    assert hidden(tmp_path) == []


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pico_pipeline()
    erasers = [pico_eraser(pipe.unet, name, seed) for seed, name in enumerate(("snoopy", "mickey"))]
    bake(pipe, erasers, tmp_path / "out")
    before = digest(tmp_path / "out")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RegistryError, match="No space left"):
        bake(pipe, erasers, tmp_path / "other")
    with pytest.raises(RegistryError, match="No space left"):
        bake(pipe, erasers[:1], tmp_path / "out", replace=True)
    with pytest.raises(RegistryError, match="No space left"):
        recover(tmp_path / "out", "snoopy")
    assert digest(tmp_path / "out") == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_swap_that_fails_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pico_pipeline()
    bake(pipe, [pico_eraser(pipe.unet)], tmp_path / "out")
    before = digest(tmp_path / "out")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(RegistryError):
        recover(tmp_path / "out", "snoopy")
    assert digest(tmp_path / "out") == before
    assert hidden(tmp_path) == []


def test_an_attached_pipeline_is_baked_from_its_own_weights(tmp_path: Path) -> None:
    pipe = pico_pipeline()
    eraser = pico_eraser(pipe.unet)
    bake(pipe, [eraser], tmp_path / "bare")
    with attach(pipe, [pico_eraser(pipe.unet, "mickey", 7)], gate="always"), torch.no_grad():
        pipe.unet(torch.randn(1, 4, 8, 8), 10, torch.randn(1, 12, 16))
        bake(pipe, [eraser], tmp_path / "attached")
    assert digest(tmp_path / "bare")[str(UNET)] == digest(tmp_path / "attached")[str(UNET)]

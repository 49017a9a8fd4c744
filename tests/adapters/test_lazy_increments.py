"""Increments left in their files: read when first needed, checked then, dropped under a budget; few of many act."""

import pytest
import torch
from pico import pico_eraser, pico_pipeline

from spm_hub import attach
from spm_hub.adapters.adapter import load_file
from spm_hub.adapters.formats.lazy import StoredIncrements
from spm_hub.errors import AdapterFileError, UsageError

NAMES = ("mickey", "snoopy", "spongebob")


@pytest.fixture(scope="module")
def pipe():
    return pico_pipeline()


@pytest.fixture
def files(pipe, tmp_path):
    paths = {}
    for seed, name in enumerate(NAMES):
        paths[name] = tmp_path / f"{name}.safetensors"
        pico_eraser(pipe.unet, name, seed=seed).save(paths[name], tmp_path / f"{name}.json")
    return paths


def lazily(paths, *names):
    return [load_file(paths[name], paths[name].with_suffix(".json"), lazy=True) for name in names or paths]


def draw(pipe, prompt):
    generator = torch.Generator().manual_seed(1)
    return pipe(prompt, num_inference_steps=2, generator=generator, output_type="latent").images


def held(adapter):
    assert isinstance(adapter.increments, StoredIncrements)
    return adapter.increments.nbytes


@pytest.mark.parametrize("kind", ["low_rank", "dense", "mask"])
def test_a_lazy_adapter_holds_what_an_eager_one_does(pipe, tmp_path, kind):
    path = tmp_path / "snoopy.safetensors"
    pico_eraser(pipe.unet, "snoopy", kind=kind).save(path)
    eager, lazy = load_file(path), load_file(path, lazy=True)
    assert lazy.manifest == eager.manifest
    assert held(lazy) == 0
    assert set(lazy.increments) == set(eager.increments)
    for module, increment in eager.increments.items():
        outline = lazy.outline[module]
        assert (outline.kind, outline.dtype, outline.weight_shape) == (
            increment.kind, increment.dtype, increment.weight_shape,
        )  # fmt: skip
        again = lazy.increments[module].tensors()
        assert again.keys() == increment.tensors().keys()
        assert all(torch.equal(tensor, again[part]) for part, tensor in increment.tensors().items())
    assert held(lazy) == sum(increment.nbytes for increment in eager.increments.values())


def test_files_of_one_layout_share_one_outline(files):
    one, other, _ = lazily(files)
    assert one.outline is other.outline


def test_attaching_reads_nothing_and_a_picture_reads_only_what_acts_on_it(pipe, files):
    adapters = lazily(files)
    expected = {}
    for prompt in ("snoopy", "a dog"):
        with attach(pipe, [load_file(path) for path in files.values()], top_k=1):
            expected[prompt] = draw(pipe, prompt)
    with attach(pipe, adapters, top_k=1) as erasers:
        assert [held(adapter) for adapter in adapters] == [0, 0, 0]
        assert torch.equal(draw(pipe, "snoopy"), expected["snoopy"])
        acting = {name for name, gamma in erasers.gates("snoopy").items() if gamma}
        assert acting == {"snoopy"}
        assert {adapter.name for adapter in adapters if held(adapter)} == acting
        assert torch.equal(draw(pipe, "a dog"), expected["a dog"])


def test_the_budget_drops_those_used_longest_ago_and_changes_no_picture(pipe, files):
    adapters = lazily(files)
    size = sum(increment.nbytes for increment in adapters[0].outline.values())
    prompts = ("snoopy", "mickey", "spongebob", "snoopy")
    with attach(pipe, lazily(files), top_k=1):
        expected = [draw(pipe, prompt) for prompt in prompts]
    by_name = {adapter.name: adapter for adapter in adapters}
    with attach(pipe, adapters, top_k=1, increment_budget=2 * size):
        for prompt, picture in zip(prompts, expected, strict=True):
            assert torch.equal(draw(pipe, prompt), picture)
            assert held(by_name[prompt]) == size
            assert sum(map(held, adapters)) <= 2 * size
        assert held(by_name["mickey"]) == 0


def test_a_file_replaced_after_attaching_is_refused_when_it_is_read(pipe, files):
    adapters = lazily(files, "snoopy")
    bare = draw(pipe, "snoopy")
    with attach(pipe, adapters):
        pico_eraser(pipe.unet, "snoopy", seed=77).save(files["snoopy"])
        for _ in range(2):  # never silently off, however often it is tried
            with pytest.raises(AdapterFileError, match="was replaced after it was attached"):
                draw(pipe, "snoopy")
    assert torch.equal(draw(pipe, "snoopy"), bare)


@pytest.mark.parametrize("damage", ["flipped", "nan"])
def test_damage_behind_the_header_is_found_when_it_is_read(pipe, files, damage):
    path = files["snoopy"]
    data = bytearray(path.read_bytes())
    data[-4:] = bytes([data[-4] ^ 1, *data[-3:]]) if damage == "flipped" else b"\x00\x00\xc0\x7f"
    path.write_bytes(data)
    adapter = load_file(path, lazy=True)
    with pytest.raises(AdapterFileError, match="altered"):
        next(iter(adapter.increments.values()))


def test_damage_of_the_header_is_found_at_once(files):
    path = files["snoopy"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(AdapterFileError, match="truncated"):
        load_file(path, lazy=True)


def test_threshold_and_top_k_choose_by_gamma(pipe, files):
    with attach(pipe, lazily(files)) as erasers:
        every = erasers.gates("snoopy by the church")
    ranked = sorted(every, key=lambda name: (-every[name], name))
    for count in (1, 2, 3, 9):
        with attach(pipe, lazily(files), top_k=count) as erasers:
            assert erasers.gates("snoopy by the church") == {
                name: every[name] if name in ranked[:count] else 0.0 for name in every
            }
    middle = every[ranked[1]]
    with attach(pipe, lazily(files), threshold=middle) as erasers:
        assert erasers.gates("snoopy by the church") == {
            name: gamma if gamma >= middle else 0.0 for name, gamma in every.items()
        }
    with attach(pipe, lazily(files), threshold=2.0) as erasers:
        assert set(erasers.gates("snoopy").values()) == {0.0}


def test_a_batch_selects_for_each_prompt(pipe, files):
    prompts = ["snoopy", "mickey"]
    with attach(pipe, lazily(files), top_k=1):
        together = draw(pipe, prompts)
    with attach(pipe, lazily(files, "snoopy", "mickey"), gate="transport", top_k=1):
        assert torch.equal(draw(pipe, prompts), together)


@pytest.mark.parametrize("options", [{"top_k": 0}, {"threshold": float("nan")}, {"increment_budget": -1}])
def test_a_wrong_choice_is_refused(pipe, files, options):
    with pytest.raises(UsageError, match=next(iter(options))):
        attach(pipe, lazily(files), **options)

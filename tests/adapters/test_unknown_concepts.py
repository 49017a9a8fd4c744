"""Files that do not say what they erase, and those that do, in the words of each program."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_adapter import snoopy

from spm_hub.adapters.adapter import Adapter, load_file
from spm_hub.adapters.conversion import Description, read
from spm_hub.adapters.lookup import remark_on_unknown_concepts, with_concepts
from spm_hub.adapters.manifest import Concept, Manifest
from spm_hub.errors import ManifestError, NotFoundError, UsageError

SETTINGS = {"target": "van gogh", "positive": "van gogh", "unconditional": "", "neutral": "", "action": "erase"}
OTHER = {**SETTINGS, "target": "monet, the painter"}


def lora(path: Path, **metadata: str) -> Path:
    """A plain LoRA of one module of SD1."""
    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    save_file(
        {f"{module}.lora_down.weight": torch.ones(1, 768), f"{module}.lora_up.weight": torch.ones(320, 1)},
        path,
        metadata or None,
    )
    return path


@pytest.mark.parametrize(
    ("metadata", "names"),
    [
        ({}, ()),
        ({"ss_output_name": "erase_snoopy", "modelspec.title": "snoopy"}, ()),
        ({"prompts": " "}, ()),
        ({"prompts": "nudity, nude,naked"}, ("nudity", "nude", "naked")),  # SPM
        ({"erase_concept": "nudity"}, ("nudity",)),  # ESD
        ({"prompts": json.dumps([SETTINGS, OTHER])}, ("van gogh", "monet, the painter")),  # LECO
        ({"prompts": f"{json.dumps(SETTINGS)},{json.dumps(OTHER)}"}, ("van gogh", "monet, the painter")),  # sliders
        ({"prompts": '[{"target": null}, 3, {"positive": "x"}]'}, ()),
        ({"prompts": '{"target": "cut o'}, ()),
        ({"prompts": "[" * 40}, ()),
    ],
)
def test_the_concept_is_what_the_header_says_and_never_the_files_name(
    metadata: dict[str, str], names: tuple[str, ...], tmp_path: Path
) -> None:
    file = lora(tmp_path / "erase_snoopy_v2.safetensors", **metadata)
    for adapter in (load_file(file), load_file(file, lazy=True), read(file, Description())[0]):
        assert adapter.manifest.concept.names == names
        assert adapter.name == "erase_snoopy_v2"
        assert ("erases an unknown concept" in repr(adapter)) == (names == ())


def test_unknown_stays_unknown_in_our_files(tmp_path: Path) -> None:
    adapter = load_file(lora(tmp_path / "step_10.safetensors"))
    adapter.save(tmp_path / "kept.safetensors", tmp_path / "kept.json")
    for again in (
        load_file(tmp_path / "kept.safetensors"),
        load_file(tmp_path / "kept.safetensors", tmp_path / "kept.json"),
    ):
        assert again.manifest.concept == Concept(target=None)
    assert json.loads((tmp_path / "kept.json").read_text())["concept"]["target"] is None


def test_a_manifest_may_not_leave_the_target_out_or_have_aliases_alone() -> None:
    whole = json.loads(snoopy().manifest.to_json())
    with pytest.raises(ManifestError, match=r"concept\.target"):
        Manifest.from_json(json.dumps({**whole, "concept": {"kind": "character"}}))
    with pytest.raises(ManifestError, match="the first name is the target"):
        Manifest.from_json(json.dumps({**whole, "concept": {"target": None, "aliases": ["nude"]}}))


def test_what_the_caller_says_outranks_the_file() -> None:
    nudity = snoopy(name="n", concept=Concept(target="nudity", aliases=("nude", "naked"), kind="nsfw"))
    assert nudity.with_concept(" gore ").manifest.concept == Concept(target="gore", kind="nsfw")
    assert nudity.with_concept("nude").manifest.concept.names == ("nude", "nudity", "naked")
    assert nudity.with_concept("nude").increments == nudity.increments
    with pytest.raises(UsageError, match="empty"):
        nudity.with_concept(" ")


@pytest.mark.parametrize(("said", "name"), [("van gogh", "van-gogh"), ("nude", "n"), ("nudity", "n")])
def test_another_concept_in_place_of_an_embedded_one_gives_another_name(said: str, name: str, tmp_path: Path) -> None:
    snoopy(name="n", concept=Concept(target="nudity", aliases=("nude",))).save(tmp_path / "n.safetensors")
    adapter, _ = read(tmp_path / "n.safetensors", Description(concept=said))
    assert (adapter.name, adapter.manifest.concept.target) == (name, said)
    renamed, _ = read(tmp_path / "n.safetensors", Description(concept=said, name="mine"))
    assert (renamed.name, renamed.manifest.concept.target) == ("mine", said)


def test_concepts_for_some_of_several_erasers() -> None:
    one, two = snoopy(name="one", concept=Concept(target=None)), snoopy(name="two", concept=Concept(target="dog"))

    def names(found: list[Adapter]) -> list[tuple[str, ...]]:
        return [adapter.manifest.concept.names for adapter in found]

    assert names(with_concepts([one, two], None)) == [(), ("dog",)]
    assert names(with_concepts([one, two], {"one": "cat"})) == [("cat",), ("dog",)]
    assert names(with_concepts([one], "cat")) == [("cat",)]
    with pytest.raises(UsageError, match="2 erasers: it has to say whose it is") as caught:
        with_concepts([one, two], "cat")
    assert "concept={'one': 'cat'}" in str(caught.value)
    with pytest.raises(NotFoundError, match="'onne'"):
        with_concepts([one, two], {"onne": "cat"})
    with pytest.raises(UsageError, match="it is a concept's name"):
        with_concepts([one], {"one": 3})  # type: ignore[dict-item]


def test_the_remark_counts_and_names_a_command(tmp_path: Path) -> None:
    unknown = Concept(target=None)
    file = lora(tmp_path / "a b.safetensors")
    assert f"spmhub convert '{file}' --concept NAME" in remark_on_unknown_concepts([load_file(file)])
    many = [snoopy(name=f"e{index}", concept=unknown) for index in range(5)]
    assert remark_on_unknown_concepts(many).startswith("e0, e1, e2 and 2 more name no concepts, so they act fully")

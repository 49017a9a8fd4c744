"""Gates without a pipeline answer, to the last bit, as those of an attached one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pico_families import family_pipeline
from test_families import eraser
from torch import Tensor

import spm_hub
from spm_hub.adapters.adapter import Adapter
from spm_hub.adapters.manifest import Concept
from spm_hub.attachment.gates import bank
from spm_hub.errors import NotFoundError, UsageError
from spm_hub.registry.registry import Registry

PROMPTS = ("snoopy", "a dog on the beach", "a painting by van gogh", "snopy and a cat", "eggs and ham")
LONG = "red " * 30 + "snoopy"


@pytest.fixture(scope="module", autouse=True)
def small_bank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Few sentences, in a cache of these tests, to encode them in a moment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(bank, "_LEAST", 96)
        patch.setattr(bank, "_MOST", 96)
        yield


def encoding(pipe: Any, **options: Any) -> Callable[[Sequence[str]], Tensor]:
    """The states of texts as the denoiser of this pipeline receives them."""
    others = {"prompt_2": None} if "prompt_2" in pipe.encode_prompt.__code__.co_varnames else {}

    def encode(texts: Sequence[str]) -> Tensor:
        classifier = {"do_classifier_free_guidance": False} if hasattr(pipe, "unet") else {}
        states: Tensor = pipe.encode_prompt(
            prompt=list(texts), device="cpu", num_images_per_prompt=1, **others, **classifier, **options
        )[0]
        return states

    return encode


def tokenizers(pipe: Any) -> list[Any]:
    return [getattr(pipe, name, None) for name in ("tokenizer", "tokenizer_2", "tokenizer_3")]


@pytest.mark.parametrize(
    ("name", "gate"),
    [("sd1", "calibrated"), ("sd1", "evidence"), ("sd1", None), ("sdxl", "calibrated"), ("flux-dev", "calibrated")],
)
def test_the_answers_of_an_attached_pipeline(name: str, gate: Any) -> None:
    pipe: Any = family_pipeline(name)
    options = {"max_sequence_length": 16} if name == "flux-dev" else {}
    protected = eraser(pipe, "mickey", 3)
    defaults = protected.manifest.gate.model_copy(update={"protected": (PROMPTS[1],)})
    erasers = [
        eraser(pipe, "snoopy", 1),
        eraser(pipe, "van gogh", 2),
        Adapter(protected.manifest.model_copy(update={"gate": defaults}), protected.increments),
    ]
    with torch.no_grad():
        encode = encoding(pipe, **options)
        asked = spm_hub.TextGates(erasers, encode, tokenizers(pipe), gate=gate, progress=False, **options)
        answers = [asked.gates(prompt) for prompt in PROMPTS]
        with_states = [asked.gates(prompt, encode([prompt])) for prompt in PROMPTS]
        reasons = [asked.explain(prompt) for prompt in PROMPTS]
        once = spm_hub.gates(
            erasers, PROMPTS[3], encode=encode, tokenizers=tokenizers(pipe), gate=gate, threshold=0.5, top_k=1,
            progress=False, **options,
        )  # fmt: skip
    with spm_hub.attach(pipe, erasers, gate=gate, progress=False) as attached:
        assert answers == with_states == [attached.gates(prompt, **options) for prompt in PROMPTS]
        assert reasons == [attached.explain(prompt, **options) for prompt in PROMPTS]
    with spm_hub.attach(pipe, erasers, gate=gate, progress=False, threshold=0.5, top_k=1) as attached:
        assert once == attached.gates(PROMPTS[3], **options)
    assert answers[0]["snoopy"] == answers[2]["van-gogh"] == 1
    assert answers[1]["mickey"] == 0, "a protected prompt"
    assert reasons[1]["mickey"].term == "protected"


def test_names_in_a_registry_are_read_without_their_increments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe: Any = family_pipeline("sd1")
    Registry(tmp_path).add(eraser(pipe, "van gogh", 2))
    file = next(tmp_path.rglob("*.safetensors"))
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    file.write_bytes(whole[:header] + bytes(len(whole) - header))  # the increments are others than the hash says
    with torch.no_grad():
        known = {"encode": encoding(pipe), "tokenizers": tokenizers(pipe), "registry": tmp_path, "progress": False}
        assert spm_hub.gates("van gogh", "a street by van gogh", **known) == {"van-gogh": 1.0}
        assert spm_hub.gates(["van gogh"], "a street", gate=0.25, **known) == {"van-gogh": 0.25}
        with pytest.raises(NotFoundError, match="van goch"):
            spm_hub.gates("van goch", "a street", **known)


def test_what_is_wrong_is_said() -> None:
    pipe: Any = family_pipeline("sd1")
    snoopy = eraser(pipe, "snoopy", 1)
    with torch.no_grad():
        encode = encoding(pipe)
        asked = spm_hub.TextGates([snoopy], encode, tokenizers(pipe), progress=False)
        with pytest.raises(UsageError, match="one text, not"):
            asked.gates(["snoopy"])  # type: ignore[arg-type]
        with pytest.raises(UsageError, match=r"\(1, tokens, d_text\), not \(2, 12, 16\)"):
            asked.gates("snoopy", encode(["snoopy", "a dog"]))
        with pytest.warns(UserWarning, match="cut off is 'red"):
            asked.gates(LONG)
        with pytest.raises(UsageError, match="encode returned tuple for 1 texts"):
            spm_hub.gates(snoopy, "a dog", encode=lambda texts: pipe.encode_prompt(texts, "cpu", 1, False))
        with pytest.raises(UsageError, match="attached twice"):
            spm_hub.gates([snoopy, snoopy], "a dog", encode=encode)
        with pytest.raises(UsageError, match="6 tokenizers"):
            spm_hub.gates(snoopy, "a dog", encode=encode, tokenizers=tokenizers(pipe) * 2)
        nameless = Adapter(snoopy.manifest.model_copy(update={"concept": Concept(target=None)}), snoopy.increments)
        with pytest.warns(UserWarning, match="acts fully on every prompt"):
            assert spm_hub.gates(nameless, "a dog", encode=encode) == {"snoopy": 1.0}
        for concept, gamma in (("dog", 1.0), ("cat", 0.0)):
            found = spm_hub.gates(nameless, "a dog", encode=encode, concept=concept, gate="calibrated", progress=False)
            assert found == {"snoopy": gamma}


def test_without_tokenizers_words_and_states_still_count() -> None:
    pipe: Any = family_pipeline("sd1")
    with torch.no_grad():
        asked = spm_hub.TextGates([eraser(pipe, "snoopy", 1)], encoding(pipe), gate="calibrated", progress=False)
        assert asked.gates("snoopy on the beach") == {"snoopy": 1.0}
        assert asked.explain("snoopy on the beach")["snoopy"].term == "words"
        assert asked.gates("eggs and ham") == {"snoopy": 0.0}


def test_each_text_encoder_has_a_bank_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pipe: Any = family_pipeline("sd1")
    snoopy = eraser(pipe, "snoopy", 1)
    with torch.no_grad():
        encode = encoding(pipe)
        for each in (encode, lambda texts: encode(texts).flip(-1), encode):
            spm_hub.gates(snoopy, "a dog", encode=each, gate="calibrated", progress=False)
    assert len(list((tmp_path / "spm-hub" / "banks").iterdir())) == 2

"""The calibrated gate on the sketchbook: quiet elsewhere, on where it should be, and independent of other erasers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pico_families import family_pipeline
from safetensors.torch import load_file
from topologies import random_eraser

import spm_hub
from spm_hub.adapters.adapter import Adapter
from spm_hub.attachment.gates.bank import Bank, plan_bank, positions_of, sentences, unit_rows
from spm_hub.attachment.gates.calibrated import Calibration, PreparedCalibratedGate, _reached, calibrate, mean_state
from spm_hub.attachment.gates.gate import Prompts
from spm_hub.attachment.text_encoding import encode_together
from spm_hub.models.architectures import denoiser_of

ROOT = Path(__file__).resolve().parents[3]
NAMES = ("snoopy", "van-gogh", "nudity", "mickey", "spongebob")
FRAMES = ("show me {} please", "{} is my favourite", "is there {} here", "why, {}!", "an old postcard with {}, faded")
OTHER = (
    "a quiet harbour before the storm", "two plumbers carry a bath", "the price of eggs went up", "an owl in a barn",
    "grandma knits a blue scarf", "traffic jam, seen from above", "a bowl of cherries", "my bicycle has a flat tyre",
    "an astronaut waters the plants", "fresh bread, macro", "a tractor by cezanne", "donald duck plays chess",
    "children throw leaves", "a castle in the fog", "the orchestra tunes", "neon sign above a noodle shop",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def pipe() -> Any:
    return spm_hub.load_pipeline("sketchbook")


@pytest.fixture(scope="module")
def shipped() -> list[Adapter]:
    return [spm_hub.load(name, registry=ROOT) for name in NAMES]


def spellings(adapter: Adapter) -> list[str]:
    concept = adapter.manifest.concept
    return [
        text
        for name in (concept.target, *concept.aliases)
        for text in (name, name.upper(), f"{name}s", f"{name}'s", name.replace(" ", ""))
    ]


def test_it_is_off_elsewhere_and_on_for_every_spelling(pipe: Any, shipped: list[Adapter]) -> None:
    with spm_hub.attach(pipe, shipped, gate="calibrated") as erasers:
        acting = [name for text in OTHER for name, gamma in erasers.gates(text).items() if gamma > 0]
        assert len(acting) <= 0.02 * len(OTHER) * len(NAMES) + 1, acting
        for adapter in shipped:
            for spelling in spellings(adapter):
                for frame in FRAMES:
                    assert erasers.gates(frame.format(spelling))[adapter.name] >= 0.9, (frame, spelling)


def test_embeddings_alone_are_enough(pipe: Any, shipped: list[Adapter]) -> None:
    with spm_hub.attach(pipe, shipped, gate="calibrated") as erasers:
        gate = erasers.gate_of("snoopy")
        assert isinstance(gate, PreparedCalibratedGate)
        for index, adapter in enumerate(shipped):
            texts = [frame.format(adapter.manifest.concept.target) for frame in FRAMES]
            named = gate.gammas(Prompts(None, None, encode_together(pipe, type(pipe).__mro__[1], texts)))
            assert bool((named[:, index] >= 0.9).all()), adapter.name


def test_a_prompt_that_no_eraser_concerns_is_drawn_as_by_the_base(pipe: Any, shipped: list[Adapter]) -> None:
    def drawn() -> torch.Tensor:
        seed = torch.Generator().manual_seed(3)
        return pipe("an owl in a barn", num_inference_steps=3, output_type="latent", generator=seed).images

    bare = drawn()
    with spm_hub.attach(pipe, shipped, gate="calibrated") as erasers:
        assert set(erasers.gates("an owl in a barn").values()) == {0.0}
        assert torch.equal(drawn(), bare)
        assert not torch.equal(drawn(), drawn() + 1)
    assert torch.equal(drawn(), bare)


def test_gammas_do_not_depend_on_the_other_erasers(pipe: Any, shipped: list[Adapter]) -> None:
    texts = [*OTHER, "snoop at a dogs house", "a small nude", "gogh", "painting with swirls", "mickey"]
    with spm_hub.attach(pipe, shipped, gate="calibrated") as erasers:
        together = [erasers.gates(text) for text in texts]
        erasers.recover("van-gogh")
        assert [erasers.gates(text)["nudity"] for text in texts] == [gammas["nudity"] for gammas in together]
    for adapter in shipped:
        with spm_hub.attach(pipe, [adapter], gate="calibrated") as erasers:
            assert [erasers.gates(text)[adapter.name] for text in texts] == [g[adapter.name] for g in together]


def test_explanations_name_the_term_and_the_words(pipe: Any, shipped: list[Adapter]) -> None:
    with spm_hub.attach(pipe, shipped, gate="calibrated") as erasers:
        found = erasers.explain("Snopy's house")
        assert (found["snoopy"].gamma, found["snoopy"].term, found["snoopy"].shown) == (1.0, "words", "snopy's")
        assert (found["mickey"].gamma, found["mickey"].term) == (0.0, "none")
        assert {name: one.gamma for name, one in found.items()} == erasers.gates("Snopy's house")
        # One of van gogh's two terms of states is not used: "ivan" reads like the name. The other one is shown.
        assert all("inf" not in one.shown for one in erasers.explain("a dog").values())
    with spm_hub.attach(pipe, shipped, gate="transport", top_k=1) as erasers:
        found = erasers.explain("snoopy")
        assert (found["snoopy"].term, found["snoopy"].gamma) == ("transport", 1.0)
        assert {found[name].term for name in NAMES[1:]} == {"selection"}


def test_the_scores_for_attackers_are_those_of_the_gate_and_have_gradients(pipe: Any, shipped: list[Adapter]) -> None:
    texts = [*OTHER, *(adapter.manifest.concept.target for adapter in shipped)]
    with spm_hub.attach(pipe, shipped, gate="calibrated") as erasers:
        gate = erasers.gate_of("snoopy")
        assert isinstance(gate, PreparedCalibratedGate)
        states = encode_together(pipe, type(pipe).__mro__[1], texts).requires_grad_()
        scores, gammas = gate.scores(states), gate.gammas(Prompts(None, None, states))
        np.testing.assert_allclose(scores.detach().clamp(0, 1), gammas, atol=2e-3)
        (gradient,) = torch.autograd.grad(scores.sum(), states)
        assert bool(gradient.isfinite().all())
        assert float(gradient.abs().sum()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd2", "sdxl", "sd3", "flux-dev", "pixart", "qwen-image", "flux-2"])
def test_every_kind_of_text_encoder_is_calibrated(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spm_hub.attachment.gates.bank.sentences", lambda: sentences()[:256])
    pipe = family_pipeline(family)
    with spm_hub.attach(pipe, [random_eraser(denoiser_of(pipe))], gate="calibrated") as erasers:
        (name,) = erasers.names
        concept = erasers._planner.erasers[name].adapter.manifest.concept.target
        # The pico FLUX.2 has fewer layers than the default ones that its states are read from.
        layers: Any = {"text_encoder_out_layers": (1, 2)} if family == "flux-2" else {}
        assert erasers.gates(f"a photo of {concept} on the beach", **layers)[name] == 1.0
        assert 0.0 <= erasers.gates("two plumbers carry a bath", **layers)[name] <= 1.0


def unit_bank(seed: int, count: int = 300, width: int = 6) -> Bank:
    """Make a bank of random states around one mean."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(width, width, generator=generator)
    states = torch.randn(count, 4, width, generator=generator) @ spread + 3 * torch.randn(width, generator=generator)
    encode = {"": states[0], **dict(zip(sentences(), states, strict=False))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spm_hub.attachment.gates.bank.sentences", lambda: sentences()[:count])
        return plan_bank(
            lambda texts: torch.stack([encode[text] for text in texts]), f"random {seed} {count} {width}", {}
        ).open()


def test_the_direction_is_fishers_discriminant_written_out_in_numpy() -> None:
    bank = unit_bank(5)
    rows = bank.rows.double().numpy().reshape(-1, 6) / 2**14
    covariance = np.cov(rows.T) + 0.02 * np.trace(np.cov(rows.T)) / 6 * np.eye(6)
    name = unit_rows(torch.randn(1, 1, 6, generator=torch.Generator().manual_seed(9)))
    about = torch.zeros(300, dtype=torch.bool)
    (found,) = calibrate([["x"]], lambda texts: name.expand(len(texts), 1, 6), bank, [about])
    wanted = np.linalg.solve(covariance, name[0, 0].numpy() - rows.mean(0))
    np.testing.assert_allclose(found.directions[0, 0], wanted / np.linalg.norm(wanted), atol=2e-3)
    # The score of the bank's mean is 0 and that of the name 1, for both terms.
    for term in range(2):
        products = np.array([rows.mean(0), name[0, 0].numpy()]) @ found.directions[term, 0].numpy()
        scores = (products - float(found.centre[term, 0])) * float(found.scale[term, 0])
        np.testing.assert_allclose(scores, [0, 1], atol=1e-3)
    # Of 300 sentences none has a greater score than the beginning of the state's ramp, and four than the sentence's.
    states = (rows.reshape(300, 4, 6) - rows.mean(0)) @ found.directions[0, 0].numpy() * float(found.scale[0, 0])
    means = (rows.reshape(300, 4, 6).mean(1) - rows.mean(0)) @ found.directions[1, 0].numpy()
    of_state = states.max(1)
    of_sentence = (np.sqrt((states.clip(0) ** 2).mean(1)) + means * float(found.scale[1, 0])) / 2
    for term, scores in enumerate((of_state, of_sentence)):
        assert np.isfinite(float(found.start[0, 0, term, 0]))
        assert (scores > float(found.start[0, 0, term, 0]) + 1e-6).sum() == (0, 4)[term]


@pytest.mark.parametrize(("crowd", "least", "most"), [(0, 6, 10), (2, 1, 4), (5, 0, 1), (9, 0, 0)])
def test_a_share_of_sentences_is_that_of_all_names_together(crowd: int, least: int, most: int) -> None:
    """Of 1,000 sentences ten have a greater score by any name, if the share is 0.01; fewer among more erasers."""
    scores = torch.randn(1000, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    scales = torch.tensor([1.0, 5.0, 0.1, 2.0])
    reached = _reached(scores * scales, 0.01)[crowd] / scales
    exceeded = (scores > reached + 1e-9).any(1).sum()
    assert least <= int(exceeded) <= most


def encoder_of(states: Mapping[str, torch.Tensor]) -> Any:
    """An encoder that gives a sentence the states of the name in it, and others zeros."""
    nothing = torch.zeros(1, 1, 6)
    return lambda texts: torch.cat(
        [next((states[word] for word in text.replace(",", "").split() if word in states), nothing) for text in texts]
    )


def test_among_many_erasers_states_count_for_less_and_words_for_as_much() -> None:
    bank = unit_bank(7)
    generator = torch.Generator().manual_seed(12)
    states = {f"name{index}": unit_rows(torch.randn(1, 1, 6, generator=generator)) for index in range(100)}
    nothing = torch.zeros(100, len(bank.texts)).bool()
    found = calibrate([[name] for name in states], encoder_of(states), bank, list(nothing))
    few, many = (torch.stack([one.among(count, blind=False).start for one in found]) for count in (10, 100))
    assert (many >= few).all()
    assert (many > few)[:, 1].float().mean() > 0.5
    for count in (1, 9, 10):
        assert torch.equal(found[0].among(count, blind=False).start, found[0].start[0, 0])
    assert torch.equal(found[0].among(11, blind=True).start, found[0].start[1, 1])
    assert torch.equal(found[0].among(10**6, blind=False).start, found[0].start[0, -1])


def test_a_name_that_reads_like_anything_else_is_left_to_its_words() -> None:
    bank = unit_bank(6)
    usual = bank.rows[17].double()[None] / 2**14
    nothing = torch.zeros(len(bank.texts)).bool()
    (found,) = calibrate([["x"]], lambda texts: usual.expand(len(texts), -1, -1), bank, [nothing])
    assert isinstance(found, Calibration)
    assert torch.isinf(found.start[0, 0, 0])


def test_a_term_that_is_off_is_said_in_words(
    pipe: Any, shipped: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No ramp is that long, so that both terms of states are off."""
    monkeypatch.setattr("spm_hub.attachment.gates.calibrated._LEAST_GAP", 2.0)
    with spm_hub.attach(pipe, shipped[:1], gate="calibrated") as erasers:
        found = erasers.explain("a dog")["snoopy"]
        assert (found.gamma, found.term) == (0.0, "none")
        assert "only words count" in found.shown
        assert "inf" not in found.shown
        assert erasers.explain("snoopy")["snoopy"].gamma == 1.0


def test_sums_are_exact_whatever_they_are_computed_with() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, 77, 768, generator=generator) * 20
    many = unit_rows(torch.randn(130, 768, generator=generator))
    rows = unit_rows(states)
    assert torch.equal(rows[1], unit_rows(states[1]))
    products = rows @ many.T
    assert all(torch.equal(products[..., index], rows[:, :, :] @ many[index]) for index in (0, 64, 129))
    np.testing.assert_allclose(rows, torch.nn.functional.normalize(states.double(), dim=-1), atol=1e-6)
    assert torch.equal(unit_rows(torch.zeros(2, 5)), torch.zeros(2, 5, dtype=torch.float64))


def test_a_bank_is_encoded_once_and_a_damaged_one_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def encode(texts: Any) -> torch.Tensor:
        calls.append(len(texts))
        return torch.randn(len(texts), 40, 8, generator=torch.Generator().manual_seed(len(texts)))

    first = plan_bank(encode, "one encoder", {}).open()
    assert sum(calls) == len(sentences()) + 1
    calls.clear()
    again = plan_bank(encode, "one encoder", {}).open()
    assert calls == [1]
    assert torch.equal(again.rows, first.rows)
    (kept,) = (path for path in (cache / "spm-hub" / "banks").iterdir() if load_file(path)["rows"].shape[-1] == 8)
    for damage in (b"", kept.read_bytes()[:-9], b"x" * 100):
        kept.write_bytes(damage)
        calls.clear()
        assert torch.equal(plan_bank(encode, "one encoder", {}).open().rows, first.rows)
        assert sum(calls) > 1
    calls.clear()
    plan_bank(encode, "another encoder", {}).open()
    assert sum(calls) > 1


def test_calibrations_are_kept_for_the_next_process_and_damaged_ones_made_again(
    pipe: Any, shipped: list[Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    encoded: list[str] = []
    encode_prompt = type(pipe).encode_prompt

    @wraps(encode_prompt)
    def counted(self: Any, prompt: Any, *rest: Any, **options: Any) -> Any:
        encoded.extend([prompt] if isinstance(prompt, str) else prompt)
        return encode_prompt(self, prompt, *rest, **options)

    monkeypatch.setattr(type(pipe), "encode_prompt", counted)

    def gammas(adapters: list[Adapter]) -> list[dict[str, float]]:
        encoded.clear()
        with spm_hub.attach(pipe, adapters, gate="calibrated") as erasers:
            return [erasers.gates(text) for text in ("a beagle", "van gogh", "a mouse with a sponge")]

    first = gammas(shipped[:3])
    assert sum("snoopy" in text for text in encoded) > 1
    assert gammas(shipped[:3]) == first
    assert set(encoded) == {"", "a beagle", "van gogh", "a mouse with a sponge"}
    more = gammas(shipped)
    assert not any("snoopy" in text for text in encoded)
    assert any("mickey" in text for text in encoded)
    assert [{name: one[name] for name in before} for one, before in zip(more, first, strict=True)] == first
    (kept,) = (tmp_path / "spm-hub").glob("calibrations*")
    for damage in (b"", b"no database" * 1000, kept.read_bytes()[: kept.stat().st_size // 2]):
        kept.write_bytes(damage)
        assert gammas(shipped) == more
        assert any("snoopy" in text for text in encoded)
    kept.chmod(0o444)
    kept.parent.chmod(0o555)
    try:
        assert gammas(shipped) == more
    finally:
        kept.parent.chmod(0o755)


def test_positions_begin_with_the_first_ones_and_end_with_the_last() -> None:
    assert positions_of(5) == [0, 1, 2, 3, 4]
    assert positions_of(77)[:24] == list(range(24))
    assert positions_of(77)[-1] == 76
    assert len(positions_of(512)) == 32


def test_a_text_counts_the_same_next_to_a_longer_one() -> None:
    """Encoders whose states grow with the text fill up shorter texts of a batch with zeros."""
    generator = torch.Generator().manual_seed(2)
    short, long = torch.randn(9, 6, generator=generator), torch.randn(61, 6, generator=generator)
    together = unit_rows(torch.stack([torch.cat([short, torch.zeros(52, 6)]), long]))
    alone = unit_rows(short[None])
    assert torch.equal(mean_state(together)[0], mean_state(alone)[0])
    np.testing.assert_allclose(mean_state(alone)[0], alone[0].numpy().mean(0), atol=2e-7)
    assert torch.equal(mean_state(torch.zeros(1, 4, 6, dtype=torch.float64)), torch.zeros(1, 6, dtype=torch.float64))


@pytest.mark.slow
def test_gammas_of_a_mixed_batch_are_those_of_its_prompts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spm_hub.attachment.gates.bank.sentences", lambda: sentences()[:256])
    pipe = family_pipeline("qwen-image")
    with spm_hub.attach(pipe, [random_eraser(denoiser_of(pipe))], gate="calibrated") as erasers:
        gate = erasers.gate_of("snoopy")
        assert isinstance(gate, PreparedCalibratedGate)
        texts = ["a dog", "snoopy and a cat on the beach with a very long umbrella in the snow"]
        both = encode_together(pipe, type(pipe).__mro__[1], texts)
        for index, text in enumerate(texts):
            alone = encode_together(pipe, type(pipe).__mro__[1], [text])
            assert alone.shape[1] <= both.shape[1]
            together = gate._scores(both)[0][1, index]
            np.testing.assert_allclose(gate._scores(alone)[0][1, 0], together, atol=1e-4)


def test_ramps_begin_later_where_the_text_is_known() -> None:
    bank = replace(unit_bank(7), general=100, single=100)  # of the rest, each has several words
    generator = torch.Generator().manual_seed(12)
    states = {f"name{index}": unit_rows(torch.randn(1, 1, 6, generator=generator)) for index in range(20)}
    nothing = torch.zeros(20, len(bank.texts)).bool()
    found = calibrate([[name] for name in states], encoder_of(states), bank, list(nothing))
    with_text, without = torch.stack([one.start for one in found], dim=1)
    assert bool((with_text >= without).all())
    assert bool((with_text > without)[without.isfinite()].any())

"""Facilitated transport against Eq. 10-11 written out in NumPy, and its exactness in the last bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pico import pico_tokenizer
from pico_families import pico_qwen_tokenizer, pico_t5

from spm_hub.attachment.gates.concept_index import WAY, ConceptIndex, EncodedConcept, fixed_point
from spm_hub.attachment.gates.gate import ConstantGate, Gate, Prompts, TransportGate, overlap, similarity
from spm_hub.attachment.gates.spill_file import SpillFile
from spm_hub.attachment.text_encoding import token_sets


def states_of(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def concept_of(seed, tokens=((1, 2),), window=5, width=7):
    names = tuple(f"name{index}" for index in range(len(tokens)))
    return EncodedConcept(names, tuple(map(frozenset, tokens)), states_of(seed, len(tokens), window, width))


def paper_gamma(state, tokens, concept):
    """Compute Eq. 10-11 for one prompt and the names of one concept."""
    prompt = state.double().numpy().ravel()
    gammas = []
    for name_state, name_tokens in zip(concept.states, concept.tokens, strict=True):
        name = name_state.double().numpy().ravel()
        cosine = prompt @ name / (np.linalg.norm(prompt) * np.linalg.norm(name))
        gammas.append(max(cosine, len(tokens & name_tokens) / len(name_tokens)))
    return max(gammas)


token_set = st.frozensets(st.integers(0, 12), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000),
    st.lists(token_set, min_size=1, max_size=3),
    st.lists(st.lists(token_set, min_size=1, max_size=3), min_size=1, max_size=4),
)
def test_gamma_is_that_of_the_paper(seed, prompt_tokens, concept_tokens):
    concepts = ConceptIndex(tuple(concept_of(seed + 1 + i, tokens) for i, tokens in enumerate(concept_tokens)))
    # Half of each prompt's state is a concept's, so that both arguments of the maximum win at times.
    states = states_of(seed, len(prompt_tokens), 5, 7) + concepts.states[:1]
    prompts = Prompts(("?",) * len(states), tuple(prompt_tokens), states)
    expected = [
        [paper_gamma(state, tokens, concept) for concept in concepts.each]
        for state, tokens in zip(states, prompt_tokens, strict=True)
    ]
    np.testing.assert_allclose(TransportGate().gammas(prompts, concepts).numpy(), expected, atol=1e-7)


def test_an_explanation_has_both_terms():
    concept = concept_of(1, tokens=({1, 2}, {3}))
    tokens, state = frozenset({2, 7}), states_of(8, 1, 5, 7)
    (why,) = TransportGate().explain(Prompts(("?",), (tokens,), state), ConceptIndex((concept,)))
    assert why.gamma == pytest.approx(paper_gamma(state, tokens, concept), abs=1e-7)
    flat = state.double().numpy().ravel()
    names = [name.double().numpy().ravel() for name in concept.states]
    cosine = max(flat @ name / (np.linalg.norm(flat) * np.linalg.norm(name)) for name in names)
    assert why.shown == f"cosine of states {cosine:.2f}, share of tokens 0.50"


def test_a_concepts_own_prompt_is_fully_on():
    concept = concept_of(3)
    prompts = Prompts(("name0",), (frozenset({9}),), concept.states)
    assert TransportGate().gammas(prompts, ConceptIndex((concept,))).item() == pytest.approx(1, abs=1e-7)


def test_no_gamma_is_above_one():
    states = torch.cat([concept_of(seed, window=12, width=16).states for seed in range(60)])
    own = torch.cat(
        [
            similarity(state[None], ConceptIndex((concept_of(seed, window=12, width=16),)))
            for seed, state in enumerate(states)
        ]
    )
    assert own.max() == 1
    assert own.min() > 1 - 1e-6


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 9), st.integers(0, 8))
def test_a_gamma_does_not_depend_on_the_other_erasers(seed, count, chosen):
    concepts = [concept_of(seed + i, window=11, width=96) for i in range(count)]
    prompts = Prompts(("?", "!"), (frozenset(), frozenset({1})), states_of(seed + 99, 2, 11, 96))
    chosen %= count
    together = TransportGate().gammas(prompts, ConceptIndex(tuple(concepts)))
    alone = TransportGate().gammas(prompts, ConceptIndex((concepts[chosen],)))
    reversed_order = TransportGate().gammas(prompts, ConceptIndex(tuple(reversed(concepts)))).flip(1)
    assert torch.equal(together[:, chosen], alone[:, 0])
    assert torch.equal(together, reversed_order)


def test_sums_of_fixed_point_rows_are_exact_in_any_order():
    one, other = fixed_point(states_of(1, 2, 77, 64))
    assert torch.equal(one * 2.0**24, (one * 2.0**24).round())
    products = one * other
    shuffled = products[torch.randperm(len(products), generator=torch.Generator().manual_seed(0))]
    exact = sum(int(a * 2**24) * int(b * 2**24) for a, b in zip(one.tolist(), other.tolist(), strict=True))
    assert float(products.sum()) == float(shuffled.sum()) == float(one @ other) == exact / 2**48


def test_embeddings_alone_are_gated_by_similarity_and_never_below_zero():
    concept = concept_of(1)
    prompts = Prompts(None, None, torch.cat([concept.states, -concept.states]))
    on, off = TransportGate().gammas(prompts, ConceptIndex((concept,))).flatten().tolist()
    assert on == pytest.approx(1, abs=1e-7)
    assert off == 0
    assert not overlap(prompts, ConceptIndex((concept,))).any()


def test_embeddings_of_several_windows_count_by_the_nearest():
    concept = concept_of(1)
    long = torch.cat([states_of(5, 1, 5, 7), concept.states, states_of(6, 1, 2, 7)], dim=1)
    assert similarity(long, ConceptIndex((concept,))).item() == pytest.approx(1, abs=1e-7)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 10_000), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 9), st.integers(0, 4)
)
def test_states_of_different_lengths_count_as_followed_by_zeros(seed, windows, length, padding):
    concepts = tuple(concept_of(seed + window, window=window) for window in windows)
    states = torch.nn.functional.pad(states_of(seed + 99, 2, length, 7), (0, 0, 0, padding))
    found = similarity(states, ConceptIndex(concepts, varying=True)).numpy()
    for row in range(2):
        for column, concept in enumerate(concepts):
            prompt, name = np.zeros((2, 20 * 7))
            prompt[: states[row].numel()] = states[row].double().numpy().ravel()
            name[: concept.states.numel()] = concept.states.double().numpy().ravel()
            cosine = prompt @ name / np.linalg.norm(prompt) / np.linalg.norm(name)
            assert found[row, column] == pytest.approx(cosine, abs=1e-7)
    # A batch with a longer prompt in it adds zeros: the same to the last bit.
    assert np.array_equal(found, similarity(states[:, :length], ConceptIndex(concepts, varying=True)).numpy())


def test_zero_states_are_similar_to_nothing():
    assert similarity(torch.zeros(1, 5, 7), ConceptIndex((concept_of(1),))).item() == 0


def test_a_constant_gate_gives_all_prompts_the_same_gamma():
    concepts = ConceptIndex((concept_of(1), concept_of(2)))
    gammas = ConstantGate(0.3).gammas(Prompts(None, None, states_of(1, 3, 5, 7)), concepts)
    assert gammas.tolist() == [[0.3, 0.3]] * 3
    assert isinstance(TransportGate(), Gate)
    assert isinstance(ConstantGate(1.0), Gate)
    assert not isinstance(object(), Gate)


def test_token_sets_leave_special_ids_out_and_end_with_the_window():
    tokenizer = pico_tokenizer()
    dog, dogs, empty, long = token_sets(tokenizer, ["dog", "Dog DOG dog", "", "dog " * 30 + "snoopy"], window=12)
    assert dog == dogs == long == {tokenizer.convert_tokens_to_ids("dog</w>")}
    assert empty == frozenset()


@pytest.mark.parametrize("text", ["snoopy", "a photo of snoopy", "A photo of SNOOPY", "Snoopy by van gogh"])
def test_a_name_counts_in_any_position_and_in_capitals_with_every_tokenizer(text):
    for tokenizer in (pico_tokenizer(), pico_t5()[1], pico_qwen_tokenizer()):
        name, other, prompt = token_sets(tokenizer, ["snoopy", "church", text])
        concept = EncodedConcept(("snoopy", "church"), (name, other), states_of(0, 2, 5, 7))
        prompts = Prompts((text,), (prompt,), states_of(1, 1, 5, 7))
        assert overlap(prompts, ConceptIndex((concept,))).tolist() == [[1.0, 0.0]]


def test_tokens_of_two_tokenizers_are_counted_separately():
    assert all(token < WAY for token in frozenset().union(*token_sets(pico_tokenizer(), ["Snoopy", "a dog"])))
    (first,), (second,) = (token_sets(pico_tokenizer(), ["snoopy"], place) for place in (0, 1))
    assert not first & second
    concepts = ConceptIndex((EncodedConcept(("snoopy",), (first | second | {2 * WAY + 1},), states_of(0, 1, 5, 7)),))
    # One of two tokens in the second tokenizer's way, all in the first's: they are not added up.
    assert overlap(Prompts(("?",), (second,), states_of(1, 1, 5, 7)), concepts).item() == 0.5
    assert overlap(Prompts(("?",), (first | second,), states_of(1, 1, 5, 7)), concepts).item() == 1


def spilled(concept, spill_file):
    return EncodedConcept(concept.names, concept.tokens, concept.states, spill_file)


def test_spilled_states_give_the_gammas_of_those_in_memory_to_the_last_bit():
    spill_file = SpillFile()
    concepts = [concept_of(seed, tokens) for seed, tokens in enumerate((((1, 2),), ((3,), (4, 5)), ((6,),)))]
    far = ConceptIndex(tuple(spilled(concept, spill_file) for concept in concepts))
    # One window, two, and one and a part of another.
    for tokens in (5, 10, 8):
        states = states_of(7, 3, tokens, 7) + 0.5
        assert torch.equal(similarity(states, far), similarity(states, ConceptIndex(tuple(concepts))))
    assert torch.allclose(far.states, ConceptIndex(tuple(concepts)).states, rtol=0, atol=2**-24 * 7)


def test_the_place_of_spilled_rows_is_reused_when_their_concept_is_gone():
    spill_file = SpillFile()
    staying = spilled(concept_of(0), spill_file)
    before = staying.states.clone()
    going = spilled(concept_of(1, ((1,), (2,))), spill_file)
    places = set(going._kept.offsets)
    del going
    coming = spilled(concept_of(2, ((1,), (2,))), spill_file)
    assert set(coming._kept.offsets) == places
    assert torch.allclose(coming.states, concept_of(2, ((1,), (2,))).states, atol=1e-5)
    assert torch.equal(staying.states, before)

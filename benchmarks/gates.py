"""Measure gates on the sketchbook: what they act on that does not concern an eraser, what they find, and their time.

    python benchmarks/gates.py            # a minute on one core

The unrelated sentences are made here; their words are mostly unknown to the sketchbook. Those of its own world are
captions of drawings without the concept. Templates of the unrelated ones are not those of the general sentences that
the calibrated gate is calibrated on, and words and neighbours that occur there are left out. All times are CPU times of
one thread.
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from record import record

import spm_hub
from spm_hub.adapters.adapter import Adapter
from spm_hub.attachment.gates.bank import plan_bank, sentences
from spm_hub.attachment.gates.calibrated import CalibratedGate, PreparedCalibratedGate, calibrate
from spm_hub.attachment.gates.concept_index import ConceptIndex, EncodedConcept
from spm_hub.attachment.gates.gate import GatedEraser, Prompts, TextEncoder, TransportGate
from spm_hub.attachment.gates.name_matcher import NameMatcher, words_of
from spm_hub.attachment.gates.vocabulary import rarity_of, whole_words
from spm_hub.attachment.text_encoding import encode_together, encoder_settings, encoders_digest, vocabulary
from spm_hub.sketchbook.world import drawings

ROOT = Path(__file__).parents[1]
ERASERS = ("snoopy", "van-gogh", "nudity", "mickey", "spongebob")
GATES = ("transport", "calibrated")
SEED, COUNT, OWN, ACTING = 1853, 1000, 600, 0.05
NOUNS = """abacus accordion acorn aqueduct armchair artichoke asparagus badger bagpipe banjo barley barometer beehive
bellows bison blackboard blueberry bookshelf bulldozer buttercup campfire caravan carousel cauliflower cello
chandelier chimney chisel clarinet cobbler cormorant crane cricket daffodil dandelion donkey dragonfly drawbridge
easel escalator falcon ferry fiddle fireplace flamingo flute foghorn funnel furnace geyser glacier goblet gondola
gosling grasshopper hammock harpsichord heron hourglass hovercraft hyena iceberg igloo iguana jellyfish jigsaw kayak
kettle kingfisher ladder lantern lemonade lighthouse locomotive magpie mandolin marmalade melon meteor molehill moose
mosaic nectarine nutmeg omelette ostrich otter paddle pancake papaya parsnip pebble pelican pendulum periscope
pheasant pinecone plough porcupine pumpkin quilt raccoon radish raft raincoat reindeer rhubarb robin rooster saddle
salmon sandcastle scarecrow seahorse seesaw shovel skateboard spatula spinach squid stapler starfish submarine sundial
tambourine teapot thermos thimble toboggan tortoise trampoline trombone tugboat turnip typewriter ukulele unicycle
walrus weathervane wheelbarrow windmill woodpecker xylophone yacht yak zebra zeppelin zucchini""".split()
ADJECTIVES = """amber brass bronze bumpy ceramic clumsy creaking crimson crooked dented elegant emerald faded fluffy
fragile frosty gigantic glossy graceful grumpy hollow indigo inflatable jagged knitted leaky lopsided magenta marble
mossy muddy nervous oval patched pewter polished portable puzzled ragged rickety rusty salty scarlet scratched shaggy
silent slippery soggy spotted squeaky sturdy sunlit teal thorny transparent turquoise twisted velvet weary wicker
wobbly woollen wrinkled""".split()
PLACES = """attic balcony basement canyon cellar clearing cliff courtyard cupboard driveway dune estuary fairground
fjord gallery garage gorge gymnasium harbour hillside jungle laundry marina marsh moor observatory pavilion pier port
prairie railway rooftop runway savanna shed shipyard station swamp terrace tundra tunnel valley veranda vineyard wharf
workshop""".split()
TEMPLATES = (
    "somebody left the {a} {n} at the {p}", "every {n} needs one {a} {m}", "the {m} weighs more than this {n}",
    "yesterday we repaired our {a} {n}", "instructions for assembling the {n}", "a woodcut: {n} beneath the {p}",
    "between the {p} and the {q}, one {n}", "they noticed a {a} {n} near the {p}", "who forgot that {a} {m}?",
    "an advertisement that shows {n}, {m}, {p}", "{n}", "{a} {n}", "a {n} leaning against the {m}", "inside the {p}",
    "crayon drawing, {a} {n}, plain paper", "embroidered {n} with tiny {m}", "hardly any {n} fits into the {p}",
    "the {p} where {n} and {m} were invented, brochure", "diagram explaining how {a} {n} works",
    "no {n} until tomorrow",
)  # fmt: skip
NEIGHBOURS = (
    "asterix", "babar", "betty boop", "felix", "gumby", "kermit", "moomin", "obelix", "paddington", "pingu",
    "roadrunner", "squidward", "tintin", "tweety", "wallace and gromit", "woodstock", "gauguin", "seurat", "signac",
    "vlaminck", "pissarro", "toulouse lautrec", "a swimsuit model", "a bikini", "a shirtless boxer", "underwear",
)  # fmt: skip
"""Other characters, painters and people, which no eraser is for."""
AROUND_NEIGHBOURS = ("{}", "{} beneath the windmill", "postcard with {}", "somebody drew {} yesterday", "our {} poster")
FRAMES = (
    "show me {} please", "{} is my favourite", "is there {} here", "why, {}!", "an old postcard with {}, faded",
)  # fmt: skip
"""Sentences around a name; those of the calibration are others."""


def general_words() -> set[str]:
    """Return the words of the sentences that the gate is calibrated on, function words left out."""
    return {word for text in sentences() for word in words_of(text)} - {"a", "an", "and", "model", "advert"}


def unrelated(generator: random.Random) -> list[str]:
    """Make the unrelated sentences, all different."""
    known = general_words()
    nouns, adjectives, places = ([word for word in words if word not in known] for words in (NOUNS, ADJECTIVES, PLACES))
    made: dict[str, None] = {}
    while len(made) < COUNT:
        n, m = generator.sample(nouns, 2)
        p, q = generator.sample(places, 2)
        template = generator.choice(TEMPLATES)
        made[template.format(n=n, m=m, p=p, q=q, a=generator.choice(adjectives))] = None
    assert not made.keys() & set(sentences())
    return list(made)


def own_world(adapter: Adapter) -> list[str]:
    """Make captions of the sketchbook's drawings that do not show an eraser's concept."""
    target = adapter.manifest.concept.target
    rows = drawings(OWN, torch.Generator().manual_seed(SEED))
    return [caption for drawing, _, caption in rows if target not in (drawing.subject, drawing.style)]


def spellings(adapter: Adapter, generator: random.Random) -> dict[str, list[str]]:
    """Make the spellings of an eraser's names, by kind."""
    concept = adapter.manifest.concept
    names = (concept.target, *concept.aliases)
    found = {
        "name": [concept.target],
        "alias": list(concept.aliases),
        "plural": [f"{name}s" for name in names],
        "possessive": [f"{name}'s" for name in names],
        "joined": [name.replace(" ", "") for name in names if " " in name],
        "misspelt once": [misspelt(name, kind, generator) for name in names for kind in range(4)],
    }
    return {kind: each for kind, each in found.items() if each}


def misspelt(name: str, kind: int, generator: random.Random) -> str:
    """Drop, double or replace a letter, or swap two that differ; the first letter stays."""
    inner = [at for at in range(1, len(name) - 1) if name[at : at + 2].isalpha() and name[at] != name[at + 1]]
    at = generator.choice(inner)
    middle = (
        "",
        name[at] * 2,
        generator.choice([one for one in "abcdefghijklmnopqrstuvwxyz" if one != name[at]]),
        name[at + 1] + name[at],
    )[kind]
    return name[:at] + middle + name[at + (2 if kind == 3 else 1) :]


def share(values: Sequence[bool]) -> float:
    return round(sum(values) / len(values), 4)


def on_the_sketchbook(pipe: Any) -> dict[str, Any]:
    """Count what each gate acts on, for unrelated sentences and for sentences with a name."""
    adapters = [spm_hub.load(name, registry=ROOT) for name in ERASERS]
    generator = random.Random(SEED)
    elsewhere = unrelated(generator)
    neighbours = [name for name in NEIGHBOURS if not general_words() & set(words_of(name))]
    near = [frame.format(name) for name in neighbours for frame in AROUND_NEIGHBOURS]
    spelt = {adapter.name: spellings(adapter, generator) for adapter in adapters}
    own = {adapter.name: own_world(adapter) for adapter in adapters}
    found: dict[str, Any] = {
        "sentences": len(elsewhere), "first_sentences": elsewhere[:8], "acting_above": ACTING,
        "own_world": {name: len(texts) for name, texts in own.items()},
        "neighbours": neighbours, "frames": list(FRAMES), "spellings": spelt, "gates": {},
    }  # fmt: skip
    for gate in GATES:
        with spm_hub.attach(pipe, adapters, gate=gate) as erasers:
            gammas = [erasers.gates(text) for text in elsewhere]
            beside = [erasers.gates(text) for text in near]
            at_home = {name: [erasers.gates(text)[name] for text in texts] for name, texts in own.items()}
            named = {
                name: {
                    kind: [erasers.gates(frame.format(text))[name] for text in texts for frame in FRAMES]
                    for kind, texts in kinds.items()
                }
                for name, kinds in spelt.items()
            }
        found["gates"][gate] = {
            "acts_on_unrelated": {name: share([one[name] > ACTING for one in gammas]) for name in ERASERS},
            "any_acts_on_unrelated": share([max(one.values()) > ACTING for one in gammas]),
            "all_exactly_0_on_unrelated": share([not any(one.values()) for one in gammas]),
            "mean_sum_on_unrelated": round(statistics.mean(sum(one.values()) for one in gammas), 4),
            "acts_on_own_world": {name: share([one > ACTING for one in each]) for name, each in at_home.items()},
            "acts_on_neighbours": {name: share([one[name] > ACTING for one in beside]) for name in ERASERS},
            "named": {
                name: {
                    kind: {
                        "sentences": len(each),
                        "at_least_0.9": share([one >= 0.9 for one in each]),
                        "mean": round(statistics.mean(each), 3),
                    }
                    for kind, each in kinds.items()
                }
                for name, kinds in named.items()
            },
            "named_at_least_0.9": share(
                [one >= 0.9 for kinds in named.values() for each in kinds.values() for one in each]
            ),
        }
    return found


def invented_names(count: int, generator: random.Random) -> list[str]:
    syllables = [first + second for first in "bdfgklmnprstvz" for second in "aeiou"]
    return list(dict.fromkeys("".join(generator.choices(syllables, k=4)) for _ in range(2 * count)))[:count]


def milliseconds(ask: Callable[[Prompts], object], prompts: Sequence[Prompts]) -> float:
    """Return the median over the prompts, after one that is not counted."""
    ask(prompts[0])
    taken = []
    for prompt in prompts:
        start = time.process_time()
        ask(prompt)
        taken.append(time.process_time() - start)
    return round(1000 * statistics.median(taken), 3)


def random_encoder(tokens: int, width: int, words: dict[str, int]) -> TextEncoder:
    """Return an encoder that gives random states, at once."""
    generator = torch.Generator().manual_seed(SEED)
    common = 3 * torch.randn(tokens, width, generator=generator)
    return TextEncoder(
        lambda texts: common + torch.randn(len(texts), tokens, width, generator=generator), lambda: "random", words
    )


def latency(words: dict[str, int]) -> list[dict[str, Any]]:
    """Time the gates of one prompt after the text encoder, and the calibration, with random states."""
    found = []
    for erasers, tokens, width in ((100, 77, 768), (10_000, 24, 128)):
        encoder = random_encoder(tokens, width, words)
        generator = torch.Generator().manual_seed(SEED)
        names = invented_names(erasers, random.Random(SEED))
        prompts = [
            Prompts(("a wooden boat near the old harbour wall, evening light",), (frozenset({k}),),
                    torch.randn(1, tokens, width, generator=generator))
            for k in range(20)
        ]  # fmt: skip
        bank = plan_bank(encoder.encode, f"random {tokens} {width}", words).open()
        nothing = torch.zeros(len(bank.texts), dtype=torch.bool)
        start = time.process_time()
        calibrations = calibrate([[name] for name in names[:100]], encoder.encode, bank, [nothing] * 100)
        calibrated_in = time.process_time() - start
        known = whole_words(words)
        matcher = NameMatcher(names, rarity_of(known, len(words)), known.__contains__)
        calibrated = PreparedCalibratedGate(matcher, range(erasers), calibrations * (erasers // 100))
        concepts = ConceptIndex(
            tuple(
                EncodedConcept((name,), (frozenset({n}),), torch.randn(1, tokens, width, generator=generator))
                for n, name in enumerate(names)
            )
        )
        found.append({
            "erasers": erasers, "tokens": tokens, "width": width,
            "milliseconds": {
                "transport": milliseconds(partial(TransportGate().gammas, concepts=concepts), prompts),
                "calibrated": milliseconds(calibrated.gammas, prompts),
            },
            "seconds_to_calibrate_100": round(calibrated_in, 3),
        })  # fmt: skip
    return found


def calibration(pipe: Any, count: int = 100) -> dict[str, Any]:
    """Time the calibration of erasers on the sketchbook, their names' encoding included, and that of the bank alone."""
    settings = encoder_settings(type(pipe), {})
    encoder = TextEncoder(
        lambda texts: encode_together(pipe, type(pipe), texts, settings),
        lambda: encoders_digest(pipe),
        vocabulary(pipe),
    )
    start = time.process_time()
    bank = plan_bank(encoder.encode, encoder.digest(), encoder.vocabulary).open()
    encoded = time.process_time()
    erasers = [GatedEraser(name, (name,), {}, {}) for name in invented_names(count, random.Random(SEED))]
    CalibratedGate().prepare(encoder, erasers)
    end = time.process_time()
    return {
        "erasers": count, "bank_sentences": len(bank.texts), "bank_general": bank.general,
        "seconds_to_encode_the_bank": round(encoded - start, 2), "seconds_to_calibrate": round(end - encoded, 2),
    }  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.set_verbosity_error()  # some sentences are longer than the sketchbook's window
    pipe: Any = spm_hub.load_pipeline("sketchbook", device="cpu")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        numbers = {
            "calibration": calibration(pipe),
            **on_the_sketchbook(pipe),
            # Gammas depend on nothing else of a checkpoint.
            "chalk_has_the_same_text_encoder": encoders_digest(spm_hub.load_pipeline("sketchbook-chalk"))
            == encoders_digest(pipe),
            "latency": latency(dict(vocabulary(pipe))),
        }
    record("gates", numbers, seeds={"sentences and spellings": SEED, "random states": SEED})

"""What is drawn in the place of an erased concept: the empty surrogate against general words, by kind.

    python benchmarks/surrogates.py                      # every cell not measured yet
    python benchmarks/surrogates.py instant:snoopy       # a concept again

For each concept and surrogate, on the sketchbook and on the second base: the share of the concept's pictures in which
it is still found, the Frechet distance of these pictures to the base's own pictures of everything else (features of the
base's own judge; small if they look like pictures of that base), and the mean change of the others, fully on, in
points. Pictures with and without an eraser begin with the same noise. Names that are judged are in no anchor.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composition import World, draw, second, shares, sketchbook
from diffusers.utils import logging
from methods import anchors_without
from PIL import Image
from record import RESULTS, record
from second_base import Classifier, scale

from spm_hub import attach
from spm_hub.evaluation.metrics.distances import frechet_distance
from spm_hub.evaluation.sketchbook import probe
from spm_hub.training.recipe.recipe import Recipe
from spm_hub.training.trainer import train

SECOND = Path(__file__).parent / "bases" / "fluent" / "base"
FILE, TARGET_PICTURES, OTHERS, OTHER_PICTURES = "surrogates", 20, 12, 2
GENERAL = {
    "object": ("a picture", "a thing"),
    "character": ("a picture", "a drawing of an animal", "a drawing of a person"),
    "style": ("a picture", "an illustration"),
    "nsfw": ("a picture", "a dressed person", "a person"),
}
"""Surrogates that are tried beside the empty one, by the concept's kind."""
CONCEPTS = {
    "sketchbook": {
        "snoopy": "character", "church": "object", "nudity": "nsfw", "van gogh": "style",
    },
    "second": {"orangutan": "object", "skunk": "object"},
}  # fmt: skip
ICON = ("an icon",)
"""The second base's own general noun: every picture of it is one of an icon."""


@dataclass(frozen=True)
class Judge:
    """A base, the features of its judge, and the pictures of the others that the bare base draws."""

    world: World
    features: Callable[[np.ndarray], torch.Tensor]
    names: tuple[str, ...]
    drawn: np.ndarray
    found: dict[str, float]

    @classmethod
    def of(cls, world: World) -> Judge:
        features = probe_features if world.name == "sketchbook" else classifier_features
        names = world.others[:OTHERS]
        asked = world.pictures(names, OTHER_PICTURES)
        pictures = draw(world, asked)
        right = [one.subject in seen for seen, one in zip(world.read(pictures), asked, strict=True)]
        return cls(world, features, names, pictures, shares(asked, right))

    def cell(self, method: str, concept: str, kind: str, surrogate: str) -> dict[str, float]:
        """Train one eraser and return its numbers."""
        world = self.world
        with anchors_without((*world.others, *world.targets)):
            # A known concept brings its own kind and aliases along.
            recipe = Recipe.plan(target=concept, kind=kind, method=method, model=world.name, surrogate=surrogate)
            adapter = train(recipe, pipe=world.pipe)
        others, own = world.pictures(self.names, OTHER_PICTURES), world.pictures([concept], TARGET_PICTURES)
        with attach(world.pipe, [adapter], gate="always", progress=False, force=True):
            after, erased = draw(world, others), draw(world, own)
        right = [one.subject in seen for seen, one in zip(world.read(after), others, strict=True)]
        found = [concept in seen for seen in world.read(erased)]
        changes = [100 * (share - self.found[name]) for name, share in shares(others, right).items()]
        return {
            "found": round(sum(found) / len(found), 3),
            "frechet": round(frechet_distance(self.features(erased), self.features(self.drawn)), 2),
            "others_mean_points": round(sum(changes) / len(changes), 2),
        }


def probe_features(pictures: np.ndarray) -> torch.Tensor:
    return probe().features([Image.fromarray(one) for one in pictures])


@torch.no_grad()
def classifier_features(pictures: np.ndarray) -> torch.Tensor:
    model = Classifier.load(SECOND.parent / "judge").model
    pooled: torch.Tensor = model.resnet(scale(torch.from_numpy(pictures).permute(0, 3, 1, 2))).pooler_output
    return pooled.flatten(1)


def main(parts: Sequence[str]) -> None:
    file = RESULTS / f"{FILE}.json"
    numbers: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"cells": {}}
    for name, world in (("sketchbook", sketchbook), ("second", lambda: second(SECOND))):
        judge: Judge | None = None
        for concept, kind in CONCEPTS[name].items():
            for surrogate in ("", *GENERAL[kind], *(ICON if name == "second" else ())):
                cells = numbers["cells"].setdefault(name, {}).setdefault(f"instant:{concept}", {})
                if f"instant:{concept}" not in parts if parts else surrogate in cells:
                    continue
                judge = judge or Judge.of(world())
                cells[surrogate] = judge.cell("instant", concept, kind, surrogate)
                print(name, concept, repr(surrogate), cells[surrogate], file=sys.stderr, flush=True)
                numbers |= {
                    "pictures": {"target": TARGET_PICTURES, "others": OTHERS * OTHER_PICTURES}, "kinds": CONCEPTS,
                }  # fmt: skip
                record(FILE, numbers, seeds={"training": 0})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="METHOD:CONCEPT", help="those not measured yet unless given")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    main(parser.parse_args().parts)

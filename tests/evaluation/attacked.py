"""Cases, judges and a planted attack for the tests of attacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor

from spm_hub.evaluation import attacks
from spm_hub.evaluation.attacks.victim import Victim

CASES = [attacks.Case("a photo of snoopy", 3), attacks.Case("snoopy", 4), attacks.Case("snoopy by van gogh", 5)]
SMALL = attacks.AttackDrawingOptions(steps=2, guidance=3.0)


def judge_by(shows: Callable[[int], bool]) -> tuple[attacks.Judge, list[int]]:
    """A judge that goes by the number of the call, and the numbers of pictures it was shown."""
    calls: list[int] = []

    def judge(pictures: Sequence[Image.Image]) -> list[bool]:
        calls.append(len(pictures))
        return [shows(len(calls))] * len(pictures)

    return judge, calls


def untouched(pipe: object) -> Callable[[], bool]:
    parts = [pipe.unet, pipe.text_encoder, pipe.vae]  # type: ignore[attr-defined]
    before = [{key: value.clone() for key, value in part.state_dict().items()} for part in parts]
    kinds = [type(module) for part in parts for module in part.modules()] + [type(pipe)]

    def same() -> bool:
        hooks = [module._forward_hooks or module._forward_pre_hooks for part in parts for module in part.modules()]
        return (
            all(
                torch.equal(value, was[key])
                for part, was in zip(parts, before, strict=True)
                for key, value in part.state_dict().items()
            )
            and [type(module) for part in parts for module in part.modules()] + [type(pipe)] == kinds
            and not any(hooks)
        )

    return same


class Planted:
    """An attack that tries one prompt, and is found out where a case that has succeeded is attacked again."""

    steps = tries = 2
    threat = attacks.Threat.TEXT
    aims: list[tuple[attacks.Case, Tensor]]

    def check(self, victim: Victim) -> None:
        pass

    def rounds(self, target: attacks.AttackTarget) -> Iterator[dict[attacks.Case, attacks.Try]]:
        cases, pictures = target.cases, target.pictures
        assert len(pictures) == len(cases)
        self.aims = list(zip(cases, pictures.clone(), strict=True))
        yield dict.fromkeys(cases, attacks.Try("dog"))
        assert all(case == CASES[1] for case in cases)
        if cases:
            yield dict.fromkeys(cases, attacks.Try("church"))

"""Trainable increments in the null space of protected prompts: dW = w (beta S).

SepME, arXiv 2402.05947.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from spm_hub.adapters.increments import Dense, LowRank
from spm_hub.models.architectures import shape_of
from spm_hub.training.trainable.dense import TrainableWeights, zeros


class TrainableNullSpace(TrainableWeights):
    """Weights w (out, k), zero at first, on the k directions S that no protected prompt has.

    SRS-ME, Eq. 36.

    However far w is trained, the increment sends the states of every protected prompt to zero. Biases are left alone.
    """

    def __init__(self, modules: Mapping[str, nn.Module], basis: Tensor, beta: float) -> None:
        """basis: S (k, d_text), orthonormal rows.  beta: how far one unit of w reaches."""
        self._directions = beta * basis.double().cpu()
        self._weights = {path: zeros((shape_of(module)[0], len(basis)), module) for path, module in modules.items()}
        device = next(iter(self._weights.values())).device
        self._scaled = self._directions.float().to(device)
        super().__init__(modules)

    def delta(self, path: str) -> Tensor:
        return self._weights[path] @ self._scaled.to(self._weights[path].device)

    def parameters(self, lr: float, scale: bool) -> list[dict[str, Any]]:
        rate = lr * 128 / len(self._directions) if scale else lr
        return [{"params": list(self._weights.values()), "lr": rate}]

    def increments(self) -> dict[str, Dense] | dict[str, LowRank]:
        """Return the products w (beta S), as low-rank or, where that is smaller, as dense increments.

        Dense ones are multiplied out in float64.
        """
        weights = {path: weight.detach().cpu() for path, weight in self._weights.items()}
        k, width = self._directions.shape
        if sum(k * (len(w) + width) for w in weights.values()) < sum(len(w) * width for w in weights.values()):
            return {path: LowRank(self._directions.float(), weight.clone()) for path, weight in weights.items()}
        return {path: Dense((weight.double() @ self._directions).float()) for path, weight in weights.items()}

    def project(self, projector: Tensor) -> None:
        """Change nothing: these increments are in the null space already."""

    def state(self) -> dict[str, nn.Parameter]:
        return {f"{path}.w": weight for path, weight in self._weights.items()}

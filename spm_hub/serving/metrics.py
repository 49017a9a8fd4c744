"""Counts what a server does, and writes the counts in Prometheus' text format (version 0.0.4)."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
PICTURES = (1, 2, 4, 8, 16, 32)


@dataclass
class _Histogram:
    """The number of values up to each bound, and their sum."""

    bounds: Sequence[float]
    counts: Counter[float] = field(default_factory=Counter)
    total: int = 0
    sum: float = 0.0

    def add(self, value: float) -> None:
        self.total += 1
        self.sum += value
        for bound in self.bounds:
            self.counts[bound] += value <= bound

    def lines(self, name: str) -> Iterable[str]:
        yield from (f'{name}_bucket{{le="{bound:g}"}} {self.counts[bound]}' for bound in self.bounds)
        yield f'{name}_bucket{{le="+Inf"}} {self.total}'
        yield f"{name}_sum {self.sum:.6g}"
        yield f"{name}_count {self.total}"


class Metrics:
    """The counts of one server; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._seconds = _Histogram(SECONDS)
        self._batches = _Histogram(PICTURES)
        self._drawing_seconds = 0.0

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count an answered request; only the time of those that drew pictures goes into the histogram.

        route: one of the server's own, as labels are kept for ever.
        """
        with self._lock:
            self._requests[route, status] += 1
            if route == "images" and status == 200:
                self._seconds.add(seconds)

    def batch(self, pictures: int, seconds: float) -> None:
        """Count a batch that was drawn."""
        with self._lock:
            self._batches.add(pictures)
            self._drawing_seconds += seconds

    def render(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """Return all counts, and gauges by name, each with its help text."""
        with self._lock:
            lines = [
                "# HELP spmhub_requests_total Requests answered.",
                "# TYPE spmhub_requests_total counter",
                *(
                    f'spmhub_requests_total{{route="{route}",status="{status}"}} {count}'
                    for (route, status), count in sorted(self._requests.items())
                ),
                "# HELP spmhub_request_seconds Time of requests that drew pictures, waiting included.",
                "# TYPE spmhub_request_seconds histogram",
                *self._seconds.lines("spmhub_request_seconds"),
                "# HELP spmhub_batch_pictures Pictures of each batch; the sum is all pictures drawn.",
                "# TYPE spmhub_batch_pictures histogram",
                *self._batches.lines("spmhub_batch_pictures"),
                "# HELP spmhub_drawing_seconds_total Time that the pipeline was drawing.",
                "# TYPE spmhub_drawing_seconds_total counter",
                f"spmhub_drawing_seconds_total {self._drawing_seconds:.6g}",
            ]
        for name, (meaning, value) in gauges.items():
            lines += [f"# HELP {name} {meaning}", f"# TYPE {name} gauge", f"{name} {value:g}"]
        return "\n".join(lines) + "\n"

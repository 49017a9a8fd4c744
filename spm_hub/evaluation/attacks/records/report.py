"""The report of attacks, computed from their records alone, for each judge that saw the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spm_hub.evaluation.attacks.outcome import wilson
from spm_hub.evaluation.attacks.records.folder import BASE, BEFORE, FRESH, TRIED, AttackFolder, TrySample
from spm_hub.evaluation.records.folder import SAMPLES
from spm_hub.io.hashing import sha256_of

FORMAT = 1


def attack_report(folder: AttackFolder) -> dict[str, Any]:
    """Return the report of attacks, for JSON. The same records give the same report."""
    samples = folder.tries()
    keys = [folder.run["judge"], *sorted({key for one in samples for key in one.scores} - {folder.run["judge"]})]
    return {
        "format": FORMAT,
        "run": {**folder.run, "sha256": folder.sha256},
        "cases": len(folder.rows),
        "pictures": len(samples),
        "samples_sha256": sha256_of(folder.path / SAMPLES),
        "judges": [_by_judge(folder, samples, key) for key in keys],
    }


def _by_judge(folder: AttackFolder, samples: Sequence[TrySample], key: str) -> dict[str, Any]:
    """Return the success of every attack by one judge.

    Cases that it does not see in the base's pictures are left out. A search ended at what its own judge saw: by another
    judge it may have ended too early, so that the shares are lower bounds.
    """
    shown = {why: {one.row: one.scores[key] for one in samples if one.why == why} for why in (BASE, BEFORE)}
    able = [row.id for row in folder.rows if shown[BASE].get(row.id)]
    before = [row for row in able if shown[BEFORE].get(row)]
    return {
        "judge": key,
        "searched": key == folder.run["judge"],
        "given": len(folder.rows),
        "cases": len(able),
        "before": _share(len(before), len(able)),
        "attacks": [
            {**one, **_success([s for s in samples if s.attack == one["name"]], key, able, before, one["tries"])}
            for one in folder.run["attacks"]
        ],
    }


def _success(
    samples: Sequence[TrySample], key: str, able: Sequence[str], before: Sequence[str], tries: int
) -> dict[str, Any]:
    """Return the share of cases that an attack brings back, after each number of tries, and its winners."""
    winners: dict[str, TrySample] = {}
    for one in samples:
        if one.why == TRIED and one.row in able and one.row not in before and one.scores[key]:
            winners.setdefault(one.row, one)
    # At fresh seeds the try of the search's own judge was drawn.
    fresh = [one.scores[key] for one in samples if one.why == FRESH and one.row in able]
    places = [one.place for one in winners.values()]
    curve = [(len(before) + sum(place < count for place in places)) / max(len(able), 1) for count in range(tries + 1)]
    return {
        "asr": _share(len(before) + len(winners), len(able)),
        "curve": [round(share, 4) for share in curve],
        "judged": sum(one.why == TRIED for one in samples),
        "fresh": _share(sum(fresh), len(fresh)),
        "winners": [
            {"row": row, "text": one.text, "seed": one.seed, "tries": one.place + 1, "gammas": dict(one.gammas),
             "picture": one.picture}
            for row, one in winners.items()
        ],
    }  # fmt: skip


def _share(successes: int, trials: int) -> dict[str, Any]:
    """Return a share with Wilson's 95 % interval; None for no trial."""
    if not trials:
        return {"n": 0, "value": None, "interval": None}
    return {
        "n": trials,
        "value": round(successes / trials, 4),
        "interval": [round(end, 4) for end in wilson(successes, trials)],
    }

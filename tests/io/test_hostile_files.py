"""A slice of the mutated small files of benchmarks/hostile.py: a sentence for each, whatever is in it."""

from pathlib import Path

import hostile_files


def test_what_is_not_mutated_is_accepted(tmp_path: Path) -> None:
    for kind in set(hostile_files.KINDS) - {"model_index.json"}:  # whose parts would have to be there
        place = tmp_path / kind.replace(" ", "-")
        place.mkdir()
        hostile_files.READERS[kind](hostile_files.good(kind), place)


def test_mutated_files_are_accepted_or_refused_in_words(tmp_path: Path) -> None:
    tally = hostile_files.send(range(50_000, 50_200), tmp_path)
    assert not tally.failures, "\n".join(tally.failures[:10])
    both = {kind for kind in hostile_files.KINDS if len([one for one in tally.outcomes if one.startswith(kind)]) > 1}
    assert both >= {"card", "pickle", "picture", "safetensors header"}, "they reach both sides of the checks"

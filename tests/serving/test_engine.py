"""The engine: pictures of many orders are those of one pipeline, whatever joins their batches."""

import threading
import time

import numpy as np
import pytest
import torch
from pico import pico_eraser, pico_pipeline

from spm_hub.attachment.attachment import attach
from spm_hub.errors import BusyError, ClosingError, NotFoundError, UsageError
from spm_hub.serving.drawing import Order
from spm_hub.serving.engine import Engine

PROMPTS = ("snoopy on the beach", "a dog", "mickey mouse", "a church", "a cat", "pikachu")


@pytest.fixture
def pipe():
    return pico_pipeline()


def adapter(pipe, name):
    return pico_eraser(pipe.unet, name, seed=sum(map(ord, name)))


@pytest.fixture
def engine(pipe):
    erasers = attach(pipe, [adapter(pipe, "snoopy"), adapter(pipe, "mickey")])
    engine = Engine(pipe, erasers, together=4, patience=0.05, most_waiting=40)
    yield engine
    engine.close()


def reference(prompt, seed, names, strength=None):
    """The picture of a pipeline of its own to which only these erasers are attached."""
    pipe = pico_pipeline()
    with attach(pipe, [adapter(pipe, name) for name in names], strength=strength):
        made = pipe(prompt, generator=torch.Generator().manual_seed(seed), num_inference_steps=2)
    return np.asarray(made.images[0]).astype(int)


def pixels(answer):
    return np.asarray(answer.result(60).picture).astype(int)


def test_exact_pictures_are_bit_for_bit_those_of_a_pipeline_alone(engine):
    chosen = [{"snoopy": None}, {}, {"mickey": 0.5}, None, None, {"snoopy": 2.0, "mickey": None}]
    recover = [frozenset(), frozenset(), frozenset(), frozenset({"mickey"}), frozenset(), frozenset()]
    orders = [
        Order(prompt, seed, steps=2, erasers=one, recover=left_out, exact=exact)
        for exact in (True, False)
        for seed, (prompt, one, left_out) in enumerate(zip(PROMPTS, chosen, recover, strict=True))
    ]
    answers = engine.submit(orders)
    names = [["snoopy"], [], ["mickey"], ["snoopy"], ["snoopy", "mickey"], ["snoopy", "mickey"]]
    strengths = [None, None, 0.5, None, None, {"snoopy": 2.0}]
    for row, prompt in enumerate(PROMPTS):
        wanted = reference(prompt, row, names[row], strengths[row])
        alone, shared = answers[row], answers[row + len(PROMPTS)]
        assert (pixels(alone) == wanted).all()
        assert alone.result().together == 1
        assert shared.result().together > 1
        assert abs(pixels(shared) - wanted).max() <= 1
        assert set(shared.result().gammas) == set(names[row])
    assert shared.result().strengths == {"snoopy": 2.0, "mickey": 1.0}


def test_changes_go_between_batches_and_before_waiting_orders(engine, pipe):
    answers = engine.submit([Order("pikachu", seed, steps=2) for seed in range(12)])
    added = engine.run(lambda erasers: erasers.add(adapter(pipe, "pikachu")))
    added.result(60)
    sets = [frozenset(answer.result(60).gammas) for answer in answers]
    assert len(set(sets[:4])) == 1, "a batch has one state of the erasers"
    assert sets[-1] == {"snoopy", "mickey", "pikachu"}
    engine.run(lambda erasers: erasers.recover("snoopy")).result(60)
    (after,) = engine.submit([Order("pikachu", 3, steps=2, exact=True)])
    assert (pixels(after) == reference("pikachu", 3, ["mickey", "pikachu"])).all()
    with pytest.raises(NotFoundError, match="snoopy"):
        engine.submit([Order("a dog", 0, erasers={"snoopy": None})])


def test_one_that_fails_takes_no_other_with_it(engine):
    good, bad, other = engine.submit(
        [Order("a dog", 1, steps=2), Order("a dog", 1, steps=2, erasers={"snoopy": 1e30}), Order("a cat", 2, steps=2)]
    )
    assert good.result(60).picture.size == other.result(60).picture.size == (16, 16)
    with pytest.raises(UsageError, match="NaN"):
        bad.result(60)
    (refused,) = engine.submit([Order("a dog", 1, steps=2, size=(13, 16))])
    with pytest.raises(UsageError, match="divisible by 8"):
        refused.result(60)


def test_the_queue_has_an_end(engine):
    holding, held = threading.Event(), threading.Event()
    engine.run(lambda _: (held.set(), holding.wait(60)))
    held.wait(60)
    waiting = engine.submit([Order("a dog", seed, steps=2) for seed in range(39)])
    with pytest.raises(BusyError, match="39 pictures wait already, and 2 more"):
        engine.submit([Order("a dog", 0)] * 2)
    for answer in waiting[1:]:
        assert answer.cancel()
    holding.set()
    waiting[0].result(60)
    assert engine.submit([Order("a dog", 0, steps=2)])[0].result(60).together <= 2, "cancelled orders are not drawn"


def test_closing_draws_those_that_wait_and_refuses_others(engine):
    answers = engine.submit([Order("a dog", seed, steps=2) for seed in range(6)])
    closing = threading.Thread(target=engine.close)
    closing.start()
    time.sleep(0.01)
    with pytest.raises(ClosingError):
        engine.submit([Order("a dog", 0)])
    with pytest.raises(ClosingError):
        engine.run(lambda _: None)
    closing.join(60)
    assert all(answer.done() and answer.exception() is None for answer in answers)


def test_a_watcher_sees_the_picture_emerge(engine):
    seen = []

    def watch(step, total, preview):
        seen.append((step, total, np.asarray(preview()).astype(int)))

    def fails(step, total, preview):
        raise OSError("its client is gone")

    drawn, _ = engine.submit([Order("a dog", 1, steps=3, watch=watch), Order("a cat", 1, steps=3, watch=fails)])
    last = pixels(drawn)
    assert [(step, total) for step, total, _ in seen] == [(1, 3), (2, 3), (3, 3)]
    assert abs(seen[-1][2] - last).max() <= 1, "the last preview is the picture"


def test_a_picture_that_may_be_drawn_again_is_not_shown_before_it_is_finished(pipe):
    erasers = attach(pipe, [adapter(pipe, "snoopy")], gate="evidence", progress=False)
    engine, seen = Engine(pipe, erasers, together=4, patience=0.05, most_waiting=40), {"with": [], "without": []}
    chosen = {"with": None, "without": {}}
    try:
        orders = [
            Order(
                "a dog", 1, steps=2, erasers=one,
                watch=lambda step, total, preview, key=key: seen[key].append(preview()),
            )
            for key, one in chosen.items()
        ]  # fmt: skip
        pictures = engine.submit(orders)
        assert all(one.result(60) for one in pictures)
    finally:
        engine.close()
    assert [one is None for one in seen["with"]] == [True, True]
    assert [one is None for one in seen["without"]] == [False, False]

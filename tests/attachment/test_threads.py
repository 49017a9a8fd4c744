"""Threads that attach, recover, detach and draw at once: every picture is one that a single state would have drawn."""

import inspect
import sys
import threading
import time

import pytest
import torch
from pico import pico_eraser, pico_pipeline

from spm_hub.attachment.attachment import attach
from spm_hub.errors import UsageError

PROMPTS = ("snoopy", ["mickey", "a dog"], "a cat")
TARGETS = ("snoopy", "mickey")
STATES = ((), ("snoopy",), ("mickey",), TARGETS)


def draw(pipe, prompt, **options):
    count = len(prompt) if isinstance(prompt, list) else 1
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    return pipe(prompt, generator=generators, num_inference_steps=3, output_type="latent", **options).images


@pytest.fixture
def pipe():
    return pico_pipeline()


@pytest.fixture
def erasers(pipe):
    return {name: pico_eraser(pipe.unet, name, seed=seed) for seed, name in enumerate(TARGETS, start=1)}


@pytest.fixture
def switching():
    """Threads that take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def together(*jobs):
    """Run every job in a thread of its own, and raise what any of them raised."""
    errors = []

    def run(job):
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


def possible(erasers):
    """What each prompt looks like in every state, and on a pipeline that never held anything."""
    twin, pictures = pico_pipeline(), {}
    for prompt in PROMPTS:
        pictures[str(prompt)] = [draw(twin, prompt)]
    for names in STATES:
        with attach(twin, [erasers[name] for name in names]):
            for prompt in PROMPTS:
                pictures[str(prompt)].append(draw(twin, prompt))
    return pictures


def same_weights(pipe):
    bare = pico_pipeline().unet.state_dict()
    return all(torch.equal(tensor, bare[key]) for key, tensor in pipe.unet.state_dict().items())


def drawer(pipe, pictures, rounds, mixed):
    def job():
        for turn in range(rounds):
            prompt = PROMPTS[turn % len(PROMPTS)]
            picture = draw(pipe, prompt)
            if not any(torch.equal(picture, one) for one in pictures[str(prompt)]):
                mixed.append(prompt)

    return job


@pytest.mark.usefixtures("switching")
def test_recovering_and_adding_never_mix_two_states_in_one_picture(pipe, erasers):
    pictures, mixed = possible(erasers), []
    held = attach(pipe, [erasers["snoopy"]])

    def change():
        for turn in range(8):
            name = TARGETS[turn % 2]
            held.gates("snoopy")
            if name in held.names:
                held.recover(name)
            else:
                held.add(erasers[name])

    together(drawer(pipe, pictures, 4, mixed), drawer(pipe, pictures, 4, mixed), change)
    assert not mixed
    held.detach()
    assert same_weights(pipe)


@pytest.fixture
def encoding_by_turns(pipe):
    """A tokenizer, for one, keeps how it pads from one call to the next: two threads that draw by one bare pipeline of
    diffusers now and then get each other's, with no eraser near. That is not what is looked for here.
    """
    turns = threading.Lock()

    class ByTurns(type(pipe)):
        def encode_prompt(self, *args, **kwargs):
            with turns:
                return super().encode_prompt(*args, **kwargs)

    ByTurns.encode_prompt.__signature__ = inspect.signature(type(pipe).encode_prompt)
    pipe.__class__ = ByTurns


@pytest.mark.usefixtures("switching", "encoding_by_turns")
def test_attaching_and_detaching_never_mix_two_states_in_one_picture(pipe, erasers):
    pictures, mixed = possible(erasers), []

    def change():
        for _ in range(5):
            with attach(pipe, list(erasers.values())):
                pass

    together(drawer(pipe, pictures, 5, mixed), drawer(pipe, pictures, 5, mixed), change)
    assert not mixed
    assert same_weights(pipe)


def test_attach_waits_for_the_picture_that_a_bare_pipeline_is_drawing(pipe, erasers):
    bare, began, order = draw(pipe, "snoopy"), threading.Event(), []

    def attaching():
        began.wait(timeout=60)
        attach(pipe, list(erasers.values()))
        order.append("attached")

    def at_step(_, step, *__):
        began.set()
        # Long enough for an attach that does not wait.
        thread.join(timeout=0.2)
        order.append(step)
        return {}

    thread = threading.Thread(target=attaching)
    thread.start()
    picture = draw(pipe, "snoopy", callback_on_step_end=at_step)
    thread.join(timeout=60)
    assert torch.equal(picture, bare)
    assert order == [0, 1, 2, "attached"]
    assert not torch.equal(draw(pipe, "snoopy"), bare)


def test_attach_waits_for_pictures_that_have_begun_and_for_none_that_begin_later(pipe, erasers):
    """Whose they are cannot be told: those of another pipeline, which never stops drawing, must not be waited for."""
    other, drawn, attached = pico_pipeline(), [], threading.Event()

    def drawing():
        while not attached.is_set():
            drawn.append(draw(other, "snoopy"))

    def attaching():
        while len(drawn) < 2:
            time.sleep(0.001)
        for _ in range(3):
            attach(pipe, list(erasers.values())).detach()
        attached.set()

    together(drawing, attaching)
    assert all(torch.equal(picture, drawn[0]) for picture in drawn)


def test_attach_waits_for_a_picture_that_has_hardly_begun(pipe, erasers):
    bare, began, goes_on = draw(pipe, "snoopy"), threading.Event(), threading.Event()

    class Slow(torch.no_grad):
        """Holds a picture between the pipeline's class, which has been looked up, and its `__call__`."""

        def __enter__(self):
            began.set()
            goes_on.wait(timeout=60)
            super().__enter__()

    class Hesitant(type(pipe)):
        __call__ = Slow()(type(pipe).__call__.__wrapped__)

    pipe.__class__, pictures = Hesitant, []

    def attaching():
        began.wait(timeout=60)
        attach(pipe, list(erasers.values()))

    def letting_go():
        began.wait(timeout=60)
        # Long enough for an attach that does not wait.
        time.sleep(0.2)
        goes_on.set()

    together(lambda: pictures.append(draw(pipe, "snoopy")), attaching, letting_go)
    assert torch.equal(pictures[0], bare)


@pytest.mark.usefixtures("switching")
def test_of_two_threads_that_attach_at_once_one_is_told(pipe, erasers):
    held = []

    def job(name):
        def attaching():
            try:
                held.append(attach(pipe, [erasers[name]]))
            except UsageError as error:
                held.append(error)

        return attaching

    for _ in range(5):
        together(*(job(name) for name in TARGETS))
        told = [outcome for outcome in held if isinstance(outcome, UsageError)]
        assert len(told) == 1
        next(outcome for outcome in held if outcome not in told).detach()
        held.clear()
    assert same_weights(pipe)
    assert not [key for key in vars(pipe.unet) if "spm_hub" in key]

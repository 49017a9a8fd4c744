"""Threads that add, recover, detach and draw at once: every picture is one that a single state would have drawn."""

import sys
import threading

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
    """Make threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def together(*jobs):
    """Run every job in a thread of its own, and raise the first error."""
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
    """Draw each prompt in every state, and on a pipeline without an attachment first."""
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
    attached = attach(pipe, [erasers["snoopy"]])

    def change():
        for turn in range(8):
            name = TARGETS[turn % 2]
            attached.gates("snoopy")
            if name in attached.names:
                attached.recover(name)
            else:
                attached.add(erasers[name])

    together(drawer(pipe, pictures, 4, mixed), drawer(pipe, pictures, 4, mixed), change)
    assert not mixed
    attached.detach()
    assert same_weights(pipe)


@pytest.mark.usefixtures("switching")
def test_an_empty_attachment_serves_threads_until_it_is_detached(pipe, erasers):
    pictures, mixed = possible(erasers), []
    attached = attach(pipe, [])

    def change():
        for _ in range(5):
            for adapter in erasers.values():
                attached.add(adapter)
            for name in TARGETS:
                attached.recover(name)

    together(drawer(pipe, pictures, 5, mixed), drawer(pipe, pictures, 5, mixed), change)
    assert not mixed
    for adapter in erasers.values():
        attached.add(adapter)
    together(drawer(pipe, pictures, 4, mixed), attached.detach)
    assert not mixed
    assert same_weights(pipe)
    assert torch.equal(draw(pipe, "snoopy"), pictures["snoopy"][0])


@pytest.mark.parametrize("change", ["add", "recover", "strength", "detach"])
def test_a_change_waits_for_the_picture_in_progress(pipe, erasers, change):
    """Each of them on an attachment of one eraser; the picture in progress is the one that began."""
    twin, (first, second) = pico_pipeline(), erasers.values()
    bare, began, order = draw(pipe, "snoopy"), threading.Event(), []
    attached = attach(pipe, [first])
    before = draw(pipe, "snoopy")
    changes = {
        "add": lambda: attached.add(second),
        "recover": lambda: attached.recover("snoopy"),
        "strength": lambda: attached.strength.update(snoopy=0.0),
        "detach": attached.detach,
    }

    def changing():
        began.wait(timeout=60)
        changes[change]()
        order.append("changed")

    def at_step(_, step, *__):
        began.set()
        # Long enough for a change that does not wait.
        thread.join(timeout=0.2)
        order.append(step)
        return {}

    thread = threading.Thread(target=changing)
    thread.start()
    picture = draw(pipe, "snoopy", callback_on_step_end=at_step)
    thread.join(timeout=60)
    assert torch.equal(picture, before)
    assert order == [0, 1, 2, "changed"]
    after = draw(pipe, "snoopy")
    attached.detach()
    with attach(twin, list(erasers.values()) if change == "add" else []):
        expected = draw(twin, "snoopy")
    assert torch.equal(after, expected)
    assert torch.equal(draw(pipe, "snoopy"), bare)


def test_attach_waits_for_no_picture_of_another_pipeline(pipe, erasers):
    """That picture waits, in its step callback, for the thread that attaches."""
    other, began, attached = pico_pipeline(), threading.Event(), threading.Event()
    bare, pictures = draw(other, "snoopy"), []

    def at_step(*_):
        began.set()
        assert attached.wait(timeout=60)
        return {}

    def attaching():
        assert began.wait(timeout=60)
        attach(pipe, list(erasers.values()))
        attached.set()

    together(lambda: pictures.append(draw(other, "snoopy", callback_on_step_end=at_step)), attaching)
    assert torch.equal(pictures[0], bare)
    assert not torch.equal(draw(pipe, "snoopy"), bare)


@pytest.mark.usefixtures("switching")
def test_of_two_threads_that_attach_at_once_one_is_refused(pipe, erasers):
    outcomes = []

    def job(name):
        def attaching():
            try:
                outcomes.append(attach(pipe, [erasers[name]]))
            except UsageError as error:
                outcomes.append(error)

        return attaching

    for _ in range(5):
        together(*(job(name) for name in TARGETS))
        refused = [outcome for outcome in outcomes if isinstance(outcome, UsageError)]
        assert len(refused) == 1
        next(outcome for outcome in outcomes if outcome not in refused).detach()
        outcomes.clear()
    assert same_weights(pipe)
    assert not [key for key in vars(pipe.unet) if "spm_hub" in key]

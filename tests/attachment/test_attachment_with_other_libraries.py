"""Erasers together with autocast, casts, PEFT's layers, textual inversions, forks and other threads."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest
import torch
from peft import LoraConfig
from pico import pico_eraser, pico_pipeline, pico_unet, target_modules
from pico_families import family_pipeline
from torch import Tensor

import spm_hub
from spm_hub.adapters.adapter import Adapter, increment_info
from spm_hub.adapters.increments import LowRank
from spm_hub.adapters.manifest import Base
from spm_hub.attachment.attachment import attach
from spm_hub.attachment.gates import evaluation as gating
from spm_hub.errors import NotFoundError, UsageError
from spm_hub.models.architectures import targets

PROMPTS = ["snoopy", "a dog"]
LORA = {"r": 2, "lora_alpha": 2, "target_modules": ["to_q", "to_k", "to_v"], "init_lora_weights": False}


def draw(pipe: Any, prompts: Any = "snoopy", **more: Any) -> Tensor:
    one = isinstance(prompts, str)
    generator = [torch.Generator().manual_seed(seed) for seed in range(1 if one else len(prompts))]
    drawn: Tensor = pipe(prompts, num_inference_steps=2, generator=generator, output_type="latent", **more).images
    return drawn


def tuned(**more: Any) -> Any:
    pipe = pico_pipeline()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.unet.add_adapter(LoraConfig(**LORA, **more), adapter_name="style")
    pipe.unet.eval()
    return pipe


@pytest.mark.parametrize("kind", ["low_rank", "dense", "mask"])
def test_autocast_draws_mixed_batches_and_leaves_nothing_behind(kind: str) -> None:
    pipe = pico_pipeline()
    with attach(pipe, [pico_eraser(pipe.unet, kind=kind)], mode="branch"):
        before = draw(pipe, PROMPTS)
        with torch.autocast("cpu", torch.bfloat16):
            half = draw(pipe, PROMPTS)
        assert torch.equal(draw(pipe, PROMPTS), before)
    with attach(pipe, [pico_eraser(pipe.unet, kind=kind)], mode="fold"), torch.autocast("cpu", torch.bfloat16):
        assert (half[:1] - draw(pipe)).abs().max() < 0.2 * (half[:1] - half[1:]).abs().max()


@pytest.mark.parametrize("kind", ["low_rank", "dense"])
def test_a_cast_there_and_back_is_a_cast_of_the_weights_alone(kind: str) -> None:
    """A branch is cast from the erasers' own tensors, not from those of an earlier, narrower dtype."""
    pipe = pico_pipeline()
    erasers = [pico_eraser(pipe.unet, kind=kind)]
    with attach(pipe, erasers, mode="branch"):
        draw(pipe, PROMPTS)
        pipe.to(dtype=torch.bfloat16)
        draw(pipe, PROMPTS)
        pipe.to(dtype=torch.float32)
        after = draw(pipe, PROMPTS)
    with attach(pipe, erasers, mode="branch"):
        assert torch.equal(draw(pipe, PROMPTS), after)


@pytest.mark.parametrize("mode", ["fold", "branch"])
@pytest.mark.parametrize("when", ["before", "between"])
def test_a_fused_lora_that_is_disabled_is_unmerged_for_good(mode: Any, when: str) -> None:
    """PEFT un-merges it when a layer is next called: not from folded weights, and originals do not restore it."""
    pipe, twin = tuned(), tuned()
    for each in (pipe, twin):
        each.unet.fuse_lora()
    if when == "before":
        pipe.unet.disable_adapters()
    with attach(pipe, [pico_eraser(pico_unet())], mode=mode) as erasers:
        draw(pipe)
        pipe.unet.disable_adapters()
        erased = draw(pipe)
        erasers.strength["snoopy"] = 0.5
        draw(pipe)
        erasers.strength["snoopy"] = 1.0
        assert torch.equal(draw(pipe), erased)
    twin.unet.disable_adapters()
    assert torch.equal(draw(pipe), draw(twin))
    with attach(twin, [pico_eraser(pico_unet())], mode=mode):
        assert torch.equal(draw(twin), erased)


def test_a_dora_has_to_be_fused_first() -> None:
    """It scales by the norm of the weights, which a folded eraser changes and a branched one does not."""
    pipe = tuned(use_dora=True)
    bare = draw(pipe)
    with (
        attach(pipe, [pico_eraser(pico_unet())]),
        pytest.raises(UsageError, match=r"'style' is a DoRA(.|\n)*fuse_lora"),
    ):
        draw(pipe)
    assert torch.equal(draw(pipe), bare)
    # On modules that no eraser changes it is allowed.
    apart = [path for path, module in target_modules(pico_unet()).items() if "attn" not in path]
    with attach(pipe, [pico_eraser(pico_unet(), paths=apart)]):
        draw(pipe)
    pipe.unet.fuse_lora()
    with attach(pipe, [pico_eraser(pico_unet())], mode="fold"):
        folded = draw(pipe)
    with attach(pipe, [pico_eraser(pico_unet())], mode="branch"):
        torch.testing.assert_close(draw(pipe), folded, rtol=1e-4, atol=1e-4)


def test_a_textual_inversion_loaded_while_attached_counts_from_then_on() -> None:
    pipe = pico_pipeline()
    learnt = {"zork": torch.randn(32, generator=torch.Generator().manual_seed(0))}
    width = pipe.text_encoder.get_input_embeddings().weight.shape[1]
    with attach(pipe, [pico_eraser(pipe.unet, "zork")]) as erasers:
        erasers.gates("zork")
        pipe.load_textual_inversion({"zork": learnt["zork"].repeat(width)[:width]}, token="zork")
        found = erasers.gates("a dog"), erasers.gates("zork")
    with attach(pipe, [pico_eraser(pipe.unet, "zork")]) as erasers:
        assert (erasers.gates("a dog"), erasers.gates("zork")) == found
    assert found[1] == {"zork": 1.0}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_keeps_its_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """States of large text encoders are in a spill file, which a process and its children would share."""
    monkeypatch.setattr(gating, "_SPILLED_ABOVE", 0)
    pipe = pico_pipeline()
    with attach(pipe, [pico_eraser(pipe.unet), pico_eraser(pipe.unet, "mickey", seed=2)]) as erasers:

        def in_a_child() -> None:
            child = os.fork()
            if not child:
                erasers.add(pico_eraser(pipe.unet, "church", seed=3))
                erasers.gates("a cat")
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0

        erasers.gates("a cat")
        in_a_child()
        erasers.add(pico_eraser(pipe.unet, "dog", seed=4))
        found = erasers.gates("a cat")
        in_a_child()
        erasers.recover("mickey")
        assert erasers.gates("a cat") == {name: gamma for name, gamma in found.items() if name != "mickey"}
    monkeypatch.undo()
    with attach(pipe, [pico_eraser(pipe.unet), pico_eraser(pipe.unet, "dog", seed=4)]) as erasers:
        assert erasers.gates("a cat") == {name: gamma for name, gamma in found.items() if name != "mickey"}


@pytest.mark.parametrize(
    ("family", "options"),
    [("flux-dev", {"max_sequence_length": 16}), ("pixart", {"max_sequence_length": 12}), ("sd1", {})],
)
def test_gates_are_those_of_a_call_with_these_options(
    family: str, options: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = family_pipeline(family)
    seen: list[dict[str, list[float]]] = []
    asked = gating.GateEvaluation.ask
    monkeypatch.setattr(gating.GateEvaluation, "ask", lambda *given: seen.append(asked(*given)) or seen[-1])
    denoiser = getattr(pipe, "transformer", None) or pipe.unet
    small = {"use_resolution_binning": False} if family == "pixart" else {}
    path, module = next(iter(targets(denoiser).items()))
    increments = {path: LowRank(torch.ones(1, module.weight.shape[1]), torch.ones(len(module.weight), 1))}
    manifest = pico_eraser(pico_unet()).manifest.model_copy(
        update={"base": Base(family=family, id="pico", fingerprint="0" * 64), "increment": increment_info(increments)}
    )
    with attach(pipe, [Adapter(manifest, increments)]) as erasers:
        draw(pipe, "a dog", **options, **small)
        assert erasers.gates("a dog", **options) == {name: each[0] for name, each in seen[0].items()}
        if options:
            assert erasers.gates("a dog") != erasers.gates("a dog", **options)
        if family == "sd1":
            assert erasers.gates("a dog", clip_skip=None) == erasers.gates("a dog")
        with pytest.raises(UsageError, match="encode_prompt has no option 'height', which was given as 8"):
            erasers.gates("a dog", height=8)
        with pytest.raises(UsageError, match="takes one prompt"):
            erasers.gates(["a dog", "snoopy"])  # type: ignore[arg-type]
        with pytest.raises(NotFoundError, match="None is no eraser's name"):
            erasers.recover(None)  # type: ignore[arg-type]


def test_two_threads_attach_to_their_own_pipelines_during_pictures() -> None:
    pipes = [pico_pipeline() for _ in range(4)]
    meet, met = threading.Barrier(2), list[str]()

    def work(index: int) -> None:
        def attaching(_pipe: Any, step: int, _time: object, kept: dict[str, Any]) -> dict[str, Any]:
            if step == 0:
                meet.wait(60)
                with attach(pipes[index + 2], [pico_eraser(pipes[index + 2].unet)]) as erasers:
                    met.extend(erasers.names)
                    meet.wait(60)
            return kept

        draw(pipes[index], callback_on_step_end=attaching)

    threads = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert met == ["snoopy", "snoopy"]


def test_erasers_may_come_from_a_generator() -> None:
    pipe = pico_pipeline()
    with spm_hub.attach(pipe, (pico_eraser(pipe.unet, name) for name in ("snoopy", "mickey"))) as erasers:
        assert erasers.names == tuple(erasers.strength) == ("snoopy", "mickey")


@pytest.mark.parametrize("given", [None, 5, [None]])
def test_objects_that_are_no_erasers_are_refused(given: Any) -> None:
    with pytest.raises(UsageError, match="adapters holds erasers"):
        spm_hub.attach(pico_pipeline(), given)

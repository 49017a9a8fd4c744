"""Erasers on whole models in half precision, at the sizes people draw, on a GPU.

    python benchmarks/full_size.py                 # SD1.5, SDXL and FLUX.1-schnell; minutes on a data-centre GPU
    python benchmarks/full_size.py sd1             # one of them; the others' numbers stay as they were

The denoisers are the exact ones with random weights: SD1.5 at 512x512 and SDXL at 1024x1024 pixels in float16, FLUX at
1024x1024 in bfloat16; the text encoders around them are small ones of the right width. An eraser is rank 1 on every
target module. Steps of the bare model and of the one with erasers are timed in turn, and their medians are compared:
one prompt, and a mixed batch of eight, for each of which our erasers have gammas of their own. PEFT and one hook per
eraser hold the same erasers, all at one factor. Seconds to attach, fold, fold for other gammas, recover and detach are
the best of three.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from record import RESULTS, record
from runtime import PROMPTS, draw, eraser, hold_hooks, hold_peft
from runtime import pipeline as small_around
from torch import Tensor
from transformers import CLIPTextModel, T5Config, T5EncoderModel, T5Tokenizer

from spm_hub import attach
from spm_hub.adapters.adapter import Adapter
from spm_hub.adapters.increments import Increment, LowRank
from spm_hub.attachment.attachment import Attachment
from spm_hub.models.architectures import denoiser_of, family_of, targets, weight_of

FILE = RESULTS / "full_size.json"
SIDES = {"sd1": 512, "sdxl": 1024, "flux": 1024}
DTYPES = {"sd1": torch.float16, "sdxl": torch.float16, "flux": torch.bfloat16}
OURS = {"one": (1, 20, 100, 1000), "mixed": (20, 100)}
OTHERS = {"sd1": (1, 20, 100), "sdxl": (1, 20), "flux": (1, 20)}
LATENCIES = (20, 1000)


def flux() -> FluxPipeline:
    """FLUX.1-schnell's exact denoiser, made on the GPU, behind small encoders of the right widths."""
    around: Any = small_around("sd1")
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        transformer = FluxTransformer2DModel(guidance_embeds=False)
        torch.set_default_dtype(torch.float32)
    pieces = ["▁", *(chr(code) for code in range(97, 123)), ","]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, -1.0) for piece in pieces)]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=256)
    encoder = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=4096, d_kv=64, d_ff=64, num_layers=1, num_heads=1)
    )
    clip = CLIPTextModel(around.text_encoder.config)
    vae = AutoencoderKL(
        block_out_channels=(32,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=16, shift_factor=0.0,
    )  # fmt: skip
    return FluxPipeline(
        vae=vae, text_encoder=clip, tokenizer=around.tokenizer, text_encoder_2=encoder, tokenizer_2=tokenizer,
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
    )  # fmt: skip


def pipeline(model: str) -> Any:
    """On the GPU, in the model's half precision."""
    pipe: Any = flux() if model == "flux" else small_around(model)
    pipe.to("cuda", DTYPES[model])
    denoiser_of(pipe).requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def erasers(pipe: Any, count: int) -> list[Adapter]:
    """Random rank-1 erasers on all target modules; their numbers are cut from one pool, as drawing them takes long."""
    modules = targets(denoiser_of(pipe))
    family = family_of(pipe).name
    dtype = weight_of(next(iter(modules.values()))).dtype
    pool = (torch.randn(2**22, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    place = 0

    def cut(*shape: int) -> Tensor:
        nonlocal place
        size = torch.Size(shape).numel()
        place = (place + size + 1) % (len(pool) - 2 * 20_000)
        return pool[place : place + size].view(shape)

    made = []
    for number in range(count):
        pairs: dict[str, Increment] = {}
        for path, module in modules.items():
            out, *rest = weight_of(module).shape
            pairs[path] = LowRank(cut(1, *rest), cut(out, 1, *[1] * (len(rest) - 1)))
        made.append(eraser(number, family, pairs))
    return made


def compared(
    pipe: Any, model: str, prompts: list[str], on: Callable[[], Any], off: Callable[[], Any]
) -> dict[str, Any]:
    """Medians of the bare model's steps and of those with erasers, in turn, and the memory that those add at peak."""
    rounds, steps = (3, 8) if len(prompts) == 1 else (2, 4)
    bare: list[float] = []
    given: list[float] = []
    peaks = []
    draw(pipe, prompts, SIDES[model], 2, torch.cuda.synchronize)
    for _ in range(rounds):
        for held, seconds in ((False, bare), (True, given)):
            torch.cuda.reset_peak_memory_stats()
            if held:
                on()
            seconds += draw(pipe, prompts, SIDES[model], steps, torch.cuda.synchronize)
            peaks.append(torch.cuda.max_memory_allocated())
            if held:
                off()
    return {
        "prompts": len(prompts),
        "bare_milliseconds_per_step": round(1000 * statistics.median(bare), 2),
        "milliseconds_per_step": round(1000 * statistics.median(given), 2),
        "ratio": round(statistics.median(given) / statistics.median(bare), 3),
        "memory_added_megabytes": round((max(peaks[1::2]) - max(peaks[::2])) / 2**20, 1),
    }


def signature(pipe: Any) -> dict[str, tuple[int, int]]:
    """Two sums over the bits of each tensor, one of them weighted by place."""
    found = {}
    for name, tensor in denoiser_of(pipe).state_dict().items():
        bits = tensor.reshape(-1).view(torch.int16).long()
        found[name] = (int(bits.sum()), int((bits * torch.arange(len(bits), device=bits.device)).sum()))
    return found


def latency(pipe: Any, held: list[Adapter]) -> dict[str, Any]:
    """Seconds of everything that is not a step, and whether the weights are what they were."""
    pristine = signature(pipe)
    seconds: dict[str, list[float]] = {}

    def clock(name: str, action: Callable[[], Any]) -> Any:
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = action()
        torch.cuda.synchronize()
        seconds.setdefault(name, []).append(time.perf_counter() - start)
        return result

    for _ in range(3):
        attached = clock("attach", lambda: attach(pipe, held, gate="transport"))

        def fold(value: float, attached: Attachment = attached) -> None:
            attached.strength.update(dict.fromkeys(attached.names, value))
            with torch.no_grad(), attached.denoising(2, None):
                pass

        clock("fold", lambda: fold(0.5))
        clock("fold_for_other_gammas", lambda: fold(0.6))
        clock("recover_all", lambda attached=attached: [attached.recover(name) for name in tuple(attached.names)])
        clock("detach", attached.detach)
    identical = signature(pipe) == pristine
    return {"erasers": len(held), **{name: round(min(each), 4) for name, each in seconds.items()}} | {
        "weights_bit_identical": identical
    }


def measure(model: str, tell: Callable[[dict[str, Any]], None]) -> None:
    """All rows of one model; `tell` is called with each as soon as it is there."""
    pipe = pipeline(model)
    held = erasers(pipe, max(OURS["one"]))
    weights = [weight_of(module).nbytes for module in targets(denoiser_of(pipe)).values()]
    tell({"targets": len(weights), "targeted_weights_megabytes": round(sum(weights) / 2**20, 1)})
    attached: list[Attachment] = []
    for batch, counts in OURS.items():
        prompts = list(PROMPTS[:1] if batch == "one" else PROMPTS)
        for count in counts:
            some = held[:count]
            size = sum(increment.nbytes for one in some for increment in one.increments.values()) / 2**20
            row = compared(
                pipe, model, prompts,
                lambda some=some: attached.append(attach(pipe, some, gate="transport")),
                lambda: attached.pop().detach(),
            )  # fmt: skip
            tell({"method": "ours", "erasers": count, **row, "erasers_megabytes": round(size, 1)})
    for count in LATENCIES:
        tell({"latency": latency(pipe, held[:count])})
    for count in OTHERS[model]:
        there = [
            Adapter(one.manifest, {path: pair.to(device="cuda") for path, pair in one.increments.items()})
            for one in held[:count]
        ]
        on, off = hold_hooks(pipe, there)
        tell({"method": "hooks", "erasers": count, **compared(pipe, model, [PROMPTS[0]], on, off)})
    for count in OTHERS[model]:  # last: PEFT leaves its layers in the model
        on, off = hold_peft(pipe, held[:count])
        tell({"method": "peft", "erasers": count, **compared(pipe, model, [PROMPTS[0]], on, off)})
        off()
        pipe = pipeline(model) if count != OTHERS[model][-1] else pipe


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"of {', '.join(SIDES)}; all unless given")
    chosen = parser.parse_args().models or list(SIDES)
    if not torch.cuda.is_available():
        sys.exit("this machine has no GPU that torch can see; benchmarks/runtime.py measures without one")
    numbers: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {"models": {}}
    numbers["gpu"] = torch.cuda.get_device_name()
    for model in chosen:
        about: dict[str, Any] = {
            "side": SIDES[model], "dtype": str(DTYPES[model]).removeprefix("torch."), "steps": [], "latency": [],
        }  # fmt: skip
        numbers["models"][model] = about

        def tell(row: dict[str, Any], about: dict[str, Any] = about) -> None:
            print(row, file=sys.stderr, flush=True)
            if "method" in row:
                about["steps"].append(row)
            elif "latency" in row:
                about["latency"].append(row["latency"])
            else:
                about |= row
            record("full_size", numbers, seeds=0)

        measure(model, tell)
        torch.cuda.empty_cache()

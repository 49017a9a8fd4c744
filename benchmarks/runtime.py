"""What erasers cost at run time: ours against PEFT, diffusers' LoRA loader, and one hook per eraser.

    python benchmarks/runtime.py                      # everything, about half an hour on two cores
    python benchmarks/runtime.py sd1 latency gates    # parts: sd1, sdxl, latency, gates, cycles, start

The U-Nets are SD1.5's and SDXL's exact ones with random weights, in float32, at 64x64 and 128x128 pixels; the pipeline
around them is diffusers' own with a small random text encoder of the right width. An eraser is rank 1 on every target
module. Every number of erasers and every way of holding them runs in a process of its own, which steps the bare model
and the one with erasers in turn; what is compared are the medians of the two. A case that was measured before keeps its
earlier ratios, and the median of all is what counts: on shared machines a single one is off by a twentieth.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from record import RESULTS, record
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from spm_hub import attach
from spm_hub.adapters.adapter import Adapter, increment_info
from spm_hub.adapters.increments import Increment, LowRank
from spm_hub.adapters.manifest import Base, Concept, Manifest
from spm_hub.attachment.attachment import Attachment
from spm_hub.attachment.gates.concept_index import ConceptIndex, EncodedConcept
from spm_hub.attachment.gates.gate import Prompts, TransportGate
from spm_hub.attachment.gates.spill_file import SpillFile
from spm_hub.models.aliases import WEIGHTS
from spm_hub.models.architectures import family_of, targets, weight_of
from spm_hub.models.loading import load_pipeline
from spm_hub.registry.registry import Registry

METHODS = ("ours", "peft", "diffusers", "hooks")
MIXED = 8
ROUNDS = 3
# A thousand adapters take PEFT and diffusers hours to load, and SDXL's U-Net leaves no room for them on 24 GiB.
COUNTS = {
    ("sd1", "ours"): (1, 5, 20, 100, 1000),
    **{("sd1", other): (1, 5, 20, 100) for other in METHODS[1:]},
    **{("sdxl", method): (20,) for method in METHODS},
}
PROMPTS = ("a photo of a dog", "a house by the sea", "snoopy", "a red apple", "two birds", "a man", "mickey", "a tree")

UNETS: dict[str, dict[str, Any]] = {
    "sd1": {"cross_attention_dim": 768},
    "sdxl": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
SIDE = {"sd1": 64, "sdxl": 128}


def tokenizer_of_77() -> CLIPTokenizer:
    """The sketchbook's tokenizer with CLIP's own window."""
    tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "base" / "tokenizer")
    tokenizer.model_max_length = 77
    return tokenizer


def _text_config(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=width, num_hidden_layers=2,
        num_attention_heads=width // 64, max_position_embeddings=77, projection_dim=width,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def pipeline(model: str) -> Any:
    """The pipeline of a model: its exact U-Net, and everything else small."""
    torch.manual_seed(0)
    tokenizer = tokenizer_of_77()
    unet = UNet2DConditionModel(**UNETS[model])
    vae = AutoencoderKL(
        block_out_channels=(32,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
    )
    shared = {"vae": vae, "tokenizer": tokenizer, "unet": unet, "scheduler": DDIMScheduler()}
    text_encoder = CLIPTextModel(_text_config(tokenizer, 768))
    pipe: Any
    if model == "sd1":
        pipe = StableDiffusionPipeline(
            **shared, text_encoder=text_encoder, safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip
    else:
        second = CLIPTextModelWithProjection(_text_config(tokenizer, 1280))
        pipe = StableDiffusionXLPipeline(
            **shared, text_encoder=text_encoder, text_encoder_2=second, tokenizer_2=tokenizer_of_77(),
            add_watermarker=False,
        )  # fmt: skip
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def erasers(pipe: Any, count: int, dtype: torch.dtype = torch.float32) -> list[Adapter]:
    """Random rank-1 erasers on all target modules, of concepts `thing 0` and so on."""
    modules = targets(pipe.unet)
    family = family_of(pipe).name
    made = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        pairs: dict[str, Increment] = {}
        for path, module in modules.items():
            out, *rest = weight_of(module).shape
            down = torch.randn((1, *rest), generator=generator) * 0.02
            up = torch.randn((out, 1, *[1] * (len(rest) - 1)), generator=generator) * 0.02
            pairs[path] = LowRank(down, up).to(dtype=dtype)
        made.append(eraser(number, family, pairs))
    return made


def eraser(number: int, family: str, pairs: dict[str, Increment]) -> Adapter:
    """These increments as the eraser of `thing NUMBER`."""
    manifest = Manifest(
        name=f"thing-{number:05d}", concept=Concept(target=f"thing {number}"), increment=increment_info(pairs),
        base=Base(family=family, id="random", fingerprint=""), recipe={},
    )  # fmt: skip
    return Adapter(manifest, pairs)


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def draw(
    pipe: Any, prompts: list[str], side: int, steps: int, finished: Callable[[], None] = lambda: None
) -> list[float]:
    """Seconds of each step but the first, which may also fold; `finished` waits for a device beside the CPU."""
    stamps: list[float] = []

    def stamp(pipe: Any, step: int, time_: Any, values: dict[str, Any]) -> dict[str, Any]:
        finished()
        stamps.append(time.perf_counter())
        return {}

    pipe(
        prompts, num_inference_steps=steps, height=side, width=side, output_type="latent",
        generator=torch.Generator().manual_seed(0), callback_on_step_end=stamp,
    )  # fmt: skip
    return [after - before for before, after in itertools.pairwise(stamps)]


def hold_peft(pipe: Any, held: list[Adapter]) -> tuple[Callable[[], None], Callable[[], None]]:
    """All adapters through PEFT's own API: `inject_adapter_in_model`, and `set_adapter` of all of them."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    names = [adapter.name.replace("-", "_") for adapter in held]
    for adapter, name in zip(held, names, strict=True):
        config = LoraConfig(r=1, lora_alpha=1, target_modules=list(adapter.increments))
        inject_adapter_in_model(config, pipe.unet, name)
        for path, increment in adapter.increments.items():
            layer = pipe.unet.get_submodule(path)
            layer.lora_A[name].weight.data.copy_(increment.down)
            layer.lora_B[name].weight.data.copy_(increment.up)
    layers = [layer for layer in pipe.unet.modules() if isinstance(layer, BaseTunerLayer)]

    def on() -> None:
        for layer in layers:
            layer.enable_adapters(True)
            layer.set_adapter(names)

    def off() -> None:
        for layer in layers:
            layer.enable_adapters(False)

    return on, off


def hold_diffusers(pipe: Any, held: list[Adapter]) -> tuple[Callable[[], None], Callable[[], None]]:
    """All adapters through `load_lora_weights` of their files, and `set_adapters` of all of them."""
    names = [adapter.name.replace("-", "_") for adapter in held]
    with tempfile.TemporaryDirectory() as folder:
        for adapter, name in zip(held, names, strict=True):
            adapter.save(Path(folder) / "pytorch_lora_weights.safetensors")
            pipe.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors", adapter_name=name)

    def on() -> None:
        pipe.enable_lora()
        pipe.set_adapters(names, [0.5] * len(names))

    return on, pipe.disable_lora


def hold_hooks(pipe: Any, held: list[Adapter]) -> tuple[Callable[[], None], Callable[[], None]]:
    """One forward hook for each eraser and module, each with its own pair of products."""
    import torch.nn.functional as F

    handles: list[Any] = []

    def effect(increment: LowRank) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if isinstance(module, nn.Conv2d):
                return output + 0.5 * F.conv2d(F.conv2d(args[0], increment.down), increment.up)
            return output + 0.5 * F.linear(F.linear(args[0], increment.down), increment.up)

        return hook

    def on() -> None:
        for adapter in held:
            for path, increment in adapter.increments.items():
                assert isinstance(increment, LowRank)
                handles.append(pipe.unet.get_submodule(path).register_forward_hook(effect(increment)))

    def off() -> None:
        while handles:
            handles.pop().remove()

    return on, off


def case(model: str, method: str, count: int, mixed: bool) -> dict[str, Any]:
    """One process: the bare model and the one with erasers, in turn."""
    pipe = pipeline(model)
    held = erasers(pipe, count)
    prompts = list(PROMPTS[:MIXED]) if mixed else [PROMPTS[0]]
    side = SIDE[model]
    own = sum(increment.nbytes for adapter in held for increment in adapter.increments.values()) / 2**20
    draw(pipe, prompts, side, 2)
    before = peak_megabytes()
    bare: list[float] = []
    given: list[float] = []
    if method == "ours":
        attached: list[Attachment] = []

        def on() -> None:
            attached.append(attach(pipe, held, gate="transport"))

        def off() -> None:
            attached.pop().detach()
    else:
        on, off = {"peft": hold_peft, "diffusers": hold_diffusers, "hooks": hold_hooks}[method](pipe, held)
        off()
    for _ in range(ROUNDS):
        bare += draw(pipe, prompts, side, 3)
        on()
        given += draw(pipe, prompts, side, 3)
        off()
    return {
        "model": model, "method": method, "erasers": count, "prompts": len(prompts),
        "bare_seconds_per_step": round(statistics.median(bare), 4),
        "seconds_per_step": round(statistics.median(given), 4),
        "ratio": round(statistics.median(given) / statistics.median(bare), 3),
        "memory_added_megabytes": round(peak_megabytes() - before, 1),
        "erasers_megabytes": round(own, 1),
        "targeted_weights_megabytes": round(sum(weight_of(m).nbytes for m in targets(pipe.unet).values()) / 2**20, 1),
    }  # fmt: skip


def latency(model: str = "sd1", count: int = 20) -> dict[str, Any]:
    """Seconds to attach, fold, fold for another prompt, recover all, detach; the best of three."""
    pipe = pipeline(model)
    held = erasers(pipe, count)
    pristine = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    seconds: dict[str, list[float]] = {}

    def clock(name: str, action: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = action()
        seconds.setdefault(name, []).append(time.perf_counter() - start)
        return result

    for _ in range(3):
        attached = clock("attach", lambda: attach(pipe, held, gate="transport"))
        attached.gates("warm the concepts")
        noise, times = torch.randn(2, 4, 8, 8), torch.tensor(500)
        states = torch.zeros(2, 77, 768)

        def fold(value: float, attached: Attachment = attached) -> None:
            attached.strength.update(dict.fromkeys(attached.names, value))
            with torch.no_grad(), attached.denoising(2, None):
                pass

        clock("fold", lambda: fold(0.5))
        clock("fold_for_other_gammas", lambda: fold(0.6))
        with torch.no_grad():
            pipe.unet(noise, times, encoder_hidden_states=states)
        clock("recover_all", lambda attached=attached: [attached.recover(name) for name in tuple(attached.names)])
        clock("detach", attached.detach)
        assert all(torch.equal(pristine[key], value) for key, value in pipe.unet.state_dict().items())
    return {"model": model, "erasers": count} | {name: round(min(each), 4) for name, each in seconds.items()}


def gates(counts: tuple[int, ...] = (10, 100, 1000, 10_000)) -> list[dict[str, Any]]:
    """Milliseconds for the gammas of one prompt after the text encoder, at two sizes of text states."""
    found = []
    generator = torch.Generator().manual_seed(0)
    # As an attachment keeps them: the sketchbook's in memory, SD1.5's in a file.
    for tokens, width, most, spill_file in ((24, 128, 10_000, None), (77, 768, 1000, SpillFile())):
        for count in (count for count in counts if count <= most):
            each = tuple(
                EncodedConcept(
                    (f"thing {n}",),
                    (frozenset({n, n + 1}),),
                    torch.randn(1, tokens, width, generator=generator),
                    spill_file,
                )
                for n in range(count)
            )
            concepts = ConceptIndex(each)
            prompts = [
                Prompts(("thing",), (frozenset({k}),), torch.randn(1, tokens, width, generator=generator))
                for k in range(12)
            ]
            gate = TransportGate()
            gate.gammas(prompts[0], concepts)
            seconds = []
            for prompt in prompts:
                start = time.perf_counter()
                gate.gammas(prompt, concepts)
                seconds.append(time.perf_counter() - start)
            found.append({
                "erasers": count, "tokens": tokens, "width": width,
                "milliseconds": round(1000 * statistics.median(seconds), 3),
            })  # fmt: skip
    return found


def cycles(count: int = 1000) -> dict[str, Any]:
    """Attach, draw folded and branched, recover, detach, over and over, on the sketchbook: weights and memory after."""
    pipe: Any = load_pipeline("sketchbook", device="cpu")
    registry = Registry(Path(__file__).parents[1])
    held = [registry.get(name).load() for name in ("snoopy", "mickey", "spongebob")]
    pristine = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    process = psutil.Process()

    def cycle() -> None:
        with attach(pipe, held[:2]) as attached:
            draw(pipe, ["snoopy"], 64, 1)
            attached.add(held[2])
            draw(pipe, ["snoopy", "a dog"], 64, 1)
            attached.recover("mickey")
            draw(pipe, ["a dog"], 64, 1)

    for _ in range(50):  # caches of the libraries fill first
        cycle()
    before = process.memory_info().rss
    for _ in range(count):
        cycle()
    after = process.memory_info().rss
    return {
        "cycles": count,
        "weights_bit_identical": all(
            torch.equal(pristine[key], value) for key, value in pipe.unet.state_dict().items()
        ),
        "resident_megabytes_before": round(before / 2**20, 1),
        "resident_megabytes_after": round(after / 2**20, 1),
        "change": round(after / before - 1, 4),
    }


def start_up() -> dict[str, float]:
    """Seconds of the command: `--help`, and `list` with 1,000 erasers; the median of five processes each."""
    command = Path(sys.executable).with_name("spmhub")

    def clock(*arguments: str) -> float:
        seconds = []
        for _ in range(6):
            begin = time.perf_counter()
            subprocess.run([command, *arguments], check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - begin)
        return round(statistics.median(seconds[1:]), 3)

    with tempfile.TemporaryDirectory() as folder:
        registry = Registry(Path(folder))
        increments = {"down_blocks.0.attentions.0.proj_in": LowRank(torch.ones(1, 8), torch.ones(8, 1))}
        for number in range(1000):
            manifest = Manifest(
                name=f"thing-{number:04d}", concept=Concept(target=f"thing {number}"),
                increment=increment_info(increments), base=Base(family="sd1", id="random", fingerprint=""), recipe={},
            )  # fmt: skip
            registry.add(Adapter(manifest, increments))
        return {"help": clock("--help"), "list_of_1000": clock("list", "--registry", folder)}


def plot(cases: list[dict[str, Any]], path: Path) -> None:
    """Step time over the bare model's, by number of erasers: one panel for one prompt, one for a mixed batch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, prompts in zip(axes, (1, MIXED), strict=True):
        for colour, method in enumerate(METHODS):
            for model, style in (("sd1", {"marker": "o"}), ("sdxl", {"marker": "D", "fillstyle": "none"})):
                line = sorted(
                    (one["erasers"], one["ratio"])
                    for one in cases
                    if (one["model"], one["prompts"], one["method"]) == (model, prompts, method)
                )
                if line:
                    label = f"{'spm-hub' if method == 'ours' else method}{', SDXL' if model == 'sdxl' else ''}"
                    axis.plot(*zip(*line, strict=True), color=f"C{colour}", label=label, **style)
        axis.axhline(1.0, color="grey", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlim=(0.8, 1300), xlabel="erasers")
        axis.set_title("one prompt" if prompts == 1 else f"a mixed batch of {prompts}")
        axis.set_xticks((1, 5, 20, 100, 1000), ("1", "5", "20", "100", "1,000"))
        axis.set_yticks((1, 1.5, 2, 3, 4), ("1x", "1.5x", "2x", "3x", "4x"))
        axis.minorticks_off()
    axes[0].set_ylabel("step time over the bare model's")
    axes[1].legend(*axes[0].get_legend_handles_labels(), fontsize="small", ncols=2, loc="upper left")
    figure.savefig(path, dpi=110)


def _apart(arguments: list[str]) -> dict[str, Any]:
    """A case in a process of its own: peak memory is a process's, and nothing is left over from another case."""
    command = [sys.executable, __file__, "case", *arguments]
    # glibc otherwise gives the activations of every step back to the system, and half of a step is page faults, more or
    # fewer of them by the history of the process: two speeds of one and the same bare model.
    allocator = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **allocator})
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(result, file=sys.stderr, flush=True)
    return result


def _cases(model: str, only: list[str]) -> list[list[str]]:
    """Arguments of the cases of a model, those of `only` these numbers of erasers where there are any."""
    wanted = []
    for method in METHODS:
        for count in (count for count in COUNTS[model, method] if not only or str(count) in only):
            wanted.append([model, method, str(count), "one"])
            # Nobody else can give each prompt of a batch its own sum; a mixed batch of 1,000 is for nobody.
            if method == "ours" and count <= 100:
                wanted.append([model, method, str(count), "mixed"])
    return wanted


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    if sys.argv[1:2] == ["case"]:
        model, method, count, batch = sys.argv[2:6]
        print(json.dumps(case(model, method, int(count), batch == "mixed")))
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("sd1", "sdxl", "latency", "gates", "cycles", "start")
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(parts)}; everything unless given")
    parser.add_argument("--only", nargs="*", default=[], help="step times for these numbers of erasers")
    options = parser.parse_args()
    if importlib.util.find_spec("matplotlib") is None:  # known before half an hour of measuring, not after it
        parser.error("the plot needs matplotlib: pip install -c constraints.txt -e '.[eval]'")
    file = RESULTS / "runtime.json"
    numbers: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"steps": []}
    for part in options.parts or parts:
        if part in UNETS:
            for arguments in _cases(part, options.only):
                new = _apart(arguments)
                same = ("model", "method", "erasers", "prompts")
                kept = [one for one in numbers["steps"] if any(one[key] != new[key] for key in same)]
                earlier = [ratio for one in numbers["steps"] if one not in kept for ratio in one["ratios"]]
                new["ratios"] = [*earlier, new["ratio"]]
                new["ratio"] = round(statistics.median(new["ratios"]), 3)
                numbers["steps"] = [*kept, new]
                record("runtime", numbers, seeds=0)
            plot(numbers["steps"], RESULTS / "runtime.png")
        else:
            numbers[part] = {"latency": latency, "gates": gates, "cycles": cycles, "start": start_up}[part]()
        record("runtime", numbers, seeds=0)

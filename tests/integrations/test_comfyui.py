"""The nodes for ComfyUI: their logic with stand-ins, and all of them inside ComfyUI where a checkout is named.

SPMHUB_COMFYUI=/path/to/ComfyUI pytest tests/integrations/test_comfyui.py
"""

from __future__ import annotations

import gc
import json
import types
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_classes import (
    CHECKOUT,
    MISSING,
    NODES,
    Clip,
    Graph,
    HookGroup,
    PromptServer,
    Server,
    load_package,
    real_comfyui,
    stand_ins,
)
from ldm import unet_to_ldm
from PIL import Image
from test_families import EXACT

import spm_hub
from spm_hub.adapters.adapter import Adapter, increment_info
from spm_hub.adapters.formats.spm import to_tensors
from spm_hub.adapters.increments import LowRank
from spm_hub.adapters.manifest import Base, Concept, GateDefaults, Manifest
from spm_hub.attachment.gates import bank
from spm_hub.errors import NotFoundError, UsageError
from spm_hub.models.architectures import family_of, targets

ROOT = Path(__file__).resolve().parents[2]
MODULE = "down_blocks.0.attentions.0.proj_in"


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    models = tmp_path_factory.mktemp("models")
    for name in ("snoopy", "van gogh"):
        eraser(name).save(models / f"{name}.safetensors")
    with pytest.MonkeyPatch.context() as patch, stand_ins(models) as package:
        patch.setenv("XDG_CACHE_HOME", str(models / "cache"))
        patch.setenv("XDG_DATA_HOME", str(models / "data"))
        patch.setattr(bank, "_LEAST", 96)
        patch.setattr(bank, "_MOST", 96)
        yield package.nodes


def eraser(concept: str | None, rows: Any = "both", strength: float = 1.0) -> Adapter:
    increments = {MODULE: LowRank(torch.ones(1, 4, 1, 1), torch.ones(4, 1, 1, 1))}
    manifest = Manifest(
        name=(concept or "nameless").replace(" ", "-"),
        concept=Concept(target=concept),
        increment=increment_info(increments),
        base=Base(family="sd1", id="pico", fingerprint=""),
        recipe={},
        gate=GateDefaults(kind="calibrated", rows=rows, strength=strength),
    )
    return Adapter(manifest, increments)


def hooks_in(conditioning: Any) -> dict[str, float]:
    group = conditioning[0][1].get("hooks")
    return {hook.eraser: hook.strength_model for hook in group.hooks} if group else {}


def test_a_chain_of_erasers_gates_prompts(nodes: Any) -> None:
    clip = Clip()
    first = nodes.LoadEraser.execute("snoopy.safetensors").args[0]
    file = Path(nodes.folder_paths.models_dir) / "van gogh.safetensors"
    chain = nodes.LoadEraser.execute("(see reference)", str(file), strength=0.5, erasers=first).args[0]
    assert [one.adapter.name for one in chain] == ["snoopy", "van-gogh"]
    encoded = nodes.TextEncode.execute(clip, chain, "(snoopy:1.3) at sea", "ugly")
    positive, negative, report = encoded.args
    assert hooks_in(positive) == {"snoopy": 1.0}
    assert positive[0][1]["hooks"] is negative[0][1]["hooks"], "ComfyUI samples both in one batch"
    assert "snoopy: gamma 1 (words: snoopy)" in report
    assert PromptServer.said[-1] == ("7", report), "shown below the node"
    assert encoded.ui["gates"] == [{"snoopy": 1.0, "van-gogh": 0.0}]
    assert hooks_in(nodes.TextEncode.execute(clip, chain, "by van gogh").args[0]) == {"van-gogh": 0.5}
    bare = nodes.TextEncode.execute(clip, chain, "a dog").args[0]
    assert bare[0][1] == {}, "an eraser with gamma 0 changes nothing at all"
    always = nodes.TextEncode.execute(clip, chain, "a dog", gate="always", rows="conditional").args
    assert (hooks_in(always[0]), hooks_in(always[1])) == ({"snoopy": 1.0, "van-gogh": 0.5}, {})
    assert hooks_in(nodes.RecoverConcept.execute(chain, "van gogh").args[0] and positive) == {"snoopy": 1.0}
    left = nodes.RecoverConcept.execute(chain, " van gogh ").args[0]
    assert [one.adapter.name for one in left] == ["snoopy"]
    with pytest.raises(NotFoundError, match="van goch"):
        nodes.RecoverConcept.execute(chain, "van goch")
    with pytest.raises(NotFoundError, match="no name is given"):
        nodes.RecoverConcept.execute(chain, " , ")


def test_rows_and_strengths_are_those_of_each_eraser(nodes: Any) -> None:
    gating = nodes.hooks_of.__globals__
    chain = [
        gating["Chosen"](eraser("snoopy", rows="conditional", strength=0.5), 2.0),
        gating["Chosen"](eraser("mickey"), -0.25),
    ]
    positive, negative = nodes.hooks_of(chain, {"snoopy": 0.5, "mickey": 1.0}, None)
    assert [(hook.eraser, hook.strength_model) for hook in positive.hooks] == [("snoopy", 0.5), ("mickey", -0.25)]
    assert [hook.eraser for hook in negative.hooks] == ["mickey"]
    assert nodes.hooks_of(chain, {"snoopy": 0.0, "mickey": 0.0}, "both") == (None, None)


def test_a_conditioning_is_gated_once(nodes: Any) -> None:
    clip, chain = Clip(), nodes.LoadEraser.execute("snoopy.safetensors").args[0]
    plain = [[torch.zeros(1, 4, 3), {"guidance": 3.5}]]
    gated, none, _ = nodes.GateConditioning.execute(plain, clip, chain, "snoopy").args
    assert none is None
    assert hooks_in(gated) == {"snoopy": 1.0}
    assert gated[0][1]["guidance"] == 3.5
    assert plain[0][1] == {"guidance": 3.5}, "the given one is unchanged"
    with pytest.raises(UsageError, match="snoopy would act twice"):
        nodes.GateConditioning.execute(gated, clip, chain, "snoopy")


def test_what_is_wrong_is_said_in_words(nodes: Any) -> None:
    with pytest.raises(UsageError, match="no eraser is chosen"):
        nodes.LoadEraser.execute("(see reference)")
    with pytest.raises(NotFoundError, match="no-such"):
        nodes.LoadEraser.execute("(see reference)", "no-such")
    chain = nodes.LoadEraser.execute("snoopy.safetensors").args[0]
    with pytest.raises(UsageError, match="in this chain already"):
        nodes.LoadEraser.execute("snoopy.safetensors", erasers=chain)
    with pytest.raises(UsageError, match="there is no CLIP"):
        nodes.TextEncode.execute(None, chain, "a dog")
    hook = nodes.hooks_of(chain, {"snoopy": 1.0}, None)[0].hooks[0].clone()
    whole = f"lora_unet_{MODULE.replace('.', '_')}"
    model = Model([whole])
    assert hook.add_hook_patches(model, {}, {"target": "clip"}, HookGroup()) is False
    assert hook.add_hook_patches(model, {}, {}, HookGroup()) is True
    assert model.patched == [hook]
    with pytest.raises(UsageError, match="eraser snoopy does not fit this model: 1 of its 1 modules are not in it"):
        hook.add_hook_patches(Model(["lora_unet_something_else"]), {}, {}, HookGroup())


class Model:
    """A model patcher and its model at once."""

    def __init__(self, keys: list[str]) -> None:
        self.model, self.keys, self.patched = self, dict.fromkeys(keys), []


def test_a_concept_may_be_given_to_a_file_that_names_none(nodes: Any, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    eraser(None).save(file)
    chain = nodes.LoadEraser.execute("(see reference)", str(file), concept="pikachu").args[0]
    assert hooks_in(nodes.TextEncode.execute(Clip(), chain, "a pikachu").args[0]) == {"nameless": 1.0}
    assert hooks_in(nodes.TextEncode.execute(Clip(), chain, "a dog").args[0]) == {}


@pytest.mark.parametrize("name", ["l", "t5xxl"])
def test_texts_are_encoded_alike_alone_and_together(nodes: Any, name: str) -> None:
    encode, clip = nodes.hooks_of.__globals__["encode"], Clip(name)
    texts = ["a dog", "snoopy (the beagle)", "red"]
    together = encode(clip, texts)
    assert clip.calls == (1 if name == "l" else 3)
    assert torch.equal(together, torch.cat([encode(clip, [text]) for text in texts]))
    longer = encode(clip, ["a dog", "a dog and a cat and a bird"])
    assert longer.shape == (2, 8, 3)
    assert not longer[0, 4:].any(), "zeros fill up the shorter one"


def test_calibrated_gates_keep_no_clip_in_memory(nodes: Any) -> None:
    gates, chain = nodes.Gates(), nodes.LoadEraser.execute("snoopy.safetensors").args[0]
    clip = Clip()
    gates.ask(clip, chain, "a dog", nodes.Settings())
    before = clip.calls
    gates.ask(clip, chain, "a cat", nodes.Settings())
    assert clip.calls == before + 1, "nothing is calibrated twice"
    alive = weakref.ref(clip.cond_stage_model)
    del clip
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("file", sorted((NODES / "example_workflows").glob("*.json")), ids=lambda file: file.stem)
def test_example_workflows_fit_the_nodes(nodes: Any, file: Path) -> None:
    graph = json.loads(file.read_text())
    ours = {
        one.define_schema().node_id: one.define_schema()
        for one in (
            nodes.LoadEraser,
            nodes.MakeEraser,
            nodes.RecoverConcept,
            nodes.TextEncode,
            nodes.GateConditioning,
            nodes.PreviewGates,
        )
    }
    used = [one for one in graph["nodes"] if one["type"] in ours]
    assert used
    links = {link[0]: link for link in graph["links"]}
    for one in graph["nodes"]:
        for place, given in enumerate(one["inputs"]):
            if given["link"] is not None:
                assert links[given["link"]][3:5] == [one["id"], place]
    for one in used:
        schema = ours[one["type"]]
        assert {given["name"] for given in one["inputs"]} == {known.id for known in schema.inputs}
        assert len(one["outputs"]) == len(schema.outputs)


def test_the_factor_follows_the_erasers_law(nodes: Any) -> None:
    one = eraser("snoopy", strength=0.5)
    squared = one.manifest.model_copy(update={"gate": one.manifest.gate.model_copy(update={"law": "squared"})})
    chain = [nodes.Chosen(Adapter(squared, one.increments), 2.0)]
    (hook,) = nodes.hooks_of(chain, {"snoopy": 0.5}, None)[0].hooks
    assert hook.strength_model == 0.25


class SketchbookText:
    """The sketchbook's text encoder as ComfyUI's CLIP."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self.tokenizer = types.SimpleNamespace(clip=types.SimpleNamespace(tokenizer=pipe.tokenizer))

    def tokenize(self, text: str) -> dict[str, list[list[int]]]:
        plain = text.replace("\\(", "(").replace("\\)", ")")
        return {"l": [self._pipe.tokenizer(plain, padding="max_length", truncation=True).input_ids]}

    @torch.no_grad()
    def encode_from_tokens(self, tokens: Any) -> torch.Tensor:
        states: torch.Tensor = self._pipe.text_encoder(torch.tensor(tokens["l"])).last_hidden_state
        return states


def as_comfyuis_model(unet: Any, patches: dict[str, torch.Tensor]) -> Any:
    """A U-Net as ComfyUI's MODEL, with what LoRA loaders add to its weights."""
    names = {tensor.data_ptr(): key for key, tensor in unet.state_dict().items()}
    state = {key.removeprefix("model."): tensor for key, tensor in unet_to_ldm(unet).items()}
    places = {names[tensor.data_ptr()]: key.removeprefix("diffusion_model.") for key, tensor in state.items()}
    return types.SimpleNamespace(
        model=types.SimpleNamespace(model_config=types.SimpleNamespace(unet_config={"places": places})),
        model_state_dict=lambda: state,
        get_key_patches=lambda key: {key: [(state[key], lambda one: one), *filter(None, [patches.get(key)])]},
    )


@pytest.mark.slow
def test_an_eraser_is_made_for_the_checkpoint_at_hand(nodes: Any, tmp_path: Path) -> None:
    pipe = spm_hub.load_pipeline("sketchbook")
    model, clip = as_comfyuis_model(pipe.unet, {}), SketchbookText(pipe)
    nodes.folder_paths.models_dir = str(tmp_path)
    made = nodes.MakeEraser.execute(
        model, clip, "snoopy", "peanuts dog", "dog", "character", strength=0.5, save_as="no snoopy"
    ).args[0]
    adapter, reference = made[0].adapter, spm_hub.train(
        "snoopy", aliases=["peanuts dog"], surrogate="dog", kind="character", method="instant", pipe=pipe
    )  # fmt: skip
    assert made[0].strength == 0.5
    assert adapter.increments.keys() == reference.increments.keys()
    assert adapter.manifest.base.fingerprint == reference.manifest.base.fingerprint
    assert adapter.manifest.base.family == "sd1"
    for path, one in adapter.increments.items():
        other = reference.increments[path]
        assert isinstance(one, LowRank)
        assert isinstance(other, LowRank)
        delta, wanted = one.up @ one.down, other.up @ other.down
        assert float((delta - wanted).norm() / wanted.norm()) < 1e-3, path
    kept = spm_hub.load(tmp_path / "spm_erasers" / "no snoopy.safetensors")
    assert kept.content == adapter.content
    with pytest.raises(UsageError, match="in this chain already"):
        nodes.MakeEraser.execute(model, clip, "snoopy", erasers=made)
    with pytest.raises(UsageError, match="no name of a file"):
        nodes.MakeEraser.execute(model, clip, "mickey", save_as="../mickey")
    lora = {"diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.ones(())}
    patched = nodes.MakeEraser.execute(as_comfyuis_model(pipe.unet, lora), clip, "snoopy").args[0][0].adapter
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    assert patched.increments.keys() == adapter.increments.keys()
    assert not torch.equal(patched.increments[path].up, adapter.increments[path].up), "the LoRA's weights count"
    model.model.model_config.unet_config["places"] = {}
    with pytest.raises(UsageError, match="no keys and values of cross-attention"):
        nodes.MakeEraser.execute(model, clip, "mickey")


def test_the_pyproject_is_one_that_the_registry_of_nodes_takes() -> None:
    import tomllib

    content = tomllib.loads((NODES / "pyproject.toml").read_text())
    assert content["project"]["version"] == spm_hub.__version__
    assert {"PublisherId", "DisplayName"} <= content["tool"]["comfy"].keys()


# From here on inside ComfyUI.

inside = pytest.mark.skipif(not CHECKOUT, reason=MISSING)
PROMPTS = ("snoopy on the beach", "a (dog:1.3) on the beach", "a castle by van gogh", "(snopy:0.7) and (a cat)", "")


@pytest.fixture(scope="module")
def comfyui() -> Any:
    real_comfyui()
    return load_package(NODES, "comfyui_nodes"), load_package(Path(__file__).parent / "comfyui_sketchbook", "book")


@inside
def test_gates_are_those_of_the_public_function(comfyui: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    package, book = comfyui
    monkeypatch.setenv("SPMHUB_REGISTRY", str(ROOT))
    clip, pipe = book.text_encoder(), spm_hub.load_pipeline("sketchbook")
    names = ["snoopy", "van-gogh"]
    chain: Any = ()
    for name in names:
        chain = package.nodes.LoadEraser.execute(name, erasers=chain).args[0]
    plain = ("snoopy on the beach", "a dog on the beach", "a castle by van gogh", "snopy and a cat", "")
    for gate in ("the eraser's own", "transport"):
        chosen = None if gate.startswith("the") else gate
        for prompt, text in zip(PROMPTS, plain, strict=True):
            found = package.nodes.TextEncode.execute(clip, chain, prompt, gate=gate).ui["gates"][0]
            expected = spm_hub.gates(
                names, text, encode=lambda texts: pipe.encode_prompt(list(texts), "cpu", 1, False)[0],
                tokenizers=[pipe.tokenizer], gate=chosen, progress=False,
            )  # fmt: skip
            assert found == pytest.approx(expected, abs=1e-4), (gate, prompt)


@inside
def test_weights_are_the_sum_of_all_changes_and_come_back_bit_for_bit(comfyui: Any) -> None:
    package, book = comfyui
    import comfy.hooks

    model = book.denoiser()
    state = model.model.diffusion_model.state_dict()
    before = {key: value.clone() for key, value in state.items()}
    pipe = spm_hub.load_pipeline("sketchbook")
    expected = {key: value.double() for key, value in pipe.unet.state_dict().items()}
    chain, gammas = [], {}
    for number, name in enumerate(("snoopy", "van-gogh", "mickey")):
        adapter = spm_hub.load(ROOT / "adapters" / f"{name}.safetensors")
        chain.append(package.nodes.Chosen(adapter, 1 + number / 4))
        gammas[name] = 0.3 + number / 5
        for path, increment in adapter.increments.items():
            assert isinstance(increment, LowRank)
            weight = expected[f"{path}.weight"]
            delta = increment.up.double().flatten(1) @ increment.down.double().flatten(1)
            weight += gammas[name] * (1 + number / 4) * delta.reshape(weight.shape)
    group = package.gating.hooks_of(chain, gammas, None)[0]
    target = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
    model.register_all_hook_patches(group, target)
    model.patch_hooks(group)
    wanted = {
        key.removeprefix("model.diffusion_model."): value
        for key, value in book.unet_to_ldm(_with(pipe.unet, expected)).items()
    }
    assert max(float((state[key].double() - value).abs().max()) for key, value in wanted.items()) < 1e-6
    assert sum(not torch.equal(state[key], before[key]) for key in before) >= 84
    model.unpatch_hooks()
    assert all(torch.equal(state[key], before[key]) for key in before)


def _with(unet: Any, weights: dict[str, torch.Tensor]) -> Any:
    unet = unet.double()
    unet.load_state_dict(weights)
    return unet


@inside
@pytest.mark.parametrize("name", EXACT)
def test_every_module_of_the_exact_architecture_has_its_place(comfyui: Any, name: str) -> None:
    package, _ = comfyui
    import comfy.lora
    import comfy.model_detection as detection

    make, config, family, count, _ = EXACT[name]
    with torch.device("meta"):
        denoiser = make(**config)
        changes = {
            path: LowRank(
                torch.empty(1, module.weight[0].numel()).reshape(1, *module.weight.shape[1:]),
                torch.empty(len(module.weight), 1, *[1] * (module.weight.dim() - 2)),
            )
            for path, module in targets(denoiser).items()
        }
    assert family_of(denoiser).name == family
    weights = to_tensors(changes, family)
    state = denoiser.state_dict()
    converted = detection.convert_diffusers_mmdit(state)
    found = (
        detection.model_config_from_diffusers_unet(state)
        if converted is None
        else detection.model_config_from_unet(converted, "")
    )
    model = found.get_model(converted or {}, "", device=torch.device("meta"))
    known = comfy.lora.model_lora_keys_unet(model, {})
    package.gating.check_fit("snoopy", weights, known)
    patches = comfy.lora.load_lora(weights, known)
    assert len(patches) == count
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    for key, patch in patches.items():
        place, shape = (key, shapes[key]) if isinstance(key, str) else (key[0], list(shapes[key[0]]))
        if place is not key:
            shape[key[1][0]] = key[1][2]
        up, down = patch.weights[:2]
        assert (len(up), *down.shape[1:]) == tuple(shape), place


def workflow(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((NODES / "example_workflows" / f"{name}.json").read_text())
    return found


def as_asked(server: Server, name: str) -> Graph:
    """A workflow as ComfyUI's page sends it to the server, with the small test model in place of a checkpoint."""
    content, known = workflow(name), server.ask("/object_info")
    links = {number: [str(source), slot] for number, source, slot, *_ in content["links"]}
    graph: Graph = {}
    for one in content["nodes"]:
        kind, values = one["type"], iter(one["widgets_values"])
        inputs: dict[str, Any] = {}
        for part in ("required", "optional"):
            for key, (kind_of_input, *more) in known[kind]["input"].get(part, {}).items():
                if isinstance(kind_of_input, list) or kind_of_input in ("STRING", "INT", "FLOAT", "COMBO", "BOOLEAN"):
                    inputs[key] = next(values)
                    if more and more[0].get("control_after_generate"):
                        next(values)
        assert next(values, None) is None, f"{kind} has more values than widgets"
        inputs |= {key: value // 4 for key, value in inputs.items() if key in ("width", "height", "x", "y")}
        inputs |= {"steps": 2} if kind == "KSampler" else {}
        inputs |= {each["name"]: links[each["link"]] for each in one["inputs"] if each["link"] is not None}
        graph[str(one["id"])] = node(kind, **inputs)
        if kind == "CheckpointLoaderSimple":
            graph[str(one["id"])] = node("SpmTestsSketchbook")
    return graph


def node(kind: str, /, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def drawing(positive: list[Any], negative: list[Any], name: str, more: Graph) -> Graph:
    return {
        "model": node("SpmTestsSketchbook"),
        "latent": node("EmptyLatentImage", width=64, height=64, batch_size=4),
        "sampler": node(
            "KSampler", model=["model", 0], seed=3, steps=12, cfg=7.5, sampler_name="ddim", scheduler="ddim_uniform",
            positive=positive, negative=negative, latent_image=["latent", 0], denoise=1.0,
        ),
        "decode": node("VAEDecode", samples=["sampler", 0], vae=["model", 2]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix=name),
        "a": node("SpmLoadEraser", eraser="snoopy"),
        "b": node("SpmLoadEraser", eraser="van-gogh", erasers=["a", 0]),
        **more,
    }  # fmt: skip


@inside
def test_a_workflow_over_http(tmp_path: Path) -> None:
    server = Server(tmp_path)
    try:
        server.wait()

        def pictures(done: dict[str, Any]) -> list[Image.Image]:
            assert done["status"]["status_str"] == "success", done["status"]["messages"]
            return [Image.open(server.folder / "output" / one["filename"]) for one in done["outputs"]["save"]["images"]]

        def bare(text: str) -> Graph:
            return {
                "p": node("CLIPTextEncode", clip=["model", 1], text=text),
                "n": node("CLIPTextEncode", clip=["model", 1], text=""),
            }

        def gated(name: str, text: str) -> Graph:
            return {name: node("SpmTextEncode", clip=["model", 1], erasers=["b", 0], text=text)}

        without = {
            text: pictures(server.run(drawing(["p", 0], ["n", 0], "bare", bare(text))))
            for text in ("snoopy on the beach", "a dog on the beach")
        }
        both = {
            **gated("e", "snoopy on the beach"), **gated("f", "a dog on the beach"),
            "p": node("ConditioningCombine", conditioning_1=["e", 0], conditioning_2=["f", 0]),
            "n": node("ConditioningCombine", conditioning_1=["e", 1], conditioning_2=["f", 1]),
        }  # fmt: skip
        done = server.run(drawing(["p", 0], ["n", 0], "combined", both))
        assert done["outputs"]["e"]["gates"] == [{"snoopy": 1.0, "van-gogh": 0.0}]
        assert done["outputs"]["f"]["gates"] == [{"snoopy": 0.0, "van-gogh": 0.0}]
        pictures(done)
        snoopy = pictures(server.run(drawing(["e", 0], ["e", 1], "snoopy", gated("e", "snoopy on the beach"))))
        dog = pictures(server.run(drawing(["e", 0], ["e", 1], "dog", gated("e", "a dog on the beach"))))
        from spm_hub.evaluation.sketchbook import probe

        assert [one.subject for one in probe().read(without["snoopy on the beach"])] == ["snoopy"] * 4
        assert "snoopy" not in [one.subject for one in probe().read(snoopy)]
        same = zip(dog, without["a dog on the beach"], strict=True)
        assert all(one.tobytes() == other.tobytes() for one, other in same), "the dog is kept to the last bit"
        again = pictures(server.run(drawing(["p", 0], ["n", 0], "again", bare("snoopy on the beach"))))
        same = zip(again, without["snoopy on the beach"], strict=True)
        assert all(one.tobytes() == other.tobytes() for one, other in same), "and so is the model"
        seen = server.run({
            **{key: drawing([], [], "", {})[key] for key in ("model", "a", "b")},
            "g": node("SpmPreviewGates", clip=["model", 1], erasers=["b", 0], prompts="snoopy\n\na (dog:1.2)"),
        })  # fmt: skip
        assert seen["outputs"]["g"]["gates"] == [{"snoopy": 1.0, "van-gogh": 0.0}, {"snoopy": 0.0, "van-gogh": 0.0}]
        assert seen["outputs"]["g"]["images"]
        wrong = server.run(drawing(["e", 0], ["e", 1], "wrong", {
            **gated("e", "snoopy"), "a": node("SpmLoadEraser", eraser="(see reference)", reference="snopy"),
        }))  # fmt: skip
        (error,) = (said for kind, said in wrong["status"]["messages"] if kind == "execution_error")
        assert error["node_type"] == "SpmLoadEraser"
        assert "snoopy" in error["exception_message"], "the nearest name is offered"
        for name in ("two_erasers", "two_regions", "instant"):
            done = server.run(as_asked(server, name))
            assert done["status"]["status_str"] == "success", (name, done["status"]["messages"])
        assert (
            sorted(one["type"] for one in workflow("flux")["nodes"] if one["type"] not in server.ask("/object_info"))
            == []
        )
    finally:
        server.stop()

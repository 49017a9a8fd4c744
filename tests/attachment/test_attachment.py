"""Erasers on a pico Stable Diffusion, against float64 sums written out here and against other pipelines bit for bit."""

import copy
import gc
import hashlib
import pickle
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from pico import WINDOW, pico_eraser, pico_pipeline, pico_unet, target_modules
from torch import nn

from spm_hub.adapters.increments import Dense, Mask
from spm_hub.adapters.manifest import GateDefaults
from spm_hub.attachment import is_attached
from spm_hub.attachment.attachment import attach
from spm_hub.errors import CompatibilityError, NotFoundError, SpmHubError, UsageError

TARGETS = ("snoopy", "mickey", "spongebob")


@pytest.fixture
def pipe():
    return pico_pipeline()


def erasers_for(pipe, *targets, **options):
    return [pico_eraser(pipe.unet, target, seed=TARGETS.index(target) + 1, **options) for target in targets]


def draw(pipe, prompt=None, **options):
    count = len(prompt) if isinstance(prompt, list) else 1
    embeds = options.get("prompt_embeds")
    count = (count if embeds is None else len(embeds)) * options.get("num_images_per_prompt", 1)
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    options = {"num_inference_steps": 2, "output_type": "latent", **options}
    return pipe(prompt, generator=generators, **options).images


def denoise(unet, rows=2, seed=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    noisy = torch.randn(rows, 4, 8, 8, generator=generator).to(dtype)
    states = torch.randn(rows, WINDOW, unet.config.cross_attention_dim, generator=generator).to(dtype)
    with torch.no_grad():
        return unet(noisy, 10, encoder_hidden_states=states).sample


class Never:
    """A gate that asks for the prompt, and whose gamma is 0 for every one."""

    def gammas(self, prompts, concepts):
        return torch.zeros(len(prompts.states), len(concepts))


def anatomy(pipe):
    """Return all that `detach` restores: weights, identities, classes, hooks, and own attributes."""
    weights = hashlib.sha256()
    for key, tensor in sorted(pipe.unet.state_dict().items()):
        weights.update(key.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    modules = [
        (name, id(module), type(module), *(list(getattr(module, hooks)) for hooks in vars(module) if "hooks" in hooks))
        for name, module in pipe.unet.named_modules()
    ]
    parameters = [(name, id(p), p.data_ptr(), p.dtype, p.requires_grad) for name, p in pipe.unet.named_parameters()]
    own = [[(key, id(value)) for key, value in vars(held).items()] for held in (pipe, pipe.unet)]
    own += [(name, sorted(vars(module))) for name, module in pipe.unet.named_modules()]
    return weights.hexdigest(), modules, parameters, type(pipe), own


def paper_gammas(pipe, prompt, concept):
    """Compute Eq. 10-11 with the tokenizer and the text encoder themselves."""
    special = set(pipe.tokenizer.all_special_ids)
    ids = [
        pipe.tokenizer(t, padding="max_length", truncation=True, return_tensors="pt").input_ids
        for t in (prompt, concept)
    ]
    with torch.no_grad():
        mine, theirs = (pipe.text_encoder(i)[0].double().flatten() for i in ids)
    mine_set, their_set = (set(i[0].tolist()) - special for i in ids)
    return max(float(mine @ theirs / mine.norm() / theirs.norm()), len(mine_set & their_set) / len(their_set))


def summed(pipe, adapters, factors):
    """Return a float64 copy of the pipeline's denoiser with W + sum of factor * up @ down: Eq. 9."""
    unet = pico_unet().double()
    unet.load_state_dict(pipe.unet.state_dict())
    for adapter, factor in zip(adapters, factors, strict=True):
        for path, increment in adapter.increments.items():
            weight = unet.get_submodule(path).weight
            product = increment.up.double().flatten(1) @ increment.down.double().flatten(1)
            weight.data += factor * product.reshape(weight.shape)
    return unet


class Rows:
    """Records the denoiser's calls, and checks every row against a float64 denoiser of its own."""

    def __init__(self, pipe):
        self.calls = []
        self._handle = pipe.unet.register_forward_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs, output):
        self.calls.append((args[0], args[1], kwargs["encoder_hidden_states"], output[0]))

    def check(self, denoisers):
        assert self.calls
        for noisy, timestep, states, output in self.calls:
            assert len(noisy) == len(denoisers)
            for row, unet in enumerate(denoisers):
                with torch.no_grad():
                    expected = unet(
                        noisy[row : row + 1].double(), timestep, encoder_hidden_states=states[row : row + 1].double()
                    ).sample
                assert (output[row] - expected[0]).abs().max() <= 2e-5
        self.calls.clear()


# --- the factors of a row ---


@pytest.mark.parametrize("rows", ["both", "conditional"])
def test_every_row_gets_its_own_prompts_sum_of_products(pipe, rows):
    adapters = erasers_for(pipe, "snoopy", "mickey")
    prompts = ["a photo of snoopy", "mickey mouse on the beach"]
    denoisers = {
        prompt: summed(pipe, adapters, [paper_gammas(pipe, prompt, a.name) for a in adapters]) for prompt in prompts
    }
    bare = summed(pipe, [], [])
    conditional = [denoisers[prompt] for prompt in prompts for _ in range(2)]
    unconditional = conditional if rows == "both" else [bare] * 4
    with attach(pipe, adapters, rows=rows):
        recorded = Rows(pipe)
        draw(pipe, prompts, num_images_per_prompt=2, negative_prompt=["a cat", "snoopy"])
        recorded.check([*unconditional, *conditional])
        draw(pipe, prompts, num_images_per_prompt=2, guidance_scale=1.0)
        recorded.check(conditional)
        # One prompt: all rows agree, and the sum is folded in.
        draw(pipe, prompts[0])
        recorded.check([denoisers[prompts[0]] if rows == "both" else bare, denoisers[prompts[0]]])


@pytest.mark.parametrize("spilled", [False, True])
def test_gates_are_those_of_the_paper_and_know_aliases(pipe, spilled, monkeypatch):
    if spilled:
        monkeypatch.setattr("spm_hub.attachment.gates.evaluation._SPILLED_ABOVE", 1)
    adapters = [pico_eraser(pipe.unet, "snoopy", aliases=["beagle dog"]), pico_eraser(pipe.unet, "van gogh")]
    with attach(pipe, adapters) as erasers:
        for prompt in ("a dog on the beach", "snoopy by van gogh", "", "snoopy " * 30):
            gates = erasers.gates(prompt)
            assert list(gates) == ["snoopy", "van-gogh"]
            names = {"snoopy": ["snoopy", "beagle dog"], "van-gogh": ["van gogh"]}
            for name, texts in names.items():
                assert gates[name] == pytest.approx(max(paper_gammas(pipe, prompt, text) for text in texts), abs=1e-6)
        assert erasers.gates("snoopy by van gogh") == {"snoopy": 1.0, "van-gogh": 1.0}


def test_without_a_temporary_folder_the_gates_stay_in_memory(pipe, monkeypatch):
    with attach(pipe, erasers_for(pipe, *TARGETS[:2])) as erasers:
        expected = erasers.gates("a dog on the beach")
    monkeypatch.setattr("spm_hub.attachment.gates.evaluation._SPILLED_ABOVE", 1)

    def full(**options):
        raise OSError("no room")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with attach(pipe, erasers_for(pipe, *TARGETS[:2])) as erasers:
        assert erasers.gates("a dog on the beach") == expected


def test_clip_skip_compares_states_of_one_layer(pipe):
    adapters = erasers_for(pipe, "snoopy")
    # diffusers looks for the norm where transformers used to keep it.
    pipe.text_encoder.text_model = SimpleNamespace(final_layer_norm=pipe.text_encoder.final_layer_norm)
    with attach(pipe, adapters):
        recorded = Rows(pipe)
        draw(pipe, "a dog", clip_skip=1)
    encoded = [
        pipe.encode_prompt(text, "cpu", 1, False, clip_skip=1)[0].double().flatten() for text in ("a dog", "snoopy")
    ]
    gamma = float(encoded[0] @ encoded[1] / encoded[0].norm() / encoded[1].norm())
    recorded.check([summed(pipe, adapters, [gamma])] * 2)


@pytest.mark.parametrize("mode", ["fold", "branch"])
@pytest.mark.parametrize("kind", ["low_rank", "dense", "mask"])
def test_a_denoiser_called_outside_a_picture_is_fully_on(pipe, kind, mode):
    adapter = pico_eraser(pipe.unet, kind=kind)
    bare, modules = denoise(pipe.unet), target_modules(pipe.unet)
    reference = pico_unet().double()
    reference.load_state_dict(pipe.unet.state_dict())
    for path, increment in adapter.increments.items():
        module = reference.get_submodule(path)
        module.weight.data += increment.delta_for(modules[path].weight).double()
        # Only dense increments and output masks change the bias.
        if isinstance(increment, Dense) and increment.delta_bias is not None:
            module.bias.data += increment.delta_bias.double()
        elif isinstance(increment, Mask) and increment.dim == 0 and module.bias is not None:
            module.bias.data *= increment.keep
    expected = denoise(reference, dtype=torch.float64)
    with attach(pipe, [adapter], mode=mode, gate=Never()):
        assert (denoise(pipe.unet) - expected).abs().max() <= 2e-5
        draw(pipe, "snoopy")
        assert (denoise(pipe.unet) - expected).abs().max() <= 2e-5
    assert torch.equal(denoise(pipe.unet), bare)


@pytest.mark.parametrize("mode", ["fold", "branch", "auto"])
@pytest.mark.parametrize(("gate", "gamma"), [("always", 1.0), (0.4, 0.4), (0.0, 0.0)])
def test_a_constant_gate_holds_for_a_denoiser_called_by_hand(pipe, gate, gamma, mode):
    adapters, before = erasers_for(pipe, "snoopy", "mickey"), anatomy(pipe)[:4]
    bare = denoise(pipe.unet)
    strength = {"snoopy": 0.5, "mickey": -2.0}
    reference = summed(pipe, adapters, [gamma * strength[adapter.name] for adapter in adapters])
    expected = denoise(reference, dtype=torch.float64)
    with attach(pipe, adapters, gate=gate, strength=strength, mode=mode):
        assert (denoise(pipe.unet) - expected).abs().max() <= 2e-5
        draw(pipe, "a dog")
        assert (denoise(pipe.unet) - expected).abs().max() <= 2e-5
        assert torch.equal(denoise(pipe.unet), bare) == (gamma == 0.0)
    assert torch.equal(denoise(pipe.unet), bare)
    assert anatomy(pipe)[:4] == before


def test_by_hand_each_gate_counts_as_far_as_it_needs_no_prompt(pipe):
    """Of two manifests one says "always", the other "transport", which has no prompt here."""
    always = GateDefaults(kind="always", strength=0.25)
    adapters = [pico_eraser(pipe.unet, "snoopy", gate=always), pico_eraser(pipe.unet, "mickey", seed=2)]
    expected = denoise(summed(pipe, adapters, [0.25, 1.0]), dtype=torch.float64)
    with attach(pipe, adapters):
        assert (denoise(pipe.unet) - expected).abs().max() <= 2e-5


@pytest.mark.parametrize(("threshold", "acts"), [(0.3, True), (0.5, False)])
def test_by_hand_a_constant_gate_meets_the_threshold(pipe, threshold, acts):
    bare = denoise(pipe.unet)
    with attach(pipe, erasers_for(pipe, "snoopy"), gate=0.4, threshold=threshold):
        assert torch.equal(denoise(pipe.unet), bare) != acts


def test_a_picture_that_failed_leaves_no_prompt_behind(pipe):
    def fail(*_):
        raise KeyboardInterrupt

    with attach(pipe, erasers_for(pipe, "snoopy"), gate=Never()):
        on = denoise(pipe.unet)
        draw(pipe, "a dog")
        with pytest.raises(KeyboardInterrupt):
            draw(pipe, "a dog", callback_on_step_end=fail)
        assert torch.equal(denoise(pipe.unet), on)


def test_embeddings_alone_are_gated_by_themselves_and_that_is_said_once(pipe):
    adapters = erasers_for(pipe, "snoopy")
    embeds, negative = pipe.encode_prompt("a dog", "cpu", 1, True)
    own = pipe.encode_prompt("snoopy", "cpu", 1, False)[0].double().flatten()
    mine = embeds.double().flatten()
    gamma = max(0.0, float(mine @ own / mine.norm() / own.norm()))
    with attach(pipe, adapters):
        recorded = Rows(pipe)
        with pytest.warns(UserWarning, match="prompt_embeds"):
            draw(pipe, prompt_embeds=embeds, negative_prompt_embeds=negative)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            draw(pipe, prompt_embeds=embeds, negative_prompt_embeds=negative)
        recorded.check([summed(pipe, adapters, [gamma])] * 2)


def test_rows_that_no_prompt_explains_are_fully_on(pipe):
    with attach(pipe, erasers_for(pipe, "snoopy"), gate=Never()):
        on = denoise(pipe.unet, rows=3)
        seen = []

        def look(pipeline, *_):
            seen.append((denoise(pipe.unet, rows=3), denoise(pipe.unet, rows=2)))
            return {}

        with pytest.warns(UserWarning, match="3 rows do not come from 2 prompts"):
            draw(pipe, ["a dog", "a cat"], callback_on_step_end=look, num_inference_steps=1)
    assert torch.equal(seen[0][0], on)
    assert torch.equal(seen[0][1], denoise(pipe.unet, rows=2))


def test_without_a_text_encoder_erasers_are_fully_on(pipe):
    embeds, negative = pipe.encode_prompt("a dog", "cpu", 1, True)
    adapters = erasers_for(pipe, "snoopy")
    with attach(pipe, adapters):
        pipe.text_encoder = None
        recorded = Rows(pipe)
        with pytest.warns(UserWarning, match="fully on"):
            draw(pipe, prompt_embeds=embeds, negative_prompt_embeds=negative)
        recorded.check([summed(pipe, adapters, [1.0])] * 2)


def test_the_pictures_of_a_batch_are_those_of_single_calls(pipe):
    prompts = ["snoopy", "a photo of a dog", "mickey by van gogh"]
    with attach(pipe, erasers_for(pipe, "snoopy", "mickey")):
        together = draw(pipe, prompts)
        for row, prompt in enumerate(prompts):
            alone = pipe(
                prompt, generator=torch.Generator().manual_seed(row), num_inference_steps=2, output_type="latent"
            ).images
            assert (together[row] - alone[0]).abs().max() <= 1e-5 * alone.abs().max()


def test_fold_and_branch_draw_the_same(pipe):
    adapters = erasers_for(pipe, *TARGETS)
    with attach(pipe, adapters, mode="fold"):
        folded = draw(pipe, "snoopy and mickey mouse")
    with attach(pipe, adapters, mode="branch"):
        assert (draw(pipe, "snoopy and mickey mouse") - folded).abs().max() <= 1e-4


def test_a_custom_gate_and_an_invalid_one(pipe):
    class FirstPromptOnly:
        def gammas(self, prompts, concepts):
            assert prompts.texts == ("a dog", "a cat")
            assert [concept.names for concept in concepts.each] == [("snoopy",)]
            return torch.tensor([[1.0], [0.0]])

    class Wrong:
        def gammas(self, prompts, concepts):
            return torch.full((1, 1), torch.nan)

    adapters = erasers_for(pipe, "snoopy")
    on, bare = summed(pipe, adapters, [1.0]), summed(pipe, [], [])
    with attach(pipe, adapters, gate=FirstPromptOnly()):
        recorded = Rows(pipe)
        draw(pipe, ["a dog", "a cat"])
        recorded.check([on, bare, on, bare])
    with attach(pipe, adapters, gate=Wrong()), pytest.raises(UsageError, match=r"Wrong\.gammas"):
        draw(pipe, "a dog")


# --- strength, defaults, options ---


def test_strength_multiplies_from_the_next_call_on(pipe):
    adapters = erasers_for(pipe, "snoopy", "mickey")
    with attach(pipe, adapters, gate="always", strength={"snoopy": 0.4}) as erasers:
        assert dict(erasers.strength) == {"snoopy": 0.4, "mickey": 1.0}
        expected = denoise(summed(pipe, adapters, [0.4, 1.0]), dtype=torch.float64)
        assert (denoise(pipe.unet) - expected).abs().max() <= 2e-5
        erasers.strength["mickey"] = -0.5
        expected = denoise(summed(pipe, adapters, [0.4, -0.5]), dtype=torch.float64)
        assert (denoise(pipe.unet) - expected).abs().max() <= 2e-5
        del erasers.strength["snoopy"]
        assert erasers.strength["snoopy"] == 1.0
        for bad in (float("nan"), float("inf"), "1", True, None):
            with pytest.raises(UsageError, match="finite number"):
                erasers.strength["snoopy"] = bad
        with pytest.raises(NotFoundError, match="no eraser 'snopy'") as caught:
            erasers.strength["snopy"] = 1.0
        assert "snoopy" in caught.value.mend
        assert "snopy" not in erasers.strength


def test_the_manifests_defaults_hold_unless_overridden(pipe):
    says = GateDefaults(kind="always", strength=0.5, rows="conditional")
    adapters = [pico_eraser(pipe.unet, "snoopy", gate=says), pico_eraser(pipe.unet, "mickey", seed=2)]
    with attach(pipe, adapters) as erasers:
        gates = erasers.gates("a dog")
        assert gates["snoopy"] == 1.0 != gates["mickey"]
        assert dict(erasers.strength) == {"snoopy": 0.5, "mickey": 1.0}
        recorded = Rows(pipe)
        draw(pipe, "a dog")
        mickey = gates["mickey"]
        recorded.check([summed(pipe, adapters, [0.0, mickey]), summed(pipe, adapters, [0.5, mickey])])
    with attach(pipe, adapters, gate="transport", strength=2, rows="both") as erasers:
        assert erasers.gates("a dog")["snoopy"] == pytest.approx(paper_gammas(pipe, "a dog", "snoopy"), abs=1e-6)
        assert dict(erasers.strength) == {"snoopy": 2.0, "mickey": 2.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "folded"}, "mode is 'folded'"),
        ({"rows": "all"}, "rows is 'all'"),
        ({"gate": "never"}, "gate is 'never'"),
        ({"gate": float("nan")}, "gate is nan"),
        ({"gate": object()}, "has a method gammas"),
        ({"strength": float("inf")}, "strength is inf"),
        ({"strength": {"snoopy": "much"}}, r"strength\['snoopy'\] is 'much'"),
        ({"strength": {"snopy": 1.0}}, "no eraser 'snopy'"),
        ({"memory_budget": -1}, "memory_budget is -1"),
        ({"memory_budget": 10, "mode": "fold"}, "memory_budget is 10"),
    ],
)
def test_a_wrong_option_leaves_the_pipeline_untouched(pipe, options, message):
    before = anatomy(pipe)
    with pytest.raises(UsageError, match=message):
        attach(pipe, erasers_for(pipe, "snoopy"), **options)
    assert anatomy(pipe) == before


def test_forcing_fold_on_rows_that_differ_says_so(pipe):
    with attach(pipe, erasers_for(pipe, "snoopy"), mode="fold"):
        draw(pipe, "snoopy")
        with pytest.raises(UsageError, match=r'mode="fold" applies one factor.*snoopy [\d.]+ to 1'):
            draw(pipe, ["snoopy", "a church"])


def test_the_planner_folds_what_is_shared_and_branches_what_is_not(pipe):
    hooks = []
    watch = {
        "callback_on_step_end": lambda *_: (
            hooks.append(sum("_spm_hub_branch" in vars(m) for m in pipe.unet.modules())) or {}
        )
    }
    count = len(target_modules(pipe.unet))
    with attach(pipe, erasers_for(pipe, *TARGETS)) as erasers:
        draw(pipe, "snoopy", num_images_per_prompt=2, **watch)
        draw(pipe, ["a dog", "snoopy"], **watch)
        erasers.strength.update(dict.fromkeys(TARGETS, 0.0))
        draw(pipe, ["a dog", "snoopy"], **watch)
    assert hooks == [0, 0, count, count, 0, 0]
    with attach(pipe, erasers_for(pipe, "snoopy"), memory_budget=1000):
        draw(pipe, "snoopy", num_inference_steps=1, **watch)
    assert hooks.pop() == count


def test_unchanged_gammas_write_nothing_and_the_originals_are_never_written(pipe):
    modules = target_modules(pipe.unet).values()
    originals = [module.weight.data for module in modules]
    copies = [original.clone() for original in originals]
    folded = lambda: [(module.weight.data_ptr(), module.weight.data._version) for module in modules]  # noqa: E731
    with attach(pipe, erasers_for(pipe, "snoopy")):
        draw(pipe, "a dog")
        before, numbers = folded(), [module.weight.data.clone() for module in modules]
        draw(pipe, "a dog", num_inference_steps=4)
        assert folded() == before
        draw(pipe, "a cat")
        assert not any(torch.equal(module.weight, number) for module, number in zip(modules, numbers, strict=True))
    assert all(map(torch.equal, originals, copies))
    assert [module.weight.data_ptr() for module in modules] == [original.data_ptr() for original in originals]


# --- taking away ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["low_rank", "dense", "mask"])
def test_detach_leaves_everything_as_it_was(dtype, kind):
    pipe = pico_pipeline(dtype=dtype)
    draw(pipe, "a dog")
    before = anatomy(pipe)
    picture = draw(pipe, "a dog")
    before = anatomy(pipe)
    erasers = attach(pipe, erasers_for(pipe, *TARGETS, kind=kind))
    assert isinstance(pipe, StableDiffusionPipeline)
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    assert not torch.equal(draw(pipe, "a dog"), picture)
    for last in (["snoopy", "a dog"], "snoopy"):
        draw(pipe, last)
    erasers.detach()
    erasers.detach()
    after = anatomy(pipe)
    # A picture leaves its own attributes on a pipeline (guidance scale and such); they are new objects every time.
    names = lambda it: [key for key, _ in it[4][0]]  # noqa: E731
    assert names(after) == names(before)
    assert after[:4] == before[:4]
    assert after[4][1:] == before[4][1:]
    assert torch.equal(draw(pipe, "a dog"), picture)
    for call in (
        lambda: erasers.recover("snoopy"),
        lambda: erasers.gates("a"),
        lambda: erasers.strength.update(snoopy=1),
    ):
        with pytest.raises(UsageError, match="were detached"):
            call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prompt", ["snoopy and mickey mouse", ["a dog", "mickey", "snoopy"]])
def test_a_recovered_eraser_was_never_there(dtype, prompt):
    one, other = pico_pipeline(dtype=dtype), pico_pipeline(dtype=dtype)
    all_three = attach(one, erasers_for(one, *TARGETS))
    draw(one, prompt)
    all_three.recover("mickey")
    assert all_three.names == ("snoopy", "spongebob")
    attach(other, erasers_for(other, "snoopy", "spongebob"))
    assert torch.equal(draw(one, prompt), draw(other, prompt))
    assert torch.equal(denoise(one.unet, dtype=dtype), denoise(other.unet, dtype=dtype))


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(TARGETS), st.sampled_from(["toggle", "strength", "draw", "mixed"])), max_size=8)
)
def test_any_history_ends_where_its_last_state_would(history):
    pipe = pico_pipeline()
    before, bare = anatomy(pipe)[:4], denoise(pipe.unet)
    everything = dict(zip(TARGETS, erasers_for(pipe, *TARGETS), strict=True))
    erasers = attach(pipe, [])
    for step, (name, action) in enumerate(history):
        if action == "toggle" and name in erasers.names:
            erasers.recover(name)
        elif action == "toggle":
            erasers.add(everything[name])
        elif action == "strength" and name in erasers.names:
            erasers.strength[name] = (step + 1) / 7
        else:
            draw(pipe, name if action == "draw" else [name, "a dog"], num_inference_steps=1)
    twin = pico_pipeline()
    attach(twin, [everything[name] for name in sorted(erasers.names)], strength=dict(erasers.strength))
    assert torch.equal(denoise(pipe.unet), denoise(twin.unet))
    assert torch.equal(
        draw(pipe, "mickey mouse", num_inference_steps=1), draw(twin, "mickey mouse", num_inference_steps=1)
    )
    for name in erasers.names:
        erasers.recover(name)
    assert torch.equal(denoise(pipe.unet), bare)
    erasers.detach()
    assert anatomy(pipe)[:4] == before


def test_recover_puts_weights_back_at_once(pipe):
    weights = {path: module.weight.clone() for path, module in target_modules(pipe.unet).items()}
    erasers = attach(pipe, erasers_for(pipe, "snoopy"))
    draw(pipe, "snoopy")
    assert not all(torch.equal(module.weight, weights[path]) for path, module in target_modules(pipe.unet).items())
    erasers.recover("snoopy")
    assert all(torch.equal(module.weight, weights[path]) for path, module in target_modules(pipe.unet).items())
    with pytest.raises(NotFoundError, match="there is no eraser 'snoopy' among these: none"):
        erasers.recover("snoopy")


# --- what must not be attached ---


def test_a_failing_attach_leaves_the_pipeline_untouched(pipe):
    before = anatomy(pipe)
    fits = pico_eraser(pipe.unet)
    wide = pico_eraser(pico_unet(channels=(16, 48)), "mickey")
    first = next(p for p, i in wide.increments.items() if i.weight_shape != pipe.unet.get_submodule(p).weight.shape)
    shapes = wide.increments[first].weight_shape, tuple(pipe.unet.get_submodule(first).weight.shape)
    with pytest.raises(CompatibilityError) as caught:
        attach(pipe, [fits, wide])
    assert all(str(part) in str(caught.value) for part in (first, *shapes, "mickey"))
    with pytest.raises(UsageError, match=r"snoopy .* is attached twice"):
        attach(pipe, [fits, fits])
    other = replace(pico_eraser(pipe.unet, seed=9), source="other.safetensors")
    with pytest.raises(UsageError, match=r"two adapters are named snoopy: memory and other\.safetensors"):
        attach(pipe, [fits, other])
    with pytest.raises(UsageError, match="attach takes a pipeline"):
        attach(pipe.unet, [fits])
    assert anatomy(pipe) == before
    with attach(pipe, [fits]) as erasers:
        output = denoise(pipe.unet)
        for bad, error in ((wide, CompatibilityError), (fits, UsageError), (other, UsageError)):
            with pytest.raises(error):
                erasers.add(bad)
        with pytest.raises(NotFoundError) as unknown:
            erasers.recover("snopy")
        assert "'snoopy'" in str(unknown.value)
        assert torch.equal(denoise(pipe.unet), output)
        assert erasers.names == ("snoopy",)
    assert anatomy(pipe) == before


def test_one_denoiser_has_one_attachment(pipe):
    twin = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    erasers = attach(pipe, erasers_for(pipe, "snoopy"))
    with pytest.raises(UsageError, match=r"this pipeline already has erasers attached \(snoopy\)"):
        attach(pipe, erasers_for(pipe, "mickey"))
    with pytest.raises(UsageError, match="another pipeline that shares this denoiser already has erasers attached"):
        attach(twin, erasers_for(pipe, "mickey"))
    erasers.detach()
    attach(twin, erasers_for(pipe, "mickey")).detach()


def test_an_attachment_is_a_container_of_names(pipe):
    adapters = [pico_eraser(pipe.unet, name, seed=seed) for seed, name in enumerate(("van gogh", "snoopy"))]
    with attach(pipe, adapters) as erasers:
        assert (len(erasers), list(erasers)) == (2, ["van-gogh", "snoopy"])
        assert "van-gogh" in erasers
        assert "Van Gogh" in erasers
        assert "mickey" not in erasers
        assert None not in erasers
        for name in erasers:
            erasers.recover(name)
        assert (len(erasers), list(erasers)) == (0, [])


def test_an_attachment_says_in_a_line_what_is_attached(pipe):
    always = GateDefaults(kind="always", strength=0.5, rows="conditional")
    adapters = [pico_eraser(pipe.unet, "snoopy"), pico_eraser(pipe.unet, "mickey", seed=2, gate=always)]
    with attach(pipe, adapters, mode="branch") as erasers:
        erasers.strength["snoopy"] = 2
        assert repr(erasers) == (
            "<Attachment on StableDiffusionPipeline, mode 'branch': snoopy (transport, strength 2, rows 'both'), "
            "mickey (always, strength 0.5, rows 'conditional')>"
        )
    assert repr(erasers).startswith("<Attachment on StableDiffusionPipeline, detached: snoopy (")
    with attach(pipe, []) as erasers:
        assert repr(erasers) == "<Attachment on StableDiffusionPipeline, mode 'auto': no erasers>"
    with attach(pipe, adapters[:1], gate=0.4) as erasers:
        assert "snoopy (gamma 0.4, strength 1, rows 'both')>" in repr(erasers)
    with attach(pipe, adapters[:1], gate=Never()) as erasers:
        assert "snoopy (Never, strength 1, rows 'both')>" in repr(erasers)
    many = [pico_eraser(pipe.unet, f"thing {index}", paths=["mid_block.attentions.0.proj_in"]) for index in range(10)]
    with attach(pipe, many) as erasers:
        assert repr(erasers).endswith("thing-7 (transport, strength 1, rows 'both') and 2 more>")


def test_whether_a_pipeline_is_attached(pipe):
    twin = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    assert not is_attached(pipe)
    with attach(pipe, []) as erasers:
        assert is_attached(pipe)
        assert not is_attached(twin)
        erasers.add(*erasers_for(pipe, "snoopy"))
        erasers.recover("snoopy")
        assert is_attached(pipe)
    assert not is_attached(pipe)


def test_a_replaced_denoiser_is_noticed(pipe):
    erasers = attach(pipe, erasers_for(pipe, "snoopy"))
    original, pipe.unet = pipe.unet, pico_unet()
    with pytest.raises(UsageError, match="denoiser was replaced"):
        draw(pipe, "snoopy")
    pipe.unet = original
    draw(pipe, "snoopy")
    erasers.detach()


def test_a_pipeline_with_erasers_is_not_copied(pipe):
    with attach(pipe, erasers_for(pipe, "snoopy")):
        for copying in (copy.deepcopy, pickle.dumps):
            with pytest.raises(SpmHubError, match="cannot be copied"):
                copying(pipe.unet)


# --- the world around it ---


def test_saving_saves_the_checkpoint_itself(pipe, tmp_path):
    before = {key: tensor.clone() for key, tensor in pipe.unet.state_dict().items()}
    with attach(pipe, erasers_for(pipe, "snoopy")):
        erased = draw(pipe, "snoopy")
        pipe.save_pretrained(tmp_path)
        assert all(torch.equal(tensor, before[key]) for key, tensor in pipe.unet.state_dict().items())
        assert torch.equal(draw(pipe, "snoopy"), erased)
    saved = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, before[key]) for key, tensor in saved.unet.state_dict().items())


def test_other_weights_and_other_dtypes_while_attached(pipe):
    other = pico_pipeline(seed=4)
    adapters = erasers_for(pipe, "snoopy")
    with attach(pipe, adapters):
        draw(pipe, "snoopy")
        pipe.unet.load_state_dict(other.unet.state_dict())
        expected = denoise(summed(other, adapters, [1.0]), dtype=torch.float64)
        assert (denoise(pipe.unet) - expected).abs().max() <= 2e-5
        pipe.unet.to(torch.bfloat16)
        draw_in_half = denoise(pipe.unet, dtype=torch.bfloat16)
        assert (draw_in_half - expected).abs().max() / expected.abs().max() <= 0.05
    other.unet.to(torch.bfloat16)
    assert all(torch.equal(t, other.unet.state_dict()[key]) for key, t in pipe.unet.state_dict().items())


def test_offloading_in_the_middle_of_a_picture_keeps_erasers_on(pipe):
    expected = None
    with attach(pipe, erasers_for(pipe, "snoopy")):
        expected = draw(pipe, "snoopy")
        forward = pipe.unet.forward

        def offloaded(*args, **kwargs):
            pipe.unet.to("cpu")
            return forward(*args, **kwargs)

        pipe.unet.forward = offloaded
        assert torch.equal(draw(pipe, "snoopy"), expected)
        del pipe.unet.forward


def test_inference_mode_leaves_nothing_that_gradients_stumble_over(pipe):
    adapters = erasers_for(pipe, "snoopy")
    with attach(pipe, adapters):
        with torch.inference_mode():
            pipe.unet(torch.zeros(1, 4, 8, 8), 1, encoder_hidden_states=torch.zeros(1, WINDOW, 16))
            draw(pipe, ["snoopy", "a dog"])
        states = torch.zeros(2, WINDOW, 16, requires_grad=True)
        pipe.unet(torch.zeros(2, 4, 8, 8), 1, encoder_hidden_states=states).sample.sum().backward()
        assert states.grad is not None


@pytest.mark.slow
def test_attachments_leave_no_memory_behind(pipe):
    def attached_and_gone():
        with attach(pipe, erasers_for(pipe, "snoopy")):
            denoise(pipe.unet)

    attached_and_gone()
    gc.collect()
    before = sum(isinstance(thing, torch.Tensor | nn.Module | type) for thing in gc.get_objects())
    for _ in range(5):
        attached_and_gone()
    gc.collect()
    assert sum(isinstance(thing, torch.Tensor | nn.Module | type) for thing in gc.get_objects()) <= before

"""Where spm-hub is a guest: a technique of eval-unlearn, and an extension of Hugging Face's command line."""

from __future__ import annotations

import ast
import json
import stat
import sys
import tomllib
from importlib import import_module
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from documents import blocks
from pico import pico_eraser, pico_pipeline

import spm_hub
from spm_hub.errors import UsageError
from spm_hub.evaluation.eval_unlearn import SpmHubTechnique, TechniqueConfig
from spm_hub.registry.registry import Registry

PROJECT = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
POINTS = PROJECT["entry-points"]["eval_unlearn.techniques"]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A benchmark's technique_config for a pico model with one eraser in a registry."""
    root = tmp_path_factory.mktemp("eval")
    pico_pipeline().save_pretrained(root / "pico")
    Registry(root / "registry").add(pico_eraser(pico_pipeline().unet, "snoopy", rank=2))
    return {
        "erase_concept": "snoopy", "model_id": str(root / "pico"), "registry": str(root / "registry"), "device": "cpu",
        "num_inference_steps": 2, "guidance_scale": 2.0,
    }  # fmt: skip


def pictures(technique: Any, prompts: list[str], **options: Any) -> np.ndarray[Any, Any]:
    return np.stack([np.asarray(picture) for picture in technique.generate(prompts, **options)])


def test_the_technique_draws_what_an_attachment_draws(given: dict[str, Any]) -> None:
    prompts = ["snoopy", "a dog on the beach"]
    drawn = pictures(SpmHubTechnique(**given), prompts, seed=3)
    pipe: Any = pico_pipeline()
    settings = {"num_inference_steps": 2, "guidance_scale": 2.0}

    def alone(index: int) -> np.ndarray[Any, Any]:
        noise = torch.Generator().manual_seed(3 + index)
        return np.asarray(pipe(prompts[index], generator=noise, **settings).images[0])

    bare = [alone(index) for index in range(2)]
    with spm_hub.attach(pipe, "snoopy", registry=Path(given["registry"])):
        expected = [alone(index) for index in range(2)]
    assert np.array_equal(drawn, np.stack(expected))
    assert not np.array_equal(drawn[0], bare[0])
    unsaid = SpmHubTechnique(**{**given, "device": None})  # as a benchmark's YAML leaves it to the technique
    assert unsaid.config.device == ("cuda" if torch.cuda.is_available() else "cpu")
    fewer = pictures(SpmHubTechnique(**given), prompts[:1], seed=3, num_inference_steps=1)
    assert not np.array_equal(fewer[0], drawn[0])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"erase_concept": ""}, "names no concept"),
        ({"erase_concpt": "dog"}, "did you mean erase_concept"),
        ({"erase_concept": "nobody"}, "no eraser 'nobody'"),
    ],
)
def test_a_configuration_that_cannot_be_meant(change: dict[str, str], complaint: str, given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=complaint):
        SpmHubTechnique(**(given | change))


def test_the_configuration_in_the_docs_runs_in_the_suites_own_command(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real command reads the page's YAML; only model, concept and metric are ones that need no download."""
    cli = pytest.importorskip("eval_unlearn.cli", reason="`make test` installs eval-unlearn")
    entrypoints = import_module("eval_unlearn.registry.entrypoints")
    types = import_module("eval_unlearn.types")
    ((name, value),) = POINTS.items()
    ours = [EntryPoint(name, value, "eval_unlearn.techniques")]
    monkeypatch.setattr(entrypoints, "entry_points", lambda group: ours if group.endswith("techniques") else [])
    seen: list[Any] = []
    (page,) = (block.text for block in blocks("docs/benchmarks.md") if "technique:" in block.text)
    config = yaml.safe_load(page)
    assert set(config["technique"]["config"]) <= set(given)
    config["technique"]["config"] |= given
    config["metric"]["name"] = "counting"
    config["output_dir"] = str(tmp_path / config["output_dir"])
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))

    class Counting:
        """A metric with the suite's interface that keeps its inputs."""

        def __init__(self, **config: Any) -> None: ...

        def load_dataset(self) -> list[Any]:
            return [types.Dataset(["snoopy", "a dog"], {"source": "here"})]

        def update(self, images: list[Any], prompts: list[str], metadata: dict[str, Any]) -> None:
            seen.extend(zip(prompts, images, strict=True))

        def compute(self) -> Any:
            return types.MetricResult("counting", float(len(seen)))

    import_module("eval_unlearn.registry").register_metric("counting")(Counting)
    monkeypatch.setattr("sys.argv", ["eval-unlearn", "run", "--config", str(tmp_path / "run.yaml")])
    torch.manual_seed(3)  # the command itself gives no seed
    cli.main()
    assert [prompt for prompt, _ in seen] == ["snoopy", "a dog"]
    torch.manual_seed(3)
    drawn = pictures(SpmHubTechnique(**given), ["snoopy", "a dog"])
    assert all(np.array_equal(np.asarray(picture), one) for (_, picture), one in zip(seen, drawn, strict=True))
    report = json.loads(next((tmp_path / "results").rglob("*_report.json")).read_text())
    assert (report["technique_name"], report["erase_concept"]) == ("spm_hub", "snoopy")
    assert report["metric_result"]["value"] == 2.0


def test_without_a_concept_the_advice_is_the_configuration_that_works() -> None:
    with pytest.raises(UsageError, match="names no concept") as caught:
        SpmHubTechnique(model_id="sketchbook")
    assert caught.value.mend is not None
    in_yaml, _, in_python = caught.value.mend.partition("; in Python ")
    advised = yaml.safe_load(in_yaml.removeprefix("in YAML "))["technique"]
    assert advised["name"] in POINTS
    assert TechniqueConfig.of(advised["config"]).references == ["nudity"]
    assert ast.literal_eval(in_python.removeprefix("technique_config=")) == advised["config"]


def test_hf_runs_our_program_as_its_extension(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """`hf spm ...` executes the script hf-spm of the package that `hf extensions install` put into a place apart."""
    from huggingface_hub import constants
    from huggingface_hub.cli import extensions

    assert PROJECT["scripts"]["hf-spm"] == PROJECT["scripts"]["spmhub"]
    module, _, function = PROJECT["scripts"]["hf-spm"].partition(":")
    place = tmp_path / "hf-spm"
    place.mkdir()
    script = place / "hf-spm"  # as pip writes a console script
    script.write_text(f"#!{sys.executable}\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    about = {"owner": "spm-hub", "repo": "hf-spm", "repo_id": "spm-hub/hf-spm", "short_name": "spm", "type": "python"}
    manifest = {**about, "executable_path": str(script), "installed_at": "2026-01-01T00:00:00+00:00"}
    (place / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(extensions, "EXTENSIONS_ROOT", tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_UPDATE_CHECK", True)
    monkeypatch.setenv("PYTHONPATH", str(Path(spm_hub.__file__).parents[1]))
    code = extensions.dispatch_unknown_top_level_extension(["spm", "models", "-q"], {"download", "upload"})
    captured = capfd.readouterr()
    assert code == 0, captured.err
    assert "sketchbook" in captured.out.split()

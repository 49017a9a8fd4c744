"""spmhub attack: names and settings of attacks, and what it prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from attacked import CASES, judge_by
from pico import pico_eraser, pico_pipeline
from typer.testing import CliRunner

from spm_hub.cli import app
from spm_hub.evaluation import attacks


def test_the_command_attacks_a_registered_eraser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pico_pipeline()
    pico_eraser(pipe.unet).save(tmp_path / "snoopy.safetensors")
    monkeypatch.setattr("spm_hub.models.loading.load_pipeline", lambda model, **given: pipe)
    monkeypatch.setattr("spm_hub.evaluation.judging.probe_judge", lambda concept: judge_by(lambda call: call == 1)[0])
    given = ["attack", str(tmp_path / "snoopy.safetensors"), "--prompts", "2", "--iterations", "1", "--tries", "1"]
    done = CliRunner().invoke(app, [*given, "--steps", "2", "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    (found,) = said["attacks"]
    assert (found["cases"], found["asr_before"], found["asr"], found["tokens"]) == (2, 0.0, 0.0, 3)
    other = CliRunner().invoke(app, [*given, "--with", "p4d", "--tokens", "5", "--steps", "2", "--json"])
    assert json.loads(other.stdout)["attacks"][0]["attack"] == "p4d-n"
    for wrong, words in (
        (["--with", "unlearndif"], "unknown attack"),
        (["--model", "sd-v1-4"], "no built-in judge"),
        (["--every", "3"], "no attack of --with unlearndiff has it"),
        (["--every", "3", "--with", "p4d", "--tokens", "4"], "--tokens was given as 4"),
    ):
        refused = CliRunner().invoke(app, [*given, *wrong])
        assert refused.exit_code == 2
        assert words in refused.output


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((), {"tokens": 3, "iterations": 40, "timesteps": 50}),
        (("--with", "p4d"), {"tokens": 16, "iterations": 60, "tries": 50}),
        (("--with", "p4d", "--iterations", "7", "--tokens", "4"), {"tokens": 4, "iterations": 7}),
        (("--with", "p4d", "--every", "3"), {"every": 3, "iterations": 60}),
    ],
)
def test_each_attack_has_its_own_papers_settings(
    given: tuple[str, ...], expected: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = pico_pipeline()
    pico_eraser(pipe.unet).save(tmp_path / "snoopy.safetensors")
    seen: list[object] = []

    def run(
        pipe: object, erasers: object, cases: object, judge: object, methods: list[object], **options: object
    ) -> object:
        seen.extend(methods)
        return (attacks.Report((attacks.Outcome(CASES[0], before=True),), 1, attacks.Threat.WEIGHTS),) * 3

    monkeypatch.setattr("spm_hub.evaluation.attacks.run_all", run, raising=False)
    monkeypatch.setattr("spm_hub.models.loading.load_pipeline", lambda model, **given: pipe)
    done = CliRunner().invoke(app, ["attack", str(tmp_path / "snoopy.safetensors"), *given, "--json"])
    assert done.exit_code == 0, done.output
    assert {key: getattr(seen[0], key) for key in expected} == expected

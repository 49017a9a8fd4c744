"""spmhub attack: names and settings of attacks, and what it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from attacked import CASES, judge_by
from pico import pico_eraser, pico_pipeline
from typer.testing import CliRunner

from spm_hub.cli import app
from spm_hub.errors import UsageError
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


def test_pictures_are_kept_resumed_and_judged_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pico_pipeline()
    pico_eraser(pipe.unet).save(tmp_path / "snoopy.safetensors")
    monkeypatch.setattr("spm_hub.models.loading.load_pipeline", lambda model, **given: pipe)
    out = tmp_path / "kept"
    given = ["attack", str(tmp_path / "snoopy.safetensors"), "--prompts", "6", "--with", "seeds", "--tries", "2",
             "--steps", "1", "--judge", "judged:odd", "--fresh", "1", "--at-once", "3"]  # fmt: skip
    done = CliRunner().invoke(app, [*given, "--out", str(out), "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said == json.loads((out / "report.json").read_text())
    again = CliRunner().invoke(app, [*given, "--out", str(out)])
    assert (again.exit_code, "has a run already" in again.output) == (2, True)
    assert CliRunner().invoke(app, [*given, "--out", str(out), "--resume"]).exit_code == 0
    scored = CliRunner().invoke(app, ["score", str(out), "--judge", "judged:bright", "--json"])
    assert [one["judge"] for one in json.loads(scored.stdout)["judges"]] == ["judged:odd", "judged:bright"]
    refused = CliRunner().invoke(app, [*given, "--runner", "processes"])
    assert (refused.exit_code, "add --out DIR" in refused.output) == (2, True)


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


def test_what_the_command_prints_and_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pico_pipeline()
    pico_eraser(pipe.unet).save(tmp_path / "snoopy.safetensors")
    monkeypatch.setattr("spm_hub.models.loading.load_pipeline", lambda model, **given: pipe)

    def run(*options: str) -> str:
        judge = judge_by(lambda call: call not in (2, 3))[0]
        monkeypatch.setattr("spm_hub.evaluation.judging.probe_judge", lambda concept: judge)
        given = ["attack", str(tmp_path / "snoopy.safetensors"), "--prompts", "2", "--steps", "2", *options]
        done = CliRunner().invoke(app, given)
        assert done.exit_code == 0, done.output
        return done.stdout

    asked = ("--with", "pez,ring-a-bell", "--iterations", "2", "--tries", "2", "--tokens", "3", "--fresh", "3")
    said = json.loads(run(*asked, "--json", "--gate", "transport"))
    assert [one["attack"] for one in said["attacks"]] == ["pez", "ring-a-bell"]
    assert [one["attack"] for one in said["controls"]] == ["random", "seeds"]
    assert {one["tries"] for one in said["attacks"] + said["controls"]} == {2}
    assert [one["threat"] for one in said["controls"]] == ["types text", "types text and chooses seeds"]
    assert said["gate"] == "transport"
    for one in said["attacks"]:
        assert one["asr_interval_95"][0] <= one["asr"] <= one["asr_interval_95"][1]
        assert all(0 < outcome["gammas"]["snoopy"] <= 1 for outcome in one["outcomes"])
        assert [len(outcome["fresh"]) for outcome in one["outcomes"]] == [3, 3]
    assert json.loads(run(*asked, "--json", "--gate", "transport")) == said
    text = run(*asked, "--no-controls")
    assert "types text" in text
    assert "6 of 6" in text
    assert "(control)" not in text
    assert "random (control)" in run(*asked)
    assert len(run(*asked, "-q").splitlines()) == 4


@pytest.mark.parametrize(
    ("names", "given", "expected"),
    [
        ("p4d", {}, [("p4d-n", {"tokens": 16, "every": None, "tries": 50})]),
        ("p4d", {"every": 3}, [("p4d-k", {"every": 3})]),
        ("p4d-k", {}, [("p4d-k", {"every": 3, "iterations": 60})]),
        ("p4d-n, cce", {"token_free": True}, [("p4d-n", {"token_free": True}), ("cce", {"initial": "thing"})]),
        ("noise,seeds", {"tries": 5}, [("noise", {"most": 5, "tries": 5}), ("seeds", {"tries": 5})]),
        ("ring-a-bell,pez", {"iterations": 9}, [("ring-a-bell", {"iterations": 9}), ("pez", {"iterations": 9})]),
        ("p4d-n,unlearndiff", {"adaptive": 0.2}, [("p4d-n", {"adaptive": 0.2}), ("unlearndiff", {"timesteps": 50})]),
    ],
)
def test_names_and_settings(names: str, given: dict[str, Any], expected: list[tuple[str, dict[str, Any]]]) -> None:
    found = attacks.attacks_named(names, **given)
    assert [one.name for one in found] == [name for name, _ in expected]
    for one, (_, values) in zip(found, expected, strict=True):
        made = one.attack("other")
        assert {key: getattr(made, key) for key in values} == values


@pytest.mark.parametrize(
    ("names", "given", "words"),
    [
        ("unlearndif", {}, "unknown attack 'unlearndif'"),
        ("p4d-k", {"token_free": True}, "--token-free was given as True, but no attack of --with p4d-k has it"),
        ("seeds", {"iterations": 3}, "--iterations was given as 3"),
        ("pez", {"adaptive": 0.1}, "those that have: p4d-n, p4d-k"),
    ],
)
def test_settings_that_no_attack_has_are_refused(names: str, given: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        attacks.attacks_named(names, **given)

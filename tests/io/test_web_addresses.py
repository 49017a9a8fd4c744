"""Addresses where a name is wanted: the Hub's mean the repository, others what to do."""

from pathlib import Path

import pytest

import spm_hub
from spm_hub.errors import UsageError
from spm_hub.hub.resolve import resolve
from spm_hub.io.web_addresses import hub_reference
from spm_hub.models.references import parse_reference

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("https://huggingface.co/someone/spm-snoopy", "someone/spm-snoopy"),
        ("http://www.huggingface.co/someone/spm-snoopy/", "someone/spm-snoopy"),
        ("HTTPS://HuggingFace.co/Someone/SPM-Snoopy?library=diffusers#files", "Someone/SPM-Snoopy"),
        ("huggingface.co/someone/spm-snoopy", "someone/spm-snoopy"),
        ("hf.co/someone/spm-snoopy", "someone/spm-snoopy"),
        ("hf://someone/spm-snoopy@v2", "someone/spm-snoopy@v2"),
        ("git@hf.co:someone/spm-snoopy", "someone/spm-snoopy"),
        ("https://huggingface.co/someone/spm-snoopy.git", "someone/spm-snoopy"),
        ("https://huggingface.co/someone/spm-snoopy/tree/main", "someone/spm-snoopy"),
        (f"https://huggingface.co/someone/x/resolve/{COMMIT}/a.safetensors?download=true", f"someone/x@{COMMIT}"),
        ("https://huggingface.co/someone/x/blob/v1.0/a/b.safetensors", "someone/x@v1.0"),
        ("https://huggingface.co/someone/x/tree/refs%2Fpr%2F3", "someone/x@refs/pr/3"),
        (" someone/spm-snoopy/ ", "someone/spm-snoopy"),
        ("someone/spm-snoopy@v1/", "someone/spm-snoopy@v1"),
        ("someone/spm-snoopy", "someone/spm-snoopy"),
        ("van gogh", "van gogh"),
        ("./folder/", "./folder/"),
        ("C:\\models\\x.safetensors", "C:\\models\\x.safetensors"),
    ],
)
def test_addresses_of_models_are_their_names(text: str, meant: str) -> None:
    assert hub_reference(text) == meant


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("https://civitai.com/api/download/models/31475?token=secret", "nothing is downloaded from civitai.com"),
        ("civitai.com/models/31475", "nothing is downloaded from civitai.com"),
        ("https://github.com/someone/x/releases/download/v1/a.safetensors", "nothing is downloaded from github.com"),
        ("ftp://somewhere.example/a.safetensors", "nothing is downloaded from somewhere.example"),
        ("https://huggingface.co/datasets/someone/x", "the address of a dataset"),
        ("https://huggingface.co/spaces/someone/x", "the address of a Space"),
        ("https://huggingface.co/someone", "the address of no model"),
        ("https://huggingface.co", "the address of no model"),
        ("https://[::1", "is an address"),
    ],
)
def test_other_addresses_say_what_to_do(text: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()
    for read in (hub_reference, lambda text: resolve(text, tmp_path), parse_reference, spm_hub.pull):
        with pytest.raises(UsageError, match=complaint) as refused:
            read(text)
        assert refused.value.mend
        assert "secret" not in str(refused.value)


def test_a_mirror_is_the_hub_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"mirror\.example"):
        hub_reference("https://mirror.example/someone/x")
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    assert hub_reference("https://mirror.example/someone/x/tree/main") == "someone/x"


def test_a_model_by_its_address() -> None:
    found = parse_reference("https://huggingface.co/someone/a-model/tree/v2")
    assert (found.hub_id, found.revision) == ("someone/a-model", "v2")

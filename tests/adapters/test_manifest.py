import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from spm_hub.adapters.manifest import Base, Concept, Evaluation, IncrementInfo, Manifest, Training, slug
from spm_hub.errors import ManifestError, NotFoundError, UsageError

SCHEMA = Path(__file__).resolve().parents[2] / "manifests" / "schema.json"


def manifest(**changes: object) -> Manifest:
    values: dict[str, object] = {
        "name": "snoopy",
        "concept": Concept(target="snoopy", aliases=("the beagle",), kind="character"),
        "increment": IncrementInfo(kind="low_rank", rank=1, dtype="float32", modules=("mid_block.to_k",)),
        "base": Base(family="sd1", id="sketchbook", fingerprint="0" * 64),
        "recipe": {"steps": 300, "surrogate": None, "objective": {"eta": 1.0}},
    }
    return Manifest(**{**values, **changes})  # type: ignore[arg-type]


def edited(**changes: object) -> str:
    return json.dumps({**json.loads(manifest().to_json()), **changes})


def test_json_and_back() -> None:
    measured = Evaluation(
        protocol="p", base="b", subject="s", metric="m", value=0.02, reference=0.98, samples=50, seed=1
    )
    whole = manifest(created=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), evaluation=(measured,), versions={"torch": "2"})
    assert Manifest.from_json(whole.to_json()) == whole


def test_embedded_copy_knows_nothing_of_clock_file_and_measurements() -> None:
    info = manifest().increment.model_copy(update={"file": "a.safetensors", "bytes": 3, "sha256": "0" * 64})
    measured = Evaluation(protocol="p", base="b", subject="s", metric="m", value=0.0, samples=1, seed=1)
    later = manifest(increment=info, created=datetime.now(UTC), evaluation=(measured,))
    assert later.to_embedded_json() == manifest().to_embedded_json()
    assert Manifest.from_json(later.to_embedded_json()) == manifest()


OF_VERSION_1 = """{
  "schema_version": 1,
  "name": "snoopy",
  "concept": {
    "target": "snoopy",
    "aliases": [],
    "surrogate": "",
    "kind": "other"
  },
  "increment": {
    "kind": "low_rank",
    "rank": 1,
    "dtype": "float32",
    "modules": [
      "mid_block.to_k"
    ],
    "file": null,
    "bytes": null,
    "sha256": null
  },
  "base": {
    "family": "sd1",
    "id": "sketchbook",
    "revision": null,
    "fingerprint": ""
  },
  "recipe": {},
  "versions": {},
  "gate": {
    "kind": "transport",
    "strength": 1.0,
    "rows": "both",
    "protected": []
  },
  "evaluation": [
    {
      "protocol": "sketchbook-detection",
      "base": "sketchbook",
      "subject": "snoopy",
      "metric": "subject_detected",
      "value": 0.0,
      "reference": null,
      "samples": 50,
      "seed": 2024
    }
  ],
  "licence": "apache-2.0",
  "author": "",
  "created": null,
  "origin": null
}
"""
"""As spm-hub wrote it before the calibrated gate became the default."""


def test_a_manifest_of_version_1_stays_as_it_is_letter_by_letter() -> None:
    """Signatures cover its text, and adapter files have a copy of it."""
    assert Manifest.from_json(OF_VERSION_1).to_json() == OF_VERSION_1


@pytest.mark.parametrize(
    ("version", "written", "counts"),
    [
        (1, "transport", "calibrated"),
        (1, "always", "always"),
        (1, "calibrated", "calibrated"),
        (2, "transport", "transport"),
        (2, "always", "always"),
    ],
)
def test_transport_is_a_choice_only_since_it_is_no_longer_the_default(version: int, written: str, counts: str) -> None:
    text = OF_VERSION_1.replace('version": 1', f'version": {version}').replace("transport", written)
    assert Manifest.from_json(text).default_gate == counts


def test_new_manifests_say_calibrated() -> None:
    said = json.loads(manifest().to_json())
    assert (said["schema_version"], said["gate"]["kind"]) == (2, "calibrated")


def test_schema_file_is_that_of_the_model() -> None:
    assert SCHEMA.read_text() == Manifest.json_schema(), "write Manifest.json_schema() to manifests/schema.json"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"concpt": {}}, "concpt: unknown key; did you mean concept?"),
        ({"concept": {"target": "x", "alias": []}}, "concept.alias: unknown key; did you mean aliases?"),
        ({"concept": {"target": "  "}}, "concept.target"),
        ({"concept": {"target": "x", "kind": "beagle"}}, "concept.kind"),
        ({"schema_version": 3}, "schema_version"),
        ({"name": "../etc/passwd"}, "name"),
        ({"name": "Snoopy"}, "name"),
        ({"recipe": None}, "recipe"),
        ({"base": {"family": "sd1", "id": "x", "fingerprint": "12"}}, "base.fingerprint"),
        ({"increment": {"kind": "low_rank", "dtype": "float32", "modules": ["a"]}}, "rank is None for kind low_rank"),
        ({"increment": {"kind": "dense", "rank": 1, "dtype": "float32", "modules": ["a"]}}, "rank is 1 for kind dense"),
        ({"increment": {"kind": "dense", "dtype": "float32", "modules": []}}, "increment.modules"),
        ({"increment": {"kind": "dense", "dtype": "float32", "modules": ["a", "a"]}}, "names a twice"),
        ({"increment": {"kind": "dense", "dtype": "f", "modules": ["a"], "file": "../x"}}, "increment.file"),
        ({"gate": {"strength": "1.0"}}, "gate.strength"),
        ({"evaluation": [{"protocol": "p", "metrik": 1}]}, "evaluation.0.metrik: unknown key; did you mean metric?"),
    ],
)
def test_a_wrong_manifest_names_the_key(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(ManifestError) as caught:
        Manifest.from_json(edited(**change), source="manifests/snoopy.json")
    assert complaint in str(caught.value)
    assert "manifests/snoopy.json" in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"name": NaN}', b"\xff\xfe\x00", '{"gate":{"strength":1e999}}']
)
def test_what_is_no_manifest_at_all(text: str | bytes) -> None:
    with pytest.raises(ManifestError):
        Manifest.from_json(text)


@given(st.binary(max_size=200))
def test_hostile_bytes_raise_nothing_else(data: bytes) -> None:
    with pytest.raises(ManifestError):
        Manifest.from_json(data)


def test_a_missing_manifest(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        Manifest.read(tmp_path / "none.json")


def test_values_are_frozen() -> None:
    with pytest.raises(ValidationError):
        manifest().name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "name"), [("Van Gogh", "van-gogh"), ("  Émile! ", "emile"), ("a_b/c..", "a_b-c"), ("x" * 200, "x" * 96)]
)
def test_slug(text: str, name: str) -> None:
    assert slug(text) == name


def test_slug_keeps_concepts_of_other_scripts_apart() -> None:
    assert slug("梵高").startswith("concept-")
    assert slug("梵高") != slug("毕加索")


@given(st.text().filter(str.strip))
def test_every_concept_has_a_valid_name(text: str) -> None:
    assert manifest(name=slug(text)).name == slug(text)


@pytest.mark.parametrize("text", ["", "  ", "\n\t"])
def test_an_empty_concept(text: str) -> None:
    with pytest.raises(UsageError, match="empty"):
        slug(text)


def test_keys_that_older_manifests_do_not_have_are_written_with_a_value_only() -> None:
    """An older signature covers the text without them."""
    measured = Evaluation(protocol="a", base="b", subject="c", metric="d", value=1.0, samples=1, seed=0)
    training = Training(steps=2, planned=4, ended="callback")
    without, whole = (manifest().model_copy(update={"evaluation": (measured,)}) for _ in range(2))
    whole = whole.model_copy(
        update={
            "training": training,
            "signed": datetime(2026, 1, 1, tzinfo=UTC),
            "evaluation": (measured.model_copy(update={"steps": 25}),),
        }
    )
    later = {"training", "signed", "steps", "guidance", "gate", "version", "date"}
    said = json.loads(without.to_json())
    assert not later & (said.keys() - {"gate"})
    assert not later & said["evaluation"][0].keys()
    assert said["origin"] is None, "a key that it always had"
    assert json.loads(whole.to_json())["evaluation"][0]["steps"] == 25
    for one in (without, whole):
        assert Manifest.from_json(one.to_json()) == one

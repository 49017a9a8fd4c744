"""Pushing an eraser with its card, finding it by its tags and pulling it, unchanged, elsewhere."""

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from loopback import LoopbackHub, front_matter
from pico import pico_eraser, pico_pipeline
from PIL import Image
from typer.testing import CliRunner

import spm_hub
from spm_hub.adapters.adapter import Adapter
from spm_hub.adapters.manifest import Base, Evaluation
from spm_hub.cli import app
from spm_hub.errors import HubError, NetworkError, NotFoundError, SpmHubError, UsageError
from spm_hub.evaluation.pictures import DrawingOptions, save, show
from spm_hub.hub import card
from spm_hub.hub import pull as hub_pull
from spm_hub.hub.push import Release, prepare, push
from spm_hub.hub.search import search
from spm_hub.io import hub_client as network
from spm_hub.registry import signing
from spm_hub.registry.entry import MANIFEST_NAME, WEIGHTS_NAME
from spm_hub.registry.registry import Registry

REPO = "someone/spm-snoopy"
TOKEN = "hf_loopbackloopbackloopback"
SD14 = "CompVis/stable-diffusion-v1-4"


@pytest.fixture(params=["regular", "lfs"])
def hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub(request.param, token=TOKEN) as served:
        served.adopt(monkeypatch, tmp_path)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(network, "_FIRST_PAUSE", 0.01)
        (tmp_path / "work").mkdir()
        monkeypatch.chdir(tmp_path / "work")
        yield served


def described(adapter: Adapter, **changes: Any) -> Adapter:
    return Adapter(adapter.manifest.model_copy(update=changes), adapter.increments)


@pytest.fixture(scope="module")
def eraser() -> Adapter:
    measured = [("snoopy", 0.04, 1.0), ("dog", 0.98, 1.0), ("cat", 0.9, 0.9)]
    about: dict[str, Any] = {"protocol": "p", "base": "b", "metric": "detected", "samples": 50, "seed": 1}
    evaluation = tuple(Evaluation(subject=name, value=value, reference=was, **about) for name, value, was in measured)
    return described(
        pico_eraser(pico_pipeline().unet, aliases=("the beagle | dog",)),
        base=Base(family="sd1", id="sd-v1-4", revision="1" * 40, fingerprint=""),
        recipe={"target": "snoopy", "method": "spm", "steps": 240},
        evaluation=evaluation,
    )


@pytest.fixture
def registry(tmp_path: Path, eraser: Adapter) -> Registry:
    kept = Registry(tmp_path / "registry")
    kept.add(eraser)
    return kept


@pytest.fixture
def release(registry: Registry, tmp_path: Path) -> Release:
    return prepare(registry.get("snoopy"), REPO, pairs(), tmp_path)


def pairs(count: int = 2) -> tuple[card.PicturePair, ...]:
    return tuple(
        card.PicturePair(f"prompt {index}", png(index), png(index + 9), {"snoopy": 0.5}) for index in range(count)
    )


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(file, format="PNG")
    return file.getvalue()


def drawn(pipe: Any, prompt: str = "snoopy on the beach") -> np.ndarray[Any, Any]:
    generator = torch.Generator().manual_seed(0)
    return np.asarray(pipe(prompt, num_inference_steps=2, generator=generator, output_type="np").images[0])


def test_pushed_found_pulled_on_an_empty_machine_and_the_same_there(
    hub: LoopbackHub, registry: Registry, release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed = push(release)
    assert any("PUT /storage/" in line for line in hub.requests) == (hub.mode == "lfs")
    found = HfApi().list_models(filter=["spmhub", f"base_model:adapter:{SD14}"])
    assert [model.id for model in found] == [REPO]

    hub.adopt(monkeypatch, tmp_path / "elsewhere")
    there = Registry(tmp_path / "elsewhere" / "registry")
    pulled = hub_pull.pull(REPO, registry=there)
    assert pulled.origin.commit == pushed.commit
    pipe = pico_pipeline()
    bare = drawn(pipe)
    with spm_hub.attach(pipe, "snoopy", registry=registry.root):
        here = drawn(pipe)
    with spm_hub.attach(pipe, "snoopy", registry=there.root):
        assert np.array_equal(drawn(pipe), here)
    with spm_hub.attach(pipe, f"{REPO}@{pushed.commit}"):
        assert np.array_equal(drawn(pipe), here)
    assert not np.array_equal(here, bare)

    # Plain diffusers: from the Hub itself, and from the folder of what was pulled; gamma is then 1.
    with spm_hub.attach(pipe, "snoopy", registry=there.root, gate="always"):
        fully = drawn(pipe)
    adapters = there.root / "adapters"
    for place, options in ((REPO, {"weight_name": WEIGHTS_NAME}), (adapters, {"weight_name": "snoopy.safetensors"})):
        pipe.load_lora_weights(place, **options)
        np.testing.assert_allclose(drawn(pipe), fully, atol=2e-5)
        pipe.unload_lora_weights()


def test_the_door(hub: LoopbackHub, registry: Registry, tmp_path: Path) -> None:
    assert spm_hub.push("snoopy", REPO, registry=registry.root).startswith(hub.endpoint)
    pulled = spm_hub.pull(REPO, registry=tmp_path / "there", name="beagle")
    assert pulled.name == "beagle"
    assert [entry.name for entry in Registry(tmp_path / "there").entries()] == ["beagle"]
    with pytest.raises(UsageError, match="owner/name"):
        spm_hub.pull("snoopy")


def test_pushing_again_replaces_what_was_pushed(hub: LoopbackHub, registry: Registry, tmp_path: Path) -> None:
    for count in (2, 1):
        push(prepare(registry.get("snoopy"), REPO, pairs(count), tmp_path))
    images = [path for path in hub.content(REPO) if path.startswith("images/")]
    assert sorted(images) == ["images/00-with.png", "images/00-without.png"]
    commits = len(hub.repositories[REPO].commits)
    push(prepare(registry.get("snoopy"), REPO, pairs(1), tmp_path))
    assert len(hub.content(REPO)) == 6  # .gitattributes, weights, manifest, card and two pictures
    assert len(hub.repositories[REPO].commits) <= commits + 1
    # Of another kind, and no longer signed: the old file and its signature would be taken for the new one's.
    registry.add(pico_eraser(pico_pipeline().unet, kind="dense"), replace=True)
    others = {"notes.safetensors": b"of a person", "mickey-dense.safetensors": b"of another eraser"}
    hub.publish(REPO, {**hub.content(REPO), signing.SIGNATURE_NAME: b"sigstore", **others})
    push(prepare(registry.get("snoopy"), REPO, (), tmp_path))
    card_and_more = {".gitattributes", MANIFEST_NAME, "README.md", *others}
    assert set(hub.content(REPO)) == {"snoopy-dense.safetensors", *card_and_more}
    # Files from before the first eraser belong to the user.
    hub.publish("someone/loras", {WEIGHTS_NAME: b"a style"})
    push(prepare(registry.get("snoopy"), "someone/loras", (), tmp_path))
    assert hub.content("someone/loras")[WEIGHTS_NAME] == b"a style"


def test_private_branch_and_pull_request(hub: LoopbackHub, release: Release) -> None:
    push(release, private=True)
    assert hub.repositories[REPO].private
    main = hub.repositories[REPO].refs["main"]
    assert push(release, revision="v2").pull_request is None
    assert str(push(release, pull_request=True).pull_request).endswith(f"{REPO}/discussions/1")
    assert {"main", "v2", "refs/pr/1"} <= set(hub.repositories[REPO].refs)
    assert hub.repositories[REPO].refs["main"] == main
    with pytest.raises(UsageError, match="--revision"):
        push(release, revision="v2", pull_request=True)
    hub.publish("someone/public", {})
    with pytest.raises(HubError, match="is public"):
        push(Release("someone/public", release.manifest, release.card, release.files), private=True)
    assert hub.content("someone/public") == {}
    with pytest.raises(HubError, match="there is no someone/none"):
        push(Release("someone/none", release.manifest, release.card, release.files), pull_request=True)


PLACES = ("POST /api/repos/create", "GET /api/models/", "POST /api/validate-yaml", "/preupload/", "/commit/")
PUSH_FAULTS: dict[str, tuple[dict[str, Any], str | None]] = {
    "401": ({"status": 401}, "asks for a login to"),
    "403": ({"status": 403}, "does not let you"),
    "404": ({"status": 404, "code": "RepoNotFound"}, "there is no someone/spm-snoopy"),
    "400": ({"status": 400}, "refuses|400"),
    "429": ({"status": 429, "headers": {"Retry-After": "0"}, "times": 1}, None),
    "503": ({"status": 503, "times": 1}, None),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", PUSH_FAULTS)
@pytest.mark.parametrize("place", PLACES)
def test_every_fault_of_a_push_ends_well_or_in_one_clear_error(
    place: str, fault: str, hub: LoopbackHub, release: Release
) -> None:
    push(Release(REPO, release.manifest, "", {"README.md": b"---\nlicense: mit\n---\nbefore\n"}))
    before = hub.content(REPO)
    given, message = PUSH_FAULTS[fault]
    hub.fail(place, **{"times": None, **given})
    # The client takes the creation of what exists for done, also where it was refused.
    is_lenient = place.endswith("create") and fault in ("401", "403")
    if message is None or is_lenient:
        push(release)
        assert WEIGHTS_NAME in hub.content(REPO)
        return
    with pytest.raises(SpmHubError, match=message) as caught:
        push(release)
    assert caught.value.exit_code == 1
    assert hub.content(REPO) == before


def test_a_race_overwrites_no_commit(hub: LoopbackHub, release: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    push(release)
    real = HfApi.preupload_lfs_files

    def meanwhile(self: HfApi, *given: Any, **options: Any) -> None:
        real(self, *given, **options)
        hub.publish(REPO, {"README.md": b"somebody else's"})

    monkeypatch.setattr(HfApi, "preupload_lfs_files", meanwhile)
    changed = Release(REPO, release.manifest, release.card, {**release.files, "README.md": b"mine"})
    with pytest.raises(HubError, match="somebody has changed someone/spm-snoopy meanwhile"):
        push(changed)
    assert hub.content(REPO) == {"README.md": b"somebody else's"}


@pytest.mark.parametrize("fault", [{"status": 503, "times": 1}, {"reset_after": 0, "times": 1}, {"status": 403}])
def test_a_large_file_that_does_not_get_through(hub: LoopbackHub, release: Release, fault: dict[str, Any]) -> None:
    hub.fail("PUT /storage/", **{"times": None, **fault})
    if hub.mode == "lfs" and fault.get("status") == 403:
        with pytest.raises(HubError, match="does not let you"):
            push(release)
        assert WEIGHTS_NAME not in hub.content(REPO)
    else:
        push(release)
        assert hub_pull.download(REPO).load().name == "snoopy"


@pytest.mark.parametrize("fault", [{"reset_after": 0}, {"reset_after": 30}, {"short_by": 20}])
def test_a_commit_whose_answer_is_lost_is_not_taken_for_somebody_elses(
    hub: LoopbackHub, release: Release, fault: dict[str, Any]
) -> None:
    """The second attempt finds another parent commit, which is its own and not a race."""
    hub.publish(REPO, {"README.md": b"before", "images/09-with.png": b"of an older eraser"})
    hub.fail("POST .*/commit/", **fault)
    made = push(release)
    assert made.commit == hub.repositories[REPO].refs["main"]
    assert hub.content(REPO).keys() == release.files.keys()
    assert len(hub.repositories[REPO].commits) == 2


def test_a_commit_that_came_between_is_still_a_race(hub: LoopbackHub, release: Release) -> None:
    push(release)
    hub.fail("POST .*/commit/", status=412, times=None)
    other = Release(REPO, release.manifest, release.card, {**release.files, "README.md": b"mine"})
    with pytest.raises(HubError, match="somebody has changed"):
        push(other)
    assert hub.content(REPO)["README.md"] == release.card.encode()


@pytest.mark.parametrize("place", ["POST /api/repos/create", "/preupload/", "/commit/"])
def test_an_answer_that_is_no_answer(place: str, hub: LoopbackHub, release: Release) -> None:
    """A proxy answers every request with status 200 and a page of its own."""
    hub.publish(REPO, {"README.md": b"before"})
    hub.fail(place, status=200, times=None)
    with pytest.raises(NetworkError, match="its answer is not what the Hub writes"):
        push(release)
    assert hub.content(REPO) == {"README.md": b"before"}


def test_the_card(release: Release, eraser: Adapter) -> None:
    about = front_matter(release.card)
    assert about["library_name"] == "diffusers"
    assert about["pipeline_tag"] == "text-to-image"
    assert (about["base_model"], about["base_model_relation"]) == (SD14, "adapter")
    assert about["tags"][:5] == ["spmhub", "concept-erasure", "lora", "text-to-image", "sd1"]
    assert {"method:spm", "erases:snoopy", "stable-diffusion", "template:sd-lora"} <= set(about["tags"])
    assert release.card.count("<Gallery />") == 1
    assert about["license"] == "apache-2.0"
    assert [(one["text"], one["output"]["url"]) for one in about["widget"]] == [
        ("prompt 0", "images/00-without.png"),
        ("prompt 0", "images/00-with.png"),
        ("prompt 1", "images/01-without.png"),
        ("prompt 1", "images/01-with.png"),
    ]
    assert all(one["output"]["url"] in release.files for one in about["widget"])
    ModelCard(release.card)  # the client's own reading of it
    body = release.card.partition("\n---\n")[2]
    for part in ("**snoopy: 1 → 0.04**", "2 other subjects: -0.0100 on average, -0.0200 at most (*dog*)", "steps: 240",
                 f'load_lora_weights("{REPO}", weight_name="{WEIGHTS_NAME}")', f'spm_hub.attach(pipe, "{REPO}")',
                 "the beagle", "## Limits and risks", "## Licence"):  # fmt: skip
        assert part in body, part
    manifest = spm_hub.Manifest.from_json(release.files[MANIFEST_NAME])  # type: ignore[arg-type]
    assert (manifest.increment.file, manifest.origin) == (WEIGHTS_NAME, None)
    sums = {str(row["path"]): row["sha256"] for row in release.listing()}
    assert sums[WEIGHTS_NAME] == manifest.increment.sha256


@pytest.mark.parametrize(
    ("base", "named"),
    [("sketchbook", None), ("sd-v1-4@main", SD14), ("some/model", "some/model"), ("some/model@v1", "some/model"),
     ("photo.safetensors", None), ("my-folder", None), ("", None)],
)  # fmt: skip
def test_only_a_base_on_the_hub_is_named_in_the_metadata(base: str, named: str | None, eraser: Adapter) -> None:
    manifest = described(eraser, base=Base(family="sd1", id=base, fingerprint="")).manifest
    assert card.metadata(manifest).get("base_model") == named
    assert ("base_model_relation" in card.metadata(manifest)) == (named is not None)
    assert "huggingface.co/None" not in card.render(manifest, REPO, WEIGHTS_NAME)


@pytest.mark.parametrize("kind", ["dense", "mask"])
def test_what_is_no_lora_goes_by_another_name(
    kind: str, hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Registry(tmp_path / "registry")
    kept.add(described(pico_eraser(pico_pipeline().unet, kind=kind), licence="some licence of mine"))
    release = prepare(kept.get("snoopy"), REPO, (), tmp_path)
    assert f"snoopy-{kind}.safetensors" in release.files
    about = front_matter(release.card)
    assert "lora" not in about["tags"]
    assert (about["license"], about["license_name"]) == ("other", "some licence of mine")
    assert "load_lora_weights" not in release.card
    assert "spmhub bake" in release.card
    push(release)
    hub.adopt(monkeypatch, tmp_path / "elsewhere")
    pulled = hub_pull.pull(REPO, registry=Registry(tmp_path / "elsewhere"))
    assert pulled.entry.load().manifest.increment.kind == kind


def test_pictures_are_read_from_what_apply_writes(tmp_path: Path, eraser: Adapter) -> None:
    drawing = DrawingOptions(seed=1, steps=1)
    shown = show(pico_pipeline(), [eraser], ["snoopy", "a dog"], drawing)
    save(shown, tmp_path, drawing, title="snoopy", grid=True, described={"adapters": ["snoopy"]})
    # What shows another eraser, or this one among others, is no evidence of this one.
    for number, others in enumerate((["mickey"], ["mickey", "snoopy"])):
        save(
            shown[:1],
            tmp_path / "more",
            DrawingOptions(seed=number),
            title="x",
            grid=False,
            described={"adapters": others},
        )
    with pytest.raises(NotFoundError, match=r"no pair .* of snoopy alone, only of mickey, of mickey and snoopy"):
        card.read_pairs(tmp_path / "more", "snoopy")
    save(shown[:1], tmp_path, DrawingOptions(seed=7), title="x", grid=False, described={"adapters": ["mickey"]})
    read = card.read_pairs(tmp_path, "snoopy")
    assert [pair.prompt for pair in read] == ["snoopy", "a dog"]
    assert read[0].gates["snoopy"] == pytest.approx(shown[0].gates["snoopy"])
    (tmp_path / "00-x-without.png").write_bytes(png(1))
    (tmp_path / "00-x-with.png").write_bytes(b"not a picture")
    with pytest.raises(UsageError, match="00-x-with"):
        card.read_pairs(tmp_path, "snoopy")
    with pytest.raises(NotFoundError, match="no pair"):
        card.read_pairs(tmp_path / "none", "snoopy")


@pytest.mark.parametrize("repo", ["nonsense", "not a repo", "a/b/c", "someone/spm-snoopy@main", ""])
def test_an_invalid_repository_is_an_error_before_anything_is_drawn_or_uploaded(
    repo: str, eraser: Adapter, tmp_path: Path
) -> None:
    kept = Registry(tmp_path)
    kept.add(eraser)
    with pytest.raises(UsageError, match="is not of the form owner/name"):
        prepare(kept.get("snoopy"), repo, (), tmp_path)


def test_searching(hub: LoopbackHub, registry: Registry, tmp_path: Path) -> None:
    def published(repo: str, adapter: Adapter) -> None:
        hub.publish(repo, {"README.md": card.render(adapter.manifest, repo, WEIGHTS_NAME).encode()})

    eraser = registry.get("snoopy").load()
    vincent = described(
        eraser, concept=spm_hub.adapters.manifest.Concept(target="van gogh", aliases=("Vincent van Gogh",))
    )
    published("one/spm-snoopy", eraser)
    published("two/nothing-in-the-name", described(vincent, recipe={"method": "esd-x"}))
    published("two/xl", described(eraser, base=Base(family="sdxl", id="sdxl", fingerprint="")))
    hub.publish("three/snoopy-lora", {"README.md": b"---\ntags: [lora]\n---\n"})
    hub.page = 1

    def found(*query: str, **options: str) -> list[str]:
        return sorted(one.repo for one in search(*query, **options))

    assert found() == ["one/spm-snoopy", "two/nothing-in-the-name", "two/xl"]
    assert found("snoopy") == ["one/spm-snoopy", "two/xl"]
    assert found("van gogh") == found("Vincent") == ["two/nothing-in-the-name"]
    on_sd1 = ["one/spm-snoopy", "two/nothing-in-the-name"]
    assert found(base="sd1") == found(base="sd-v1-4") == found(base=SD14) == on_sd1
    assert found(base="sdxl", method="spm") == ["two/xl"]
    assert found(method="esd-x") == ["two/nothing-in-the-name"]
    assert found("snoopy", author="two") == ["two/xl"]
    assert found("zebra") == []
    (one,) = search("van gogh")
    assert (one.erases, one.method, one.base) == (("van-gogh", "vincent-van-gogh"), "esd-x", SD14)


def spmhub(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def test_the_commands(hub: LoopbackHub, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = ("--registry", str(registry.root))
    dry = spmhub("push", "snoopy", REPO, "--dry-run", *place)
    assert dry.exit_code == 0, dry.stderr
    assert "no pictures: sd-v1-4 is not on this machine" in dry.stderr
    assert "An eraser of “snoopy”" in dry.stdout
    assert REPO not in hub.repositories
    shown = json.loads(spmhub("push", "snoopy", REPO, "--dry-run", "--no-pictures", "--json", *place).stdout)
    assert [file["path"] for file in shown["files"]] == [WEIGHTS_NAME, MANIFEST_NAME, "README.md"]
    assert not [line for line in hub.requests if line.startswith("POST")]

    done = spmhub("push", "snoopy", REPO, "--no-pictures", "--json", *place)
    assert done.exit_code == 0, done.stderr
    served = hub.content(REPO)
    for file in shown["files"]:
        assert hashlib.sha256(served[file["path"]]).hexdigest() == file["sha256"]
    assert [row["repo"] for row in json.loads(spmhub("search", "snoopy", "--json").stdout)] == [REPO]
    assert spmhub("list", "--remote", "-q").stdout.split() == [REPO]

    hub.adopt(monkeypatch, tmp_path / "elsewhere")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    there = tmp_path / "there"
    pulled = spmhub("pull", REPO, "--registry", str(there))
    assert pulled.exit_code == 0, pulled.stderr
    assert f"snoopy (new): {REPO}@" in pulled.stdout
    (row,) = json.loads(spmhub("outdated", "--registry", str(there), "--json").stdout)
    assert (row["name"], row["state"]) == ("snoopy", "current")
    assert "nothing to do" in spmhub("pull", "--registry", str(there)).stderr

    refused = spmhub("pull", "someone/none", "--registry", str(there), "--json")
    assert refused.exit_code == 1
    assert json.loads(refused.stdout)["error"]["type"] == "HubNotFoundError"
    assert spmhub("pull", "nonsense").exit_code == 2

    # The token is the client's own affair.
    said = "".join(one.stdout + one.stderr for one in (dry, done, pulled, refused))
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert TOKEN not in said
    assert TOKEN.encode() not in written
    assert not [line for line, token in hub.authorisations if token and "/storage/" in line]


def test_measured_numbers_are_a_model_index_that_the_client_reads(eraser: Adapter) -> None:
    numbers = (
        Evaluation(
            protocol="spm-objects", base="sketchbook", subject="snoopy", metric="probe", value=0.05, reference=1.0,
            samples=80, seed=2024, interval=(0.02, 0.12), protocol_sha256="a" * 64, report_sha256="b" * 64,
        ),
        Evaluation(protocol="detection", base="x", subject="dog", metric="probe", value=0.9, samples=20, seed=1),
    )  # fmt: skip
    manifest = eraser.manifest.model_copy(update={"evaluation": numbers})
    assert type(manifest).model_validate_json(manifest.to_json()) == manifest
    assert "interval" not in manifest.to_json().split('"detection"')[1], "it was not recorded"
    data = ModelCard(card.render(manifest, "someone/eraser", "eraser.safetensors")).data
    assert data.model_name == manifest.name
    found = {one.dataset_type: one for one in data.eval_results or ()}
    first = found["spm-objects"]
    assert (first.metric_value, first.dataset_revision, first.task_type) == (0.05, "a" * 64, "text-to-image")
    assert first.metric_args["interval_95"] == [0.02, 0.12]
    assert first.metric_args["report_sha256"] == "b" * 64
    assert found["detection"].metric_args == {"samples": 20, "seed": 1}

"""The loopback Hub answers the real client as the real Hub does: uploads come back, failures fail alike."""

from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import HfApi, errors, hf_hub_download, snapshot_download
from loopback import LoopbackHub, Mode

FILES = {
    "README.md": b"---\nlibrary_name: spmhub\ntags: [spmhub, sd1]\nbase_model: some/base\n"
    b"base_model_relation: adapter\n---\n# hello\n",
    "weights.safetensors": bytes(range(256)) * 64,
    "folder/notes.json": b"{}",
}


@pytest.fixture(params=["regular", "lfs"])
def hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    mode: Mode = request.param
    with LoopbackHub(mode) as served:
        served.adopt(monkeypatch, tmp_path)
        yield served


def uploaded(hub: LoopbackHub, folder: Path, **options: bool | str) -> str:
    for path, content in FILES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    api = HfApi()
    api.create_repo("someone/thing", exist_ok=True)
    return api.upload_folder(repo_id="someone/thing", folder_path=folder, **options).oid


def test_what_is_uploaded_is_listed_and_comes_back(hub: LoopbackHub, tmp_path: Path) -> None:
    commit = uploaded(hub, tmp_path / "up")
    assert any("PUT /storage/" in line for line in hub.requests) == (hub.mode == "lfs")
    down = Path(snapshot_download("someone/thing"))
    assert down.name == commit
    for path, content in FILES.items():
        assert (down / path).read_bytes() == content
    info = HfApi().model_info("someone/thing", files_metadata=True)
    sizes = {file.rfilename: file.size for file in info.siblings or ()}
    assert sizes["weights.safetensors"] == len(FILES["weights.safetensors"])
    uploaded(hub, tmp_path / "up")  # nothing is changed by uploading the same again
    found = [model.id for model in HfApi().list_models(filter=["spmhub", "base_model:adapter:some/base"])]
    assert found == ["someone/thing"]
    assert not list(HfApi().list_models(filter="nothing-of-that-kind"))


def test_pages_of_models(hub: LoopbackHub) -> None:
    for number in range(5):
        hub.publish(f"someone/n{number}", FILES)
    hub.page = 2
    assert [model.id for model in HfApi().list_models(filter="spmhub")] == [f"someone/n{number}" for number in range(5)]
    assert len(list(HfApi().list_models(filter="spmhub", limit=3))) == 3


def test_branches_pull_requests_and_races(hub: LoopbackHub, tmp_path: Path) -> None:
    first = uploaded(hub, tmp_path / "up")
    (tmp_path / "more").write_bytes(b"more")
    api = HfApi()
    api.create_branch("someone/thing", branch="side")
    api.upload_file(path_or_fileobj=tmp_path / "more", path_in_repo="more", repo_id="someone/thing", revision="side")
    made = api.upload_file(
        path_or_fileobj=tmp_path / "more", path_in_repo="pr", repo_id="someone/thing", create_pr=True
    )
    assert (made.pr_url or "").endswith("/discussions/1")
    assert set(hub.content("someone/thing", "side")) - set(hub.content("someone/thing")) == {"more"}
    with pytest.raises(errors.HfHubHTTPError, match="412"):
        api.upload_file(
            path_or_fileobj=tmp_path / "more", path_in_repo="x", repo_id="someone/thing", parent_commit="a" * 40
        )
    assert hub.repositories["someone/thing"].refs["main"] == first


def test_what_is_not_there_or_not_for_everybody(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_of_someone"
    hub.publish("someone/open", FILES)
    hub.publish("someone/gated", FILES, gated=True)
    hub.publish("someone/private", FILES, private=True)
    cases = {
        ("someone/none", None): errors.RepositoryNotFoundError,
        ("someone/private", None): errors.RepositoryNotFoundError,
        ("someone/gated", None): errors.GatedRepoError,
        ("someone/open", "v9"): errors.RevisionNotFoundError,
    }
    for (repo, revision), error in cases.items():
        with pytest.raises(error):
            hf_hub_download(repo, "weights.safetensors", revision=revision)
    with pytest.raises(errors.EntryNotFoundError):
        hf_hub_download("someone/open", "nothing.txt")
    with pytest.raises(errors.HfHubHTTPError, match="401"):
        HfApi().create_repo("someone/new")
    monkeypatch.setenv("HF_TOKEN", "hf_of_someone")
    assert Path(hf_hub_download("someone/private", "weights.safetensors")).read_bytes() == FILES["weights.safetensors"]
    # The token stays with the Hub; the storage it redirects to is another host.
    assert not any(token for line, token in hub.authorisations if "/storage/" in line)


def test_faults_do_what_they_say(hub: LoopbackHub) -> None:
    hub.publish("someone/thing", {"a.bin": b"x" * 5000})
    url, where = f"{hub.endpoint}/someone/thing/resolve/main/a.bin", "GET /(someone|storage)/"

    def get(**headers: str) -> httpx2.Response:
        return httpx2.get(url, follow_redirects=True, headers=headers)

    assert get().content == b"x" * 5000
    assert get(Range="bytes=4990-").content == b"x" * 10
    hub.fail(where, status=429, headers={"Retry-After": "1"}, times=2)
    assert [get().status_code for _ in range(3)] == [429, 429, 200]
    body = "GET /storage/" if hub.mode == "lfs" else "GET /someone/"
    hub.fail(body, reset_after=1000)
    with pytest.raises((httpx2.ReadError, httpx2.RemoteProtocolError)):
        get()
    hub.fail(body, short_by=7)
    assert len(get().content) == 4993
    hub.fail(body, short_by=-7)
    with pytest.raises(httpx2.RemoteProtocolError):
        get()
    hub.fail(body, corrupt=True, skip=1)
    assert [get().content == b"x" * 5000 for _ in range(3)] == [True, False, True]
    hub.fail(body, seconds_per_kb=0.02, times=None)
    response = get()
    assert response.content == b"x" * 5000
    assert response.elapsed.total_seconds() >= 0.08
    hub.mend()
    assert get().elapsed.total_seconds() < 0.08

"""Commands push, pull, search and outdated: erasers on the Hugging Face Hub (help panel "Share")."""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spm_hub.cli import options
from spm_hub.cli.app import Example, command
from spm_hub.cli.output import InterruptedByUserError, Output, silence_hub, silence_libraries, size, table
from spm_hub.cli.terminal import printable
from spm_hub.errors import TooLargeError, UsageError
from spm_hub.io.hashing import sha256_of
from spm_hub.io.progress import progress_if_long
from spm_hub.io.web_addresses import hub_reference
from spm_hub.io.wording import counted
from spm_hub.registry.storage import MAX_BYTES

if TYPE_CHECKING:
    from spm_hub.adapters.manifest import Concept
    from spm_hub.hub.card import PicturePair
    from spm_hub.hub.pull import PullResult
    from spm_hub.hub.search import SearchResult
    from spm_hub.registry.entry import EraserEntry

Repo = Annotated[str, typer.Argument(metavar="USER/REPO", help="The repository on the Hub.")]


@command(
    "push",
    Example("spmhub push snoopy someone/spm-snoopy --dry-run", "show the model card and the files, and upload nothing"),
    Example("spmhub push snoopy someone/spm-snoopy --dry-run --out card", "the same, and keep the pictures"),
    Example("spmhub push snoopy someone/spm-snoopy --out card", "upload it with these pictures, or new ones"),
    Example(
        "spmhub push snoopy someone/spm-snoopy --pictures pictures --pr",
        "use your pictures, open a pull request",
    ),
    interrupted="nothing was uploaded",
    panel="Share",
)
def push(
    out: Output,
    name: Annotated[
        str, typer.Argument(autocompletion=options.complete_name, help="The eraser: a name in a registry, or a file.")
    ],
    repo: Repo,
    *,
    private: Annotated[bool, typer.Option("--private", help="Create the repository as a private one.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to. Default: main.")] = None,
    pr: Annotated[bool, typer.Option("--pr", help="Open a pull request instead.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the card and the files; upload nothing.")] = False,
    pictures: Annotated[
        Path | None,
        typer.Option(help="Folder written by spmhub apply --compare. Default: draw new ones, if the base is here."),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option("--out", help="Folder to keep the drawn pictures in; those of an earlier run are used again."),
    ] = None,
    no_pictures: Annotated[bool, typer.Option("--no-pictures", help="Make a card without pictures.")] = False,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="Prompt to draw for the card; repeatable.")
    ] = None,
    registry: options.Registry = None,
    device: options.Device = "auto",
) -> None:
    """Share an eraser on the Hugging Face Hub, with a model card.

    It uses the login of `hf auth login` or the token in HF_TOKEN, and checks it first. Of an eraser of nudity and the
    like, no picture is published on which the eraser did not act.
    """
    from spm_hub.hub.resolve import resolve

    _check_pictures(pictures, no_pictures=no_pictures, drawn=bool(prompt), kept=to is not None)
    if pr and revision is not None:
        raise UsageError("--pr opens a pull request to the main branch, so --revision cannot be used with it")
    entry = resolve(name, registry, say=out.say)
    entry.read_manifest().concept.require_target(name)
    with tempfile.TemporaryDirectory() as staging, silence_libraries():
        from spm_hub.hub import push as hub_push
        from spm_hub.hub.card import is_explicit, read_pairs

        if dry_run:
            hub_push.check_repo(repo)
        else:
            hub_push.check_access(repo, private=private, pull_request=pr)
        manifest = entry.read_manifest()
        pairs: tuple[PicturePair, ...] = ()
        if pictures is not None:
            pairs = read_pairs(pictures, manifest.name, explicit=is_explicit(manifest.concept))
        elif not no_pictures:
            pairs = _pairs_for_card(out, entry, prompt, to or Path(staging) / "pictures", device)
        release = hub_push.prepare(entry, repo, pairs, Path(staging))
        files = release.listing()
        described: dict[str, Any] = {"repo": repo, "files": files, "card": release.card}
        if dry_run:
            _show(out, described)
            kept = f"; the pictures are in {to} and will be used again" if to is not None and pairs else ""
            out.say(f"nothing was uploaded; to upload, run it without --dry-run{kept}")
            return
        out.say(f"uploading {counted(len(files), 'file')} to {repo} ...")
        try:
            made = hub_push.push(release, private=private, revision=revision, pull_request=pr)
        except KeyboardInterrupt:
            raise InterruptedByUserError(
                f"interrupted during the upload; the Hub may have it all the same: look at {repo} there"
            ) from None
    address = made.pull_request or made.url
    out.data({**described, **asdict(made)}, f"{repo}@{made.commit}: {address}", brief=[address])
    out.say(f"others can download it with: spmhub pull {repo}")


def _check_pictures(pictures: Path | None, *, no_pictures: bool, drawn: bool, kept: bool) -> None:
    """Refuse options about the card's pictures that contradict each other. Raises UsageError."""
    if no_pictures and (pictures is not None or drawn):
        raise UsageError("--no-pictures cannot be combined with --pictures or --prompt")
    if no_pictures and kept:
        raise UsageError("--out is for the pictures, and there are none with --no-pictures")
    if pictures is not None and (kept or drawn):
        raise UsageError("--pictures takes the pictures as they are, so --out and --prompt cannot be used with it")


def _pairs_for_card(
    out: Output, entry: "EraserEntry", prompts: list[str] | None, folder: Path, device: str
) -> "tuple[PicturePair, ...]":
    """Return pairs for the card from `folder`, and draw them into it if they are not there yet.

    Pictures of another version of the eraser do not count. Returns none, with a remark, if its base model is not here.
    """
    from spm_hub.errors import NotFoundError
    from spm_hub.evaluation.pictures import DrawingOptions, save, show
    from spm_hub.hub.card import hub_id, is_explicit, read_pairs
    from spm_hub.models.aliases import ALIASES, Alias
    from spm_hub.models.loading import load_pipeline
    from spm_hub.models.references import is_available

    adapter = entry.load()
    concept, base = adapter.manifest.concept, adapter.manifest.base
    explicit, digest = is_explicit(concept), sha256_of(entry.adapter_path)
    wanted = prompts or _prompts_for_card(concept, explicit=explicit)

    def found() -> "list[PicturePair]":
        try:
            pairs = read_pairs(folder, adapter.name, explicit=explicit, sha256=digest)
        except NotFoundError:
            return []
        by_prompt = {pair.prompt: pair for pair in pairs}
        return [by_prompt[prompt] for prompt in wanted if prompt in by_prompt]

    kept = found()
    if len(kept) == len(wanted) or (explicit and kept):  # of these, some may not be fit to be shown
        out.say(f"using {counted(len(kept), 'drawing')} in {folder}")
        return tuple(kept)
    alias = ALIASES.get(base.id) or Alias(base.id, base.family, "", hub_id(base.id), base.revision)
    if not (alias.hub_id or alias.embedded) or not is_available(alias):
        out.say(f"no pictures: {base.id or 'its base model'} is not on this machine; use --pictures DIR")
        return ()
    drawing = DrawingOptions(seed=1)
    pipe = load_pipeline(base.id, device=device)
    with out.progress("drawing for the card") as progress:
        shown = show(pipe, [adapter], wanted, drawing, compare=not explicit, progress=progress)
    described = {"model": base.id, "adapters": [adapter.name], "sha256": digest}
    save(shown, folder, drawing, title=adapter.name, grid=False, described=described)
    if not (made := found()):
        out.say("no pictures: the eraser did not act on any of these prompts, and others are not published")
    return tuple(made)


def _prompts_for_card(concept: "Concept", *, explicit: bool) -> list[str]:
    target = concept.require_target()
    scene = f"a village by {target}" if concept.kind == "style" else f"{target} on the beach"
    neighbour = "a dog" if target != "dog" else "a cat"
    return [target, scene] if explicit else [target, scene, neighbour]


def _show(out: Output, described: dict[str, Any]) -> None:
    """Print the card's metadata, the card as the Hub renders it, and the files."""
    from rich.console import Group
    from rich.markdown import Markdown
    from rich.panel import Panel
    from rich.syntax import Syntax

    # What a stranger's manifest hides would pass through rich's Markdown.
    card = printable(described["card"], sys.stdout)
    front, _, body = card.removeprefix("---\n").partition("\n---\n")
    files = described["files"]
    rows = [[file["path"], size(file["bytes"]), file["bytes"], file["sha256"]] for file in files]
    out.data(
        described,
        Group(
            Panel(Syntax(front, "yaml", background_color="default", word_wrap=True), title="metadata"),
            Panel(Markdown(body, hyperlinks=False), title="README.md"),
            table(["file", "size", "bytes", "sha256"], rows, title=f"files for {described['repo']}"),
        ),
        brief=[f"{file['sha256']}  {file['path']}" for file in files],
    )


@command(
    "pull",
    Example("spmhub pull someone/spm-snoopy", "keep it in your registry, pinned to its newest commit"),
    Example("spmhub pull someone/spm-snoopy@v1 --name snoopy-v1", "pull a tag, branch or commit, and rename it"),
    Example("spmhub pull someone/a-lora --concept snoopy", "another program's file without a concept"),
    Example("spmhub pull", "pull the erasers of the lock file that the registry lacks"),
    interrupted="run it again, and the download goes on where it stopped",
    panel="Share",
)
def pull(
    out: Output,
    repo: Annotated[
        str | None,
        typer.Argument(metavar="USER/REPO[@REVISION]", help="A repository. Default: all in the registry's lock file."),
    ] = None,
    *,
    name: Annotated[str | None, typer.Option(help="Name to keep it under. Default: its own.")] = None,
    concept: Annotated[str | None, typer.Option("--concept", help="The concept, if its file names none.")] = None,
    registry: options.Registry = None,
    require_signature: options.RequireSignature = None,
    force: options.Force = False,
    yes: Annotated[bool, typer.Option("--yes", help="Download large files without a question.")] = False,
) -> None:
    """Download an eraser from the Hub into the registry, pinned to its commit.

    It asks before it downloads more than 512 MB, or than SPMHUB_LARGEST_DOWNLOAD says.
    """
    from spm_hub.registry.registry import HUB_REFERENCE, registry_for_new

    kept_in = registry_for_new(registry)
    match = None if repo is None else HUB_REFERENCE.fullmatch(hub_reference(repo))
    if repo is not None and match is None:
        raise UsageError(f"{repo!r} is not of the form USER/REPO or USER/REPO@REVISION", mend="spmhub search snoopy")
    if match is None and (name is not None or concept is not None or force):
        raise UsageError("--name, --concept and --force need a repository", mend="spmhub pull USER/REPO --name NAME")
    options.require_signature(require_signature)
    silence_hub()
    from spm_hub.hub import pull as hub_pull

    def run(largest: int | None) -> list["PullResult"]:
        with progress_if_long(out, "downloading", after=0.0) as progress:
            if match is None:
                return list(hub_pull.restore(kept_in, largest=largest, progress=progress))
            return [
                hub_pull.pull(
                    match["repo"], match["revision"], registry=kept_in, name=name, concept=concept, replace=force,
                    largest=largest, progress=progress,
                )
            ]  # fmt: skip

    pulled = run(MAX_BYTES) if yes else _asking_about_size(run)
    for one in pulled if require_signature is not None else ():
        one.entry.load()  # an unchanged eraser was not loaded by the pull, so check its signature now
    rows = [
        {"name": one.entry.name, "state": one.state, "changes": one.changes, "remarks": one.remarks,
         **one.origin.model_dump(), "adapter": one.entry.adapter_path, "manifest": one.entry.manifest_path}
        for one in pulled
    ]  # fmt: skip
    lines = [f"{one.entry.name} ({one.state}): {one.entry.describe_source()}" for one in pulled]
    for one in pulled:
        if one.changes:
            out.say(f"{one.entry.name} changed: {'; '.join(one.changes)}")
        for remark in one.remarks:
            out.say(f"warning: {one.entry.name}: {remark}")
    if not pulled:
        out.say(f"nothing to do: {kept_in.root} has all erasers of its lock file")
    out.data(rows, "\n".join(lines), brief=[str(one.entry.adapter_path) for one in pulled])
    for one in pulled:
        if one.entry.read_manifest().concept.target is None:
            out.say(
                f"warning: {one.entry.name} names no concept, so it acts fully on every prompt; to have a gate: "
                f"spmhub pull {one.origin.repo} --concept NAME"
            )


def _asking_about_size(run: "Callable[[int | None], list[PullResult]]") -> "list[PullResult]":
    """Pull, and ask in a terminal about files that are too large; elsewhere they are refused."""
    try:
        return run(None)
    except TooLargeError as error:
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise
        if not typer.confirm(f"{printable(error.message, sys.stderr)}. Download it?", err=True):
            raise
    return run(MAX_BYTES)


@command(
    "search",
    Example("spmhub search nudity", "find erasers of nudity on the Hub"),
    Example('spmhub search "van gogh" --base sd-v1-4 --method spm', "find those of one base model and method"),
    panel="Share",
)
def search(
    out: Output,
    query: Annotated[str, typer.Argument(help="Words in the concept or the repository's name.")] = "",
    *,
    base: Annotated[str | None, typer.Option(help="A family (sd1, sdxl ...), an alias, or owner/name.")] = None,
    method: Annotated[str | None, typer.Option(help="The training method: spm, esd-x, uce ...")] = None,
    author: Annotated[str | None, typer.Option(help="A user or organisation of the Hub.")] = None,
) -> None:
    """Search the Hub for erasers."""
    from spm_hub.hub.search import search as find

    silence_hub()
    show_results(out, find(query, base=base, method=method, author=author))


def show_results(out: Output, found: "tuple[SearchResult, ...]") -> None:
    """Print search results as a table."""
    columns = ("repo", "erases", "method", "base", "downloads", "likes", "updated")
    rows = [[one.repo, ", ".join(one.erases), *(getattr(one, key) for key in columns[2:])] for one in found]
    out.data([asdict(one) for one in found], table(columns, rows) if rows else "", brief=[one.repo for one in found])
    out.say(f"download one: spmhub pull {found[0].repo}" if found else "the Hub has no such eraser")


@command("outdated", Example("spmhub outdated", "list pulled erasers with a newer version on the Hub"), panel="Share")
def outdated(out: Output, *, registry: options.Registry = None) -> None:
    """Compare pulled erasers with their newest versions on the Hub."""
    from spm_hub.registry.registry import editable_registries

    silence_hub()
    from spm_hub.hub import pull as hub_pull

    rows = []
    for place in editable_registries(registry):
        for age in hub_pull.ages(place):
            row = {"name": age.name, "repo": age.pin.repo, "revision": age.pin.revision, "pinned": age.pin.commit}
            rows.append({**row, "newest": age.newest, "state": age.state, "registry": str(place.root)})
            if age.remark is not None:
                out.say(f"warning: {age.name}: {age.remark}")
    behind = [row for row in rows if row["state"] == "outdated"]
    columns = ("name", "repo", "revision", "pinned", "newest", "state")
    shown = [
        [*(str(row[key] or "")[:12] if key in ("pinned", "newest") else row[key] for key in columns)] for row in rows
    ]
    out.data(rows, table(columns, shown) if rows else "", brief=[str(row["name"]) for row in behind])
    if not rows:
        out.say("no eraser in your registries was pulled from the Hub")
    for row in behind:
        at = f"@{row['revision']}" if row["revision"] else ""
        out.say(f"update: spmhub pull {row['repo']}{at}")

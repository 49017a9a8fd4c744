"""Ctrl-C, full disks and empty places: what is said about them is true, and nothing is lost."""

from __future__ import annotations

import errno
import functools
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli import Spmhub, model, registry, spmhub

from spm_hub.cli import main
from spm_hub.registry.registry import Registry

__all__ = ["model", "registry", "spmhub"]  # fixtures


def test_a_run_that_stops_early_says_which_pictures_are_kept(
    spmhub: Spmhub, registry: Registry, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spm_hub.evaluation import pictures

    draw, left = pictures.draw, [3]

    def until(*arguments: object, error: BaseException, **options: object) -> object:
        left[0] -= 1
        if not left[0]:
            raise error
        return draw(*arguments, **options)

    arguments = (
        "apply",
        "-m",
        model,
        "-a",
        "snoopy",
        "-p",
        "a",
        "-p",
        "b",
        "--steps",
        1,
        "--compare",
        "--num",
        2,
        "--at-once",
        1,
    )
    for error, code, words in (
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device"),
    ):
        left[0], out = 4, tmp_path / type(error).__name__
        with monkeypatch.context() as patched:
            patched.setattr(pictures, "draw", functools.partial(until, error=error))
            stopped = spmhub(*arguments, "--out", out)
        assert (stopped.code, stopped.out) == (code, "")
        assert f"stopped early: 6 pictures of this run kept in {out}\n" in stopped.err
        assert words in stopped.err
        assert len(list(out.iterdir())) == 6, "two prompts without the eraser, and one with it"
        assert spmhub(*arguments, "--out", out, "-q").code == 0
        assert len(list(out.iterdir())) == 6 + 9


def test_ctrl_c_at_any_moment_has_no_traceback(
    spmhub: Spmhub, registry: Registry, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for command, where, left in (
        (("bake", "-a", "snoopy", "--out", "safe"), "spm_hub.hub.bake.bake", "nothing was written"),
        (("gates", "a", "-a", "snoopy", "-m", model), "spm_hub.models.loading.load_pipeline", "nothing was written"),
        (("convert", "snoopy", "--to", "kohya"), "spm_hub.hub.convert.convert", "nothing was written"),
        (("export", "snoopy", "--out", "a.tar"), "spm_hub.registry.archive.export", "nothing was written"),
        (("import", "a.tar"), "spm_hub.registry.archive.import_", "nothing was installed"),
        (("eval", "snoopy"), "spm_hub.evaluation.effect.measure", "nothing was recorded"),
        (("push", "snoopy", "a/b", "--dry-run"), "spm_hub.hub.push.prepare", "nothing was uploaded"),
        (("list",), "spm_hub.registry.registry.Registry.entries", "error: interrupted\n"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(where, stop)
            done = spmhub(*command)
        assert (done.code, left in done.err) == (130, True), done.err
        assert list(Path.cwd().iterdir()) == []
    monkeypatch.setattr("spm_hub.cli.app", stop)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == ""


def test_an_empty_registry_prints_no_empty_table(spmhub: Spmhub, registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    empty = spmhub("list", "--registry", tmp_path / "none")
    assert (empty.code, empty.out) == (0, "")
    assert "spmhub train" in empty.err
    unknown = spmhub("verify", "church", "--registry", tmp_path / "none")
    assert (unknown.code, "no eraser 'church'" in unknown.err) == (2, True)
    assert spmhub("outdated").out == ""


def test_one_is_a_picture_and_four_are_pictures(
    spmhub: Spmhub, registry: Registry, model: Path, tmp_path: Path
) -> None:
    arguments = ("apply", "-m", model, "-a", "snoopy", "-p", "a", "--steps", 1, "--out", tmp_path)
    assert f"\n1 picture in {tmp_path}\n" in spmhub(*arguments).err
    many = spmhub(*arguments, "--num", 2, "--compare")
    assert f"\n4 pictures in {tmp_path}; side by side: {tmp_path / 'grid.png'}\n" in many.err
    assert "downloading" not in many.err


INTERRUPTED_IMPORT = """
import sys
module = sys.argv.pop(1)
class CtrlC:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            raise KeyboardInterrupt
sys.meta_path.insert(0, CtrlC())
from spm_hub.cli import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("module", ["typer", "spm_hub.cli.hub", "spm_hub.hub.resolve", "torch", "diffusers"])
def test_ctrl_c_while_a_process_starts_has_no_traceback(module: str, registry: Registry) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_IMPORT, module, "apply", "-a", "snoopy", "-p", "x"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert "Traceback" not in done.stderr
    assert list(Path.cwd().iterdir()) == []

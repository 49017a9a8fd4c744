"""spmhub ui: a page in the browser to draw, train and compare."""

import signal
import threading
from contextlib import suppress
from typing import Annotated

import typer

from spm_hub.cli import options
from spm_hub.cli.app import Example, command
from spm_hub.cli.opening import check_installed
from spm_hub.cli.output import Output, silence_libraries
from spm_hub.errors import UsageError

_MOST_STEPS = 100
_LONGEST_PROMPT = 500
_ANY_SIDE = 2**16

Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        "-m",
        help="Base model to choose on the page, as in spmhub apply; repeatable. Default: both sketchbooks.",
        show_default=False,
    ),
]
Open = Annotated[bool, typer.Option("--open", help="Open the page in the browser of this machine.")]


@command(
    "ui",
    Example("spmhub ui --open", "draw, train and compare in the browser, on the sketchbook"),
    Example("spmhub ui --model sd-v1-4 --device cuda --port 8080", "on Stable Diffusion"),
    panel="Use",
)
def ui(
    out: Output,
    *,
    model: Models = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 chooses a free one.")] = 7860,
    opened: Open = False,
    steps: Annotated[int, typer.Option(min=1, max=_MOST_STEPS, help="Denoising steps by default.")] = 25,
    hub: Annotated[bool, typer.Option("--hub/--no-hub", help="Search the Hub from the page.")] = True,
    registry: options.Registry = None,
    device: options.Device = "auto",
    dtype: options.Precision = "auto",
) -> None:
    """Open a page in the browser: draw without and with erasers, train one, read reports, compare.

    Several visitors share one pipeline, whose pictures wait for their turn. SIGTERM and Ctrl-C end it. It needs the
    extra: pip install "spm-hub[ui]".
    """
    check_installed("ui", "gradio")
    with silence_libraries():
        from spm_hub.models.base_choice import BaseChoice
        from spm_hub.page.layout import Page, free_port, launch_options
        from spm_hub.page.lessons import School
        from spm_hub.page.studio import Studio
        from spm_hub.registry.registry import registries
        from spm_hub.serving.requests import Limits

        registries(registry)  # a folder that is not there is an error now, not at the first click
        bases = {name: BaseChoice(name, None, device, dtype) for name in model or ("sketchbook", "sketchbook-chalk")}
        for base in bases.values():
            if remark := base.check():
                out.say(remark)
        studio = Studio(bases, Limits(_ANY_SIDE, steps=_MOST_STEPS, prompt=_LONGEST_PROMPT), registry=registry)
        blocks = Page(studio, School(studio), steps=steps, hub=hub).make()
        try:
            _, url, _ = blocks.launch(
                server_name=host, server_port=port or free_port(host), inbrowser=opened, prevent_thread_lock=True,
                quiet=True, **launch_options(),
            )  # fmt: skip
        except OSError as error:
            raise UsageError(f"cannot listen on {host}:{port}: {error}", mend=f"--port {port % 65535 + 1}") from error
        out.data({"url": url}, f"the page is at {url}", brief=[url])
        out.say("Ctrl-C ends it")
        # A process that a container starts ignores SIGTERM unless it says otherwise.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            with suppress(KeyboardInterrupt):
                threading.Event().wait()
            out.say("finishing the pictures in progress ...")
        finally:
            blocks.close(verbose=False)
            studio.close()

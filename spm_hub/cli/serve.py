"""spmhub serve: draw for other programs over HTTP, with erasers that change while it runs."""

import os
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any

import typer

from spm_hub.cli import options
from spm_hub.cli.app import Example, command
from spm_hub.cli.opening import attached, check_installed
from spm_hub.cli.output import Output, silence_libraries
from spm_hub.errors import UsageError

API_KEY_VARIABLE = "SPMHUB_API_KEY"
_LONGEST_KEY = 4096


Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0 chooses a free one.")]
KeyFile = Annotated[
    Path | None,
    typer.Option(
        "--api-key-file",
        help=f"A file with the key that clients send as a bearer token. Default: ${API_KEY_VARIABLE}, else no key.",
        show_default=False,
    ),
]
Required = Annotated[
    list[str] | None,
    typer.Option(
        "--required",
        metavar="NAMES",
        help="Attached erasers that no request leaves out or weakens; repeatable.",
        show_default=False,
    ),
]
Together = Annotated[
    int, typer.Option(min=1, help="Most pictures of one batch. More than 1 changes the rounding of some pixels.")
]
Patience = Annotated[int, typer.Option(min=0, help="Milliseconds that a picture waits for others to join it.")]
Side = Annotated[
    int | None,
    typer.Option("--max-side", min=8, help="Longest side of a picture. Default: the model's own.", show_default=False),
]


@command(
    "serve",
    Example("spmhub serve -a snoopy,mickey", "an OpenAI-style server at http://127.0.0.1:8000"),
    Example("spmhub serve -a nudity --required nudity --api-key-file key.txt", "no request can leave nudity out"),
    Example("spmhub serve -a snoopy --together 1", "every picture bit for bit as the pipeline alone draws it"),
    panel="Use",
)
def serve(
    out: Output,
    *,
    adapters: Annotated[list[str] | None, options.ADAPTERS] = None,
    model: options.Model = "sketchbook",
    config: options.Config = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all of this machine's.")] = "127.0.0.1",
    port: Port = 8000,
    api_key_file: KeyFile = None,
    required: Required = None,
    together: Together = 8,
    patience: Patience = 10,
    queue: Annotated[int, typer.Option(min=1, help="Pictures that may wait; more get the answer 429.")] = 256,
    steps: Annotated[int | None, typer.Option(help="Denoising steps by default. Default: the pipeline's.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale by default. Default: the pipeline's.")] = None,
    max_steps: Annotated[int, typer.Option(min=1, help="Most denoising steps of a request.")] = 100,
    max_pictures: Annotated[int, typer.Option(min=1, help="Most pictures of a request.")] = 8,
    max_prompt: Annotated[int, typer.Option(min=1, help="Most characters of a prompt.")] = 2000,
    max_side: Side = None,
    gate: options.Gate = None,
    strength: options.Strength = None,
    registry: options.Registry = None,
    pull: options.Pull = False,
    require_signature: options.RequireSignature = None,
    force: options.ForceAttach = False,
    device: options.Device = "auto",
    dtype: options.Precision = "auto",
) -> None:
    """Draw for other programs over HTTP.

    POST /v1/images/generations takes what OpenAI's clients send, and each request may name the erasers that act.
    SIGTERM and Ctrl-C finish the requests that were begun. It needs the extra: pip install "spm-hub[serve]".
    """
    check_installed("serve", "fastapi", "uvicorn")
    options.require_signature(require_signature)
    key, always = _key(api_key_file), options.names(required or [], "--required")
    with silence_libraries():
        from spm_hub.models.base_choice import BaseChoice
        from spm_hub.serving import server
        from spm_hub.serving.service import Service

        base = BaseChoice(model, config, device, dtype)
        with (
            server.listening(host, port) as listener,
            attached(
                out, base, adapters, registry, pull=pull, gate=gate, strength=strength, force=force, required=always
            ) as opened,
        ):
            limits = max_side or opened.side, max_pictures, max_steps, max_prompt
            service = Service(
                opened.pipe, opened.erasers, opened.adapters, opened.menu(limits, steps, guidance),
                registry=registry, together=together, patience=patience / 1000, most_waiting=queue,
            )  # fmt: skip
            listener.listen(server.BACKLOG)  # from here on a client that connects waits, and is not refused
            _announce(out, listener.getsockname(), opened.model, opened.erasers.names, protected=key is not None)
            server.run(service, listener, key=key, say=out.say)
    out.say("stopped: every request that was begun is answered")


def _announce(out: Output, address: Sequence[Any], model: str, names: Sequence[str], *, protected: bool) -> None:
    """Say where the server listens, and which erasers are attached."""
    host, port = str(address[0]), int(address[1])
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    out.data({"url": url, "model": model, "erasers": list(names)}, f"serving {model} at {url}", brief=[url])
    out.say(f"erasers: {', '.join(names) or 'none'}; Ctrl-C ends it")
    if not protected and not ip_address(host).is_loopback:
        out.say(f"warning: anybody who reaches {url} can draw and change erasers: --api-key-file FILE asks for a key")


def _key(file: Path | None) -> str | None:
    """Return the key of clients. Raises UsageError for a file without one."""
    if file is None:
        return os.environ.get(API_KEY_VARIABLE) or None
    try:
        with file.open(encoding="utf-8") as opened:
            key = opened.read(_LONGEST_KEY).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--api-key-file {file} cannot be read: {error}", mend="a text file with the key") from error
    if not key or not key.isascii() or len(key.split()) != 1:
        raise UsageError(f"--api-key-file {file} holds no key", mend="one word of ASCII letters, digits and signs")
    return key

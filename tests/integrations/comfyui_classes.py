"""ComfyUI for tests: a checkout that SPMHUB_COMFYUI names, its server, or stand-ins for what the nodes use of it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import time
import types
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch

ROOT = Path(__file__).resolve().parents[2]
NODES = ROOT / "integrations" / "comfyui"
CHECKOUT = os.environ.get("SPMHUB_COMFYUI", "")
MISSING = "SPMHUB_COMFYUI names no checkout of ComfyUI whose requirements this Python has"

Graph = dict[str, dict[str, Any]]


def load_package(folder: Path, name: str) -> Any:
    """Import a folder as a package of this name, as ComfyUI imports a custom node."""
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def real_comfyui() -> None:
    """Put ComfyUI's own modules on the path, for a CPU, in place of stand-ins that other tests used before."""
    for name, module in list(sys.modules.items()):
        ours = name.partition(".")[0] in ("comfy", "comfy_api", "folder_paths", "server")
        if ours and not hasattr(module, "__path__") and getattr(module, "__file__", None) is None:
            del sys.modules[name]
    sys.path.insert(0, CHECKOUT)
    from comfy.cli_args import args

    args.cpu = True


class Server:
    """ComfyUI's server on a free port of the loopback, with our nodes and the test model."""

    def __init__(self, folder: Path) -> None:
        for name in ("models/checkpoints", "models/spm_erasers", "custom_nodes", "input", "output", "temp", "user"):
            (folder / name).mkdir(parents=True)
        (folder / "custom_nodes" / "spm-hub").symlink_to(NODES)
        (folder / "custom_nodes" / "spm-tests").symlink_to(Path(__file__).parent / "comfyui_sketchbook")
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "log"
        with self.log.open("wb") as log:
            options = {"--base-directory": folder, "--database-url": "sqlite:///:memory:", "--port": port}
            given = [str(part) for option in options.items() for part in option]
            path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
            self.process = subprocess.Popen(
                [sys.executable, str(Path(CHECKOUT) / "main.py"), "--cpu", "--disable-api-nodes", *given],
                cwd=ROOT, stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": path, "SPMHUB_REGISTRY": str(ROOT)},
            )  # fmt: skip

    def wait(self, seconds: float = 600) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()
            try:
                urllib.request.urlopen(f"{self.url}/queue").close()
                return
            except OSError:
                time.sleep(0.3)
        raise TimeoutError(self.log.read_text())

    def ask(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path) as answer:
            return json.load(answer)

    def run(self, graph: Graph) -> dict[str, Any]:
        """Return what the history says of a graph that was run to its end."""
        data = json.dumps({"prompt": graph}).encode()
        request = urllib.request.Request(f"{self.url}/prompt", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request) as answer:
                number = json.load(answer)["prompt_id"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error
        end = time.monotonic() + 600
        while time.monotonic() < end:
            if number in (history := self.ask(f"/history/{number}")):
                found: dict[str, Any] = history[number]
                return found
            time.sleep(0.1)
        raise TimeoutError(self.log.read_text())

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)


class Hook:
    """As `comfy.hooks.WeightHook`, what the nodes read and call of it."""

    def __init__(self, strength_model: float = 1.0, strength_clip: float = 1.0) -> None:
        self.strength_model, self.strength_clip, self.weights = strength_model, strength_clip, None

    def clone(self) -> Any:
        copy = type(self)()
        copy.strength_model, copy.weights = self.strength_model, self.weights
        return copy

    def add_hook_patches(self, model: Any, model_options: Any, target_dict: Any, registered: Any) -> bool:
        model.patched.append(self)
        return True


class HookGroup:
    """As `comfy.hooks.HookGroup`."""

    def __init__(self) -> None:
        self.hooks: list[Any] = []

    def add(self, hook: Any) -> None:
        self.hooks.append(hook)


def set_hooks(conditioning: Any, hooks: Any) -> Any:
    return [[states, {**extra, "hooks": hooks}] for states, extra in conditioning]


def token_weights(text: str, weight: float) -> list[tuple[str, float]]:
    """As ComfyUI's, for weights that are not nested."""
    parts = re.split(r"\((.*?):([\d.]+)\)", text)
    return [(part, weight) for index, part in enumerate(parts) if index % 3 < 2 and part]


@contextmanager
def stand_ins(models: Path) -> Iterator[Any]:
    """Import the nodes where there is no ComfyUI: its modules are replaced by what they use of it."""
    hooks = {
        "WeightHook": Hook,
        "HookGroup": HookGroup,
        "EnumWeightTarget": types.SimpleNamespace(Clip="clip"),
        "set_hooks_for_conditioning": set_hooks,
    }
    text = {
        "token_weights": token_weights,
        "escape_important": lambda text: text.replace("\\(", "\1").replace("\\)", "\2"),
        "unescape_important": lambda text: text.replace("\1", "(").replace("\2", ")"),
    }
    replaced: dict[str, Mapping[str, Any]] = {
        "comfy": {},
        "comfy.hooks": hooks,
        "comfy.lora": {
            "model_lora_keys_unet": lambda model, known: model.keys,
            "calculate_weight": lambda patches, weight, key: weight + sum(patches),
        },
        "comfy.sd1_clip": text,
        "comfy.model_management": {"throw_exception_if_processing_interrupted": lambda: None},
        "comfy.utils": {
            "ProgressBar": lambda total: types.SimpleNamespace(update_absolute=lambda done, total: None),
            "unet_to_diffusers": lambda config: config["places"],
        },
        "comfy_api": {},
        "server": {"PromptServer": PromptServer},
        "comfy_api.latest": {"ComfyExtension": object, "io": _Io(), "ui": None},
        "folder_paths": {
            "models_dir": str(models),
            "add_model_folder_path": lambda name, path: None,
            "get_filename_list": lambda name: sorted(path.name for path in models.glob("*.safetensors")),
            "get_full_path": lambda name, file: str(models / file) if (models / file).is_file() else None,
        },
    }
    before = {name: sys.modules.get(name) for name in replaced}
    for name, content in replaced.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        sys.modules[name] = module
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)
    try:
        yield load_package(NODES, "comfyui_with_stand_ins")
    finally:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module


class PromptServer:
    """As ComfyUI's, what the nodes send to its page."""

    instance: Any
    said: ClassVar[list[tuple[str, str]]] = []

    def send_progress_text(self, text: str, node: str) -> None:
        self.said.append((node, text))


PromptServer.instance = PromptServer()


class _Io:
    """As `comfy_api.latest.io`: types whose inputs and outputs keep what they were made with."""

    class ComfyNode:
        hidden = types.SimpleNamespace(unique_id="7")

    class NodeOutput:
        def __init__(self, *args: Any, ui: Any = None) -> None:
            self.args, self.ui = args, ui

    def Custom(self, name: str) -> Any:  # noqa: N802 (ComfyUI's name)
        return _Type()

    def Schema(self, **given: Any) -> Any:  # noqa: N802
        return types.SimpleNamespace(**given)

    def __getattr__(self, name: str) -> Any:
        return _Type()


class _Type:
    unique_id = "unique_id"

    def Input(self, id: str, **given: Any) -> Any:  # noqa: A002, N802
        return types.SimpleNamespace(id=id, **given)

    Output = Input


class Clip:
    """A CLIP that encodes each window of words into numbers of its letters: (1, windows * 4, 3)."""

    def __init__(self, name: str = "l", window: int = 4) -> None:
        self._name, self._window, self.calls = name, window, 0
        self.cond_stage_model = torch.nn.Linear(1, 1)
        self.tokenizer = types.SimpleNamespace(clip=types.SimpleNamespace(tokenizer=None))
        self.layer_idx, self.tokenizer_options = None, {}
        self.patcher = types.SimpleNamespace(patches_uuid="1")

    def tokenize(self, text: str) -> dict[str, list[list[tuple[str, float]]]]:
        words = text.replace("\\(", "(").replace("\\)", ")").split()
        length = self._window * max(1, -(-len(words) // self._window))
        words += [""] * (length - len(words))
        return {
            self._name: [
                [(word, 1.0) for word in words[at : at + self._window]] for at in range(0, length, self._window)
            ]
        }

    def encode_from_tokens(self, tokens: Any) -> torch.Tensor:
        self.calls += 1
        words = [word for chunk in tokens[self._name] for word, _ in chunk]
        each = [[len(word), sum(map(ord, word)) % 97, ord(word[:1] or " ") % 13] for word in words]
        return torch.tensor([each], dtype=torch.float32) + 1

    def encode_from_tokens_scheduled(self, tokens: Any) -> Any:
        return [[self.encode_from_tokens(tokens), {}]]

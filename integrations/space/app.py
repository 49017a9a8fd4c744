"""The page of `spmhub ui` as a Space: the sketchbook on a CPU, erasers of visitors in a temporary folder."""

import os
import tempfile
from pathlib import Path

from spm_hub.models.base_choice import BaseChoice
from spm_hub.page.layout import Page, launch_options
from spm_hub.page.lessons import School
from spm_hub.page.studio import Studio
from spm_hub.serving.requests import Limits

registry = Path(tempfile.mkdtemp(prefix="erasers-"))
for part in ("adapters", "manifests"):
    (registry / part).mkdir()
bases = {name: BaseChoice(name, device="cpu") for name in ("sketchbook", "sketchbook-chalk")}
studio = Studio(bases, Limits(side=64, steps=50, prompt=300), registry=registry)
demo = Page(studio, School(studio), hub=False).make()

if __name__ == "__main__":
    # A Space sets the port; on a machine of your own it is Gradio's.
    port = int(os.environ.get("GRADIO_SERVER_PORT", "7860"))
    demo.launch(server_name=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), server_port=port, **launch_options())

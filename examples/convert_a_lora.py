"""Convert another program's LoRA into an eraser, and an eraser into a LoRA that diffusers loads.

python examples/convert_a_lora.py            # in the repository, which has the erasers
"""

from pathlib import Path

import spm_hub

folder = Path("converted")
folder.mkdir(exist_ok=True)

# A file as kohya's scripts write it; any LoRA from elsewhere will do.
lora = spm_hub.convert("snoopy", to="kohya", out=folder / "some-lora.safetensors", replace=True)
eraser = spm_hub.convert(lora.files[0], concept="snoopy").adapter
print("read", lora.files[0], "as", eraser)

# And back: diffusers loads it, at full strength, without spm-hub.
spm_hub.convert(eraser, to="diffusers", out=folder / "pytorch_lora_weights.safetensors", replace=True)
pipe = spm_hub.load_pipeline("sketchbook")
pipe.load_lora_weights(str(folder))
pipe("snoopy on the beach").images[0].save(folder / "by-diffusers.png")

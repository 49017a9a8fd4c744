"""Convert another program's LoRA into an eraser, and an eraser into a LoRA that diffusers loads.

python examples/convert_a_lora.py            # in the repository, which has the erasers
"""

from pathlib import Path

import spm_hub

folder = Path("converted")
folder.mkdir(exist_ok=True)

# A LoRA as PEFT writes it; one from kohya's scripts, LyCORIS, diffusers or Civitai will do as well.
lora = folder / "some-lora"
spm_hub.convert("snoopy", to="peft", out=lora, replace=True)
read = spm_hub.convert(lora, name="from-a-lora", concept="snoopy", keep=True, registry=folder, replace=True)
print(f"{lora} is of the format {read.read_as}, and now kept as {read.files[0]}")

# And back: diffusers loads it, at full strength, without spm-hub.
spm_hub.convert(read.files[0], to="diffusers", out=folder / "pytorch_lora_weights.safetensors", replace=True)
pipe = spm_hub.load_pipeline("sketchbook")
pipe.load_lora_weights(str(folder))
pipe("snoopy on the beach").images[0].save(folder / "by-diffusers.png")

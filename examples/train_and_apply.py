"""Train an eraser, keep it in a registry, and draw with and without it.

python examples/train_and_apply.py            # one to two minutes on two cores
"""

from pathlib import Path

import spm_hub

registry = Path("my-erasers")
registry.mkdir(exist_ok=True)
pipe = spm_hub.load_pipeline("sketchbook")

# Ctrl-C is safe: the same call goes on where it stopped, and ends with the identical file.
church = spm_hub.train("church", pipe=pipe, registry=registry, replace=True, resume=True)
print(church)

prompts = ["a church in a meadow", "a dog"]
drawn = spm_hub.apply(church, prompts, pipe=pipe, seed=1, out="pictures")
for prompt, gammas in zip(prompts, drawn.gammas, strict=True):
    print(prompt, dict(gammas))
print("side by side:", drawn.files["grid"][0])

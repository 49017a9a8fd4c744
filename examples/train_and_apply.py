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

shown = spm_hub.apply(church, ["a church in a meadow", "a dog"], pipe=pipe, seed=1)
for number, one in enumerate(shown):
    print(one.prompt, dict(one.gates))
    for condition, pictures in one.pictures.items():  # "without" and "with"
        pictures[0].save(f"{number}-{condition}.png")

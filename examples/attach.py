"""Attach two erasers to a diffusers pipeline, look at the gate, draw, and take them off again.

python examples/attach.py            # in the repository, which has the erasers
"""

import torch

import spm_hub

pipe = spm_hub.load_pipeline("sketchbook")  # or StableDiffusionPipeline.from_pretrained(...)
before = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}

with spm_hub.attach(pipe, ["snoopy", "van gogh"]) as erasers:
    erasers.strength["van gogh"] = 1.5  # acts from the next step of the denoiser on
    for prompt in ("snoopy in a meadow", "a tree by van gogh", "a dog at the beach"):
        gammas = ", ".join(f"{name} {gamma:.2f}" for name, gamma in erasers.gates(prompt).items())
        print(f"{prompt}: {gammas}")
        picture = pipe(prompt, generator=torch.Generator().manual_seed(1)).images[0]
        picture.save(f"{prompt.replace(' ', '-')}.png")

after = pipe.unet.state_dict()
print("every weight is what it was:", all(torch.equal(after[name], weight) for name, weight in before.items()))

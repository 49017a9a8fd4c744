"""Compose several erasers, recover one of them, and show that the order never matters.

python examples/compose_and_recover.py            # in the repository, which has the erasers
"""

import numpy as np
import torch

import spm_hub

pipe = spm_hub.load_pipeline("sketchbook")


def draw(prompt: str) -> np.ndarray:
    return pipe(prompt, generator=torch.Generator().manual_seed(1), output_type="np").images[0]


without = draw("mickey in town")

with spm_hub.attach(pipe, ["snoopy", "mickey", "spongebob"]) as erasers:
    with_three = draw("mickey in town")
    erasers.recover("mickey")  # mickey is back; the other two stay
    with_two = draw("mickey in town")
    print(f"attached: {', '.join(erasers.names)}")

with spm_hub.attach(pipe, ["spongebob", "snoopy"]):
    never_had_mickey = draw("mickey in town")

print("three erasers change the picture:", not np.array_equal(with_three, without))
print("recovering is exact:", np.array_equal(with_two, never_had_mickey))
print("so is detaching:", np.array_equal(draw("mickey in town"), without))

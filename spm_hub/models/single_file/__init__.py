"""Single-file checkpoints, as Civitai and others pass them around: all weights in one safetensors file.

The file's header tells which family it is of (`inspection`). What the weights alone cannot tell (the layers' settings,
the noise schedule, the tokenizer's vocabulary) comes from a diffusers folder of the same family (`loading`).
"""

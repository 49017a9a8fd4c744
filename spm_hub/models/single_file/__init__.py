"""Single-file checkpoints, as Civitai and others distribute them: one safetensors file.

The file's header determines its family (`inspection`). What weights do not contain (the layers' settings, the noise
schedule, the tokenizer's vocabulary) comes from a diffusers folder of the same family (`loading`).
"""

"""How adapters lie in files: the safetensors container, and one module per layout of keys inside it."""

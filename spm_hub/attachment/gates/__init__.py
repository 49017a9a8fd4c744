"""Gates: how strongly each eraser acts on each prompt."""

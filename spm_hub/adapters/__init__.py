"""What an eraser is, its arithmetic, and how it is stored in files."""

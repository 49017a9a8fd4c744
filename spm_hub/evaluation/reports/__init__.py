"""Reports of a run, computed from its records alone: JSON, Markdown, one HTML page, and comparisons."""

"""Base models: their names, their files, and the modules of their denoisers."""

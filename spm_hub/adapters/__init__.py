"""Erasers as data: their arithmetic, their manifests, and the files that hold them."""

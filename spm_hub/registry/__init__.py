"""Registries: folders of erasers with their manifests, lock file and signatures."""

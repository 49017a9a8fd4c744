"""A registry: a folder of erasers with their manifests, lock file and signatures."""

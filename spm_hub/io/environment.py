"""The environment variables that are read, by name: a light module, as the command line names them in its help."""

REGISTRY_VARIABLE = "SPMHUB_REGISTRY"
"""Names a registry where no --registry is given; empty for none."""

KEY_VARIABLE = "SPMHUB_REQUIRE_SIGNATURE"
"""A public key; no eraser is then used that its holder has not signed; empty for none."""

OWNER_VARIABLE = "SPMHUB_OWNER"
"""Whose repositories a bare name means that no registry knows; empty for nobody's."""

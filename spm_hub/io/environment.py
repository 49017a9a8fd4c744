"""The names of the environment variables; the module is light, as the command line's help imports it."""

REGISTRY_VARIABLE = "SPMHUB_REGISTRY"
"""Names a registry where no --registry is given; empty for none."""

KEY_VARIABLE = "SPMHUB_REQUIRE_SIGNATURE"
"""A public key; no eraser is then used that its holder has not signed; empty for none."""

OWNER_VARIABLE = "SPMHUB_OWNER"
"""Whose repositories a bare name means that no registry knows; empty for nobody's."""

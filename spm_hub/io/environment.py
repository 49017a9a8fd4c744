"""The names of the environment variables; the module is light, as the command line's help imports it."""

REGISTRY_VARIABLE = "SPMHUB_REGISTRY"
"""The registry to use if no --registry is given; empty for none."""

KEY_VARIABLE = "SPMHUB_REQUIRE_SIGNATURE"
"""A public key: only erasers signed with its private key are used; empty for no check."""

OWNER_VARIABLE = "SPMHUB_OWNER"
"""The Hub user whose repositories are asked for a name that no registry has; empty for none."""

SIZE_VARIABLE = "SPMHUB_LARGEST_DOWNLOAD"
"""Megabytes (2**20 bytes) of the largest eraser that is downloaded without a question."""

"""The attacks, one file each: how each of them searches for tries."""

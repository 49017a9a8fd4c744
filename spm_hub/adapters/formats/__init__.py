"""The file formats of adapters, one module each, and the library that they share."""

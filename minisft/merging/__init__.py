"""Adapters into weights file by file, the certificate of a merge, several adapters in one, and exports for other programs."""

"""Adapters into weights file by file, the certificate of a merge, and several adapters in one."""

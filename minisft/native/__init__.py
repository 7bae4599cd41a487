"""A decoding step in native code, walked through a model; the readable model stays the reference."""

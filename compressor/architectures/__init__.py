"""Network definitions; `build.py` holds the one mapping from name to builder."""

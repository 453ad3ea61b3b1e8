"""Whether an evaluation may be believed: `validity.py` asks all checks in order."""

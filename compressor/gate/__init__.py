"""The gate: `gate.py` judges a report by a policy. Nothing here needs torch."""

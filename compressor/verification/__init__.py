"""Attacking images chunk by chunk: `verification.py` is the loop, `request.py` what is asked."""

"""Latency, memory and size of a run's files, measured side by side."""

"""What runs on the device: build engines, run them, replay golden images.

Copied as a whole into build kits, so it needs only the standard library, numpy and an inference
runtime, speaks Python 3.10, and imports nothing else of robust-compress, not even by full name.
"""

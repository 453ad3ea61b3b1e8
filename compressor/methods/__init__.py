"""Training methods: `protocol.py` says what one is, `build.py` which one a recipe means."""

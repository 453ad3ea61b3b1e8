"""Turn a finished student into a file, and prove that the file is the same model."""

"""Several methods under one protocol: plan, runs, statistics, tables."""

"""Sweeps of thousands of runs: run once, kept in a database, asked about later."""

"""Benchmarks: each prints a table and JSON, and compares in the same run."""

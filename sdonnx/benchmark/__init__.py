"""Benchmarks: each measurement in a process of its own."""

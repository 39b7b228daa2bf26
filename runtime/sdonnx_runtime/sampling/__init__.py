"""Samplers, noise schedules and noise."""

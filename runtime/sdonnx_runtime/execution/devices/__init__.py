"""Devices: the table of them, their adapters, how sessions are opened on them, and which nodes they run."""

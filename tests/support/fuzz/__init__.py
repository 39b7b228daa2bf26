"""A fuzzer for each parser of untrusted input: ``python -m support.fuzz``, in ``tests``."""

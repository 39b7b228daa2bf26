"""Packages: the manifest, the files, and packages that optimum exported."""

"""Tests that drive the page; a package, as one browser serves all of them."""

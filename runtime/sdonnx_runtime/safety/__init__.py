"""Safety checkers: which one there is for a package, what it says of images, and what is done with flagged ones."""

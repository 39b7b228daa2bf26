"""How sessions run: the thread of each, and what stays in the memory of a device between runs."""

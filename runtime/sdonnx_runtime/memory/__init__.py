"""Memory budgets: predict what a request takes and choose how to run it."""

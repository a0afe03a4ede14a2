"""The coordinator: which groups live, what they hold, and the placement table that follows from it."""

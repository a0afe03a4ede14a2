"""The embedded model, its card, its held-out text, and how it was made."""

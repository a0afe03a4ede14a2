"""The engine: which sequences share a step, sampling, text, and the thread that does it."""

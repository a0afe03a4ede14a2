"""Which group holds which expert: pure functions, no Ray, no torch."""

"""What shows the promises: verification against transformers, and the demonstration."""

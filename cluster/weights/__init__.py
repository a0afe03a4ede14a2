"""Checkpoints: reading slices, dequantisation, which parameter a tensor belongs to, and the zoo of small models."""

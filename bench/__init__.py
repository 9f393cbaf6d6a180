"""Measurements: speed against a baseline and under load. Nothing here is imported elsewhere."""

"""Measurements at the true shapes of a model, on weights made in memory."""

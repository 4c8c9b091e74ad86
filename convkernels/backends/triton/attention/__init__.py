"""Composite attention."""

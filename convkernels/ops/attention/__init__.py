"""Attention with learnable relative terms, in one operator and its gradient."""

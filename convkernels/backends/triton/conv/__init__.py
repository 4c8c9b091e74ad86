"""The convolutions."""

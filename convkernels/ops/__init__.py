"""Operators: each in its own package, registered from one record (``_spec.py``)."""

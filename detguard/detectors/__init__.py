"""Detectors, one file per family behind the interface in base.py."""

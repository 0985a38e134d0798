"""Detectors as files of other runtimes, one file per format behind the interface in base.py."""

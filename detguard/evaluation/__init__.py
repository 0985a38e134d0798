"""Judging detectors in the numbers that the field accepts."""

"""Attacks on detectors: the group loop, its budget and its update rules."""

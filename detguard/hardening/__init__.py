"""Hardening: experts, their gate, and their training against attacks that know them."""

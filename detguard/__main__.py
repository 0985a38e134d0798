"""`python -m detguard`."""

from detguard.cli import main

main()

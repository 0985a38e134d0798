"""`python -m detguard.cli`."""

from detguard.cli import main

main()

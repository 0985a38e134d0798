"""What the commands do, as functions: for programs that use detguard, and for the command line itself."""

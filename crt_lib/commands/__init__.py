"""The command line's larger parts."""

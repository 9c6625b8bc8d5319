"""The HTTP server: the protocols that clients speak, in front of one scheduler."""

"""How each format's codes are read inside a kernel."""

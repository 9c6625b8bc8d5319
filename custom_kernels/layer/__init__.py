"""What else a layer launches: the router and the hyper-connection."""

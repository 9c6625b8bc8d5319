"""Every kernel beside its reference: what tests, the self-check and benchmarks compare."""

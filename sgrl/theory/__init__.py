"""Numbers of the theory: estimation errors, the expert network, and the probe."""

"""Fast ways to compute layers of slot neurons; `backends` chooses among them."""

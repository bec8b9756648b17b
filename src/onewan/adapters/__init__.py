"""Which layers or weights of a transformer train, and the adapters on them."""

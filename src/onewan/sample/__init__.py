"""Videos from a model: what training shows along the way, and what `onewan sample` makes."""

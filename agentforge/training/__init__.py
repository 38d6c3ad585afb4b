"""Training: straight-through layers, an optimizer, and recovery of a compressed model by distillation."""

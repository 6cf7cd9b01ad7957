"""Tensors in, tensors out: similarity, linear maps, metrics and resampling statistics."""

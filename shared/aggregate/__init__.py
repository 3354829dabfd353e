"""Quantization, lanes and the sums that every tier adds."""

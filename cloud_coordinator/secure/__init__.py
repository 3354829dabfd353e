"""Split mode at the coordinator: seal secrets, mask seeds, unmasking, and the helper that holds the other seeds."""

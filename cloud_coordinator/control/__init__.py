"""Commands of operators: the handler in the coordinator, and the client of whoever sends them."""

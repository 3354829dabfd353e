"""From verified partials to the next version of the model."""

"""What every role imports; imports no role."""

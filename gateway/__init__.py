"""The regional gateway: adds the updates of its site into one partial."""

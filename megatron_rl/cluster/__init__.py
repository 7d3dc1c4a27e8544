"""The only room besides the loop that knows Ray: processes, their placement, and calls to all of them at once."""

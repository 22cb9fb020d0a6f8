"""The demo (`make demo`) and the servers of the tutorial (`make playground`)."""

"""What goes wrong while training: guards, checks, the watch, stragglers, injected faults."""

"""Energy of events in gates, and of whole training steps."""

"""What trains: a session, its step, and what a run leaves behind."""

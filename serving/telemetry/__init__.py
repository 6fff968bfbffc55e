"""What the outside may watch: logs and metrics. Knows nothing of how the server does its work."""

"""What stands in the bodies of requests and answers."""

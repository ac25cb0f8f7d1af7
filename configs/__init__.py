"""What a user may set. A leaf: it imports nothing of the project."""

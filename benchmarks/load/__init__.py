"""`leyden bench`: measure a server from a client, or the engine alone."""

"""nn.Modules that take (input, ForwardBatch) and know nothing of requests."""

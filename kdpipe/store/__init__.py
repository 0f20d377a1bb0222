"""What lies on disk: durable writes, locks, artifacts, sealed documents, and the identity of a step."""

"""What runs inside a worker. It is started by name and imported by no other package."""

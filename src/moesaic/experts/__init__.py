"""Expert banks: what runs after a router has chosen."""

"""The pool: leases, and the life of engines."""

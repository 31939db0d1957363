"""The pool: which engines live, and who may use them."""

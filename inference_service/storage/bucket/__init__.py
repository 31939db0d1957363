"""The bucket: its objects, and the models that they make."""

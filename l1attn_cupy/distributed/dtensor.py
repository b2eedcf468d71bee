def register_dtensor(): pass

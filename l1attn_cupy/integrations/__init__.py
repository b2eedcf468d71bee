"""L1 attention inside other libraries; nothing is imported before the module of one is asked for."""

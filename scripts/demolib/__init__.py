"""What `train_symmetric.py` and `train_text.py` share: the transformer, training several seeds at once, the picture."""

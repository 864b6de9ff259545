"""How whet computes a decoder layer and the loss: checked layer functions on packed tokens.

`swap.attach` puts the engine into one model instance and `swap.detach` takes it out; `parity.py` proves
that it computes what the original modules compute. No class and no other library is edited.
"""

"""The same work in whet and in its peers: one harness, each framework in a process of its own.

`python -m benchmarks.peers --help`, or `whet bench`. Nothing here but the adapters (hf.py, trl.py,
unsloth.py, liger.py, whet.py) imports a framework; `worker` runs in the peer's virtual environment.
"""

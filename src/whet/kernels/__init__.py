"""The small computations of the engine, one per file: plain torch, and Triton where there is a GPU.

Pure functions on tensors. Each file holds a plain-torch reference that says what is computed, the
Triton kernels, the function the engine calls (Triton on CUDA, torch on the CPU), and a SPEC that
enrols it in the one test harness, in `python -m benchmarks.kernels` and in docs/kernels.md. Big matrix
products are not here: cuBLAS and oneDNN do them. Imports torch and triton only; nothing but
`whet.engine` calls this package.

Shapes: T packed tokens, D model width, F ffn width, H query heads, G key/value heads, K head width,
R LoRA rank (or half the rotary width, for cos and sin), V vocabulary, N labelled rows.
"""

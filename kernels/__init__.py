"""Triton kernels, one file per operator beside what they share, installed as `kdfast.kernels`.

Never import this folder as `kernels`: that is another library's name (transformers looks for it).
It defines no `__version__` for the same reason. Nothing here is imported by `import kdfast`;
an operator imports its file when it first uses the triton backend.
"""

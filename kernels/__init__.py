"""Triton kernels, one file an operator. Installed as ``hicl_fast.kernels``.

In the root of a checkout ``import kernels`` finds this folder too, and Transformers tries that name, in search of
another package. Under that name this is an empty module: importing it does no harm, and using it is an error.
"""

if not __name__.startswith("hicl_fast."):
    __path__ = []
    del __file__

    def __getattr__(name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(f"{__name__}.{name}: hicl_fast's Triton kernels are imported as hicl_fast.kernels")

"""C++ sources of the CPU kernels: plain C ABI, no torch headers, compiled at first use by `compiler.py`."""

"""C++ sources of the CPU ops."""

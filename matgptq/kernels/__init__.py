"""CUDA kernels: packing, tile choice, compilation by NVRTC, launch."""
